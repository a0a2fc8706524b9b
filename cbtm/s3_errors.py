"""Errors of requests to S3: which may pass by themselves, and what to tell people of the others."""

from cbtm.errors import StorageError

_TRANSIENT_STATUS = {429, 500, 502, 503, 504}
TRANSIENT_CODES = {
    *("InternalError", "ServiceUnavailable", "RequestTimeout", "SlowDown", "Throttling", "ThrottlingException"),
    *("TooManyRequests", "RequestLimitExceeded", "BandwidthLimitExceeded", "OperationAborted"),
}
REMEDIES = {
    "NoSuchBucket": "the bucket is not there; create it or correct the URI",
    "NoSuchKey": "the object is not there",
    "404": "the object is not there",
    "PreconditionFailed": "the object was changed while it was read; run again when nothing writes to it",
    "AccessDenied": "access denied; the credentials need read, write, list and delete on this bucket",
    "403": "access denied; check AWS_ACCESS_KEY_ID, AWS_SECRET_ACCESS_KEY and the bucket's policy",
    "InvalidAccessKeyId": "the access key is unknown to the store; check AWS_ACCESS_KEY_ID",
    "SignatureDoesNotMatch": "the secret is wrong; check AWS_SECRET_ACCESS_KEY",
}


def unwrapped(error: Exception) -> Exception:
    """What s3transfer wrapped into an error of its own."""
    wrapped = getattr(error, "last_exception", None)
    if type(error).__name__ == "S3UploadFailedError":
        wrapped = error.__context__
    return wrapped if isinstance(wrapped, Exception) else error


def code_of(error: BaseException) -> str:
    """S3's name of the error, "" where the store has not answered."""
    response = getattr(error, "response", None)
    return str(response.get("Error", {}).get("Code", "")) if isinstance(response, dict) else ""


def is_local(error: Exception) -> bool:
    """Tell whether a file of this machine failed; botocore's errors carry no number of the operating system."""
    of_a_socket = isinstance(error, ConnectionError | TimeoutError)
    return isinstance(error, OSError) and error.errno is not None and not of_a_socket


def is_transient(error: Exception) -> bool:
    """Tell whether the same request may succeed later, with nothing done about it."""
    from botocore import exceptions

    if isinstance(error, exceptions.ClientError):
        status = error.response.get("ResponseMetadata", {}).get("HTTPStatusCode")
        return status in _TRANSIENT_STATUS or code_of(error) in TRANSIENT_CODES
    if isinstance(error, exceptions.SSLError):
        return not any(lasting in str(error) for lasting in ("CERTIFICATE_VERIFY_FAILED", "WRONG_VERSION_NUMBER"))
    passing = (exceptions.ConnectionError, exceptions.HTTPClientError, exceptions.IncompleteReadError)
    return isinstance(error, (*passing, ConnectionError, TimeoutError))


def explain(error: Exception, uri: str) -> StorageError:
    """Translate an error of botocore into what happened and what to do."""
    name, code = type(error).__name__, code_of(error)
    if code in REMEDIES:
        return StorageError(f"{uri}: {REMEDIES[code]} ({code})")
    if "CERTIFICATE_VERIFY_FAILED" in str(error):
        return StorageError(
            f"{uri}: the certificate of the object store cannot be verified; set AWS_CA_BUNDLE to the file of the "
            f"authority that signed it ({error})"
        )
    if "Invalid endpoint" in str(error):
        return StorageError(f"{uri}: {error}; AWS_ENDPOINT_URL is to be a URL such as http://host:9000")
    if name in {"NoCredentialsError", "PartialCredentialsError"}:
        return StorageError(f"{uri}: no credentials found; set AWS_ACCESS_KEY_ID and AWS_SECRET_ACCESS_KEY")
    if name in {"EndpointConnectionError", "ConnectTimeoutError", "ReadTimeoutError", "ConnectionClosedError"}:
        return StorageError(f"{uri}: the object store does not answer; check AWS_ENDPOINT_URL ({error})")
    return StorageError(f"{uri}: {error}")
