"""Shards of a corpus in an object store, fetched whole to local disk before they are read."""

import contextlib
import dataclasses
import hashlib
import os
import threading
import time
from collections.abc import Callable, Sequence
from pathlib import Path

from pipeline.cache_folder import CacheFolder, key_of
from pipeline.errors import CorpusError
from pipeline.patient_store import patiently
from pipeline.shards import CHUNK_BYTES, Shard, check_sums
from pipeline.storage import LocalStore, Store

_FETCHES = 3
"""How often a chunk is fetched until its bytes are those of the manifest."""
_POLL_SECONDS = 0.05
"""Between looks at a fetch of another process."""


def default_folder() -> Path:
    """The folder of the cache: TVQ_CACHE or ~/.cache/tvq/shards."""
    return Path(os.environ.get("TVQ_CACHE") or "~/.cache/tvq/shards").expanduser()


class ShardCache:
    """Local files of a store's shards, within a limit of disk space.

    A shard that `path` gave is in use, and its file stays, until it is given back by `release`
    as often (a map of a removed file would go on filling the disk, uncounted). When a shard needs
    room, files that nobody uses go, the least recently asked for or given back first; those that
    `prefetch` was told of last. If what is in use leaves no room, `path` raises `CorpusError` with
    the limit needed; a prefetch waits for a release instead, and evicts neither what this process
    uses nor what it was told to fetch.

    Other processes that share the folder keep what they use; what they only prefetched may go. A
    process is taken to be dead when its locks are gone, and its unfinished files are removed.

    Every chunk is checked against the manifest as it arrives. A file that was there before is
    checked whole when this process first uses it, and fetched again if a byte is wrong; so nothing
    is synced to disk.

    A store that is not well is waited for, ten minutes at most: a training reads here.

    Of a local store, the file itself is used and nothing is copied. Several threads may use one
    cache. `clock` gives increasing nanoseconds, the same for all processes.
    """

    def __init__(
        self,
        store: Store,
        folder: Path,
        limit_bytes: int | None,
        *,
        clock: Callable[[], int] = time.time_ns,
    ) -> None:
        """Nothing is read or written yet; without a limit nothing is evicted."""
        self._store, self._folder = store, CacheFolder(folder, limit_bytes, clock)
        self._mutex = threading.Lock()
        self._in_use: dict[str, _Use] = {}
        self._ahead: list[Shard] = []  # what prefetch was told of and path was not asked for
        self._checked: set[str] = set()  # keys whose bytes this process has seen to be right
        self._thread: threading.Thread | None = None
        self._closed = threading.Event()

    def path(self, shard: Shard) -> Path:
        """The shard as a whole, right local file, in use until it is released.

        Raises `CorpusError` if the shard is missing or damaged, if the store does not answer, or
        if the limit leaves no room.
        """
        if isinstance(self._store, LocalStore):
            return self._store.path(shard.path)
        key = key_of(shard)
        with self._mutex:
            if key in self._in_use:
                return self._use(shard)
        descriptor = self._obtain(shard, ahead=False)
        assert descriptor is not None
        with self._mutex:
            if key in self._in_use:
                os.close(descriptor)  # another thread was as fast
            else:
                self._in_use[key] = _Use(descriptor)
            self._ahead = [other for other in self._ahead if key_of(other) != key]
            return self._use(shard)

    def release(self, shard: Shard) -> None:
        """Give back what `path` gave once: its file may be evicted."""
        if isinstance(self._store, LocalStore):
            return
        key = key_of(shard)
        with self._mutex:
            use = self._in_use.get(key)
            if use is None:
                return  # closed meanwhile
            use.count -= 1
            if use.count == 0:
                self._folder.touch(use.descriptor)
                os.close(self._in_use.pop(key).descriptor)
        self._work_ahead()

    def prefetch(self, shards: Sequence[Shard]) -> None:
        """Fetch these next, in this order, on a thread; forget what was to be fetched before.

        What goes wrong is raised when `path` is asked for the shard.
        """
        if isinstance(self._store, LocalStore):
            return
        with self._mutex:
            self._ahead = [shard for shard in shards if key_of(shard) not in self._in_use]
        self._work_ahead()

    def check_limit(self, shards: Sequence[Shard], at_once: int) -> None:
        """Raise `CorpusError` with the limit needed if any `at_once` of the shards may not fit."""
        lengths = sorted((shard.length for shard in shards), reverse=True)
        if not isinstance(self._store, LocalStore):
            self._folder.refuse_over_limit(sum(lengths[:at_once]))

    def close(self) -> None:
        """Stop fetching and give everything back; the files stay. Harmless when done twice."""
        self._closed.set()
        with self._mutex:
            thread, self._ahead = self._thread, []
        if thread is not None:
            thread.join()
        with self._mutex:
            for use in self._in_use.values():
                os.close(use.descriptor)
            self._in_use.clear()

    def __enter__(self) -> "ShardCache":
        return self

    def __exit__(self, *_: object) -> None:
        self.close()

    # ---- The thread that works ahead -------------------------------------------------------------

    def _work_ahead(self) -> None:
        with self._mutex:
            if self._ahead and self._thread is None and not self._closed.is_set():
                self._thread = threading.Thread(
                    target=self._fetch_ahead, name="tvq shards", daemon=True
                )
                self._thread.start()

    def _fetch_ahead(self) -> None:
        """Fetch until all is there, there is no room, or something is wrong."""
        done: set[str] = set()
        while True:
            with self._mutex:
                todo = [shard for shard in self._ahead if key_of(shard) not in done]
                if not todo or self._closed.is_set():
                    self._thread = None
                    return
            descriptor = None
            with contextlib.suppress(CorpusError):
                descriptor = self._obtain(todo[0], ahead=True)
            if descriptor is None:
                with self._mutex:
                    self._thread = None  # the next release or prefetch tries again
                return
            os.close(descriptor)
            done.add(key_of(todo[0]))

    # ---- Files -----------------------------------------------------------------------------------

    def _obtain(self, shard: Shard, *, ahead: bool) -> int | None:
        """A descriptor of the shard's right file, locked as in use; ahead, None for no room."""
        if not ahead:
            self._folder.refuse_over_limit(shard.length)
        wrong = False
        while not self._closed.is_set():
            with self._folder.locked():
                found = None if wrong else self._folder.take(shard)
                partial, room = None, True
                if found is None:
                    with self._mutex:
                        needed_next = self._ahead
                    room = self._folder.make_room(shard, needed_next, ahead=ahead)
                    partial = self._folder.begin(shard) if room else None
            if found is not None:
                if self._is_right(shard):
                    return found
                os.close(found)
                wrong = True
            elif partial is not None:
                return self._fetch(shard, partial)
            elif not room and ahead:
                return None
            else:
                time.sleep(_POLL_SECONDS)  # another process or thread fetches it, or makes room
                wrong = False
        raise CorpusError(f"{self._folder.path}: the shard cache was closed")

    def _use(self, shard: Shard) -> Path:
        use = self._in_use[key_of(shard)]
        use.count += 1
        self._folder.touch(use.descriptor)
        return self._folder.file(shard)

    def _is_right(self, shard: Shard) -> bool:
        key = key_of(shard)
        if key not in self._checked:
            try:
                check_sums(
                    self._folder.path,
                    dataclasses.replace(shard, path=self._folder.file(shard).name),
                )
            except CorpusError:
                return False
            self._checked.add(key)
        return True

    def _fetch(self, shard: Shard, descriptor: int) -> int:
        """Fill the partial file, give it its name, and return it locked as in use."""
        try:
            for index in range(len(shard.sums)):
                if self._closed.is_set():
                    raise CorpusError(f"{self._folder.path}: the shard cache was closed")
                data = self._chunk(shard, index)
                with (
                    self._folder.writing(),
                    os.fdopen(descriptor, "wb", closefd=False) as file,
                ):
                    file.write(data)
            with self._folder.locked():
                self._folder.finish(shard, descriptor)
        except BaseException:
            self._folder.abandon(shard, descriptor)
            raise
        self._checked.add(key_of(shard))
        return descriptor

    def _chunk(self, shard: Shard, index: int) -> bytes:
        where = f"shard {self._store.location}/{shard.path}"
        begin = index * CHUNK_BYTES
        end = min(begin + CHUNK_BYTES, shard.length)
        for _ in range(_FETCHES):
            try:
                data = patiently(
                    lambda: self._read(shard, begin, end),
                    self._store.location,
                    pause=self._closed.wait,
                )
            except FileNotFoundError:
                raise CorpusError(f"{where}: missing; run `tvq prepare` again") from None
            if hashlib.sha256(data).hexdigest() == shard.sums[index]:
                return data
        raise CorpusError(
            f"{where}: chunk {index} (bytes {begin} to {end}) is not what the manifest says, "
            f"{_FETCHES} times; delete the file and run `tvq prepare` again with the same settings"
        )

    def _read(self, shard: Shard, begin: int, end: int) -> bytes:
        if self._closed.is_set():
            raise CorpusError(f"{self._folder.path}: the shard cache was closed")
        with self._store.open(shard.path) as file:
            file.seek(begin)
            return file.read(end - begin)


@dataclasses.dataclass
class _Use:
    """A file in use: the descriptor that holds its lock, and how often it was asked for."""

    descriptor: int
    count: int = 0
