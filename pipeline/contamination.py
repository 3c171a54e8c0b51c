"""Decontamination: finds the documents of train that repeat a held-out one.

A document of train is compared with each held-out document by the word n-grams that they share:

    share = n-grams of both / the fewer of (n-grams of the one, n-grams of the other)

so a near copy, a long document that quotes most of a held-out one, and a passage cut out of a
held-out one all come near 1, and a document that shares a quotation or a phrase stays near 0. Three
rules keep a mere phrase from dropping anything:

- an n-gram that 4 or more held-out documents have is a common one (a licence, a page's header) and
  does not count;
- a document of under 32 n-grams (44 words) is only compared exactly, as a duplicate;
- the share is of one held-out document, never of all together.

Only one n-gram in `one_in` is looked at, chosen by its hash and so the same one in every document:
memory and time fall by as much, and shares stay right on average.
"""

import hashlib
import io
from collections.abc import Iterable, Iterator
from dataclasses import dataclass
from typing import BinaryIO, NamedTuple, Self

import numpy as np
import numpy.typing as npt

from pipeline.errors import CorpusError
from pipeline.ngrams import MOST_WORDS, NgramHasher

SUM_BYTES = 32
"""Length of the checksum at the end of an index."""

_COMMON = 4
_FEWEST = 32
# Hits of a document that are held before they are made unique.
_HITS = 1 << 16


