"""A schedule and its ticks, as they lie in the store that all daemons share.

<root>/schedules/<name>/schedule.json   when, and by what policy
                        flow.yaml       the flow that is run, as it was when it was added
<root>/ticks/<name>/<tick>/lease.json     who saw to it (pipeline/claims.py)
                           request.json   there before it: somebody asked for it by hand
                           attempt-1.json ...  launched, or about to be
                           waiting.json   it came in time and waits for an earlier one
                           replaced.json  a newer tick wants its place
                           result.json    what came of it; the first one stands
                           alerted.json   the alert about it was sent, or given up
                    horizon/<tick>      the oldest tick that is kept
"""

import dataclasses
import json
import re
from collections.abc import Iterable
from dataclasses import dataclass, field
from datetime import datetime
from typing import Any, Literal

from jobs.errors import UserError
from jobs.flows.flow_file import NAME
from jobs.schedules.alerts import Hook
from jobs.schedules.ticks import Cron, is_by_hand, is_tick_id, parse_tick, tick_id
from pipeline.storage import Location, Store, open_store

Overlap = Literal["skip", "queue", "replace"]
Outcome = Literal["succeeded", "failed", "skipped", "missed", "replaced"]

# In full: a daemon that was killed while it wrote a file leaves one of a longer name.
_ATTEMPT = re.compile(r"attempt-\d+\.json")


@dataclass(frozen=True)
class Schedule:
    """When a flow runs, and what happens if it cannot."""

    name: str
    """Of the flow; with a tick it is the submission id."""
    cron: str
    timezone: str
    since: str
    """Tick id: only ticks after this instant are run. When it was added, or last resumed."""
    overlap: Overlap = "skip"
    """What a tick does while an earlier one is not done. skip: it is not run. queue: it waits.
    replace: the earlier one is stopped."""
    misfire_seconds: float = 3600.0
    """A tick that nobody saw to for so long is not run any more, but noted as missed."""
    deadline_seconds: float | None = None
    """A run that takes longer, its retries included, is stopped and has failed."""
    retries: int = 0
    """A run that failed is repeated so often; it goes on where it was."""
    backoff_seconds: float = 60.0
    """Before the first retry; twice as long before each further one."""
    history: int = 100
    """Ticks that are kept with what came of them."""
    alert: Hook | None = None
    """Who is told of a failure and of the first success after it."""
    paused: bool = False
    """No tick is begun; what runs is seen to its end."""

    def ticks(self) -> Cron:
        """The instants."""
        return Cron.parse(self.cron, self.timezone)


@dataclass(frozen=True)
class Result:
    """What came of a tick."""

    outcome: Outcome
    ended: float
    """Unix time."""
    attempts: int = 0
    detail: str = ""
    """One line: why."""
    since: str | None = None
    """Of a missed tick: the first of those, up to it, that were missed with it."""
    missed: int = 0
    """How many ticks that are, itself included; 0 of one that was not missed."""
    alert: Literal["failure", "recovery"] | None = None
    """What is to be told of it."""


@dataclass
class Tick:
    """A tick that somebody has claimed, or asked for."""

    id: str
    files: set[str] = field(default_factory=set)
    """That lie in its folder."""

    @property
    def claimed(self) -> bool:
        """Whether somebody saw to it."""
        return "lease.json" in self.files

    @property
    def by_hand(self) -> bool:
        """Whether somebody asked for it, and not the cron expression."""
        return is_by_hand(self.id)

    @property
    def attempts(self) -> int:
        """How often it was launched, or about to be."""
        return sum(_ATTEMPT.fullmatch(name) is not None for name in self.files)

    @property
    def settled(self) -> bool:
        """Whether it is known what came of it."""
        return "result.json" in self.files


