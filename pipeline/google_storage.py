"""The connection to Google Cloud Storage, and what its failures mean.

gcsfs retries what may pass (a cut connection, 429, 5xx, a silent server) five times within about
half a minute and its waits, which are bounded here. `STORAGE_EMULATOR_HOST` names another server,
asked without credentials.
"""

import functools
import logging
import os
from typing import TYPE_CHECKING, Any

from pipeline.errors import CorpusError

if TYPE_CHECKING:
    from gcsfs.core import GCSFileSystem

_SILENCE_SECONDS = 30.0
"""A server that sends nothing for so long is asked again."""
_REQUEST_SECONDS = 120.0
"""No request may last longer: one of 8 MiB then moves under 70 kB/s."""


_OTHER_CLIENTS = {
    # Tensorstore, which moves checkpoints' arrays, would wait for a silent server for ever.
    "TENSORSTORE_CURL_LOW_SPEED_TIME_SECONDS": "60",
    "TENSORSTORE_CURL_LOW_SPEED_LIMIT_BYTES": "1",
    "TENSORSTORE_CURL_CONNECT_TIMEOUT_SECONDS": "30",
}


def file_system() -> "GCSFileSystem":
    """This process's connection; raises `CorpusError` if the credentials named are not there.

    From the first call on, the other clients of this process and its children (Orbax's gcsfs and
    tensorstore, which read the environment) ask the same server.
    """
    # A child that was forked must not use its parent's connections.
    return _connect(os.environ.get("STORAGE_EMULATOR_HOST", ""), os.getpid())


@functools.cache
def _connect(emulator: str, process: int) -> "GCSFileSystem":
    others = dict(_OTHER_CLIENTS)
    if emulator:
        others["TENSORSTORE_GCS_HTTP_URL"] = emulator
        # Else gcsfs, where Orbax imports it, asks the emulator for a gRPC service: 60 s a bucket.
        others["GCSFS_EXPERIMENTAL_ZB_HNS_SUPPORT"] = "false"
    for name, value in others.items():
        os.environ.setdefault(name, value)

    import aiohttp

    # Not gcsfs.GCSFileSystem, which asks a bucket's kind by gRPC first: a minute where that port
    # does not answer.
    from gcsfs.core import GCSFileSystem

    # It prints tracebacks of what is raised anyway.
    logging.getLogger("gcsfs").setLevel(logging.CRITICAL)
    return GCSFileSystem(
        token="anon" if emulator else _credentials(),
        use_listings_cache=False,
        skip_instance_cache=True,
        requests_timeout=aiohttp.ClientTimeout(
            total=_REQUEST_SECONDS, sock_connect=_SILENCE_SECONDS, sock_read=_SILENCE_SECONDS
        ),
    )


def _credentials() -> Any:
    """Google's default credentials; without any, public buckets can be read.

    gcsfs itself would pass over credentials that are named and broken. The look for the metadata
    server of Google's machines ends after three times 3 s.
    """
    import google.auth
    import google.auth.exceptions

    try:
        scope = "https://www.googleapis.com/auth/devstorage.read_write"
        credentials, _ = google.auth.default(scopes=[scope])
    except google.auth.exceptions.DefaultCredentialsError as error:
        if file := os.environ.get("GOOGLE_APPLICATION_CREDENTIALS"):
            said = str(error).splitlines()[0]
            raise CorpusError(f"GOOGLE_APPLICATION_CREDENTIALS={file}: {said}") from None
        return "anon"
    return credentials


def failures() -> tuple[type[Exception], ...]:
    """What gcsfs raises when the store does not do as it was asked."""
    import aiohttp
    import requests
    from gcsfs.retry import HttpError, NonRetryableError
    from google.auth.exceptions import GoogleAuthError

    of_libraries = (aiohttp.ClientError, requests.RequestException, GoogleAuthError)
    return (HttpError, NonRetryableError, *of_libraries, OSError, TimeoutError, ValueError)


_LOG_IN = "run `gcloud auth application-default login` or set GOOGLE_APPLICATION_CREDENTIALS"


def status(error: Exception) -> int | None:
    """The HTTP status that gcsfs made an error of."""
    import requests
    from gcsfs.retry import HttpError

    if isinstance(error, HttpError):
        return int(error.code) if error.code else None
    if isinstance(error, requests.exceptions.ProxyError):
        return 502
    return 403 if str(error).startswith("Forbidden") else None


def passing(error: Exception) -> bool:
    """Whether the same request may succeed once the store is well."""
    import aiohttp
    from google.auth.exceptions import TransportError

    code = status(error)
    if code is not None:
        return code in (408, 429) or code >= 500
    return isinstance(error, TimeoutError | aiohttp.ClientError | TransportError)


def may_start_again(error: Exception) -> bool:
    """Whether a whole upload may succeed where gcsfs gave up one request of it.

    The store forgot the upload, does not understand how it goes on, or ceased to listen.
    """
    if isinstance(error, TimeoutError | ValueError | FileNotFoundError):
        return True
    return status(error) in (400, 404, 410)


def reason(error: Exception) -> str:
    """What went wrong and what mends it, in one line."""
    import aiohttp
    from gcsfs.retry import NonRetryableError
    from google.auth.exceptions import GoogleAuthError

    code = status(error)
    said = " ".join(str(error).split())[:200]
    if code == 401 or isinstance(error, GoogleAuthError | NonRetryableError):
        return f"no valid Google credentials; {_LOG_IN}"
    if code == 403:
        if file_system().credentials.credentials is None:
            return f"forbidden without Google credentials; {_LOG_IN}"
        return "forbidden; give the account the role Storage Object User on the bucket"
    if code is not None:
        return f"the store answered {code}; try again when it is well"
    if isinstance(error, TimeoutError):
        return f"the store did not answer within {_SILENCE_SECONDS:g} s; try again when it is well"
    if isinstance(error, aiohttp.ClientError):
        emulator = os.environ.get("STORAGE_EMULATOR_HOST")
        hint = f"STORAGE_EMULATOR_HOST={emulator}" if emulator else "the network"
        return f"the store cannot be reached ({said}); check {hint}"
    return said
