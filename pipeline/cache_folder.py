"""The folder of the shard cache, which all processes of a machine may share.

KEY.arrow     a whole shard; KEY is a hash of the sums that the manifest gives it, so that
              corpora with equal shards share them. A shared lock on it: a process uses it.
KEY.partial   a shard that is being fetched. An exclusive lock on it: its writer lives.
.lock         whoever adds, evicts or takes a file holds it, for moments
"""

import contextlib
import fcntl
import hashlib
import os
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path

from pipeline.errors import CorpusError
from pipeline.shards import Shard


def key_of(shard: Shard) -> str:
    """The name of a shard's content."""
    return hashlib.sha256(" ".join((str(shard.length), *shard.sums)).encode()).hexdigest()


class CacheFolder:
    """The files of the cache and the room that its limit leaves.

    `take`, `begin`, `finish` and `make_room` are called inside `locked`. A descriptor that they
    give keeps its file from eviction, by any process, until it is closed. A process is taken to
    be dead when its locks are gone, and its unfinished files are removed.
    """

    def __init__(self, path: Path, limit_bytes: int | None, clock: Callable[[], int]) -> None:
        """Nothing is read or written yet."""
        self.path, self._limit, self._clock = path, limit_bytes, clock

    def file(self, shard: Shard) -> Path:
        """Where the whole shard lies."""
        return self.path / f"{key_of(shard)}.arrow"

    def touch(self, descriptor: int) -> None:
        """The file was used now."""
        now = self._clock()
        os.utime(descriptor, ns=(now, now))

    def take(self, shard: Shard) -> int | None:
        """A descriptor of the shard's file, locked as in use, if it is there and of its length."""
        try:
            descriptor = os.open(self.file(shard), os.O_RDONLY)
        except FileNotFoundError:
            return None
        if os.fstat(descriptor).st_size != shard.length:
            os.close(descriptor)
            return None
        fcntl.flock(descriptor, fcntl.LOCK_SH)
        self.touch(descriptor)
        return descriptor

    def begin(self, shard: Shard) -> int | None:
        """A new partial file that takes its room at once; None if another writes it."""
        partial = self.file(shard).with_suffix(".partial")
        try:
            descriptor = os.open(partial, os.O_RDWR | os.O_CREAT | os.O_EXCL, 0o666)
        except FileExistsError:
            return None  # of a living writer: dead ones' were removed
        fcntl.flock(descriptor, fcntl.LOCK_EX)
        try:
            os.posix_fallocate(descriptor, 0, shard.length)
        except OSError:
            self.abandon(shard, descriptor)
            raise
        return descriptor

    def finish(self, shard: Shard, descriptor: int) -> None:
        """Give the partial file its name, and lock it as in use."""
        final = self.file(shard)
        final.with_suffix(".partial").replace(final)
        fcntl.flock(descriptor, fcntl.LOCK_SH)
        self.touch(descriptor)

    def abandon(self, shard: Shard, descriptor: int) -> None:
        """Leave nothing of a partial file."""
        self.file(shard).with_suffix(".partial").unlink(missing_ok=True)
        os.close(descriptor)

    def make_room(self, shard: Shard, needed_next: Sequence[Shard], *, ahead: bool) -> bool:
        """Evict what is needed to add the shard, or nothing and False if that is not enough.

        Fetching `ahead`, nothing goes that is needed next. Otherwise it may, and if what is in
        use alone leaves no room, and no fetch is about to end, raises `CorpusError`.
        """
        sizes: dict[Path, int] = {}
        ages: dict[Path, int] = {}
        fetching = False
        for path in self.path.iterdir():
            with contextlib.suppress(FileNotFoundError):  # a writer that failed removes its own
                if path.suffix == ".partial":
                    if not _is_used(path):
                        path.unlink()  # its writer died
                        continue
                    fetching = True
                if path.suffix in (".arrow", ".partial"):
                    status = path.stat()
                    sizes[path], ages[path] = status.st_size, status.st_mtime_ns
        if self._limit is None:
            return True
        missing = sum(sizes.values()) + shard.length - self._limit
        # Of what is needed next, the last goes first.
        order = {self.file(other): -place for place, other in enumerate(needed_next)}
        candidates = [
            path
            for path in sizes
            if path.suffix == ".arrow" and not (ahead and path in order) and not _is_used(path)
        ]
        candidates.sort(key=lambda path: (path in order, order.get(path, 0), ages[path], path))
        evicted = []
        for path in candidates:
            if missing <= 0:
                break
            evicted.append(path)
            missing -= sizes[path]
        if missing <= 0:
            for path in evicted:
                path.unlink()
            return True
        if not ahead and not fetching:
            self.refuse_over_limit(self._limit + missing)
        return False

    def refuse_over_limit(self, needed: int) -> None:
        """Raise `CorpusError` with the limit needed for so many bytes, if they do not fit."""
        if self._limit is not None and needed > self._limit:
            raise CorpusError(
                f"{self.path}: the shard cache may hold {self._limit} bytes, the shards in use "
                f"at once need {needed}; raise its limit to {needed}"
            )

    @contextlib.contextmanager
    def locked(self) -> Iterator[None]:
        """No other process or thread adds, evicts or takes a file meanwhile."""
        with self.writing():
            self.path.mkdir(parents=True, exist_ok=True)
            with (self.path / ".lock").open("a") as lock:
                fcntl.flock(lock, fcntl.LOCK_EX)
                yield

    @contextlib.contextmanager
    def writing(self) -> Iterator[None]:
        """Say in one line that the folder cannot be written: no permission, a full disk."""
        try:
            yield
        except OSError as error:
            raise CorpusError(
                f"{self.path}: the shard cache cannot be written ({error.strerror}); "
                "name another folder in TVQ_CACHE"
            ) from None


def _is_used(path: Path) -> bool:
    """Whether anybody has a lock on the file. Nobody takes one without the folder's lock."""
    with path.open("rb") as file:
        try:
            fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError:
            return True
    return False
