"""`tvq logs`: what the driver and the workers of a run said, whether there is a cluster or not."""

import itertools
import json
import time
from collections.abc import Iterator
from typing import Any

from jobs.console import Console
from jobs.errors import UserError
from jobs.readable import in_one_line
from jobs.runs.run_directory import RunDirectory
from jobs.runs.run_log import LogTail, writers
from pipeline.errors import CorpusError
from pipeline.storage import Location

_LOOK_SECONDS = 1.0
_OWN = ("time", "level", "logger", "pid", "message", "traceback", "event")
"""Fields that a line shows in its own way, or not at all."""


def logs_command(
    root: Location, name: str, who: str | None, *, follow: bool, console: Console, as_json: bool
) -> None:
    """Prints the log of `who` (driver, rank-0, ...), or all of them in the order of time.

    With `follow`, goes on with what is added, until Ctrl-C. JSON is a line for each line.

    Raises:
        UserError: there is no such run, or it has no such log.
    """
    run = RunDirectory.existing(root, name)
    there = writers(run.logs)
    if who is not None and who not in there and not follow:
        raise UserError(
            f"run {run.name}: has no log of {who}; there are {', '.join(there)}"
            if there
            else f"run {run.name}: has no logs yet: they come with its first training"
        )
    logs = _Logs(run, who)
    try:
        for round_ in itertools.count():
            for writer, line in logs.new(patient=follow and round_ > 0):
                console.result(_as_json(writer, line) if as_json else _shown(writer, line))
            if not follow:
                return
            time.sleep(_LOOK_SECONDS)
    except KeyboardInterrupt:
        return


class _Logs:
    """The logs of a run, read on from where they were read to."""

    def __init__(self, run: RunDirectory, who: str | None):
        self._run = run
        self._who = who
        self._tails: dict[str, LogTail] = {}

    def new(self, *, patient: bool) -> Iterator[tuple[str, dict[str, Any]]]:
        """Who wrote what since the last call, by time; `patient` with a store that is not well."""
        found: list[tuple[str, dict[str, Any]]] = []
        try:
            for who in writers(self._run.logs) if self._who is None else [self._who]:
                if who not in self._tails:
                    self._tails[who] = LogTail(self._run.logs, who, from_start=True)
                found += [(who, line) for line in self._tails[who].read()]
        except CorpusError:
            if not patient:
                raise
        return iter(sorted(found, key=lambda pair: pair[1].get("time", "")))


def _as_json(who: str, line: dict[str, Any]) -> str:
    return json.dumps({"who": who} | line)


def _shown(who: str, line: dict[str, Any]) -> str:
    """`2026-11-24T18:43:00Z rank-0 WARNING: message`, and the traceback below."""
    level = line.get("level", "INFO")
    mark = "" if level == "INFO" else f"{level}: "
    fields = " ".join(f"{key}={value}" for key, value in line.items() if key not in _OWN)
    message = in_one_line(str(line.get("message", "")).encode(), 10_000)
    text = f"{line.get('time', '')} {who} {mark}{message} {fields}".rstrip()
    return "\n".join([text, *(f"    {part}" for part in line.get("traceback", "").splitlines())])
