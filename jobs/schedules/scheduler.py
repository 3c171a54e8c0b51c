"""What a daemon does about schedules: claims ticks, launches them, sees them to their end.

All that is known lies in the store, so that daemons may die and be many.
"""

import json
import logging
import math
import time
from collections.abc import Callable
from dataclasses import asdict
from datetime import UTC, datetime
from typing import NamedTuple

from jobs.errors import UserError
from jobs.schedules import alerts
from jobs.schedules.launchers import Launcher, State
from jobs.schedules.schedule import (
    Outcome,
    Result,
    Schedule,
    ScheduleFolder,
    Tick,
    as_json,
    list_schedules,
    newest_nominal,
    submission_id,
)
from jobs.schedules.tick_claims import TickClaims, TickKey
from jobs.schedules.ticks import parse_tick, tick_id
from pipeline.errors import CorpusError
from pipeline.storage import Location

log = logging.getLogger("tvq.schedule")

_CLOCKS_APART_SECONDS = 600.0
"""Ticks that were missed by so much more than the misfire window are noted together: by then no
daemon whose clock is less wrong would still run one of them."""
_LOST_RETRIES = 3
"""Of a run that ended without a word, whatever `retries` says: nothing says that it is at fault."""


class _Look(NamedTuple):
    """What one look at a schedule found."""

    folder: ScheduleFolder
    schedule: Schedule
    ticks: list[Tick]


