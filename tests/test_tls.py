"""Certificates are verified: by default, of the object store and of the tracking server."""

import ssl
import threading
from collections.abc import Iterator
from datetime import UTC, datetime, timedelta
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path

import pytest
from cryptography import x509
from cryptography.hazmat.primitives import hashes, serialization
from cryptography.hazmat.primitives.asymmetric import ec
from cryptography.x509.oid import NameOID

from cbtm import storage
from cbtm.errors import StorageError
from cbtm.tracking import TrackingConfig, open_run, replay


class Refuse(BaseHTTPRequestHandler):
    """Answers 403 to everything, and counts who got that far."""

    protocol_version = "HTTP/1.1"  # botocore waits for "100 Continue" before it sends a body

    def _answer(self) -> None:
        self.server.reached += 1  # type: ignore[attr-defined]
        self.rfile.read(int(self.headers.get("Content-Length", 0)))
        self.send_response(403)
        self.send_header("Content-Length", "0")
        self.send_header("Connection", "close")
        self.end_headers()

    do_GET = do_PUT = do_POST = do_HEAD = do_DELETE = _answer

    def log_message(self, *_: object) -> None:
        """Write nothing."""


@pytest.fixture(scope="module")
def certificate(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Certificate for localhost, signed by itself, with its key."""
    key = ec.generate_private_key(ec.SECP256R1())
    name = x509.Name([x509.NameAttribute(NameOID.COMMON_NAME, "localhost")])
    now = datetime.now(UTC)
    made = (
        x509.CertificateBuilder()
        .subject_name(name)
        .issuer_name(name)
        .public_key(key.public_key())
        .serial_number(1)
        .not_valid_before(now - timedelta(days=1))
        .not_valid_after(now + timedelta(days=1))
        .add_extension(x509.SubjectAlternativeName([x509.DNSName("localhost")]), critical=False)
        .add_extension(x509.BasicConstraints(ca=True, path_length=None), critical=True)
        .sign(key, hashes.SHA256())
    )
    path = tmp_path_factory.mktemp("certificate") / "both.pem"
    plain = serialization.NoEncryption()
    encoding, form = serialization.Encoding.PEM, serialization.PrivateFormat.PKCS8
    path.write_bytes(key.private_bytes(encoding, form, plain) + made.public_bytes(encoding))
    return path


@pytest.fixture
def server(certificate: Path) -> Iterator[ThreadingHTTPServer]:
    """A server on this machine that speaks TLS."""
    context = ssl.SSLContext(ssl.PROTOCOL_TLS_SERVER)
    context.load_cert_chain(certificate)
    served = ThreadingHTTPServer(("127.0.0.1", 0), Refuse)
    served.socket = context.wrap_socket(served.socket, server_side=True)
    served.reached = 0  # type: ignore[attr-defined]
    thread = threading.Thread(target=served.serve_forever)
    thread.start()
    yield served
    served.shutdown()
    thread.join()
    served.server_close()


def test_a_store_whose_authority_is_unknown_is_refused_and_the_message_says_how_to_name_it(server, s3_settings):
    s3_settings.setenv("AWS_ENDPOINT_URL", f"https://localhost:{server.server_port}")
    s3_settings.delenv("AWS_CA_BUNDLE", raising=False)
    with pytest.raises(StorageError, match="cannot be verified; set AWS_CA_BUNDLE"):
        storage.check_writable("s3://bucket/run")
    assert server.reached == 0


def test_a_store_whose_authority_is_named_is_spoken_to(server, certificate, s3_settings):
    s3_settings.setenv("AWS_ENDPOINT_URL", f"https://localhost:{server.server_port}")
    s3_settings.setenv("AWS_CA_BUNDLE", str(certificate))
    with pytest.raises(StorageError, match="access denied"):
        storage.check_writable("s3://bucket/run")
    assert server.reached > 0


def test_a_tracking_server_whose_authority_is_unknown_gets_nothing(server, tmp_path, monkeypatch):
    for name in ("REQUESTS_CA_BUNDLE", "CURL_CA_BUNDLE", "MLFLOW_TRACKING_INSECURE_TLS"):
        monkeypatch.delenv(name, raising=False)
    config = TrackingConfig(uri=f"https://localhost:{server.server_port}", close_timeout_s=2)
    journal = tmp_path / "journal.jsonl"
    open_run(config, name="expert", kind="expert", run_key="key", journal=journal).close()
    (problem,) = replay(journal, config).problems
    assert "certificate verify failed" in problem.lower()
    assert server.reached == 0
