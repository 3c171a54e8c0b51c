"""A run's folder, local or in a bucket: what lies where, and who claimed it.

<root>/<run>/run.json      who this run is; created exclusively, before anything is tracked
             recipe.yaml   the resolved recipe
             lease.json    which driver may write now (jobs/runs/lease.py)
             group.json    which worker group of that driver may commit checkpoints
             closed.json   the last update, once MLflow holds everything up to it
             stop          there while the training is asked to save and end
             checkpoints/  metrics/  ledger/  logs/
             samples/      what the model wrote while it was trained (jobs/training/samples.py)
             evaluations/  what `tvq evaluate` found (jobs/evaluation/record.py)
"""

import contextlib
import json
import re
import threading
import time
import uuid
import weakref
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from typing import Any

from jobs.errors import UserError
from pipeline.errors import CorpusError
from pipeline.patient_store import open_patient_store
from pipeline.storage import LocalStore, Location, Store, is_url, open_store

FORMAT_VERSION = 1
"""Of the run directory, recipe.yaml included."""
_NAME = re.compile(r"[A-Za-z0-9][A-Za-z0-9._-]{0,99}")
_RESERVED = {
    "models",
    "mlartifacts",
    "corpora",
    "flows",
    "launches",
    "schedules",
    "sweeps",
    "ticks",
}
"""Folders that lie beside the runs under one root."""
_STOP_SECONDS = 2.0
"""Between two looks for a stop request in an object store."""


@dataclass(frozen=True)
class Origin:
    """What a run began with that is not random (jobs/checkpoints/init_from.py)."""

    place: str
    """The run's folder or the exported file."""
    run_key: str
    """Of the run that trained them."""
    update: int
    sums: dict[str, int]
    """Of their leaves, as in a checkpoint's manifest."""


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
    recipe: str = ""
    """What `recipe.yaml` was made of: whoever wins the claim has settled the recipe with it."""
    origin: Origin | None = None
    """Of its first parameters, if `training.init_from` names them."""
    mlflow_run_id: str | None = None
    tracking_uri: str | None = None
    """Where that run is, without credentials; None: in the SQLite file beside the runs."""


