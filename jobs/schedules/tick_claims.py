"""Which ticks a daemon sees to: it claims new ones and takes over those of dead daemons."""

import logging
from collections.abc import Callable
from typing import NamedTuple

from jobs.schedules.schedule import ScheduleFolder, Tick
from pipeline.claims import Claim
from pipeline.errors import CorpusError

log = logging.getLogger("tvq.schedule")


class TickKey(NamedTuple):
    """A tick among those of all schedules."""

    schedule: str
    tick: str


class TickClaims:
    """The claims that this daemon holds.

    Policy: a new tick is claimed by exclusive create of its lease, so that of many daemons one has
    it. A claim is renewed after a quarter of `expire_seconds`; one that was not, or whose process
    is gone, is taken over. A tick older than the schedule's horizon is over, whatever lies there:
    its claim is removed again.
    """

    def __init__(
        self, clock: Callable[[], float], expire_seconds: float, say: Callable[[str], None]
    ):
        """
        Args:
            clock: Unix time in seconds.
            expire_seconds: after which a daemon that does not renew counts as dead.
            say: is given a line about each tick that is taken over.
        """
        self._clock = clock
        self._expire_seconds = expire_seconds
        self._say = say
        self._held: dict[TickKey, Claim] = {}
        self._renewed: dict[TickKey, float] = {}

    @property
    def held(self) -> list[TickKey]:
        """The ticks that this daemon still sees to."""
        return list(self._held)

    def claim(self, folder: ScheduleFolder, tick: Tick) -> bool:
        """Claims a tick that nobody has claimed; whether that succeeded."""
        claim = self._new(folder, tick)
        won = claim.create()
        tick.files.add("lease.json")
        if won and tick.id < folder.horizon():  # it was over, and removed, since we listed it
            folder.forget(tick.id)
            return False
        if won:
            self._hold(folder, tick, claim)
        return won

    def keep_or_take(self, folder: ScheduleFolder, tick: Tick) -> bool:
        """Renews what is ours, if it is time to, or takes it from the dead; whether it is ours."""
        key = TickKey(folder.name, tick.id)
        claim = self._held.get(key)
        now = self._clock()
        if claim is None:
            claim = self._new(folder, tick)
            if claim.take() is not None:
                return False
            if tick.id < folder.horizon():  # it was over: who removed it died at that
                folder.forget(tick.id)
                return False
            self._say(f"{key.schedule} {key.tick}: taken over from a daemon that is gone")
            self._hold(folder, tick, claim)
        elif now - self._renewed[key] > self._expire_seconds / 4:
            if not claim.renew():
                self.drop(key)
                return False
            self._renewed[key] = now
        return True

    def is_held(self, folder: ScheduleFolder, tick: Tick) -> bool:
        """Whether the store says, too, that a tick that we hold is ours."""
        return self._held[TickKey(folder.name, tick.id)].is_held()

    def drop(self, key: TickKey) -> None:
        """A tick that we see to no more, if we did; its claim stays where it is."""
        self._held.pop(key, None)
        self._renewed.pop(key, None)

    def let_go(self) -> None:
        """Others may take over all of ours at once."""
        for claim in self._held.values():
            try:
                claim.let_go()
            except CorpusError as error:
                log.warning("a claim was not let go, it expires: %s", error)
        self._held.clear()
        self._renewed.clear()

    def _new(self, folder: ScheduleFolder, tick: Tick) -> Claim:
        return Claim(folder.tick(tick.id), clock=self._clock, expire_seconds=self._expire_seconds)

    def _hold(self, folder: ScheduleFolder, tick: Tick, claim: Claim) -> None:
        key = TickKey(folder.name, tick.id)
        self._held[key], self._renewed[key] = claim, self._clock()
