"""A run's folder on disk: what lies where, who claimed it, and who may write to it now.

<root>/<run>/run.json      who this run is; created exclusively, before anything is tracked
             lease.json    which driver may write now
             group.json    which worker group of that driver may commit checkpoints
             recipe.yaml   the resolved recipe
             closed.json   the last update, once MLflow holds everything up to it
             stop          there while the training is asked to save and end
             checkpoints/  metrics/  ledger/  logs/
"""

import contextlib
import errno
import fcntl
import json
import logging
import os
import re
import shutil
import socket
import threading
import time
import uuid
from collections.abc import Callable, Iterator
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from typing import Any

from jobs.errors import ExitCode, UserError
from pipeline.files import replace_durably

FORMAT_VERSION = 1
"""Of the run directory, recipe.yaml included."""
log = logging.getLogger("tvq.run_directory")
_NAME = re.compile(r"[A-Za-z0-9][A-Za-z0-9._-]{0,99}")
_RESERVED = {"models", "mlartifacts", "corpora"}
"""Folders that lie beside the runs under one root."""


@dataclass(frozen=True)
class RunRecord:
    """`run.json`: the identity of a run, written once (the MLflow id follows when there is one)."""

    format_version: int
    name: str
    run_key: str
    """Random; the tag by which MLflow's run is found again."""
    identity: str
    """Hash of the recipe's mathematical fields."""
    fingerprints: dict[str, str]
    """Of each split of the corpus that the run is trained on."""
    created: str
    """UTC, ISO 8601."""
    mlflow_run_id: str | None = None
    tracking_uri: str | None = None
    """Where that run is, without credentials; None: in the SQLite file beside the runs."""


