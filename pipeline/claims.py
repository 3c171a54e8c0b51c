"""Who has something for himself, among all who share a store: the primitive of every claim.

Needs of the store only that of many who create a file one wins, so that it works the same in a
folder, on a file server and in a bucket.
"""

import contextlib
import functools
import json
import logging
import os
import socket
import threading
import time
import uuid
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any, NamedTuple

from pipeline.errors import CorpusError
from pipeline.storage import Store

log = logging.getLogger("tvq.claims")

CLAIM = "lease.json"
"""The file of a claim, unless it is given another name."""
CLAIMS_BEFORE = "leases/"
"""The folder of what says that a claim was superseded."""


class Holder(NamedTuple):
    """Who holds a claim, as written by himself."""

    owner: str
    """Random; of this claim, not of the process."""
    host: str = ""
    pid: int = 0
    process_start: str | None = None
    heartbeat: float = 0.0
    """Unix time, by its own clock, at which it was last renewed."""


class Claim:
    """One process's right to something, for as long as it renews it.

    Policy: the holder renews `file` now and then; a claim that was not renewed for
    `expire_seconds`, or whose process is gone from this host, may be taken over. Who takes it over
    first creates `leases/<owner before>.json`, which one of many can, and which stays: an owner
    that was superseded never holds it again, even if it wakes up in the middle of a renewal and
    overwrites the file. Who is about to do what only the holder may asks `is_held` first.
    """

    def __init__(
        self,
        store: Store,
        *,
        file: str = CLAIM,
        clock: Callable[[], float] = time.time,
        expire_seconds: float = 60,
    ):
        self.owner = uuid.uuid4().hex
        self._store = store
        self._file = file
        self._clock = clock
        self._expire_seconds = expire_seconds
        self._lost = threading.Event()

    @property
    def is_lost(self) -> bool:
        """Whether `renewed` has found that another has it; asks no store."""
        return self._lost.is_set()

    def take(self) -> Holder | None:
        """Takes it if it is free or may be taken over; returns who holds it if that is another."""
        while True:  # who loses a race reads who won it
            holder = self.holder()
            if holder is None:
                if self._store.create(self._file, self._fields()):
                    return None
            elif holder.owner == self.owner:
                return None
            elif self.is_alive(holder):
                return holder
            elif self._store.create(_successor(holder.owner), self._fields()):
                self._store.write(self._file, self._fields())
                return None

    def create(self) -> bool:
        """Takes it if nobody ever held it; whether it is ours now."""
        return self._store.create(self._file, self._fields())

    def is_alive(self, holder: Holder) -> bool:
        """Whether that holder still has its right."""
        if self._clock() - holder.heartbeat > self._expire_seconds:
            return False
        if holder.host != socket.gethostname():
            return True
        return _process_start(holder.pid) == holder.process_start

    def holder(self) -> Holder | None:
        """Who holds it, alive or not; None where nobody does."""
        return holder_of(self._store, self._file)

    def is_held(self) -> bool:
        """Whether it is still ours."""
        holder = self.holder()
        return holder is not None and holder.owner == self.owner

    def renew(self) -> bool:
        """Says that we are alive; whether it is still ours."""
        if not self.is_held():
            return False
        self._store.write(self._file, self._fields())
        return True

    def give_back(self) -> None:
        """Frees it, for anybody, if it is ours."""
        if self.is_held():
            self._store.remove(self._file)

    def let_go(self) -> None:
        """Lets anybody take it over at once, if it is ours; it stays claimed."""
        if self.is_held():
            self._store.write(self._file, self._fields(heartbeat=0.0))

    @contextlib.contextmanager
    def renewed(self, every_seconds: float, what: str) -> Iterator[None]:
        """Renews it in a thread while the body runs, until another has it.

        Args:
            what: is claimed, for the log.
        """
        stop = threading.Event()

        def renew() -> None:
            while not stop.wait(every_seconds):
                try:
                    if not self.renew():
                        self._lost.set()
                        return
                except CorpusError as error:  # a full disk, a store that is not well: may pass
                    log.warning("the lease of %s was not renewed: %s", what, error)

        thread = threading.Thread(target=renew, name="lease", daemon=True)
        thread.start()
        try:
            yield
        finally:
            stop.set()
            thread.join()

    @contextlib.contextmanager
    def kept(self, every_seconds: float, what: str) -> Iterator[None]:
        """Renews it while the body runs, then frees it; a store that is not well ends nothing.

        Args:
            what: is claimed, for the log.
        """
        try:
            with self.renewed(every_seconds, what):
                yield
        finally:
            try:
                self.give_back()
            except CorpusError as error:
                log.warning("the claim of %s was not given back, it expires: %s", what, error)

    def _fields(self, heartbeat: float | None = None) -> bytes:
        holder = Holder(
            owner=self.owner,
            host=socket.gethostname(),
            pid=os.getpid(),
            process_start=_own_start(os.getpid()),
            heartbeat=self._clock() if heartbeat is None else heartbeat,
        )
        return (json.dumps(holder._asdict(), indent=2) + "\n").encode()


def holder_of(store: Store, file: str = CLAIM) -> Holder | None:
    """Who holds the claim that lies in `file`; None where nobody does."""
    holder = _read(store, file)
    while holder and (successor := _read(store, _successor(holder.owner))):
        holder = successor
    return holder


def _successor(owner: str) -> str:
    return f"{CLAIMS_BEFORE}{owner}.json"


def _read(store: Store, name: str) -> Holder | None:
    try:
        fields: dict[str, Any] = json.loads(store.read(name))
        return Holder(**fields)
    except FileNotFoundError:
        return None
    except (ValueError, TypeError):
        raise CorpusError(
            f"{store.location}/{name}: damaged; remove it if nothing works under that claim"
        ) from None


@functools.cache
def _own_start(pid: int) -> str | None:
    return _process_start(pid)  # it stays the same: a daemon renews many claims


def _process_start(pid: int) -> str | None:
    """When the process began, in clock ticks since boot: a recycled pid has another value.

    None for one that is not there, or is dead and only not yet waited for by its parent.
    """
    try:
        state, *rest = Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()
    except (FileNotFoundError, ProcessLookupError):
        return None
    return None if state in "ZX" else rest[18]