class ScheduleFolder:
    """The files of one schedule."""

    def __init__(self, root: Location, name: str):
        if not NAME.fullmatch(name):
            raise UserError(
                f"schedule name {name!r}: expected letters, digits, '.', '_', '-', beginning with"
                " a letter or digit, at most 63; it is the `name` in the flow's file"
            )
        self.name = name
        self.store: Store = open_store(root).child(f"schedules/{name}")
        # Apart: who lists the schedules is not to list all ticks.
        self._ticks: Store = open_store(root).child(f"ticks/{name}")

    @staticmethod
    def existing(root: Location, name: str) -> "ScheduleFolder":
        """The folder of a schedule that there is.

        Raises:
            UserError: there is none; lists those that are.
        """
        folder = ScheduleFolder(root, name)
        if folder.load() is None:
            names = [other.name for other in list_schedules(root)]
            known = f"there are {', '.join(names)}" if names else "`tvq schedule add` makes one"
            raise UserError(f"schedule {name!r}: not found under {root}; {known}")
        return folder

    def load(self) -> Schedule | None:
        """The schedule; None if there is none (any more)."""
        try:
            fields = json.loads(self.store.read("schedule.json"))
        except FileNotFoundError:
            return None
        try:
            if fields["alert"] is not None:
                fields["alert"] = Hook(**fields["alert"])
            return Schedule(**fields)
        except (TypeError, KeyError) as error:
            raise UserError(
                f"{self.store.location}/schedule.json: damaged, or of a newer tvq ({error}); add"
                " the schedule again with --replace"
            ) from None

    def save(self, schedule: Schedule) -> None:
        """Writes or overwrites the schedule."""
        self.store.write("schedule.json", as_json(dataclasses.asdict(schedule)))

    def create(self, schedule: Schedule) -> bool:
        """Writes it unless there is one; of many who try, one gets True."""
        return self.store.create("schedule.json", as_json(dataclasses.asdict(schedule)))

    def tick(self, id: str) -> Store:
        """The folder of a tick."""
        return self._ticks.child(id)

    def ticks(self) -> list[Tick]:
        """All ticks that there is something of, oldest first."""
        found: dict[str, Tick] = {}
        for entry in self._ticks.list():
            id, _, file = entry.name.partition("/")
            if is_tick_id(id):
                found.setdefault(id, Tick(id)).files.add(file)
        return sorted(found.values(), key=lambda tick: tick.id)

    def result(self, id: str) -> Result | None:
        """What came of a tick; None if that is not known yet."""
        try:
            return Result(**json.loads(self.tick(id).read("result.json")))
        except FileNotFoundError:
            return None

    def horizon(self) -> str:
        """Id of the oldest tick that is kept: an older one is over, whatever lies there."""
        names = (entry.name.partition("/")[2] for entry in self._ticks.list("horizon"))
        return max(filter(is_tick_id, names), default="")

    def forget(self, id: str) -> None:
        """Removes a tick."""
        self._ticks.remove_tree(id)

    def remove(self) -> None:
        """Removes the schedule and all its ticks."""
        self.store.remove("schedule.json")  # first: no daemon begins another tick
        self.store.remove_tree("")
        self._ticks.remove_tree("")

    def request(self, now: datetime) -> str:
        """Asks for a run now; returns the id of its tick."""
        id = tick_id(now, by_hand=True)
        self.tick(id).create("request.json", as_json({"asked": now.timestamp()}))
        return id

    def retire(self, ticks: list[Tick], keep: int) -> None:
        """Removes the oldest of these ticks, as far as they are settled, but for `keep`.

        The horizon first: a daemon that slept since it listed the ticks, and claims one that was
        removed, sees by the horizon that it is over. It only ever rises, whoever writes it.
        """
        ordered = sorted(ticks, key=lambda tick: tick.id)
        # What comes next follows from the newest tick of the expression: it is never removed.
        newest = [tick for tick in ordered if not tick.by_hand][-1:]
        old = []
        for tick in ordered[: max(0, len(ordered) - keep)]:
            if tick in newest or not (tick.settled or tick.id < self.horizon()):
                break
            old.append(tick)
        if not old:
            return
        horizon = ordered[len(old)].id
        self._ticks.create(f"horizon/{horizon}", b"{}\n")
        for entry in self._ticks.list("horizon"):
            if entry.name < f"horizon/{horizon}":
                self._ticks.remove(entry.name)
        for tick in old:
            self.forget(tick.id)
            ticks.remove(tick)


def list_schedules(root: Location) -> list[ScheduleFolder]:
    """The schedules under a root, by name."""
    store = open_store(root)
    parts = (entry.name.split("/") for entry in store.list("schedules"))
    names = [part[1] for part in parts if len(part) == 3 and part[2] == "schedule.json"]
    return [ScheduleFolder(root, name) for name in names]


def submission_id(name: str, tick: str, attempt: int) -> str:
    """The id under which an attempt is submitted: flow and tick, and which retry it is."""
    return f"{name}-{tick}" + (f"-{attempt}" if attempt > 1 else "")


def newest_nominal(ticks: Iterable[Tick]) -> datetime | None:
    """The newest tick of the expression that somebody has claimed."""
    ids = [tick.id for tick in ticks if tick.claimed and not tick.by_hand]
    return parse_tick(max(ids)) if ids else None


def as_json(fields: dict[str, Any]) -> bytes:
    """Fields as a file that people can read."""
    return (json.dumps(fields, indent=2) + "\n").encode()
