"""A training whose processes a test kills, and what its log says of them."""

import contextlib
import os
import signal
import subprocess
import sys
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any, TextIO

from jobs.checkpoints.manifest import newest_update
from jobs.runs.run_directory import RunDirectory
from jobs.runs.run_log import LogTail

TVQ = [sys.executable, "-c", "from jobs.cli.main import main; main()"]
ROOT = Path(__file__).parents[2]
LIMIT_SECONDS = 600
"""Nothing that is waited for may take longer: a hang fails the test and says where."""


class Training:
    """`tvq train` on two workers, started again whenever its driver was killed."""

    def __init__(self, folder: Path, name: str, *overrides: str):
        self.run = RunDirectory(folder / "runs" / name)
        self.events: list[dict[str, Any]] = []
        """What both ranks logged, in the order in which it was seen."""
        self._folder = folder
        self._output: TextIO = (folder / f"{name}.out").open("w")
        corpus = f"data.corpus={folder / 'corpus'}"
        self._command = [*TVQ, "train", "./micro.yaml", corpus, "--run", name, *overrides]
        self._tails = [LogTail(self.run.logs, f"rank-{rank}") for rank in (0, 1)]
        self.driver = self._started()

    def _started(self) -> subprocess.Popen[bytes]:
        return subprocess.Popen(
            self._command,
            cwd=self._folder,
            stdout=self._output,
            stderr=subprocess.STDOUT,
            env={
                **os.environ,
                "PYTHONPATH": str(ROOT),
                "JAX_PLATFORMS": "cpu",
                "XLA_FLAGS": "--xla_backend_optimization_level=0",
            },
        )

    # ---- What goes on ----------------------------------------------------------------------------

    def look(self) -> None:
        """Takes in what was logged since."""
        for rank, tail in enumerate(self._tails):
            self.events += [line | {"rank": rank} for line in tail.read() if "event" in line]

    def newest(self, event: str, rank: int = 0) -> int:
        """The index of the newest event of that name; -1 if there is none."""
        found = (
            index
            for index in reversed(range(len(self.events)))
            if self.events[index]["event"] == event and self.events[index]["rank"] == rank
        )
        return next(found, -1)

    def pid(self, rank: int) -> int:
        """Of that rank in the newest group."""
        return self.events[self.newest("group start", rank)]["pid"]

    def wait(self, what: str, condition: Callable[[], Any], *, over: bool = False) -> None:
        """Looks at the log until it holds; the driver must not end before, unless `over`."""
        deadline = time.monotonic() + LIMIT_SECONDS
        while True:
            self.look()
            if condition():
                return
            code = self.driver.poll()
            assert over or code is None, f"the driver ended with {code} before {what}"
            assert time.monotonic() < deadline, f"waited {LIMIT_SECONDS} s in vain for {what}"
            time.sleep(0.004)

    def at_work(self, since: int) -> None:
        """Waits until a group that began behind event `since` has stored a checkpoint."""
        for rank in (0, 1):
            self.wait(f"rank {rank} at work", lambda r=rank: self.newest("state ready", r) > since)
        stored = newest_update(self.run)
        self.wait("a new checkpoint", lambda: newest_update(self.run) > stored)

    # ---- Kills -----------------------------------------------------------------------------------

    def kill(self, kind: str) -> bool:
        """Kills in that phase of a group at work; whether the phase was really met."""
        return {
            "worker 0": lambda: self._kill(0),
            "other worker": lambda: self._kill(1),
            "driver": self._kill_driver,
            "stopped worker": lambda: self._kill(1, signal.SIGSTOP),
            "saving": self._kill_saving,
            "restoring": self._kill_restoring,
            "evaluating": self._kill_evaluating,
        }[kind]()

    def _kill(self, rank: int, how: signal.Signals = signal.SIGKILL) -> bool:
        os.kill(self.pid(rank), how)
        return True

    def _kill_driver(self) -> bool:
        workers = [self.pid(rank) for rank in (0, 1)]
        self.driver.kill()
        self.driver.wait()
        self.wait("the end of its workers", lambda: not any(map(_is_alive, workers)), over=True)
        self.driver = self._started()
        return True

    def _kill_saving(self) -> bool:
        stale, met = self._unfinished(), set[tuple[int, int]]()

        def begun() -> bool:
            met.update(self._unfinished() - stale)
            return bool(met)

        self.wait("a save", begun)
        self._kill(0)
        time.sleep(0.2)
        return not {update for update, _ in met} & self._complete()

    def _complete(self) -> set[int]:
        """The updates whose checkpoints have a manifest."""
        manifests = (self.run.path / "checkpoints").glob("*/manifest.json")
        return {int(path.parent.name) for path in manifests}

    def _unfinished(self) -> set[tuple[int, int]]:
        """Newer folders without one, and when they last changed; older ones are being removed."""
        complete, found = self._complete(), set[tuple[int, int]]()
        for path in (self.run.path / "checkpoints").iterdir():
            if int(path.name) > max(complete, default=0):
                with contextlib.suppress(FileNotFoundError):
                    found.add((int(path.name), path.stat().st_ctime_ns))
        return found

    def _kill_restoring(self) -> bool:
        before = len(self.events)
        self._kill(1)
        self.wait("a restore", lambda: self.newest("restore start") >= before)
        victim = self.pid(0)
        self._kill(0)
        time.sleep(0.2)
        self.look()
        return not any(
            event["event"] == "state ready" and event["pid"] == victim for event in self.events
        )

    def _kill_evaluating(self) -> bool:
        before = len(self.events)
        self.wait("an evaluation", lambda: self.newest("evaluation start") >= before)
        begun = self.events[self.newest("evaluation start")]
        self._kill(0)
        time.sleep(0.2)
        self.look()
        return not any(
            event["event"] == "evaluation end" and event["pid"] == begun["pid"]
            and event["update"] == begun["update"]
            for event in self.events
        )  # fmt: skip

    # ---- Its end ---------------------------------------------------------------------------------

    def finished(self) -> None:
        """Waits for the driver's good end."""
        try:
            assert self.driver.wait(LIMIT_SECONDS) == 0, self.output()
        finally:
            self.close()

    def stopped(self, code: int) -> int:
        """Sends SIGTERM and waits for the driver; the update that it saved."""
        self.driver.send_signal(signal.SIGTERM)
        assert self.driver.wait(LIMIT_SECONDS) == code, self.output()
        self.close()
        return newest_update(self.run)

    def close(self) -> None:
        self.driver.kill()
        self.driver.wait()
        self._output.close()

    def output(self) -> str:
        return Path(self._output.name).read_text()[-3000:]


def _is_alive(pid: int) -> bool:
    try:
        return Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()[0] not in "ZX"
    except OSError:
        return False
