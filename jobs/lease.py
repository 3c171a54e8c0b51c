"""Who may write to a run now: the driver that holds its lease, and that driver's newest group.

Needs of the store only that of many who create a file one wins, so that it works the same in a
folder, on a file server and in a bucket.
"""

import contextlib
import json
import logging
import os
import socket
import threading
import time
import uuid
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any, Protocol

from jobs.errors import ExitCode, UserError
from jobs.run_directory import RunDirectory
from pipeline.errors import CorpusError
from pipeline.storage import Store

log = logging.getLogger("tvq.lease")


class LeaseLostError(UserError):
    """Another driver or worker group took the run over: this one must not write any more."""

    def __init__(self, message: str, code: ExitCode = ExitCode.BUSY):
        super().__init__(message, code)


class Held(Protocol):
    """What one driver at a time may write to: a run's folder, or a registered model's."""

    name: str
    store: Store


class Lease:
    """The right to write to a run, held by one driver at a time.

    Policy: the holder renews `lease.json` every `renew_seconds`; a lease that was not renewed for
    `expire_seconds`, or whose process is gone from this host, may be taken over. Who takes it over
    first creates `leases/<owner before>.json`, which one of many can, and which stays: an owner
    that was superseded never holds the run again, even if it wakes up in the middle of a renewal
    and overwrites `lease.json`. Before every commit the holder (or a worker acting for it) reads
    both: whoever lost the lease stops. So does a driver whose renewal finds it gone (`is_lost`).
    """

    def __init__(
        self,
        run: Held,
        *,
        clock: Callable[[], float] = time.time,
        renew_seconds: float = 5,
        expire_seconds: float = 60,
        busy: str = "run {name}: is being trained by {holder}; wait for it, stop it, or choose"
        " another name with --run",
    ):
        """`busy` is what is said where somebody else holds it."""
        self.owner = uuid.uuid4().hex
        self._store = run.store
        self._name = run.name
        self._busy = busy
        self._clock = clock
        self._renew_seconds = renew_seconds
        self._expire_seconds = expire_seconds
        self._stop = threading.Event()
        self._lost = threading.Event()
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
            self._give_back()

    def _acquire(self) -> None:
        while True:  # who loses a race reads who won it
            holder = _holder(self._store)
            if holder is None:
                if self._store.create("lease.json", self._fields()):
                    return
            elif self._alive(holder):
                age = self._clock() - holder["heartbeat"]
                who = (
                    f"process {holder['pid']} on {holder['host']} (lease {holder['owner'][:8]},"
                    f" renewed {age:.0f} s ago)"
                )
                raise UserError(self._busy.format(name=self._name, holder=who), ExitCode.BUSY)
            elif self._store.create(_successor(holder["owner"]), self._fields()):
                self._store.write("lease.json", self._fields())
                return

    def _alive(self, holder: dict[str, Any]) -> bool:
        if self._clock() - holder["heartbeat"] > self._expire_seconds:
            return False
        if holder["host"] != socket.gethostname():
            return True
        return _process_start(holder["pid"]) == holder["process_start"]

    def _renew(self) -> None:
        while not self._stop.wait(self._renew_seconds):
            try:
                if (_holder(self._store) or {}).get("owner") != self.owner:
                    self._lost.set()
                    return
                self._store.write("lease.json", self._fields())
            except CorpusError as error:  # a full disk, a store that is not well: it may pass
                log.warning("the lease of run %s was not renewed: %s", self._name, error)

    @property
    def is_lost(self) -> bool:
        """Whether another driver is known to have taken the run over: this one must end."""
        return self._lost.is_set()

    def check(self) -> None:
        """Raises LeaseLostError if another driver has taken the run over, as far as is known."""
        if self.is_lost:
            raise LeaseLostError(f"run {self._name}: another driver has taken the run over")

    def _give_back(self) -> None:
        try:
            if (_holder(self._store) or {}).get("owner") == self.owner:
                self._store.remove("lease.json")
        except CorpusError as error:
            log.warning("the lease of run %s was not given back, it expires: %s", self._name, error)

    def _fields(self) -> bytes:
        return _json(
            {
                "owner": self.owner,
                "host": socket.gethostname(),
                "pid": os.getpid(),
                "process_start": _process_start(os.getpid()),
                "heartbeat": self._clock(),
            }
        )


def is_held(run: RunDirectory) -> bool:
    """Whether a driver holds the run now; for who looks and writes nothing."""
    holder = _holder(run.store)
    return holder is not None and Lease(run)._alive(holder)


class Fence:
    """The right of one worker group to commit: its driver holds the lease and it is the newest."""

    def __init__(self, run: RunDirectory, owner: str):
        self._run = run
        self._owner = owner
        self._group = uuid.uuid4().hex

    def raise_over_others(self) -> None:
        """Makes this group the newest; called once by rank 0 when the group starts."""
        self.check(group=False)
        self._run.store.write("group.json", _json({"group": self._group}))

    def check(self, *, group: bool = True) -> None:
        """To be called right before a commit.

        Raises:
            LeaseLostError: another driver holds the lease, or a newer group has started.
            CorpusError: the store does not say.
        """
        if (_holder(self._run.store) or {}).get("owner") != self._owner:
            raise LeaseLostError(f"run {self._run.name}: another driver has taken the run over")
        if group and (_read(self._run.store, "group.json") or {}).get("group") != self._group:
            raise LeaseLostError(f"run {self._run.name}: a newer worker group has started")


def _holder(store: Store) -> dict[str, Any] | None:
    """What the holder of the lease wrote last; None where nobody holds it."""
    holder = _read(store, "lease.json")
    while holder and (successor := _read(store, _successor(holder["owner"]))):
        holder = successor
    return holder


def _successor(owner: str) -> str:
    return f"leases/{owner}.json"


def _read(store: Store, name: str) -> dict[str, Any] | None:
    try:
        fields = json.loads(store.read(name))
        if isinstance(fields, dict):
            return fields
    except FileNotFoundError:
        return None
    except ValueError:
        pass
    raise UserError(
        f"{store.location}/{name}: damaged; remove it if no training of this run is going on"
    )


def _json(fields: dict[str, Any]) -> bytes:
    return (json.dumps(fields, indent=2) + "\n").encode()


def _process_start(pid: int) -> str | None:
    """When the process began, in clock ticks since boot: a recycled pid has another value.

    None for one that is not there, or is dead and only not yet waited for by its parent.
    """
    try:
        state, *rest = Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()
    except (FileNotFoundError, ProcessLookupError):
        return None
    return None if state in "ZX" else rest[18]