class RunDirectory:
    """The folder of one run."""

    def __init__(self, path: Path):
        self.path = path
        self.recipe = path / "recipe.yaml"
        self.checkpoints = path / "checkpoints"
        self.metrics = path / "metrics"
        self.ledger = path / "ledger"
        self.logs = path / "logs"

    @property
    def name(self) -> str:
        return self.path.name

    @property
    def root(self) -> Path:
        return self.path.parent

    @staticmethod
    def at(root: Path, name: str) -> "RunDirectory":
        """The folder of run `name`, whether it exists or not; refuses names that are not one."""
        if not _NAME.fullmatch(name) or name in _RESERVED:
            raise UserError(
                f"run name {name!r}: expected letters, digits, '.', '_', '-', beginning with a"
                f" letter or digit, and none of {', '.join(sorted(_RESERVED))}; choose another"
                " with --run"
            )
        return RunDirectory(root / name)

    @staticmethod
    def existing(root: Path, name: str) -> "RunDirectory":
        """The folder of run `name` or, where `name` is a path, of the run that lies there.

        Raises:
            UserError: there is no such run; lists those that are.
        """
        path = Path(name)
        run = RunDirectory(path) if (path / "run.json").is_file() else RunDirectory.at(root, name)
        if run.record() is None:
            names = [other.name for other in list_runs(root)]
            known = f"there are {', '.join(names)}" if names else "there are none yet: `tvq train`"
            raise UserError(f"run {name!r}: not found under {root}; {known}")
        return run

    def record(self) -> RunRecord | None:
        """What `run.json` says; None where nobody claimed the folder."""
        path = self.path / "run.json"
        try:
            fields = json.loads(path.read_text(encoding="utf-8"))
            if fields["format_version"] > FORMAT_VERSION:
                raise UserError(
                    f"{path}: format {fields['format_version']} is newer than {FORMAT_VERSION},"
                    " which this tvq reads; upgrade tvq"
                )
            return RunRecord(**fields)
        except (FileNotFoundError, NotADirectoryError):
            return None
        except (ValueError, KeyError, TypeError) as error:
            raise UserError(
                f"{path}: damaged, or not written by tvq ({error!r}); nothing was changed; choose"
                " another name with --run or another folder with --root"
            ) from None

    def claim(self, identity: str, fingerprints: dict[str, str], recipe_yaml: str) -> RunRecord:
        """Makes the folder this run's own, or returns the record of who was first.

        The folder is made under a temporary name and appears whole: whoever dies or comes second
        in between neither blocks the name nor replaces the first one's recipe.

        Raises:
            UserError: the folder holds files but no `run.json`: it is not ours; or it cannot be
                made.
        """
        if record := self.record():
            return record
        record = RunRecord(
            format_version=FORMAT_VERSION,
            name=self.name,
            run_key=uuid.uuid4().hex,
            identity=identity,
            fingerprints=fingerprints,
            created=time.strftime("%Y-%m-%dT%H:%M:%SZ", time.gmtime()),
        )
        draft = RunDirectory(self.root / f".{self.name}.{uuid.uuid4().hex}")
        try:
            for folder in (draft.checkpoints, draft.metrics, draft.ledger, draft.logs):
                folder.mkdir(parents=True)
            write_atomically(draft.recipe, recipe_yaml)
            write_atomically(draft.path / "run.json", _json(asdict(record)))
            # Exclusive: a folder takes the place of nothing, or of an empty folder.
            replace_durably(draft.path, self.path)
        except OSError as error:
            if first := self.record():
                return first
            taken = error.errno in (errno.ENOTEMPTY, errno.EEXIST, errno.ENOTDIR)
            problem = "is there and is not a tvq run" if taken else f"cannot be made ({error})"
            raise UserError(
                f"{self.path}: {problem}; nothing was written there; choose another name with"
                " --run or another folder with --root"
            ) from None
        finally:
            shutil.rmtree(draft.path, ignore_errors=True)
        return record

    def request_stop(self, wanted: bool) -> None:
        """Asks the training to save and end at its next batch, or takes that back."""
        if wanted:
            (self.path / "stop").touch()
        else:
            (self.path / "stop").unlink(missing_ok=True)

    def stop_requested(self) -> bool:
        """Whether the training was asked to stop."""
        return (self.path / "stop").exists()

    def store_tracking(self, tracking_uri: str | None, mlflow_run_id: str) -> None:
        """Notes where MLflow holds this run, for the commands that read it there."""
        record = self.record()
        assert record is not None, "a run is claimed before it is tracked"
        noted = replace(record, mlflow_run_id=mlflow_run_id, tracking_uri=tracking_uri)
        if noted != record:
            write_atomically(self.path / "run.json", _json(asdict(noted)))

    def note_closed(self, update: int) -> None:
        """Notes that the run ended at `update` and that MLflow holds all of it."""
        write_atomically(self.path / "closed.json", _json({"update": update}))

    def closed_at(self) -> int | None:
        """The update at which `note_closed` was last called; None if never."""
        try:
            return json.loads((self.path / "closed.json").read_text(encoding="utf-8"))["update"]
        except FileNotFoundError:
            return None


class LeaseLostError(RuntimeError):
    """Another driver or worker group took the run over: this one must not write any more."""


