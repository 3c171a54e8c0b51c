"""Near copies: documents whose sets of word shingles are nearly the same, found by MinHash.

A document's signature is the least hash of its shingles under each of `permutations` functions
(rensa's R-MinHash); the share of equal values estimates the Jaccard similarity of the two sets,
with a standard error of sqrt(s (1 - s) / permutations): 0.035 at 0.8 with 128. Signatures cut into
bands find the pairs that are worth comparing.
"""

import math
from dataclasses import dataclass

import numpy as np
import numpy.typing as npt

from pipeline.errors import CorpusError
from pipeline.ngrams import MOST_WORDS, NgramHasher

_SEED = 20_240_229
# A pair at the threshold may fail to meet in a band this often.
_MISSED = 0.01
_EMPTY = np.uint32(0xFFFFFFFF)
# Bytes hashed before the hashes are signed: rensa takes 7 ns a shingle for ten thousand at once,
# 118 for two hundred and 14 for three million.
_AT_ONCE = 1 << 16
# Documents that the index has room for at first, and that are handled at once.
_ROOM = 1024


@dataclass(frozen=True)
class NearDuplicateSettings:
    """Which documents count as near copies of one another."""

    similarity: float = 0.8
    """Least Jaccard similarity of two documents' sets of shingles, as estimated."""

    shingle_words: int = 5
    """Words of a shingle; a document of fewer words is one shingle."""

    permutations: int = 128
    """Values of a signature: 4 bytes each, a document."""

    def __post_init__(self) -> None:
        if not 0 < self.similarity <= 1:
            raise CorpusError(f"similarity: must be above 0 and at most 1, got {self.similarity}")
        if not 1 <= self.shingle_words <= MOST_WORDS:
            raise CorpusError(f"shingle_words: must be 1 to {MOST_WORDS}, got {self.shingle_words}")
        if not 16 <= self.permutations <= 1024:
            raise CorpusError(f"permutations: must be 16 to 1024, got {self.permutations}")


class Signer:
    """The signature of one document, which is given in blocks of any length."""

    def __init__(self, settings: NearDuplicateSettings) -> None:
        self._settings = settings
        self._hasher = NgramHasher(settings.shingle_words)
        self._waiting: list[npt.NDArray[np.uint64]] = []
        self._least = np.full(settings.permutations, _EMPTY)
        self._any = False

    def update(self, block: bytes) -> None:
        """Take the next block."""
        for at in range(0, len(block), _AT_ONCE):
            self._waiting.append(self._hasher.update(block[at : at + _AT_ONCE]))
            if sum(len(shingles) for shingles in self._waiting) >= _AT_ONCE // 8:
                self._sign()

    def signature(self) -> npt.NDArray[np.uint32] | None:
        """uint32[permutations]; `None` for a document without a word, which is no copy of any."""
        self._waiting.append(self._hasher.finish(short=True))
        self._sign()
        return self._least if self._any else None

    def _sign(self) -> None:
        shingles = np.concatenate(self._waiting)
        self._waiting = []
        if len(shingles) == 0:
            return
        from rensa import RMinHash  # pyright: ignore[reportAttributeAccessIssue]

        # The signature of a union is the least of each value (a test holds rensa to it), so the
        # shingles of a document need not be held together.
        rows = RMinHash.digest_matrix_from_flat_token_hashes(
            shingles, [0, len(shingles)], self._settings.permutations, _SEED
        ).to_rows()
        np.minimum(self._least, np.array(rows[0], dtype=np.uint32), out=self._least)
        self._any = True


