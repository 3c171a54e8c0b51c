"""The run's own log: JSON lines of each rank and of the driver, kept in the run directory."""

import contextlib
import json
import logging
import os
import shutil
import tempfile
import threading
import time
from pathlib import Path
from typing import Any

from pipeline.errors import CorpusError
from pipeline.storage import LocalStore, Location, Store, open_store

_UPLOAD_SECONDS = 5.0
"""A log in an object store lags behind by at most so much, while the store is well."""
_logger = logging.getLogger("tvq")


class _JsonLines(logging.Formatter):
    def format(self, record: logging.LogRecord) -> str:
        fields: dict[str, Any] = {
            "time": f"{time.strftime('%Y-%m-%dT%H:%M:%S', time.gmtime(record.created))}"
            f".{int(record.msecs):03d}Z",
            "level": record.levelname,
            "logger": record.name,
            "pid": os.getpid(),
            "message": record.getMessage(),
        }
        if record.exc_info:
            fields["traceback"] = self.formatException(record.exc_info)
        return json.dumps(fields | getattr(record, "fields", {}))


class _UploadedFile(logging.FileHandler):
    """A log on this machine's disk that is copied to an object store, which cannot append.

    Logging never waits for the store, and never fails because of it: a thread copies what is new.
    """

    def __init__(self, store: Store, name: str) -> None:
        self._store, self._object = store, name  # `_name` is logging's
        self._folder = Path(tempfile.mkdtemp(prefix="tvq-log-"))
        path = self._folder / name
        with contextlib.suppress(FileNotFoundError, CorpusError):
            path.write_bytes(store.read(name))  # an earlier start's
        super().__init__(path, encoding="utf-8")
        self._uploaded = path.stat().st_size
        self._closing = threading.Event()
        self._thread = threading.Thread(target=self._upload_all, name="log", daemon=True)
        self._thread.start()

    def _upload_all(self) -> None:
        last_round = False
        while not last_round:
            last_round = self._closing.wait(_UPLOAD_SECONDS)
            with contextlib.suppress(CorpusError):
                data = Path(self.baseFilename).read_bytes()
                if len(data) > self._uploaded:
                    self._store.write(self._object, data)
                    self._uploaded = len(data)

    def close(self) -> None:
        super().close()
        self._closing.set()
        self._thread.join()
        shutil.rmtree(self._folder, ignore_errors=True)


def open_log(folder: Location, who: str) -> None:
    """From now on everything logged under `tvq` in this process goes to `<folder>/<who>.jsonl`."""
    close_log()
    store, name = open_store(folder), f"{who}.jsonl"
    if isinstance(store, LocalStore):
        store.root.mkdir(parents=True, exist_ok=True)
        handler = logging.FileHandler(store.path(name), encoding="utf-8")
    else:
        handler = _UploadedFile(store, name)
    handler.setFormatter(_JsonLines())
    _logger.addHandler(handler)
    _logger.setLevel(logging.INFO)
    _logger.propagate = False  # libraries give the root logger handlers that print


def close_log() -> None:
    """Ends what `open_log` began."""
    for handler in list(_logger.handlers):
        if isinstance(handler.formatter, _JsonLines):
            _logger.removeHandler(handler)
            handler.close()


def event(name: str, **fields: Any) -> None:
    """Logs something that other code or a person looks for, as `event` with its fields."""
    _logger.info(name, extra={"fields": {"event": name, **fields}})


class LogTail:
    """What another process adds to a log from now on."""

    def __init__(self, folder: Location, who: str, *, from_start: bool = False):
        """`from_start`: and what is in it already."""
        self._store, self._name = open_store(folder), f"{who}.jsonl"
        self._offset = 0 if from_start else self._size()

    def read(self) -> list[dict[str, Any]]:
        """The lines that were completed since the last call, as their fields.

        Raises:
            CorpusError: the store does not answer; the lines come with a later call.
        """
        if self._size() <= self._offset:
            return []
        with self._store.open(self._name) as file:
            file.seek(self._offset)
            complete, newline, _ = file.read().rpartition(b"\n")
        self._offset += len(complete) + len(newline)
        return _parsed(complete)

    def _size(self) -> int:
        try:
            return self._store.size(self._name)
        except FileNotFoundError:
            return 0


def writers(folder: Location) -> list[str]:
    """Who has a log there: `driver` first, then the ranks in order."""
    names = (entry.name for entry in open_store(folder).list())
    found = [name.removesuffix(".jsonl") for name in names if name.endswith(".jsonl")]
    return sorted(found, key=lambda who: (who != "driver", len(who), who))


def events(folder: Location, who: str, name: str) -> list[dict[str, Any]]:
    """All events `name` that `who` logged, oldest first."""
    try:
        text = open_store(folder).read(f"{who}.jsonl")
    except FileNotFoundError:
        return []
    return [fields for fields in _parsed(text) if fields.get("event") == name]


def _parsed(text: bytes) -> list[dict[str, Any]]:
    parsed = []
    for line in text.splitlines():
        with contextlib.suppress(ValueError):  # torn where its writer was killed
            parsed.append(json.loads(line))
    return parsed