class RunDirectory:
    """The folder of one run."""

    def __init__(self, location: Location, *, patient: bool = False):
        """`patient`: for a training, whose calls wait for a store that is not well."""
        self.store: Store = (open_patient_store if patient else open_store)(location)
        self.location: str = self.store.location
        """The absolute path or the URL, for messages and for other processes."""
        self.name = self.location.rpartition("/")[2]
        self.metrics: Location = self.store.child("metrics").location
        self.logs: Location = self.store.child("logs").location
        self._stop_watch: _StopWatch | None = None

    @property
    def path(self) -> Path:
        """The folder of a run that lies on this machine."""
        assert isinstance(self.store, LocalStore), f"{self.location} is not on this machine"
        return self.store.root

    @property
    def root(self) -> Location:
        """The folder that the run lies in: a path, or the URL of one in a bucket."""
        return self.location.rpartition("/")[0] if is_url(self.location) else self.path.parent

    @staticmethod
    def at(root: Location, name: str) -> "RunDirectory":
        """The folder of run `name`, whether it exists or not; refuses names that are not one."""
        if not _NAME.fullmatch(name) or name in _RESERVED:
            raise UserError(
                f"run name {name!r}: expected letters, digits, '.', '_', '-', beginning with a"
                f" letter or digit, and none of {', '.join(sorted(_RESERVED))}; choose another"
                " with --run"
            )
        return RunDirectory(open_store(root).child(name).location)

    @staticmethod
    def existing(root: Location, name: str) -> "RunDirectory":
        """The folder of run `name` or, where `name` is a path or a URL, of the run that lies there.

        Raises:
            UserError: there is no such run; lists those that are.
        """
        elsewhere = is_url(name) or Path(name, "run.json").is_file()
        run = RunDirectory(name) if elsewhere else RunDirectory.at(root, name)
        if run.record() is None:
            root = run.root if elsewhere else root
            names = [other.name for other in list_runs(root)]
            known = f"there are {', '.join(names)}" if names else "there are none yet: `tvq train`"
            raise UserError(f"run {name!r}: not found under {root}; {known}")
        return run

    def record(self) -> RunRecord | None:
        """What `run.json` says; None where nobody claimed the folder."""
        where = f"{self.location}/run.json"
        try:
            fields = json.loads(self.store.read("run.json").decode("utf-8"))
            if fields["format_version"] > FORMAT_VERSION:
                raise UserError(
                    f"{where}: format {fields['format_version']} is newer than {FORMAT_VERSION},"
                    " which this tvq reads; upgrade tvq"
                )
            if fields.get("origin"):
                fields["origin"] = Origin(**fields["origin"])
            return RunRecord(**fields)
        except FileNotFoundError:
            return None
        except (ValueError, KeyError, TypeError) as error:
            raise UserError(
                f"{where}: damaged, or not written by tvq ({error!r}); nothing was changed; choose"
                " another name with --run or another folder with --root"
            ) from None

    def claim(
        self,
        identity: str,
        fingerprints: dict[str, str],
        recipe_yaml: str,
        origin: Origin | None = None,
    ) -> RunRecord:
        """Makes the folder this run's own, or returns the record of who was first.

        `run.json` is the claim and holds all of it: whoever dies or comes second in between
        neither blocks the name nor replaces the first one's recipe.

        Raises:
            UserError: the folder holds files but no `run.json`: it is not ours; or it cannot be
                made.
        """
        record = self.record() or self._first_record(identity, fingerprints, recipe_yaml, origin)
        if not self.store.exists("recipe.yaml"):
            self.store.create("recipe.yaml", record.recipe.encode())
        if isinstance(self.store, LocalStore):  # in a bucket there are no folders
            for folder in ("checkpoints", "metrics", "ledger", "logs"):
                (self.path / folder).mkdir(exist_ok=True)
        return record

    def _first_record(
        self,
        identity: str,
        fingerprints: dict[str, str],
        recipe_yaml: str,
        origin: Origin | None,
    ) -> RunRecord:
        record = RunRecord(
            format_version=FORMAT_VERSION,
            name=self.name,
            run_key=uuid.uuid4().hex,
            identity=identity,
            fingerprints=fingerprints,
            created=time.strftime("%Y-%m-%dT%H:%M:%SZ", time.gmtime()),
            recipe=recipe_yaml,
            origin=origin,
        )
        problem = ""
        try:
            if self._is_foreign():
                problem = "is there and is not a tvq run"
            elif self.store.create("run.json", _json(asdict(record))):
                return record
        except CorpusError as error:
            problem = f"cannot be made ({error})"
        if first := self.record():
            return first
        raise UserError(
            f"{self.location}: {problem}; nothing was written there; choose another name with"
            " --run or another folder with --root"
        )

    def _is_foreign(self) -> bool:
        """Whether there are files of somebody else; a claim that was killed leaves its own."""
        if isinstance(self.store, LocalStore) and self.store.root.is_file():
            return True
        return any(not entry.name.startswith("run.json") for entry in self.store.list())

    def recipe_text(self) -> str:
        """The resolved recipe that the run was begun with, YAML.

        Raises:
            UserError: `recipe.yaml` is not what `run.json` says that it was.
        """
        record = self.record()
        begun_with = record.recipe if record else ""
        with contextlib.suppress(FileNotFoundError):
            text = self.store.read("recipe.yaml").decode("utf-8", errors="replace")
            if begun_with and text != begun_with:
                raise UserError(
                    f"{self.location}/recipe.yaml: is not the recipe that the run was begun with;"
                    " remove it, run.json holds the same text; to change a field, state it in the"
                    " command"
                )
            return text
        return begun_with  # claimed this moment, or by who was killed behind it

    def request_stop(self, wanted: bool) -> None:
        """Asks the training to save and end at its next batch, or takes that back."""
        if wanted:
            self.store.write("stop", b"")
        else:
            self.store.remove("stop")

    def stop_requested(self) -> bool:
        """Whether the training was asked to stop.

        Never waits for an object store, which is asked in a thread: the loop calls this at every
        batch.
        """
        if isinstance(self.store, LocalStore):
            return self.store.exists("stop")
        if self._stop_watch is None:
            self._stop_watch = _StopWatch(open_store(self.location))
        return self._stop_watch.requested

    def store_tracking(self, tracking_uri: str | None, mlflow_run_id: str) -> None:
        """Notes where MLflow holds this run, for the commands that read it there."""
        record = self.record()
        assert record is not None, "a run is claimed before it is tracked"
        noted = replace(record, mlflow_run_id=mlflow_run_id, tracking_uri=tracking_uri)
        if noted != record:
            self.store.write("run.json", _json(asdict(noted)))

    def note_closed(self, update: int) -> None:
        """Notes that the run ended at `update` and that MLflow holds all of it."""
        self.store.write("closed.json", _json({"update": update}))

    def closed_at(self) -> int | None:
        """The update at which `note_closed` was last called; None if never."""
        try:
            return json.loads(self.store.read("closed.json"))["update"]
        except (FileNotFoundError, ValueError, KeyError, TypeError):
            return None  # damaged: then it is noted again


def list_runs(root: Location) -> list[RunDirectory]:
    """The runs under `root`, by name."""
    store = open_store(root)
    if isinstance(store, LocalStore):  # without a look at every file of every run
        names = sorted(path.parent.name for path in store.root.glob("*/run.json"))
    else:
        parts = (entry.name.split("/") for entry in store.list())
        names = [part[0] for part in parts if len(part) == 2 and part[1] == "run.json"]
    return [RunDirectory(store.child(name).location) for name in names if name[0] != "."]


class _StopWatch:
    """Looks for a stop request in an object store for as long as somebody asks for it."""

    def __init__(self, store: Store) -> None:
        self.requested = False
        arguments = (weakref.ref(self), store)
        threading.Thread(target=_watch, args=arguments, name="stop", daemon=True).start()


def _watch(asked_for_by: "weakref.ref[_StopWatch]", store: Store) -> None:
    while True:
        requested = None
        with contextlib.suppress(CorpusError):  # the store is not well: it may be later
            requested = store.exists("stop")
        watch = asked_for_by()
        if watch is None:
            return
        if requested is not None:
            watch.requested = requested
        del watch
        time.sleep(_STOP_SECONDS)


def _json(fields: dict[str, Any]) -> bytes:
    return (json.dumps(fields, indent=2) + "\n").encode()