@dataclass(frozen=True)
class ContaminationSettings:
    """Which documents of train count as repeating a held-out one."""

    ngram_words: int = 13
    """Words of an n-gram; as in GPT-3's decontamination."""

    share: float = 0.5
    """Least share of n-grams in common, by which a document of train is dropped. One word in 20
    changed at random leaves half of a copy's n-grams of 13 words."""

    one_in: int = 8
    """One n-gram in so many is looked at. With 8, a share of half is known to 0.05 for a document
    of 1,000 words and a document of 100 words or more is compared nearly always; with 1, all are
    from 44 words on, exactly."""

    def __post_init__(self) -> None:
        if not 2 <= self.ngram_words <= MOST_WORDS:
            raise CorpusError(f"ngram_words: must be 2 to {MOST_WORDS}, got {self.ngram_words}")
        if not 0 < self.share <= 1:
            raise CorpusError(f"share: must be above 0 and at most 1, got {self.share}")
        if not 1 <= self.one_in <= _FEWEST:
            raise CorpusError(f"one_in: must be 1 to {_FEWEST}, got {self.one_in}")

    @property
    def fewest(self) -> int:
        """Least n-grams looked at of a document that is compared."""
        return -(-_FEWEST // self.one_in)


def ngram_hashes(
    blocks: Iterable[bytes], settings: ContaminationSettings
) -> Iterator[npt.NDArray[np.uint64]]:
    """The n-grams that are looked at of one document, in their order, repeated ones repeated.

    What a word is, and that the hashes are frozen: `pipeline.ngrams`.
    """
    hasher = NgramHasher(settings.ngram_words)
    largest = np.uint64((2**64 - 1) // settings.one_in)
    for block in blocks:
        hashes = hasher.update(block)
        yield hashes[hashes <= largest]
    hashes = hasher.finish()
    yield hashes[hashes <= largest]


def held_out_hashes(
    blocks: Iterable[bytes], settings: ContaminationSettings
) -> npt.NDArray[np.uint64]:
    """What the index needs of a held-out document: its n-grams looked at, sorted, each once.

    8 bytes for each: 0.19 for each byte of Shakespeare with the default settings.
    """
    found = [np.unique(hashes) for hashes in ngram_hashes(blocks, settings)]
    return np.unique(np.concatenate(found))


class Overlap(NamedTuple):
    """How much a document of train shares with the held-out document that it shares most with."""

    share: float
    """0 to 1."""
    document: int | None
    """Which held-out document, by its place when the index was built; `None` at share 0."""


class HeldOutIndex:
    """The n-grams of all held-out documents: 12 bytes for each that is looked at, and 4 a document.

    That is about a quarter of the held-out text's bytes with the default settings (measured on
    Shakespeare: 0.28).
    """

    def __init__(
        self,
        settings: ContaminationSettings,
        hashes: npt.NDArray[np.uint64],
        documents: npt.NDArray[np.uint32],
        sizes: npt.NDArray[np.uint32],
    ) -> None:
        self._settings = settings
        self._hashes = hashes  # sorted; as often as there are documents that have it
        self._documents = documents  # the document of each
        self._sizes = sizes  # n-grams of each document that count

    @classmethod
    def build(
        cls, documents: Iterable[npt.NDArray[np.uint64]], settings: ContaminationSettings
    ) -> Self:
        """The index of what `held_out_hashes` gave for each held-out document, in their order."""
        each = list(documents)
        hashes = np.concatenate([np.empty(0, dtype=np.uint64), *each])
        owners = np.repeat(np.arange(len(each), dtype=np.uint32), [len(one) for one in each])
        order = np.argsort(hashes, kind="stable")
        hashes, owners = hashes[order], owners[order]
        first = np.flatnonzero(np.append(True, hashes[1:] != hashes[:-1])[: len(hashes)])
        times = np.diff(first, append=len(hashes))
        counts = np.repeat(times < _COMMON, times)
        hashes, owners = hashes[counts], owners[counts]
        sizes = np.bincount(owners, minlength=len(each)).astype(np.uint32)
        compared = sizes[owners] >= settings.fewest
        return cls(settings, hashes[compared], owners[compared], sizes)

    def save(self, file: BinaryIO) -> None:
        """Write the index: three arrays in NumPy's format and the SHA-256 of all before it, the
        same bytes for the same index."""
        data = io.BytesIO()
        for array in (self._hashes, self._documents, self._sizes):
            np.save(data, array, allow_pickle=False)
        file.write(data.getbuffer())
        file.write(hashlib.sha256(data.getbuffer()).digest())

    @classmethod
    def load(cls, data: bytes, settings: ContaminationSettings) -> Self:
        """The index of what was written of one with the same settings.

        One without a checksum, as the first versions wrote it, is taken as it is. Raises
        `ValueError` for bytes that were changed.
        """
        file = io.BytesIO(data)
        end = len(data) - SUM_BYTES
        is_whole = hashlib.sha256(memoryview(data)[: max(end, 0)]).digest() == data[end:]
        try:
            hashes, documents, sizes = (np.load(file, allow_pickle=False) for _ in range(3))
        except Exception as error:  # NumPy raises many kinds for a header that was changed
            raise ValueError(f"no index: {error}") from None
        if file.tell() != (end if is_whole else len(data)):
            raise ValueError("it is not what its checksum says")
        return cls(settings, hashes, documents, sizes)

    def overlap(self, blocks: Iterable[bytes]) -> Overlap:
        """Compare a document of train. It is contaminated if `share` is at least the settings'.

        Memory: a block's n-grams, and 8 bytes for each n-gram of the index that the document has.
        """
        seen, waiting, n_waiting, total = np.empty(0, dtype=np.int64), [], 0, 0
        for hashes in ngram_hashes(blocks, self._settings):
            total += len(hashes)
            waiting.append(self._find(np.unique(hashes)))
            n_waiting += len(waiting[-1])
            if n_waiting > max(_HITS, len(seen)):
                seen, waiting, n_waiting = np.unique(np.concatenate([seen, *waiting])), [], 0
        seen = np.unique(np.concatenate([seen, *waiting]))
        if len(seen) == 0 or total < self._settings.fewest:
            return Overlap(0.0, None)
        documents, common = np.unique(self._documents[seen], return_counts=True)
        shares = common / np.minimum(self._sizes[documents], total)
        best = int(np.argmax(shares))
        return Overlap(float(shares[best]), int(documents[best]))

    def _find(self, hashes: npt.NDArray[np.uint64]) -> npt.NDArray[np.int64]:
        """Where these are in the index, at most `_COMMON` - 1 places for each."""
        at = np.searchsorted(self._hashes, hashes)
        places = []
        for _ in range(_COMMON - 1):
            inside = at < len(self._hashes)
            at, hashes = at[inside], hashes[inside]
            equal = self._hashes[at] == hashes
            at, hashes = at[equal], hashes[equal]
            places.append(at)
            at = at + 1
        return np.concatenate(places)