class Scheduler:
    """Sees to the ticks of all schedules under a root.

    Policy: ticks are claimed in their order, each by exclusive create of its lease, so that the
    newest claim tells which tick comes next and of many daemons one runs it. An attempt is noted
    before it is launched under an id made of flow and tick, and an id is launched once: who takes
    a tick over, because the lease expired or its process is gone, finds the attempt and first looks
    whether a job or a run of that id exists. The first result stands. Whatever breaks in one
    schedule is logged and does not touch the others.
    """

    def __init__(
        self,
        root: Location,
        launcher: Launcher,
        *,
        clock: Callable[[], float] = time.time,
        claim_seconds: float = 60.0,
        run_state: Callable[[str, str], State | None] = lambda name, tick: None,
        say: Callable[[str], None] = log.info,
        warn: Callable[[str], None] = log.warning,
    ):
        """
        Args:
            root: folder of the runs, in which `schedules/` lies.
            launcher: what runs a flow.
            clock: Unix time in seconds.
            claim_seconds: after which a daemon that does not renew counts as dead.
            run_state: of the run of a flow at a tick, wherever it was launched.
            say: is given a line about each thing that happens.
            warn: is given a line about each thing that went wrong.
        """
        self._root = root
        self._launcher = launcher
        self._clock = clock
        self._run_state = run_state
        self._say = say
        self._warn = warn
        self._claims = TickClaims(clock, claim_seconds, say)
        self._closed: dict[TickKey, Result] = {}
        """Ticks that nothing is left to do about: their results are read once."""
        self._failed: dict[str, float] = {}
        """When a submission was first seen to have failed."""
        self._deliveries = alerts.Deliveries(clock, warn)
        self._warned: dict[str, str] = {}
        self._served: list[str] = []

    def step(self, only: str | None = None) -> float:
        """One look at all schedules, or at one; returns the Unix time of the next tick.

        Infinite where none is due any more.
        """
        soonest = math.inf
        folders = list_schedules(self._root)
        self._served = [folder.name for folder in folders]
        for folder in folders:
            if only not in (None, folder.name):
                continue
            try:
                soonest = min(soonest, self._see_to_schedule(folder))
                self._warned.pop(folder.name, None)
            # The store is not well; no process can be started.
            except (CorpusError, UserError, OSError) as error:
                self._warn_once(folder.name, str(error))
            except (ValueError, TypeError, KeyError) as error:  # no JSON, or not as we write it
                file = f"a damaged file in {self._root}/ticks/{folder.name}"
                self._warn_once(folder.name, f"{file} ({error!r}); remove it")
        return soonest

    @property
    def open(self) -> list[tuple[str, str]]:
        """Schedule and tick of all that this daemon still sees to."""
        return [(key.schedule, key.tick) for key in self._claims.held]

    @property
    def outcomes(self) -> dict[tuple[str, str], Outcome]:
        """What came of the ticks that this daemon knows of, by schedule and tick."""
        return {(key.schedule, key.tick): found.outcome for key, found in self._closed.items()}

    @property
    def missed(self) -> dict[str, int]:
        """Of each schedule, how many ticks were missed since one was last run to its end.

        Read from what came of the ticks that are kept, so that a daemon which comes back after a
        night, and notes what it slept through in its first look, says so.
        """
        counts = dict.fromkeys(self._served, 0)
        ended: set[str] = set()
        for key, result in sorted(self._closed.items(), reverse=True):
            if key.schedule not in counts or key.schedule in ended:
                continue
            if result.outcome in ("succeeded", "failed"):
                ended.add(key.schedule)
            counts[key.schedule] += result.missed if key.schedule not in ended else 0
        return counts

    def let_go(self) -> None:
        """The daemon ends: others may take over at once. What it launched goes on."""
        self._claims.let_go()

    def _warn_once(self, schedule: str, text: str) -> None:
        if self._warned.get(schedule) != text:
            self._warned[schedule] = text
            self._warn(f"{schedule}: {text}")

    # ---- One schedule ----------------------------------------------------------------------------

    def _see_to_schedule(self, folder: ScheduleFolder) -> float:
        schedule = folder.load()
        if schedule is None:
            return math.inf
        look = _Look(folder, schedule, folder.ticks())
        listed = {tick.id for tick in look.ticks}
        for key in self._claims.held:
            # Over, and removed by another daemon: nobody would ever end it here.
            if key.schedule == folder.name and key.tick not in listed:
                self._claims.drop(key)
        for tick in list(look.ticks):
            if tick.claimed and TickKey(folder.name, tick.id) not in self._closed:
                self._see_to(look, tick)
        for tick in list(look.ticks):
            if tick.by_hand and not tick.claimed:
                self._claim(look, tick)
        if schedule.paused:
            return math.inf
        soonest = self._claim_due(look)
        known = {tick.id for tick in look.ticks}
        for key in [key for key in self._closed if key.schedule == folder.name]:
            if key.tick not in known:
                del self._closed[key]
        return soonest

    def _claim_due(self, look: _Look) -> float:
        """Claims what is due, in order; returns when the next tick is due."""
        now = self._clock()
        begin = parse_tick(look.schedule.since)
        if newest := newest_nominal(look.ticks):
            begin = max(begin, newest)
        known = {tick.id: tick for tick in look.ticks}
        missed: list[datetime] = []
        due = begin
        for due in look.schedule.ticks().after(begin):
            late = now - due.timestamp()
            if late < 0:
                break
            if late > look.schedule.misfire_seconds + _CLOCKS_APART_SECONDS:
                missed.append(due)
                continue
            self._miss(look, missed)
            tick = known.get(tick_id(due)) or Tick(tick_id(due))
            if tick.id not in known:
                look.ticks.append(tick)
            self._claim(look, tick)
        self._miss(look, missed)
        return due.timestamp()

    def _miss(self, look: _Look, missed: list[datetime]) -> None:
        """Notes ticks that are long over, together, at the last of them."""
        if not missed:
            return
        tick = Tick(tick_id(missed[-1]))
        look.ticks.append(tick)
        if self._claims.claim(look.folder, tick):
            detail = f"{len(missed):,} ticks, no daemon saw to them"
            since = tick_id(missed[0])
            self._settle(look, tick, "missed", detail, since=since, missed=len(missed))
        missed.clear()

    def _claim(self, look: _Look, tick: Tick) -> None:
        if self._claims.claim(look.folder, tick):
            self._begin(look, tick)

    # ---- One tick --------------------------------------------------------------------------------

    def _see_to(self, look: _Look, tick: Tick) -> None:
        """Does what is next for a tick, if it is ours or its daemon is dead."""
        key = TickKey(look.folder.name, tick.id)
        result = look.folder.result(tick.id) if tick.settled else None
        if result and (result.alert is None or "alerted.json" in tick.files):
            self._close(key, result)
            return
        if not self._claims.keep_or_take(look.folder, tick):
            return
        if result:
            self._alert(look, tick, result)
        elif tick.attempts:
            self._follow(look, tick)
        else:
            self._begin(look, tick)

    def _begin(self, look: _Look, tick: Tick) -> None:
        """Launches a tick, unless the overlap policy says otherwise."""
        late = 0.0 if tick.by_hand else self._clock() - parse_tick(tick.id).timestamp()
        if "replaced.json" in tick.files:
            self._settle(look, tick, "replaced", "a newer tick took its place")
            return
        if late > look.schedule.misfire_seconds and "waiting.json" not in tick.files:
            detail = f"{late:.0f} s late, {look.schedule.misfire_seconds:.0f} s are allowed"
            self._settle(look, tick, "missed", detail, missed=1)
            return
        others = [
            other
            for other in look.ticks
            if other.id != tick.id
            and (other.id < tick.id or other.attempts)
            and (other.claimed and not other.settled)
            and TickKey(look.folder.name, other.id) not in self._closed
            and look.folder.result(other.id) is None  # it may have ended since it was listed
        ]
        if not others:
            self._launch(look, tick, 1)
        elif look.schedule.overlap == "skip":
            detail = f"tick {others[0].id} was not done"
            self._settle(look, tick, "skipped", detail)
        else:
            self._mark(look, tick, "waiting.json", {"for": others[0].id})
            if look.schedule.overlap == "replace":
                for other in others:
                    self._mark(look, other, "replaced.json", {"by": tick.id})

    def _mark(self, look: _Look, tick: Tick, file: str, fields: dict[str, str]) -> None:
        if file not in tick.files:
            look.folder.tick(tick.id).create(file, as_json(fields))
            tick.files.add(file)

    def _launch(self, look: _Look, tick: Tick, attempt: int) -> None:
        """Notes the attempt, then launches it: who finds the note launches it if nobody did."""
        store, file = look.folder.tick(tick.id), f"attempt-{attempt}.json"
        submission = submission_id(look.schedule.name, tick.id, attempt)
        store.create(file, as_json({"submission_id": submission, "launched": self._clock()}))
        tick.files.add(file)
        self._submit(look.folder, tick, submission)

    def _submit(self, folder: ScheduleFolder, tick: Tick, submission: str) -> None:
        if not self._claims.is_held(folder, tick):
            return
        flow = f"{folder.store.location}/flow.yaml"
        command = ["flow", "run", flow, "--tick", tick.id, "--root", str(self._root)]
        self._launcher.launch(submission, command)
        where = self._launcher.where(submission)
        self._say(f"{folder.name} {tick.id}: launched as {submission}; its output: {where}")

    def _follow(self, look: _Look, tick: Tick) -> None:
        now, attempt = self._clock(), tick.attempts
        submission = submission_id(look.schedule.name, tick.id, attempt)
        state = self._launcher.state(submission)
        if state not in ("running", "succeeded"):
            # Launched by nobody, or only to find that another runs it: a cluster's own cron.
            state = self._run_state(look.schedule.name, tick.id) or state
        replaced = "replaced.json" in tick.files
        passed = look.schedule.deadline_seconds is not None and (
            now - self._launched(look.folder, tick) > look.schedule.deadline_seconds
        )
        if state == "succeeded":
            self._settle(look, tick, "succeeded")
        elif state == "running":
            if replaced or passed:
                self._launcher.stop(submission)
        elif replaced:
            self._settle(look, tick, "replaced", "a newer tick took its place")
        elif passed:
            detail = f"not done within the deadline of {look.schedule.deadline_seconds:.0f} s"
            self._settle(look, tick, "failed", detail)
        elif state is None:
            self._submit(look.folder, tick, submission)
        else:
            self._retry(look, tick, submission, state)

    def _retry(self, look: _Look, tick: Tick, submission: str, state: State) -> None:
        now, attempt, allowed = self._clock(), tick.attempts, look.schedule.retries
        if state == "lost":
            allowed = max(allowed, _LOST_RETRIES)
        if attempt > allowed:
            detail = f"{state}; its output: {self._launcher.where(submission)}"
            self._settle(look, tick, "failed", detail)
            return
        since = self._failed.setdefault(submission, now)
        wait = 0.0 if state == "lost" else look.schedule.backoff_seconds * 2 ** (attempt - 1)
        if now - since >= wait:
            self._say(f"{look.folder.name} {tick.id}: {state}, attempt {attempt + 1}")
            self._launch(look, tick, attempt + 1)

    def _launched(self, folder: ScheduleFolder, tick: Tick) -> float:
        return json.loads(folder.tick(tick.id).read("attempt-1.json"))["launched"]

    # ---- What came of it -------------------------------------------------------------------------

    def _settle(
        self,
        look: _Look,
        tick: Tick,
        outcome: Outcome,
        detail: str = "",
        since: str | None = None,
        missed: int = 0,
    ) -> None:
        alert = None
        if look.schedule.alert and outcome in ("failed", "missed"):
            alert = "failure"
        elif (
            look.schedule.alert
            and outcome == "succeeded"
            and self._before(look, tick) in ("failed", "missed")
        ):
            alert = "recovery"
        result = Result(outcome, self._clock(), tick.attempts, detail, since, missed, alert)
        if not look.folder.tick(tick.id).create("result.json", as_json(asdict(result))):
            return  # another daemon's stands; the next look reads it
        tick.files.add("result.json")
        self._say(f"{look.folder.name} {tick.id}: {outcome}{detail and f' ({detail})'}")
        if alert:
            self._alert(look, tick, result)
        else:
            self._close(TickKey(look.folder.name, tick.id), result)
        look.folder.retire(look.ticks, look.schedule.history)

    def _before(self, look: _Look, tick: Tick) -> Outcome | None:
        """How the last tick ended before this one that was run, or should have been."""
        for other in sorted(look.ticks, key=lambda other: other.id, reverse=True):
            if other.id < tick.id and other.settled:
                key = TickKey(look.folder.name, other.id)
                result = self._closed.get(key) or look.folder.result(other.id)
                if result and result.outcome in ("succeeded", "failed", "missed"):
                    return result.outcome
        return None

    def _alert(self, look: _Look, tick: Tick, result: Result) -> None:
        store, hook = look.folder.tick(tick.id), look.schedule.alert
        event = self._event(look.schedule, tick, result)
        if hook is None or self._deliveries.deliver(hook, event, store):
            tick.files.add("alerted.json")
            self._close(TickKey(look.folder.name, tick.id), result)

    def _event(self, schedule: Schedule, tick: Tick, result: Result) -> dict[str, object]:
        submission = submission_id(schedule.name, tick.id, max(1, result.attempts))
        return {
            "event": result.alert,
            "schedule": schedule.name,
            "tick": tick.id,
            "outcome": result.outcome,
            "attempts": result.attempts,
            "detail": result.detail,
            "output": self._launcher.where(submission) if result.attempts else None,
            "ended": datetime.fromtimestamp(result.ended, UTC).isoformat(),
        }

    def _close(self, key: TickKey, result: Result) -> None:
        self._closed[key] = result
        self._claims.drop(key)
