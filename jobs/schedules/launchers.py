"""Where a tick's flow is run: the protocol, and processes of this machine.

A launch of a local one lies in `<folder>/<submission id>/`:
  command.json   what is to run
  started.json   created exclusively by the one supervisor that runs it
  lock           held as long as that supervisor lives
  stop           there once it is asked to stop
  exit.json      the exit code
  output.log     what it printed
"""

import contextlib
import fcntl
import json
import os
import signal
import subprocess
import sys
import time
from collections.abc import Sequence
from pathlib import Path
from typing import Literal, Protocol

from pipeline.files import write_json
from pipeline.storage import LocalStore

State = Literal["running", "succeeded", "failed", "lost"]
"""lost: it was started and is gone without a word (its machine was switched off, or it was
killed)."""

TVQ = (sys.executable, "-P", "-c", "from jobs.cli.main import main; main()")
"""Runs this tvq, whatever lies in the working folder."""

_GRACE_SECONDS = 120.0
"""A training that is asked to stop saves first."""
_POLL_SECONDS = 0.2
_START_SECONDS = 20.0


class Launcher(Protocol):
    """Runs commands under submission ids. Policy: one id is started once, whoever asks."""

    def launch(self, submission_id: str, command: Sequence[str]) -> None:
        """Starts a command of `tvq` (its arguments), unless that id was started before."""
        ...

    def state(self, submission_id: str) -> State | None:
        """How it stands with that id; None if it was never started."""
        ...

    def stop(self, submission_id: str) -> None:
        """Asks it to save and stop; it is killed if it does not."""
        ...

    def where(self, submission_id: str) -> str:
        """Where its output is, for people."""
        ...


class LocalLauncher:
    """Processes of this machine that live on when their daemon ends.

    Policy: a launch is a folder, and a supervisor of its own (`supervise`) that alone creates
    `started.json`, so that a second launch of the same id, by whomever and whenever, starts
    nothing. A lock and not a process id tells whether it lives.
    """

    def __init__(self, folder: Path):
        self._folder = folder.absolute()

    def launch(self, submission_id: str, command: Sequence[str]) -> None:
        folder = self._folder / submission_id
        LocalStore(folder).create("command.json", json.dumps(list(command)).encode())
        with (folder / "output.log").open("ab") as output:
            subprocess.Popen(
                [*TVQ, "schedule", "supervise", str(folder)],
                stdin=subprocess.DEVNULL,
                stdout=output,
                stderr=output,
                start_new_session=True,  # Ctrl-C in the daemon's terminal is not for it
            )
        # Not before it has begun: who asks for the state next is not to start another.
        end = time.monotonic() + _START_SECONDS
        while self.state(submission_id) is None and time.monotonic() < end:
            time.sleep(0.02)

    def state(self, submission_id: str) -> State | None:
        folder = self._folder / submission_id
        for _ in range(2):  # it may end between the two looks
            with contextlib.suppress(FileNotFoundError):
                code = json.loads((folder / "exit.json").read_text())["code"]
                return "succeeded" if code == 0 else "failed"
            if not (folder / "started.json").exists():
                return None
            if _is_locked(folder):
                return "running"
        return "lost"

    def stop(self, submission_id: str) -> None:
        folder = self._folder / submission_id
        if folder.is_dir():
            (folder / "stop").touch()

    def where(self, submission_id: str) -> str:
        return str(self._folder / submission_id / "output.log")


def supervise(folder: Path) -> int:
    """Runs the command of a launch, unless somebody does or did, and notes how it ended."""
    with (folder / "lock").open("w") as lock:
        try:
            fcntl.flock(lock, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError:
            return 0
        started = json.dumps({"pid": os.getpid(), "time": time.time()}).encode()
        if not LocalStore(folder).create("started.json", started):
            return 0
        command = json.loads((folder / "command.json").read_text())
        # Its own group: a training's workers are stopped with it. Not the lock, or it would be
        # held as long as any of them lives.
        child = subprocess.Popen(
            [*TVQ, *command], stdin=subprocess.DEVNULL, start_new_session=True, close_fds=True
        )
        code = _wait(child, folder)
        write_json(folder / "exit.json", {"code": code, "time": time.time()})
        return 0


def _wait(child: subprocess.Popen[bytes], folder: Path) -> int:
    """The exit code of the command; it is stopped when the launch is asked to."""
    asked: float | None = None
    while True:
        with contextlib.suppress(subprocess.TimeoutExpired):
            return child.wait(_POLL_SECONDS)
        if asked is None and (folder / "stop").exists():
            asked = time.monotonic()
            child.send_signal(signal.SIGINT)  # a training saves and stops
        elif asked is not None and time.monotonic() - asked > _GRACE_SECONDS:
            with contextlib.suppress(ProcessLookupError):
                os.killpg(child.pid, signal.SIGKILL)


def _is_locked(folder: Path) -> bool:
    try:
        with (folder / "lock").open() as lock:
            fcntl.flock(lock, fcntl.LOCK_SH | fcntl.LOCK_NB)
    except BlockingIOError:
        return True
    except FileNotFoundError:
        pass
    return False
