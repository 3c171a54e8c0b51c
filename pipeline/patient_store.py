"""A training's store: an outage is waited for, within a limit, and told once."""

import logging
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import BinaryIO, TypeVar

from pipeline.errors import PassingFaultError
from pipeline.storage import Entry, LocalStore, Location, Store, open_store

log = logging.getLogger("tvq.storage")
_Answer = TypeVar("_Answer")

LIMIT_SECONDS = 600.0
"""How long an outage may last before it ends what waits for it."""
_LONGEST_PAUSE_SECONDS = 15.0


class PatientStore:
    """A store whose calls are made again while the store is not well.

    Policy: what may pass (no answer, 429, 5xx) is tried again after 1, 2, 4 ... 15 s for
    `limit_s`, on top of the half minute for which gcsfs itself tries. The first failure and the
    end of an outage are logged, what lies between is not. All else, a missing bucket or a missing
    permission, is raised at once. Not for who must not wait: the training loop's own thread uses
    it before its first update, and to go back to a checkpoint, when nothing else could be done.
    """

    def __init__(
        self,
        store: Store,
        limit_s: float = LIMIT_SECONDS,
        pause: Callable[[float], object] = time.sleep,
        clock: Callable[[], float] = time.monotonic,
    ) -> None:
        self._store, self._limit_s, self._pause, self._clock = store, limit_s, pause, clock
        self.location = store.location

    def child(self, name: str) -> "PatientStore":
        return PatientStore(self._store.child(name), self._limit_s, self._pause, self._clock)

    def read(self, name: str) -> bytes:
        return self._patiently(lambda: self._store.read(name))

    def open(self, name: str) -> BinaryIO:
        return self._patiently(lambda: self._store.open(name))

    def size(self, name: str) -> int:
        return self._patiently(lambda: self._store.size(name))

    def exists(self, name: str) -> bool:
        return self._patiently(lambda: self._store.exists(name))

    def md5(self, name: str) -> str:
        return self._patiently(lambda: self._store.md5(name))

    def write(self, name: str, data: bytes) -> None:
        self._patiently(lambda: self._store.write(name, data))

    def create(self, name: str, data: bytes) -> bool:
        return self._patiently(lambda: self._store.create(name, data))

    def scratch(self, name: str) -> Path:
        return self._store.scratch(name)

    def place(self, temporary: Path, name: str) -> None:
        self._patiently(lambda: self._store.place(temporary, name))

    def list(self, prefix: str = "") -> Iterator[Entry]:
        return iter(self._patiently(lambda: [*self._store.list(prefix)]))

    def remove(self, name: str) -> None:
        self._patiently(lambda: self._store.remove(name))

    def remove_tree(self, prefix: str) -> None:
        self._patiently(lambda: self._store.remove_tree(prefix))

    def _patiently(self, call: Callable[[], _Answer]) -> _Answer:
        return patiently(
            call, self.location, limit_s=self._limit_s, pause=self._pause, clock=self._clock
        )


def patiently(
    call: Callable[[], _Answer],
    where: str,
    *,
    limit_s: float = LIMIT_SECONDS,
    pause: Callable[[float], object] = time.sleep,
    clock: Callable[[], float] = time.monotonic,
) -> _Answer:
    """What `call` returns, called again while it raises a `PassingFaultError`, within the limit."""
    begun, seconds, failed = clock(), 1.0, False
    while True:
        try:
            answer = call()
        except PassingFaultError as fault:
            if clock() - begun + seconds > limit_s:
                raise
            if not failed:
                log.warning("%s; tried again for %.0f s", fault, limit_s)
            failed = True
            pause(seconds)
            seconds = min(2 * seconds, _LONGEST_PAUSE_SECONDS)
        else:
            if failed:
                log.warning("%s answers again", where)
            return answer


def open_patient_store(location: Location) -> Store:
    """The store at a location, patient if an outage of it can pass: not one of this machine."""
    store = open_store(location)
    return store if isinstance(store, LocalStore) else PatientStore(store)
