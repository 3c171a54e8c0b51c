"""A new file whose chunks are summed as they are written, past the page cache where that goes."""

import contextlib
import fcntl
import hashlib
import mmap
import os
from collections.abc import Iterator
from pathlib import Path

import numpy as np
import pyarrow as pa

from pipeline.errors import CorpusError

CHUNK_BYTES = 8 * 1024 * 1024
"""A file's checksums are of chunks of this length, the last one shorter."""

# What is written at once: it is summed where the core's cache still has it, and of three shards
# that a task writes each holds as much.
_PIECE_BYTES = 1024 * 1024
# What a direct write begins and ends at: a page, which no disk's block is longer than.
_ALIGNED = mmap.PAGESIZE


class SummedFile:
    """What Arrow needs of a Python file; it is synced when it is finished.

    Written straight to the disk: that takes 0.1 ns a byte of CPU time, by way of the page cache
    0.33, and a corpus that is prepared does not drive the sources out of memory. Where the file
    system knows no direct writes, they go by way of the page cache.
    """

    def __init__(self, path: Path) -> None:
        """Raises `CorpusError` where it cannot be made."""
        self._folder = path.parent
        with self._writing():
            self._file = path.open("xb", buffering=0)
        self._is_direct = self._set_direct(True)
        # It begins at a page. From malloc, which gives the next file the same memory: to map as
        # much anew takes as long as to fill it.
        room = np.empty(_PIECE_BYTES + _ALIGNED, np.uint8)
        begin = -room.ctypes.data % _ALIGNED
        self._piece = room[begin : begin + _PIECE_BYTES].data
        self._held = 0
        self._digest = hashlib.sha256()  # of the chunk so far
        self._written = 0
        self.sums: list[str] = []
        """SHA-256 of each chunk that is full."""
        self.closed = False

    @property
    def length(self) -> int:
        """Bytes so far."""
        return self._written + self._held

    def write(self, data: bytes | pa.Buffer) -> int:
        view = memoryview(data).cast("B")
        at = 0
        while at < len(view):
            some = view[at : at + _PIECE_BYTES - self._held]
            self._piece[self._held : self._held + len(some)] = some
            self._held += len(some)
            at += len(some)
            if self._held == _PIECE_BYTES:
                self._end_piece()
        return at

    def flush(self) -> None:
        """A piece is written when it is full."""

    def tell(self) -> int:
        return self.length

    def finish(self) -> None:
        """Write what is left, and make the file durable."""
        if self._held:
            self._end_piece()
        if self.length % CHUNK_BYTES:
            self._end_chunk()
        with self._writing():
            os.fsync(self._file.fileno())
        self.close()

    def close(self) -> None:
        self._file.close()
        self.closed = True

    def _end_chunk(self) -> None:
        self.sums.append(self._digest.hexdigest())
        self._digest = hashlib.sha256()

    def _end_piece(self) -> None:
        piece = self._piece[: self._held]
        self._digest.update(piece)
        with self._writing():
            at = 0
            while at < len(piece):
                end = len(piece)
                if self._is_direct:
                    end -= end % _ALIGNED
                    if at % _ALIGNED or at == end:  # the file's last bytes, or behind a short write
                        self._is_direct = self._set_direct(False)
                        continue
                try:
                    at += self._file.write(piece[at:end])
                except OSError:
                    if not self._is_direct:
                        raise
                    # It took the flag and refuses the write; or the disk is full, as the next says.
                    self._is_direct = self._set_direct(False)
        self._written += self._held
        self._held = 0
        if self._written % CHUNK_BYTES == 0:
            self._end_chunk()

    def _set_direct(self, wanted: bool) -> bool:
        """Whether writes pass the page cache from now on."""
        direct = getattr(os, "O_DIRECT", 0)  # Linux has it
        flags = fcntl.fcntl(self._file, fcntl.F_GETFL)
        try:
            fcntl.fcntl(self._file, fcntl.F_SETFL, flags | direct if wanted else flags & ~direct)
        except OSError:
            return False  # a file system in memory, for one
        return wanted and bool(direct)

    @contextlib.contextmanager
    def _writing(self) -> Iterator[None]:
        try:
            yield
        except OSError as error:
            raise CorpusError(
                f"{self._folder}: cannot be written ({error.strerror or error})"
            ) from None