class NearDuplicates:
    """The signatures of the documents that are kept; finds the earliest similar one.

    A pair is found if its estimated similarity is at least `similarity` and it shares a band: at
    the threshold itself, 99 of 100 do. With the default settings 0.76 kB a document
    when its room is full, 1.44 just after growing, and 2.3 for a moment while growing (measured).
    Time goes with the number of documents that share a band, so a corpus of many half-alike
    documents takes longer than linear.
    """

    def __init__(self, settings: NearDuplicateSettings) -> None:
        self._fewest = math.ceil(settings.similarity * settings.permutations - 1e-9)
        self._bands, self._rows = _cut(settings)
        self._each_band = np.arange(self._bands)
        self._count = 0
        self._signatures = np.empty((_ROOM, settings.permutations), dtype=np.uint32)
        self._indices = np.empty(_ROOM, dtype=np.int64)
        # A hash table a band, with chains: the newest document of each slot, and for each document
        # the one before it in its slot; -1 ends a chain.
        self._newest = np.full((self._bands, _ROOM), -1, dtype=np.int32)
        self._before = np.empty((_ROOM, self._bands), dtype=np.int32)

    def first_similar(self, signature: npt.NDArray[np.uint32]) -> int | None:
        """The index given with the earliest added document that is similar; `None` if none is."""
        chains = self._newest[self._each_band, self._slots(signature[None])[0]]
        bands, candidates = self._each_band, [np.empty(0, dtype=np.int32)]
        while True:
            alive = chains >= 0
            chains, bands = chains[alive], bands[alive]
            if len(chains) == 0:
                break
            candidates.append(chains)
            chains = self._before[chains, bands]
        rows = np.unique(np.concatenate(candidates))
        for at in range(0, len(rows), _ROOM):
            some = rows[at : at + _ROOM]
            equal = np.count_nonzero(self._signatures[some] == signature, axis=1)
            similar = some[equal >= self._fewest]
            if len(similar):
                return int(self._indices[similar[0]])
        return None

    def add(self, index: int, signature: npt.NDArray[np.uint32]) -> None:
        """Keep a document's signature under `index`, whatever is similar to it."""
        if self._count == len(self._signatures):
            self._grow()
        at = self._count
        slots = self._slots(signature[None])[0]
        self._signatures[at] = signature
        self._indices[at] = index
        self._before[at] = self._newest[self._each_band, slots]
        self._newest[self._each_band, slots] = at
        self._count += 1

    def _slots(self, signatures: npt.NDArray[np.uint32]) -> npt.NDArray[np.uint64]:
        """uint64[documents, bands]: where each band of each signature is in its table."""
        used = signatures[:, : self._bands * self._rows].astype(np.uint64)
        bands = used.reshape(len(signatures), self._bands, self._rows)
        keys = np.zeros(bands.shape[:2], dtype=np.uint64)
        for row in range(self._rows):
            keys = (keys ^ bands[:, :, row]) * np.uint64(0x9E3779B97F4A7C15)
            keys ^= keys >> np.uint64(29)
        return keys % np.uint64(self._newest.shape[1])

    def _grow(self) -> None:
        """Double the room; the slots change with the size of the tables."""
        n = self._count
        self._signatures = np.concatenate([self._signatures, np.empty_like(self._signatures)])
        self._indices = np.concatenate([self._indices, np.empty_like(self._indices)])
        self._newest = np.full((self._bands, 2 * n), -1, dtype=np.int32)
        self._before = np.full((2 * n, self._bands), -1, dtype=np.int32)
        for at in range(0, n, _ROOM):
            documents = np.arange(at, min(at + _ROOM, n), dtype=np.int32)
            slots = self._slots(self._signatures[documents])
            for band in self._each_band:
                self._link(int(band), documents, slots[:, band])

    def _link(
        self, band: int, documents: npt.NDArray[np.int32], slots: npt.NDArray[np.uint64]
    ) -> None:
        """Put documents into one band's table; they come in their order."""
        order = np.argsort(slots, kind="stable")
        documents, slots = documents[order], slots[order]
        same = slots[1:] == slots[:-1]
        first, last = np.append(True, ~same), np.append(~same, True)
        self._before[documents[first], band] = self._newest[band, slots[first]]
        self._before[documents[1:][same], band] = documents[:-1][same]
        self._newest[band, slots[last]] = documents[last]


def _cut(settings: NearDuplicateSettings) -> tuple[int, int]:
    """(bands, rows): the longest bands of which similar pairs nearly always share one."""
    for rows in range(settings.permutations, 0, -1):
        bands = settings.permutations // rows
        missed = (1 - settings.similarity**rows) ** bands
        if missed <= _MISSED:
            return bands, rows
    return settings.permutations, 1
