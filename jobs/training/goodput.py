"""Where the seconds of a training go, over all its worker groups; taken on the host's clock."""

import contextlib
import time
from collections import deque
from collections.abc import Callable, Iterator
from typing import Any, Literal

from jobs.runs.ledger import Ledger

Phase = Literal["compile", "data_wait", "coordination", "evaluation", "checkpoint"]
PHASES = (
    "start", "restart", "compile", "data_wait", "coordination", "step", "evaluation", "checkpoint",
    "lost",
)  # fmt: skip
"""start: of the first group, until it can begin. restart: of later groups, with the gap since the
one before where the same driver started both. compile: the first call of each program, with what
it then computes. data_wait: for the next batch, the devices working on or not. coordination: asking
whether to stop, Ray included. checkpoint: while the loop was held up by one. step: all else. lost:
steps behind the last checkpoint that a later group made again."""

_ACCOUNT_SECONDS = 10.0
"""Between two accounts in the ledger: what a kill leaves untold."""
_SAVES = 8
"""Checkpoints that an account remembers: a resume may find the newest ones damaged."""
_UPDATES = 10_000
"""Updates that percentiles look back at most."""


class Goodput:
    """Divides a worker group's time into phases and adds those of the groups before.

    Policy: it only reads the clock. What lies before `begin_at` is the start; of the rest, what no
    `phase` covers is step time, so that the phases always make up the whole. Rank 0 notes its
    account in the ledger every ten seconds; the next group reads there what was lost.
    """

    def __init__(
        self, ledger: Ledger | None, owner: str, *, clock: Callable[[], float] = time.time
    ):
        """
        Args:
            ledger: of the run; None on all processes but one, which then know only their own time.
            owner: the driver's lease: two groups of one driver are a restart, else it was paused.
            clock: Unix time in seconds.
        """
        self._ledger = ledger
        self._owner = owner
        self._clock = clock
        self._began = self._noted_at = clock()
        self._own = dict.fromkeys(PHASES, 0.0)
        self._earlier = [account for account in ledger.earlier if account] if ledger else []
        self._saves: dict[str, float] = {}
        self._ended: float | None = None
        self._marked: float | None = None
        self._steps: deque[float] = deque(maxlen=_UPDATES)
        self._waits: deque[float] = deque(maxlen=_UPDATES)

    @contextlib.contextmanager
    def phase(self, name: Phase) -> Iterator[None]:
        """What runs inside belongs to that phase; phases do not overlap."""
        begun = self._clock()
        try:
            yield
        finally:
            seconds = self._clock() - begun
            self._own[name] += seconds
            if name == "data_wait":
                self._waits.append(seconds)

    def begin_at(self, update: int) -> None:
        """The group can begin, after `update`: what the one before did behind it is lost."""
        self._own["restart" if self._earlier else "start"] = self._clock() - self._began
        if not self._earlier:
            return
        before = self._earlier[-1]
        self._own["lost"] = before["seconds"]["step"] - before["saves"].get(str(update), 0.0)
        if before["owner"] == self._owner:
            gap = max(0.0, self._began - before["time"])
            self._own["restart"] += gap
            self._began -= gap

    def step_seconds(self) -> float:
        """Of this group so far."""
        others = sum(s for name, s in self._own.items() if name not in ("step", "lost"))
        return max(0.0, (self._ended or self._clock()) - self._began - others)

    def updates_done(self, n_updates: int) -> None:
        """That many updates more were made since the last call; the first call compiled."""
        now = self.step_seconds()
        if self._marked is not None:
            self._steps.extend([(now - self._marked) / n_updates] * n_updates)
        self._marked = now
        if self._ledger and self._clock() - self._noted_at >= _ACCOUNT_SECONDS:
            self._note()

    def saved(self, update: int) -> None:
        """A checkpoint of that update was begun."""
        self._saves[str(update)] = self.step_seconds()
        self._saves = dict(list(self._saves.items())[-_SAVES:])
        self._note()

    def close(self) -> None:
        """The group ends: notes its last account."""
        self._note()
        self._ended = self._noted_at

    def summary(self) -> str:
        """Where the time of the whole training went, in a line."""
        totals = self.totals()
        whole = sum(totals.values())
        shown = sorted(totals.items(), key=lambda item: -item[1])
        each = ", ".join(
            f"{name.replace('_', ' ')} {seconds:.1f} s"
            for name, seconds in shown
            if seconds >= 0.05
        )
        return f"goodput {totals['step'] / max(whole, 1e-9):.0%} of {whole:.1f} s: {each}"

    def totals(self) -> dict[str, float]:
        """Seconds by phase over all groups; lost ones are not counted as steps again."""
        own = self._own | {"step": self.step_seconds()}
        accounts = [account["seconds"] for account in self._earlier] + [own]
        totals = {name: sum((a[name] for a in accounts), 0.0) for name in PHASES}
        totals["step"] -= totals["lost"]
        return totals

    def values(self) -> dict[str, float]:
        """Metrics: totals, and percentiles since the last call."""
        totals = self.totals()
        values = {f"goodput/{name}_seconds": seconds for name, seconds in totals.items()}
        values["goodput/fraction"] = totals["step"] / max(sum(totals.values()), 1e-9)
        if self._steps:
            values["perf/step_seconds_p50"] = _percentile(self._steps, 50)
            values["perf/step_seconds_p95"] = _percentile(self._steps, 95)
        if self._waits:
            values["perf/data_wait_seconds_p95"] = _percentile(self._waits, 95)
        self._steps.clear()
        self._waits.clear()
        return values

    def _note(self) -> None:
        self._noted_at = self._clock()
        if self._ledger:
            account: dict[str, Any] = {
                "owner": self._owner,
                "began": self._began,
                "time": self._noted_at,
                "seconds": self._own | {"step": self.step_seconds()},
                "saves": self._saves,
            }
            self._ledger.account(account)


def _percentile(values: deque[float], percent: int) -> float:
    """The smallest value that so many percent of them do not exceed."""
    ordered = sorted(values)
    return ordered[max(0, -(-len(ordered) * percent // 100) - 1)]
