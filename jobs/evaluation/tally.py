"""Adds scores up: by document, by block of a document, and by position.

Everything is summed in float64, a span's targets of one block at once and the spans of a block in
their order: the figures do not depend on who scored what.
"""

import itertools

import numpy as np
import numpy.typing as npt

from jobs.evaluation.record import BLOCK_KIB, PositionBucket
from jobs.evaluation.scoring import SpanScores
from pipeline.document_table import DocumentTable
from pipeline.tokenizers import TOKEN_OFFSET
from pipeline.windows import Windows

FIRST_BUCKET = 64
"""Targets of the first position bucket; each of the following ends at twice the position."""

Integers = npt.NDArray[np.int64]


class BlockTable:
    """Where the blocks of one corpus's split begin, and how large they are."""

    def __init__(self, begins: Integers, document: Integers, n_bytes: Integers) -> None:
        """Columns [blocks]: position in the stream, number of the document, bytes."""
        self.begins, self.document, self.n_bytes = begins, document, n_bytes


def whole_documents(documents: DocumentTable) -> BlockTable:
    """Each document is one block."""
    return BlockTable(documents.begins[:-1], np.arange(len(documents.ids)), documents.n_bytes)


def cut_documents(documents: DocumentTable, windows: Windows, token_bytes: Integers) -> BlockTable:
    """Documents cut into equal blocks, as near to BLOCK_KIB of text as can be.

    Args:
        documents: of the split.
        windows: of the same split, as a stream.
        token_bytes: the bytes that each stored id writes [ids].
    """
    begins: list[int] = []
    document: list[int] = []
    n_bytes: list[int] = []
    for number, (start, tokens) in enumerate(
        zip(documents.begins.tolist(), documents.tokens.tolist(), strict=False)
    ):
        ids = np.empty(tokens, np.int32)
        windows.read_stream(start, ids)
        ends = np.cumsum(token_bytes[ids - TOKEN_OFFSET])
        size = int(ends[-1])
        n_blocks = max(1, round(size / (BLOCK_KIB * 1024)))
        cuts = np.searchsorted(ends, np.arange(1, n_blocks) * size / n_blocks) + 1
        borders = [0, *np.unique(cuts[cuts < tokens]).tolist(), tokens]
        for begin, end in itertools.pairwise(borders):
            begins.append(start + begin)
            document.append(number)
            n_bytes.append(int(ends[end - 1] - (ends[begin - 1] if begin else 0)))
    return BlockTable(np.array(begins), np.array(document), np.array(n_bytes))


class Tally:
    """The sums over one corpus's split."""

    def __init__(self, blocks: BlockTable) -> None:
        self.blocks = blocks
        self.nats = np.zeros(len(blocks.begins))
        """[blocks]"""
        self.n_tokens = np.zeros(len(blocks.begins), np.int64)
        """[blocks]"""
        self.n_correct = np.zeros(len(blocks.begins), np.int64)
        """[blocks]"""
        self._position_nats: list[float] = []
        self._position_tokens: list[int] = []

    def add(self, begin: int, scores: SpanScores) -> None:
        """Adds a span that begins at this position of the stream."""
        nats, n = scores.nats.astype(np.float64), len(scores.nats)
        first, last = np.searchsorted(self.blocks.begins, [begin, begin + n - 1], side="right") - 1
        inside = self.blocks.begins[first + 1 : last + 1] - begin
        cuts = np.concatenate([[0], inside])
        here = slice(first, last + 1)
        self.nats[here] += np.add.reduceat(nats, cuts)
        self.n_tokens[here] += np.diff(cuts, append=n)
        self.n_correct[here] += np.add.reduceat(scores.correct, cuts, dtype=np.int64)
        borders = bucket_borders(n)
        sums = np.add.reduceat(nats, borders[:-1])
        for bucket, (total, width) in enumerate(zip(sums, np.diff(borders), strict=True)):
            if bucket == len(self._position_nats):
                self._position_nats.append(0.0)
                self._position_tokens.append(0)
            self._position_nats[bucket] += float(total)
            self._position_tokens[bucket] += int(width)

    def by_document(self, values: npt.NDArray) -> npt.NDArray:
        """Sums over each document of values of the blocks."""
        return np.add.reduceat(values, np.flatnonzero(np.diff(self.blocks.document, prepend=-1)))

    def positions(self, longest: int) -> tuple[PositionBucket, ...]:
        """The buckets; the last ends with the longest span."""
        borders = bucket_borders(longest).tolist()
        return tuple(
            PositionBucket(*pair, targets, nats)
            for pair, targets, nats in zip(
                itertools.pairwise(borders),
                self._position_tokens,
                self._position_nats,
                strict=True,
            )
        )


def bucket_borders(length: int) -> Integers:
    """0, 64, 128, 256, ... and, at the end, the length."""
    borders = [0]
    while (following := max(2 * borders[-1], FIRST_BUCKET)) < length:
        borders.append(following)
    return np.array([*borders, length])