class Lease:
    """The right to write to a run, held by one driver at a time.

    Policy: the holder renews `lease.json` every `renew_seconds`; a lease that was not renewed for
    `expire_seconds`, or whose process is gone from this host, may be taken over. Before every
    commit the holder (or a worker acting for it) re-reads the file: whoever lost the lease stops.
    """

    def __init__(
        self,
        run: RunDirectory,
        *,
        clock: Callable[[], float] = time.time,
        renew_seconds: float = 5,
        expire_seconds: float = 60,
    ):
        self.owner = uuid.uuid4().hex
        self._path = run.path / "lease.json"
        self._name = run.name
        self._clock = clock
        self._renew_seconds = renew_seconds
        self._expire_seconds = expire_seconds
        self._stop = threading.Event()
        self._thread: threading.Thread | None = None

    @contextlib.contextmanager
    def held(self) -> Iterator["Lease"]:
        """Takes the lease, renews it in the background, and gives it back.

        Raises:
            UserError: somebody else holds it; names owner, host and age.
        """
        self._acquire()
        self._thread = threading.Thread(target=self._renew, name="lease", daemon=True)
        self._thread.start()
        try:
            yield self
        finally:
            self._stop.set()
            self._thread.join()
            with self._lock():
                if (self._read() or {}).get("owner") == self.owner:
                    self._path.unlink()

    def _acquire(self) -> None:
        with self._lock():
            holder = self._read()
            if holder and self._alive(holder):
                age = self._clock() - holder["heartbeat"]
                raise UserError(
                    f"run {self._name}: is being trained by process {holder['pid']} on"
                    f" {holder['host']} (lease {holder['owner'][:8]}, renewed {age:.0f} s ago);"
                    " wait for it, stop it, or choose another name with --run",
                    ExitCode.BUSY,
                )
            self._write()

    def _alive(self, holder: dict[str, Any]) -> bool:
        if self._clock() - holder["heartbeat"] > self._expire_seconds:
            return False
        if holder["host"] != socket.gethostname():
            return True
        return _process_start(holder["pid"]) == holder["process_start"]

    def _renew(self) -> None:
        while not self._stop.wait(self._renew_seconds):
            try:
                with self._lock():
                    if (self._read() or {}).get("owner") != self.owner:
                        return
                    self._write()
            except OSError as error:  # a full disk, a file server that stalls: it may pass
                log.warning("the lease of run %s was not renewed: %s", self._name, error)

    def _read(self) -> dict[str, Any] | None:
        try:
            return json.loads(self._path.read_text(encoding="utf-8"))
        except FileNotFoundError:
            return None

    def _write(self) -> None:
        fields = {
            "owner": self.owner,
            "host": socket.gethostname(),
            "pid": os.getpid(),
            "process_start": _process_start(os.getpid()),
            "heartbeat": self._clock(),
        }
        write_atomically(self._path, _json(fields))

    @contextlib.contextmanager
    def _lock(self) -> Iterator[None]:
        # Two drivers that find the same expired lease: the lock lets one of them see the other's.
        with self._path.with_suffix(".lock").open("w") as file:
            fcntl.flock(file, fcntl.LOCK_EX)
            yield


class Fence:
    """The right of one worker group to commit: its driver holds the lease and it is the newest."""

    def __init__(self, run: RunDirectory, owner: str):
        self._run = run
        self._owner = owner
        self._group = uuid.uuid4().hex

    def raise_over_others(self) -> None:
        """Makes this group the newest; called once by rank 0 when the group starts."""
        self.check(group=False)
        write_atomically(self._run.path / "group.json", _json({"group": self._group}))

    def check(self, *, group: bool = True) -> None:
        """To be called right before a commit.

        Raises:
            LeaseLostError: another driver holds the lease, or a newer group has started.
        """
        if self._read("lease.json").get("owner") != self._owner:
            raise LeaseLostError(f"run {self._run.name}: another driver has taken the run over")
        if group and self._read("group.json").get("group") != self._group:
            raise LeaseLostError(f"run {self._run.name}: a newer worker group has started")

    def _read(self, name: str) -> dict[str, Any]:
        try:
            return json.loads((self._run.path / name).read_text(encoding="utf-8"))
        except FileNotFoundError:
            return {}


def list_runs(root: Path) -> list[RunDirectory]:
    """The runs under `root`, by name."""
    found = sorted(root.glob("*/run.json"))  # also those that are just being claimed: `.name.x`
    return [RunDirectory(path.parent) for path in found if path.parent.name[0] != "."]


def write_atomically(path: Path, text: str) -> None:
    """Replaces `path`: a reader sees the old content or the new one, also after a crash."""
    temporary = path.with_name(f".{path.name}.{uuid.uuid4().hex}")
    with temporary.open("w", encoding="utf-8") as file:
        file.write(text)
        file.flush()
        os.fsync(file.fileno())
    replace_durably(temporary, path)


def _json(fields: dict[str, Any]) -> str:
    return json.dumps(fields, indent=2) + "\n"


def _process_start(pid: int) -> str | None:
    """When the process began, in clock ticks since boot: a recycled pid has another value.

    None for one that is not there, or is dead and only not yet waited for by its parent.
    """
    try:
        state, *rest = Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()
    except (FileNotFoundError, ProcessLookupError):
        return None
    return None if state in "ZX" else rest[18]
