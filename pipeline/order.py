"""The order of training: rows of the endless epoch sequence -> windows, by a stateless permutation.

Nothing is stored and nothing is drawn in sequence: the window of any row is computed from the
key, so a training resumes at any row in no time, on any number of hosts. The permutation is our
own, with golden vectors in its test, because libraries' random streams change between versions.
"""

import functools
import hashlib
import math
from typing import NamedTuple

import numpy as np
import numpy.typing as npt

_ROUNDS = 8  # of 64-bit keys: one SHA-512 digest


class Permutation:
    """A bijection of 0..n-1 that is drawn by a key, evaluated at any indices in O(1).

    A Feistel network on the numbers below a*b, written as pairs (left below a, right below b):
    in turn, each half is moved by a hash of the other and of the round's key, modulo its size
    (the generalised Feistel cipher FE1 of Bellare, Ristenpart, Rogaway, Stegers, "Format-preserving
    encryption", 2009, with unequal halves). a and b are about sqrt(n) and a*b is n or little more;
    a result that is not below n is encrypted again until it is ("cycle walking"), which keeps it a
    bijection. The hash is the finaliser of SplitMix64 (Steele, Lea, Flood, 2014). It shuffles; it
    does not hide.
    """

    def __init__(self, n: int, key: str) -> None:
        """Draw the permutation of `n` >= 1 elements that belongs to the text `key`."""
        if n < 1:
            raise ValueError(f"a permutation needs at least 1 element, got {n}")
        root = math.isqrt(n)
        left = root + (root * root < n)
        self.n = n
        self._left, self._right = np.uint64(left), np.uint64(-(-n // left))
        digest = hashlib.sha512(key.encode()).digest()
        self._keys = np.frombuffer(digest, "<u8").astype(np.uint64)

    def __call__(self, index: npt.ArrayLike) -> npt.NDArray[np.int64]:
        """The elements at the positions `index`, of any shape, each in 0..n-1."""
        start = np.asarray(index, np.int64)
        if start.size and not 0 <= int(start.min()) <= int(start.max()) < self.n:
            raise IndexError(f"positions lie in 0..{self.n - 1}")
        value = self._encrypt(start.astype(np.uint64).ravel())
        while (outside := np.flatnonzero(value >= self.n)).size:
            value[outside] = self._encrypt(value[outside])
        return value.astype(np.int64).reshape(start.shape)

    def _encrypt(self, value: npt.NDArray[np.uint64]) -> npt.NDArray[np.uint64]:
        left, right = value // self._right, value % self._right
        for number, key in enumerate(self._keys):
            if number % 2 == 0:
                left = (left + mix(right, key) % self._left) % self._left
            else:
                right = (right + mix(left, key) % self._right) % self._right
        return left * self._right + right


class _Epoch(NamedTuple):
    """One epoch's spans: which shards, how many windows, in what order."""

    ends: npt.NDArray[np.int64]
    """Rows of the epoch before the end of each span [spans]."""
    shards: list[npt.NDArray[np.int64]]
    """The shards of each span, ascending."""


class Order:
    """Rows of the endless epoch sequence -> windows of one split.

    Row r lies in epoch r // n, and each epoch holds each of the n windows once. Two levels: in
    each epoch the shards are permuted and dealt into spans of `shuffle_span` shards (the last may
    have fewer), the spans follow one another, and the windows of a span are permuted; so a reader
    needs the shards of at most two spans at a time, and the next shard's beginning where a window
    lies across its end. By default the split is one span, and then
    the order does not depend on where its shards end. A window belongs to the shard in which its
    first token lies.

    The order is a function of the split's fingerprint, the seed and the number of windows, and
    with several spans of the shards; not of hosts, batch sizes or what was read before.
    """

    def __init__(
        self,
        shard_windows: npt.NDArray[np.int64],
        *,
        fingerprint: str,
        seed: int,
        shuffle_span: int | None = None,
    ) -> None:
        """Order the windows of a split.

        `shard_windows` [shards + 1] has the first window of each shard, and at its end the number
        of windows. `shuffle_span` counts shards and is at least 1.
        """
        if shuffle_span is not None and shuffle_span < 1:
            raise ValueError(f"data.shuffle_span: must be at least 1, got {shuffle_span}")
        self._shard_windows = np.asarray(shard_windows, np.int64)
        self.n = int(self._shard_windows[-1])
        if self.n < 1:
            raise ValueError("an order needs at least one window")
        n_shards = len(self._shard_windows) - 1
        self._span = min(shuffle_span or n_shards, n_shards)
        self._key = f"tvq order 1 {fingerprint} {seed}"
        # Two: a batch may lie across the end of an epoch.
        self._epoch = functools.lru_cache(maxsize=2)(self._make_epoch)
        self._permutation = functools.lru_cache(maxsize=64)(self._make_permutation)

    def windows(self, rows: npt.ArrayLike) -> npt.NDArray[np.int64]:
        """The windows [rows] at rows [rows] of the endless epoch sequence, each at least 0."""
        rows = np.asarray(rows, np.int64)
        if rows.size and int(rows.min()) < 0:
            raise IndexError("rows of the epoch sequence begin at 0")
        epochs, positions = rows // self.n, rows % self.n
        out = np.empty_like(rows)
        for epoch in np.unique(epochs).tolist():
            here = epochs == epoch
            out[here] = self._windows_of_epoch(epoch, positions[here])
        return out

    def shards_ahead(self, row: int) -> list[int]:
        """The shards of the span that a row lies in, then those of the next span."""
        (epoch, position), ahead = divmod(row, self.n), []
        ends, shards = self._epoch(epoch)
        span = int(np.searchsorted(ends, position, side="right"))
        ahead += shards[span].tolist()
        following = shards[span + 1] if span + 1 < len(shards) else self._epoch(epoch + 1).shards[0]
        return ahead + [shard for shard in following.tolist() if shard not in ahead]

    def _windows_of_epoch(
        self, epoch: int, positions: npt.NDArray[np.int64]
    ) -> npt.NDArray[np.int64]:
        ends, shards = self._epoch(epoch)
        out = np.empty_like(positions)
        spans = np.searchsorted(ends, positions, side="right")
        for span in np.unique(spans).tolist():
            here = spans == span
            begin = int(ends[span - 1]) if span else 0
            place = self._permutation(epoch, span, int(ends[span]) - begin)(positions[here] - begin)
            # The span's windows, counted through its shards in ascending order.
            firsts = self._shard_windows[shards[span]]
            counts = self._shard_windows[shards[span] + 1] - firsts
            before = np.cumsum(counts) - counts
            shard = np.searchsorted(before + counts, place, side="right")
            out[here] = firsts[shard] + place - before[shard]
        return out

    def _make_epoch(self, epoch: int) -> _Epoch:
        n_shards = len(self._shard_windows) - 1
        shards = np.arange(n_shards)
        if self._span < n_shards:
            shards = Permutation(n_shards, f"{self._key} epoch {epoch} shards")(shards)
        counts = np.diff(self._shard_windows)[shards]
        cuts = np.arange(self._span, n_shards, self._span)
        ends = np.cumsum(counts)[np.append(cuts, n_shards) - 1]
        return _Epoch(ends, [np.sort(part) for part in np.split(shards, cuts)])

    def _make_permutation(self, epoch: int, span: int, n: int) -> Permutation:
        return Permutation(n, f"{self._key} epoch {epoch} span {span}")


def mix(value: npt.NDArray[np.uint64], key: np.uint64) -> npt.NDArray[np.uint64]:
    """64 well-mixed bits of each value and the key; arithmetic modulo 2**64."""
    x = value * np.uint64(0x9E3779B97F4A7C15) + key
    x = (x ^ (x >> np.uint64(30))) * np.uint64(0xBF58476D1CE4E5B9)
    x = (x ^ (x >> np.uint64(27))) * np.uint64(0x94D049BB133111EB)
    return x ^ (x >> np.uint64(31))
