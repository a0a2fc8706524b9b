"""The API of Kubeflow Pipelines: the one module that uses kfp's client.

An address is asked for its health first, once and with a limit: kfp's own client asks five times with pauses, and
would hang where nothing answers. Every failure is one sentence that says what to do. Credentials come from the
environment, where they do not show in a list of processes: CBTM_KFP_TOKEN (a bearer token) or CBTM_KFP_COOKIES (of a
browser's session with the dashboard).
"""

import contextlib
import io
import json
import logging
import os
import tempfile
import warnings
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from cbtm.errors import CbtmError, ConfigError

logger = logging.getLogger(__name__)

ENDPOINT_VARIABLE, UI_VARIABLE = "KF_PIPELINES_ENDPOINT", "KF_PIPELINES_UI_ENDPOINT"  # kfp's own
TOKEN_VARIABLE, COOKIES_VARIABLE = "CBTM_KFP_TOKEN", "CBTM_KFP_COOKIES"
_INSTALLATION = "the installation"
_ANSWER_SECONDS = 10.0
_LOG_SECONDS = 60.0
_LOG_PATH = "/apis/v1alpha1/runs/{run_id}/nodes/{node_id}/log"  # in no OpenAPI model; the UI uses it


class KubeflowError(CbtmError):
    """The API cannot be used, or refuses what was asked; the operator of the cluster can mend it."""


class UnreachableError(KubeflowError):
    """Nothing answers at the address; later something may."""


@dataclass(frozen=True)
class Submitted:
    """A run that was created, and the page that shows it; None where the address of the UI is not known."""

    run_id: str
    url: str | None


class Kubeflow:
    """Kubeflow Pipelines at one address.

    Args:
        host: Address of the API, with the path in front of `/apis`; None takes KF_PIPELINES_ENDPOINT, or else the
            cluster of this pod or of the kubeconfig.
        namespace: Namespace of the runs; None where the installation has one for all.
        ca_cert: File of the certificate authority of an address with https; None takes the public ones.

    Raises:
        UnreachableError: If nothing answers.
        KubeflowError: If what answers is not Kubeflow Pipelines, or refuses the credentials.
        ConfigError: If kfp is not installed, or the installation has many users and no namespace is given.
    """

    def __init__(self, host: str | None, *, namespace: str | None = None, ca_cert: Path | None = None) -> None:
        self._host = (host or os.environ.get(ENDPOINT_VARIABLE) or "").rstrip("/")
        self._namespace = namespace
        if self._host and "://" not in self._host:
            raise ConfigError(f"--host {self._host} has no scheme; write it as https://{self._host} or http://…")
        with self._explained(_INSTALLATION):
            self._client = _client(self._host or None, namespace, ca_cert)
            health = self._client.get_kfp_healthz()
        if health.multi_user and not (namespace or self._client.get_user_namespace()):
            raise ConfigError(
                f"{self._printable} has many users, each with a namespace; give yours with --namespace, as the "
                "dashboard shows it"
            )

    @property
    def _printable(self) -> str:
        return self._host or "the cluster of the kubeconfig"

    def submit(
        self,
        pipeline: str,
        parameters: Mapping[str, Any],
        *,
        name: str,
        experiment: str,
        service_account: str | None = None,
    ) -> Submitted:
        """Create a run of a compiled pipeline, and its experiment where there is none of that name."""
        with tempfile.TemporaryDirectory() as folder, self._explained(f"namespace {self._namespace or 'of all'}"):
            path = Path(folder, "pipeline.yaml")
            path.write_text(pipeline, encoding="utf-8")
            with contextlib.redirect_stdout(io.StringIO()):  # it prints links of its own
                made = self._client.create_run_from_pipeline_package(
                    str(path),
                    arguments=dict(parameters),
                    run_name=name,
                    experiment_name=experiment,
                    namespace=self._namespace,
                    service_account=service_account,
                )
        return Submitted(made.run_id, self.url(made.run_id))

    def url(self, run_id: str) -> str | None:
        """Page of the UI that shows a run."""
        ui = (os.environ.get(UI_VARIABLE) or self._host).rstrip("/")
        return f"{ui}/#/runs/details/{run_id}" if ui else None

    def run(self, run_id: str) -> Any:
        """A run, as a `kfp_server_api.V2beta1Run`."""
        with self._explained(f"run {run_id}"):
            return self._client.get_run(run_id)

    def retry(self, run_id: str) -> None:
        """Have the failed tasks of a run done again."""
        with self._explained(f"run {run_id}"):
            self._client._run_api.run_service_retry_run(run_id=run_id)

    def log(self, run_id: str, pod_name: str) -> Iterator[str] | None:
        """Lines of the log of a run's pod; None where the server has none of it, as after the pod is gone."""
        from kfp_server_api import ApiException

        api = self._client._run_api.api_client
        path = {"run_id": run_id, "node_id": pod_name}
        with self._explained(f"log of {pod_name}"):
            try:
                answer = api.call_api(
                    _LOG_PATH,
                    "GET",
                    path_params=path,
                    auth_settings=["Bearer"],
                    _preload_content=False,
                    _return_http_data_only=True,
                    _request_timeout=(_ANSWER_SECONDS, _LOG_SECONDS),
                )
            except ApiException as error:
                if error.status in (401, 403):
                    raise
                return None
            if answer.status != 200:
                return None
        return _lines(answer)

    @contextlib.contextmanager
    def _explained(self, what: str) -> Iterator[None]:
        from kfp_server_api import ApiException
        from urllib3.exceptions import HTTPError

        try:
            yield
        except ApiException as error:
            raise self._explanation(error, what) from None
        except HTTPError as error:
            if "CERTIFICATE_VERIFY_FAILED" in str(error):
                raise KubeflowError(
                    f"the certificate of {self._printable} is not trusted ({_reason(error)}); give the file of the "
                    "authority that signed it with --ca-cert"
                ) from None
            raise UnreachableError(
                f"Kubeflow Pipelines at {self._printable} does not answer ({_reason(error)}); check --host or "
                f"{ENDPOINT_VARIABLE}; from outside of a cluster: kubectl port-forward -n kubeflow "
                "svc/ml-pipeline-ui 8080:80, then --host http://127.0.0.1:8080/pipeline"
            ) from None

    def _explanation(self, error: Any, what: str) -> KubeflowError:
        said = _message(error)
        if error.status == 401:
            return KubeflowError(
                f"{self._printable} refuses the credentials (401 {said}); set {TOKEN_VARIABLE} to a bearer token, or "
                f"{COOKIES_VARIABLE} to the cookies of a session with the dashboard"
            )
        if error.status == 403:
            return KubeflowError(
                f"{self._printable} does not allow this for {what} (403 {said}); check --namespace, and that the "
                "account of the token may use Kubeflow Pipelines there"
            )
        if error.status == 404 and what == _INSTALLATION:
            return KubeflowError(
                f"{self._printable} is not the address of Kubeflow Pipelines (404); it is what stands in front of "
                "/apis, such as https://kubeflow.example.com/pipeline"
            )
        if error.status == 404:
            return KubeflowError(
                f"{self._printable} knows no {what} (404 {said}); check the id, --host and --namespace"
            )
        return KubeflowError(f"{self._printable} refuses {what} ({error.status} {said})")


