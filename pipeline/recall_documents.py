"""Synthetic documents that ask for associative recall: pairs of a key and a value, each twice.

    kBpF3xBkB...   k is bound to B; p to F; ...; when k comes again, B follows

A document of T bytes has T/4 keys. At a key's first place its value is drawn at random and cannot
be known; at its second it is the same, and whoever remembers the first predicts it. How far the
two lie apart is drawn log-uniformly, so that each doubling of the distance is asked as often. This
is multi-query associative recall (Arora et al. 2023, "Zoology") with the distance in the place of
a fixed order of bindings and questions.

Documents are a function of (seed, number, T): nothing is drawn in sequence.
"""

import hashlib
from collections.abc import Sequence
from typing import NamedTuple

import numpy as np
import numpy.typing as npt

from pipeline.errors import CorpusError
from pipeline.order import mix

VALUES = b"0123456789ABCDEF"
KEYS = bytes(byte for byte in range(0x21, 0x7F) if byte not in VALUES)
LONGEST = 4 * len(KEYS)
"""Most bytes of a document: beyond, keys would have to be bound twice."""


class RecallDocuments(NamedTuple):
    """Documents, and what they ask."""

    texts: npt.NDArray[np.uint8]
    """[documents, T]"""
    distances: npt.NDArray[np.int64]
    """[documents, T]: bytes back to where the value was bound that is recalled here, 0 where
    nothing can be."""


def recall_documents(seed: int, numbers: Sequence[int], length: int) -> RecallDocuments:
    """The documents of these numbers, of T bytes each.

    Raises `CorpusError` for a T that is not possible.
    """
    if not 4 <= length <= LONGEST or length % 4:
        raise CorpusError(
            f"recall: documents have a multiple of 4 bytes, at most {LONGEST}, got {length}"
        )
    N, n_slots, n_keys = len(numbers), length // 2, length // 4
    hashes = np.stack([_hashes(seed, number, len(KEYS) + n_slots) for number in numbers])
    order = np.argsort(hashes[:, : len(KEYS)], axis=1, kind="stable")[:, :n_keys]
    keys = np.frombuffer(KEYS, np.uint8)[order]
    drawn = hashes[:, len(KEYS) : len(KEYS) + n_keys] % np.uint64(len(VALUES))
    values = np.frombuffer(VALUES, np.uint8)[drawn.astype(np.int64)]
    shares = hashes[:, len(KEYS) + n_keys :] / 2**64
    texts = np.empty((N, n_slots, 2), np.uint8)
    distances = np.zeros((N, n_slots, 2), np.int64)
    free, rows, slots = np.ones((N, n_slots), bool), np.arange(N), np.arange(n_slots)
    for pair in range(n_keys):
        first = np.argmax(free, axis=1)
        free[rows, first] = False
        # Uniform on a logarithmic scale up to the end; the nearest free slot takes it.
        wanted = first + (n_slots - first) ** shares[:, pair]
        away = np.where(free, np.abs(slots - wanted[:, None]), np.inf)
        second = np.argmin(away, axis=1)
        free[rows, second] = False
        for slot in (first, second):
            texts[rows, slot, 0], texts[rows, slot, 1] = keys[:, pair], values[:, pair]
        distances[rows, second, 1] = 2 * (second - first)
    return RecallDocuments(texts.reshape(N, length), distances.reshape(N, length))


def _hashes(seed: int, number: int, count: int) -> npt.NDArray[np.uint64]:
    digest = hashlib.sha512(f"tvq recall 1 {seed} {number}".encode()).digest()
    return mix(np.arange(count, dtype=np.uint64), np.frombuffer(digest, "<u8")[0])
