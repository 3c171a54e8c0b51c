"""The run's own log: JSON lines of each rank and of the driver, kept in the run directory."""

import contextlib
import json
import logging
import os
import time
from pathlib import Path
from typing import Any

_logger = logging.getLogger("tvq")


class _JsonLines(logging.Formatter):
    def format(self, record: logging.LogRecord) -> str:
        fields: dict[str, Any] = {
            "time": time.strftime("%Y-%m-%dT%H:%M:%SZ", time.gmtime(record.created)),
            "level": record.levelname,
            "logger": record.name,
            "pid": os.getpid(),
            "message": record.getMessage(),
        }
        if record.exc_info:
            fields["traceback"] = self.formatException(record.exc_info)
        return json.dumps(fields | getattr(record, "fields", {}))


def open_log(folder: Path, who: str) -> None:
    """From now on everything logged under `tvq` in this process goes to `<folder>/<who>.jsonl`."""
    close_log()
    folder.mkdir(parents=True, exist_ok=True)
    handler = logging.FileHandler(folder / f"{who}.jsonl", encoding="utf-8")
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

    def __init__(self, folder: Path, who: str):
        self._path = folder / f"{who}.jsonl"
        self._offset = self._path.stat().st_size if self._path.exists() else 0

    def read(self) -> list[dict[str, Any]]:
        """The lines that were completed since the last call, as their fields."""
        if not self._path.exists():
            return []
        with self._path.open("rb") as file:
            file.seek(self._offset)
            complete, newline, _ = file.read().rpartition(b"\n")
        self._offset += len(complete) + len(newline)
        return _parsed(complete)


def events(folder: Path, who: str, name: str) -> list[dict[str, Any]]:
    """All events `name` that `who` logged, oldest first."""
    path = folder / f"{who}.jsonl"
    if not path.exists():
        return []
    return [fields for fields in _parsed(path.read_bytes()) if fields.get("event") == name]


def _parsed(text: bytes) -> list[dict[str, Any]]:
    parsed = []
    for line in text.splitlines():
        with contextlib.suppress(ValueError):  # torn where its writer was killed
            parsed.append(json.loads(line))
    return parsed