def _client(host: str | None, namespace: str | None, ca_cert: Path | None) -> Any:
    try:
        import kfp
    except ImportError:
        raise ConfigError(
            'this command needs kfp, which speaks to the cluster: pip install "cbtm[pipelines]"'
        ) from None

    class Client(kfp.Client):  # type: ignore[misc]  # kfp has no types
        def get_kfp_healthz(self, sleep_duration: int = 0) -> Any:
            """Ask once, and for a limited time."""
            ask = self._healthz_api.healthz_service_get_healthz_with_http_info
            health, _, headers = ask(_request_timeout=_ANSWER_SECONDS)
            if "json" not in headers.get("Content-Type", ""):
                raise KubeflowError(
                    f"{host or 'the cluster'} answers with a page, probably one to log in; set {COOKIES_VARIABLE} to "
                    f"the cookies of a session with the dashboard, or {TOKEN_VARIABLE} to a bearer token"
                )
            return health

    # It warns of every attempt, and the last one is reported.
    logging.getLogger("urllib3").setLevel(logging.ERROR)
    with warnings.catch_warnings(), contextlib.redirect_stdout(io.StringIO()):
        warnings.simplefilter("ignore")
        return Client(
            host=host,
            namespace=namespace or "kubeflow",
            existing_token=os.environ.get(TOKEN_VARIABLE) or None,
            cookies=os.environ.get(COOKIES_VARIABLE) or None,
            ssl_ca_cert=str(ca_cert) if ca_cert else None,
        )


def _lines(answer: Any) -> Iterator[str]:
    rest = b""
    for piece in answer.stream(1 << 16):
        *lines, rest = (rest + piece).split(b"\n")
        for line in lines:
            yield line.decode("utf-8", errors="replace")
    if rest:
        yield rest.decode("utf-8", errors="replace")


def _message(error: Any) -> str:
    """What the server says: the message of its JSON, or the start of whatever else it sends."""
    body = error.body.decode(errors="replace") if isinstance(error.body, bytes) else str(error.body or error.reason)
    try:
        found = json.loads(body)
        text = found.get("message") or found.get("error_message") or found.get("error")
    except (ValueError, AttributeError):
        text = body
    return " ".join(str(text).split())[:300]


def _reason(error: Exception) -> str:
    found = getattr(error, "reason", None) or error
    return str(found).rpartition(": ")[2] or type(found).__name__
