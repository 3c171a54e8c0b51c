"""A daemon in a process of its own, with a clock of its own, that races another one.

Its launcher appends the submission id to a file and is done: the lines are what was run.
"""

import os
import random
import sys
import time
from collections.abc import Sequence
from pathlib import Path

from jobs.schedules.launchers import State
from jobs.schedules.scheduler import Scheduler


class Lines:
    """Every launch is a line in a file that all daemons append to."""

    def __init__(self, path: Path):
        self._path = path

    def launch(self, submission_id: str, command: Sequence[str]) -> None:
        descriptor = os.open(self._path, os.O_WRONLY | os.O_APPEND | os.O_CREAT)
        os.write(descriptor, f"{submission_id}\n".encode())
        os.close(descriptor)

    def state(self, submission_id: str) -> State | None:
        ran = self._path.read_text().splitlines() if self._path.exists() else []
        return "succeeded" if submission_id in ran else None

    def stop(self, submission_id: str) -> None:
        raise AssertionError("nothing is stopped here")

    def where(self, submission_id: str) -> str:
        return str(self._path)


def main(root: str, lines: str, begin: float, end: float, seed: int) -> None:
    jitter = random.Random(seed)
    now = begin
    # Nobody dies here, and the two clocks are far apart: no claim expires.
    scheduler = Scheduler(root, Lines(Path(lines)), clock=lambda: now, claim_seconds=1e9)
    while now < end or scheduler.open:
        scheduler.step()
        if now < end:
            now += jitter.choice((1, 20, 60, 60, 120))
        else:
            time.sleep(0.01)  # the clock stands, so that no further tick falls due
    print(len(scheduler.outcomes))


if __name__ == "__main__":
    root, lines, begin, end, seed = sys.argv[1:]
    main(root, lines, float(begin), float(end), int(seed))
