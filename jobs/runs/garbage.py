"""`tvq gc`: what is left under a root that no training will ever use."""

import calendar
import contextlib
import re
import time
from collections.abc import Callable
from pathlib import Path
from typing import Literal, NamedTuple

from jobs.checkpoints.manifest import remove, unfinished_updates
from jobs.console import Console
from jobs.errors import UserError
from jobs.runs.lease import Lease, is_held
from jobs.runs.run_directory import RunDirectory, list_runs
from pipeline.storage import Entry, LocalStore, Location, open_store

_TEMPORARY = re.compile(r"\.[0-9a-f]{32}\.tmp")
"""How the name of a file ends that was being written (pipeline/files.py)."""
_MANIFEST = re.compile(r"checkpoints/\d{8,}/manifest\.json")

Kind = Literal["run without a checkpoint", "unfinished checkpoint", "temporary file"]


class Garbage(NamedTuple):
    """Something to remove."""

    kind: Kind
    run: str | None
    """Whose it is; None: no run's."""
    name: str
    """Of the file or folder, in the root."""
    bytes: int
    age: float | None
    """Seconds since it was written or, of a run, begun; None: the store does not say."""


def find_garbage(
    root: Location, older_than: float, now: float, *, left_alone: Callable[[str], None]
) -> list[Garbage]:
    """What there is, by name; nothing is changed.

    Of runs that nobody holds: those begun more than `older_than` seconds ago that never had a
    checkpoint, and of the others the checkpoints that were never finished. On this machine's disk,
    files that a killed writer left, if they are as old. A damaged checkpoint is no garbage.

    Args:
        left_alone: is told of each run whose checkpoints this tvq cannot judge, and why.
    """
    found: list[Garbage] = []
    store = open_store(root)
    entries = list(store.list())
    held, orphans = set[str](), set[str]()
    for run in list_runs(root):
        inside = [entry for entry in entries if entry.name.startswith(f"{run.name}/")]
        if is_held(run):
            held.add(run.name)
            continue
        age = _age_of(run, now)
        if not _has_checkpoint(inside, run.name) and age is not None and age > older_than:
            orphans.add(run.name)
            found.append(_garbage("run without a checkpoint", run.name, run.name, inside, age))
            continue
        try:
            unfinished = unfinished_updates(run)
        except UserError as error:  # a newer tvq's: no reason to keep what others left
            held.add(run.name)
            left_alone(f"run {run.name} is left as it is: {error}")
            continue
        for update in unfinished:
            name = f"{run.name}/checkpoints/{update:08d}"
            parts = [entry for entry in inside if entry.name.startswith(f"{name}/")]
            if not any(_MANIFEST.fullmatch(e.name.partition("/")[2]) for e in parts):
                age = _age(store, parts, now)
                found.append(_garbage("unfinished checkpoint", run.name, name, parts, age))
    for entry in entries if isinstance(store, LocalStore) else []:
        run = entry.name.partition("/")[0]
        age = _age(store, [entry], now)
        if _TEMPORARY.search(entry.name) and run not in held | orphans and (age or 0) > older_than:
            found.append(_garbage("temporary file", None, entry.name, [entry], age))
    return sorted(found, key=lambda garbage: garbage.name)


def remove_garbage(root: Location, found: list[Garbage]) -> None:
    """Removes it, each run's under its lease; what a training took up meanwhile stays."""
    store = open_store(root)
    for garbage in found:
        if garbage.run is None:
            store.remove(garbage.name)
            continue
        run = RunDirectory.at(root, garbage.run)
        with contextlib.suppress(UserError), Lease(run).held():
            if garbage.kind == "unfinished checkpoint":
                update = int(garbage.name.rpartition("/")[2])
                if update in unfinished_updates(run):
                    remove(run, update)
            elif not _has_checkpoint(list(run.store.list()), None):
                # The claim last: without it, what is left would look like somebody else's.
                for entry in [*run.store.list()]:
                    if entry.name not in ("run.json", "lease.json"):
                        run.store.remove(entry.name)
                run.store.remove("run.json")
        if isinstance(run.store, LocalStore):
            _remove_empty_folders(run.store.root)


def gc_command(
    root: Location, *, older_than_hours: float, yes: bool, console: Console, as_json: bool
) -> None:
    """Lists what may go, with sizes; removes it only with `yes`."""
    found = find_garbage(root, older_than_hours * 3600, time.time(), left_alone=console.warning)
    if yes:
        remove_garbage(root, found)
    total = sum(garbage.bytes for garbage in found)
    if as_json:
        garbage = [each._asdict() for each in found]
        console.json({"garbage": garbage, "bytes": total, "removed": yes})
        return
    if not found:
        console.result(f"nothing to remove under {open_store(root).location}")
        return
    console.table(
        ["what", "where", "size", "age"],
        [[each.kind, each.name, f"{each.bytes / 1e6:,.1f} MB", _hours(each.age)] for each in found],
    )
    console.result(
        f"{total / 1e6:,.1f} MB {'removed' if yes else 'in all; add --yes to remove it'}"
    )


def _garbage(
    kind: Kind, run: str | None, name: str, entries: list[Entry], age: float | None
) -> Garbage:
    return Garbage(kind, run, name, sum(entry.size for entry in entries), age)


def _has_checkpoint(entries: list[Entry], run: str | None) -> bool:
    """Whether there is a manifest, sound or not, among the files of a run, or of a root's run."""
    begin = f"{run}/" if run else ""
    return any(_MANIFEST.fullmatch(entry.name.removeprefix(begin)) for entry in entries)


def _age_of(run: RunDirectory, now: float) -> float | None:
    """Of the run; None where its claim does not say."""
    with contextlib.suppress(UserError, ValueError):
        if record := run.record():
            return now - calendar.timegm(time.strptime(record.created, "%Y-%m-%dT%H:%M:%SZ"))
    return None


def _age(store: object, entries: list[Entry], now: float) -> float | None:
    """Of the youngest; None in an object store, whose versions are no times."""
    if not isinstance(store, LocalStore) or not entries:
        return None
    return now - max(int(entry.version) for entry in entries) / 1e9


def _remove_empty_folders(top: Path) -> None:
    folders = [path for path in top.rglob("*") if path.is_dir()]
    for folder in [*sorted(folders, reverse=True), top]:
        with contextlib.suppress(OSError):  # not empty, or gone
            folder.rmdir()


def _hours(age: float | None) -> str:
    return "" if age is None else f"{age / 3600:,.1f} h"
