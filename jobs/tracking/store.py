"""Where MLflow keeps its data, and how it is loaded.

Importing this package is cheap; MLflow itself (3 to 4 s) is imported by `load`, which everything
else here calls.
"""

import contextlib
import fcntl
import logging
import os
import re
from collections.abc import Iterator
from pathlib import Path
from typing import NamedTuple

from jobs.errors import UserError
from pipeline.storage import Location, is_url

DIGEST_CHARACTERS = 36
"""Of a dataset's digest MLflow takes so many."""


class Store(NamedTuple):
    """Where the tracking data lies."""

    uri: str
    """MLflow tracking URI."""
    artifact_location: str | None = None
    """Of experiments created there; None: the server decides."""


def embedded_store(root: Location) -> Store:
    """The store without a server: a SQLite file and a folder of artifacts under `root`."""
    if is_url(str(root)):
        raise UserError(
            f"tracking.uri: the runs lie in {root}, and MLflow cannot keep its SQLite file in a"
            " bucket; set tracking.uri or MLFLOW_TRACKING_URI to a server, or to"
            " sqlite:////PATH/mlflow.db on this machine"
        )
    root = Path(root).resolve()
    if strange := set("?#%") & set(str(root)):
        raise UserError(
            f"{root}: MLflow cannot keep its SQLite file under a path with {' '.join(strange)};"
            " choose another root, or set tracking.uri"
        )
    return Store(f"sqlite:///{root / 'mlflow.db'}", (root / "mlartifacts").as_uri())


def without_credentials(text: str) -> str:
    """`text` with the user and password of every URL in it blotted out."""
    return re.sub(r"://[^/@\s]+@", "://***@", text)


def load() -> None:
    """Imports MLflow, quiet and without its usage reporting. Safe to call from any thread.

    Environment variables that the user set stand. Records of MLflow's and alembic's loggers go to
    handlers of the root logger only, from WARNING up; never to stdout or stderr by themselves.
    """
    for name, value in (
        ("MLFLOW_DISABLE_TELEMETRY", "true"),
        ("MLFLOW_CONFIGURE_LOGGING", "false"),
        ("MLFLOW_SUPPRESS_PRINTING_URL_TO_STDOUT", "true"),
        ("MLFLOW_ENABLE_ARTIFACTS_PROGRESS_BAR", "false"),
        # The tracker retries by itself, for as long as it takes; a call should soon be over.
        ("MLFLOW_HTTP_REQUEST_MAX_RETRIES", "1"),
        ("MLFLOW_HTTP_REQUEST_TIMEOUT", "30"),
    ):
        os.environ.setdefault(name, value)
    for name in ("mlflow", "alembic"):
        logger = logging.getLogger(name)
        logger.setLevel(logging.WARNING)
        if not logger.handlers:
            logger.addHandler(logging.NullHandler())
    import mlflow.store.tracking.sqlalchemy_store
    import mlflow.tracking  # noqa: F401


@contextlib.contextmanager
def one_process_creates(uri: str) -> Iterator[None]:
    """Two processes that create the tables of one SQLite file at once break each other."""
    if not uri.startswith("sqlite:///"):
        yield
        return
    path = Path(uri.removeprefix("sqlite:///")).with_suffix(".lock")
    path.parent.mkdir(parents=True, exist_ok=True)
    with path.open("w") as file:
        fcntl.flock(file, fcntl.LOCK_EX)
        yield


def reason(error: BaseException) -> str:
    """What an error says, in one short line without credentials."""
    text = str(error).strip()
    # Errors of the database hide the driver's own words, "(sqlite3.OperationalError) ...".
    words = re.search(r"\([\w.]+Error\) .+", text)
    line = words.group() if words else text.partition("\n")[0]
    line = without_credentials(line)[:200]
    return f"{type(error).__name__}: {line}" if line else type(error).__name__
