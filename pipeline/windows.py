"""A split's tokens cut to windows of T, read from memory-mapped shards.

`stream`: the documents of the split in stored order, each followed by one eos, are one long
stream through all shards, cut every T; the last window may be shorter. So windows do not depend
on where shards or the parts of a document end.
`document`: each document is one window, without eos.
"""

import functools
import weakref
from collections.abc import Sequence
from typing import Literal, NamedTuple

import numpy as np
import numpy.typing as npt

from pipeline.errors import CorpusError
from pipeline.manifest import Manifest, Split
from pipeline.shard_cache import ShardCache, default_folder
from pipeline.shards import ShardReader
from pipeline.storage import LocalStore, Location, open_store
from pipeline.tokenizers import EOS

WindowMode = Literal["stream", "document"]

# Each holds a file descriptor; 1,024 is a usual limit of a process.
_OPEN_SHARDS = 256


class _Mapped(NamedTuple):
    """A shard that is open, and where its rows lie in its own piece of the stream."""

    reader: ShardReader
    begins: npt.NDArray[np.int64]
    """Position at which each row begins, and the end of the last [rows + 1]; in stream mode the
    eos of a document belongs to its last row."""


def window_count(split: Split, sequence_length: int, mode: WindowMode) -> int:
    """The number of windows of a split; T is `sequence_length`."""
    if mode == "document":
        return split.documents
    return -(-(split.tokens + split.documents) // sequence_length)


class Windows:
    """The windows of one split; shards are opened when they are first read.

    Only one thread may read at a time.
    """

    def __init__(
        self,
        corpus: Location,
        split: str,
        *,
        sequence_length: int,
        mode: WindowMode = "stream",
        shards_at_once: int | None = None,
        cache_bytes: int | None = None,
    ) -> None:
        """Lay out the windows from the manifest alone.

        The shards of an object store are read through a cache on this machine's disk of at most
        `cache_bytes`, which must hold `shards_at_once` of them (all, if null); nothing is fetched
        yet. Raises `CorpusError` if there is no corpus or no such split, if the split is empty, in
        `document` mode if a document is longer than `sequence_length` (T, at least 1), and for a
        cache that is too small.
        """
        if sequence_length < 1:
            raise ValueError(f"sequence_length: must be at least 1, got {sequence_length}")
        if mode not in ("stream", "document"):
            raise ValueError(f"data.window: must be stream or document, got {mode!r}")
        self.manifest = Manifest.load(corpus)
        self.split = self.manifest.split(split)
        self.sequence_length = sequence_length
        self._mode: WindowMode = mode
        self._dtype = np.dtype(self.manifest.tokenizer.dtype)
        self._offset = np.int32(self.manifest.tokenizer.token_offset)
        shards = self.split.shards
        for shard in shards:
            if mode == "document" and shard.longest_document > sequence_length:
                raise CorpusError(
                    f"{corpus}: a document of {split} in {shard.path} has {shard.longest_document} "
                    f"tokens, a window has {sequence_length}: set data.window=stream or a longer "
                    "data.sequence_length"
                )
        # Documents are whole within a shard, so the manifest's counts place it in the stream.
        if mode == "stream":
            lengths = [shard.tokens + shard.documents for shard in shards]
        else:
            lengths = [shard.documents for shard in shards]
        self._shard_ends = np.cumsum(np.array(lengths, np.int64))
        self._shard_begins = self._shard_ends - lengths
        self._store = open_store(corpus)
        self._cache = ShardCache(self._store, default_folder(), cache_bytes)
        open_shards = _OPEN_SHARDS
        if cache_bytes is not None:
            at_once = min(shards_at_once or len(shards), len(shards))
            self._cache.check_limit(shards, at_once)
            # One less: the next is opened before the least recently used is given up.
            open_shards = min(open_shards, max(at_once - 1, 1))
        self._shard = functools.lru_cache(maxsize=open_shards)(self._open)

    def __len__(self) -> int:
        """The number of windows."""
        return window_count(self.split, self.sequence_length, self._mode)

    @functools.cached_property
    def shard_windows(self) -> npt.NDArray[np.int64]:
        """The first window of each shard, then the number of windows: int64 [shards + 1].

        A window belongs to the shard in which its first token lies.
        """
        borders = np.append(self._shard_begins, self._shard_ends[-1])
        return borders if self._mode == "document" else -(-borders // self.sequence_length)

    @property
    def is_remote(self) -> bool:
        """The shards lie in an object store."""
        return not isinstance(self._store, LocalStore)

    def prefetch(self, shards: Sequence[int]) -> None:
        """Fetch these shards (numbers of the split) next, in order, while others are read."""
        self._cache.prefetch([self.split.shards[index] for index in shards])

    def read(self, window: int) -> npt.NDArray[np.int32]:
        """The targets of a window: a model's ids, at most T of them, eos included."""
        out = np.empty(self.sequence_length, np.int32)
        return out[: self.read_into(window, out)]

    def read_into(self, window: int, out: npt.NDArray[np.int32]) -> int:
        """Copy a window's targets to the front of `out` [T]; returns how many there are.

        Raises `CorpusError` naming the shard if it is missing or damaged.
        """
        if not 0 <= window < len(self):
            raise IndexError(f"windows are 0..{len(self) - 1}, got {window}")
        if self._mode == "document":
            index = int(np.searchsorted(self._shard_ends, window, side="right"))
            mapped = self._shard(index)
            document = window - int(self._shard_begins[index])
            first = mapped.reader.first_rows
            last = document + 1 == len(first)
            begin = int(mapped.begins[first[document]])
            end = int(mapped.begins[-1 if last else first[document + 1]])
            self._copy(mapped, begin, out[: end - begin])
            return end - begin
        begin = window * self.sequence_length
        end = min(begin + self.sequence_length, int(self._shard_ends[-1]))
        self.read_stream(begin, out[: end - begin])
        return end - begin

    def read_stream(self, begin: int, out: npt.NDArray[np.int32]) -> None:
        """Fill `out` [n] with the stream's targets from position `begin` on; of `stream` windows.

        Raises `CorpusError` naming the shard if it is missing or damaged.
        """
        end = begin + len(out)
        if self._mode != "stream" or not 0 <= begin <= end <= int(self._shard_ends[-1]):
            raise IndexError(f"the stream has no positions {begin} to {end}")
        index = int(np.searchsorted(self._shard_ends, begin, side="right"))
        at = begin
        while at < end:
            stop = min(end, int(self._shard_ends[index]))
            local = at - int(self._shard_begins[index])
            self._copy(self._shard(index), local, out[at - begin : stop - begin])
            at, index = stop, index + 1

    def _copy(self, mapped: _Mapped, begin: int, out: npt.NDArray[np.int32]) -> None:
        """Fill `out` from position `begin` of a shard: one copy from the map, ids made a model's"""
        row = int(np.searchsorted(mapped.begins, begin, side="right")) - 1
        filled, start = 0, begin - int(mapped.begins[row])
        while filled < len(out):
            tokens = mapped.reader.tokens(row)[start : start + len(out) - filled]
            np.add(tokens, self._offset, out=out[filled : filled + len(tokens)])
            filled += len(tokens)
            end_of_row = int(mapped.begins[row + 1] - mapped.begins[row])
            if filled < len(out) and end_of_row > mapped.reader.lengths[row]:
                out[filled] = EOS
                filled += 1
            row, start = row + 1, 0

    def _open(self, index: int) -> _Mapped:
        shard = self.split.shards[index]
        path = self._cache.path(shard)
        try:
            reader = ShardReader(path, shard, self._dtype)
        except BaseException:
            self._cache.release(shard)
            raise
        weakref.finalize(reader, self._cache.release, shard)
        lengths = reader.lengths
        if self._mode == "stream":
            ends_document = np.zeros(len(lengths), np.int64)
            ends_document[reader.first_rows[1:] - 1] = 1
            ends_document[-1] = 1
            lengths = lengths + ends_document
        return _Mapped(reader, np.concatenate([[0], np.cumsum(lengths)]))
