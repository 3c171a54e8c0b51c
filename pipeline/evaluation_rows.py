"""Which targets of a split are scored together: spans of its stream, each token in one of them.

A span is scored from an empty cache, T targets at a time with the cache handed on, so every target
in it sees all that is before it in the span. The spans are the windows of T (`windows`), or with
`carry` the documents, whatever their length. They follow from the manifest, T and the mode alone:
whoever scores a batch of them gets the same arrays.
"""

from collections.abc import Iterator
from typing import NamedTuple

import numpy as np
import numpy.typing as npt

from pipeline.document_table import DocumentTable
from pipeline.errors import CorpusError
from pipeline.tokenizers import EOS, PAD
from pipeline.windows import WindowMode, Windows

Spans = npt.NDArray[np.int64]
"""[spans, 2]: positions of the split's stream at which each begins and ends."""


class Piece(NamedTuple):
    """At most T targets of each of B spans. A row whose span has ended has none."""

    inputs: npt.NDArray[np.int32]
    """[B, T]: `targets` shifted right. A span begins with eos, a later piece of it with the target
    before."""
    targets: npt.NDArray[np.int32]
    """[B, T]: a model's ids, pad where there is none."""
    loss_mask: npt.NDArray[np.bool_]
    """[B, T]: where there is a target."""


def evaluation_spans(
    documents: DocumentTable, *, sequence_length: int, window: WindowMode, carry: bool
) -> Spans:
    """The spans of a split, in the order in which they are scored.

    Windows come in the order of the stream. With `carry` documents come by length, the longest
    first, so that those of a batch end at about the same time. The eos behind a document is a
    target in `stream` mode. Raises `CorpusError` in `document` mode if a document is longer than T
    and its cache is not carried.
    """
    begins = documents.begins
    if carry or window == "document":
        spans = np.stack([begins[:-1], begins[1:] - (window == "document")], axis=1)
        longest = int(documents.tokens.max())
        if carry:
            return spans[np.argsort(spans[:, 0] - spans[:, 1], kind="stable")]
        if longest > sequence_length:
            raise CorpusError(
                f"a document has {longest} tokens, a window {sequence_length}: evaluate with"
                f" --carry or --length {longest}"
            )
        return spans
    cuts = np.append(np.arange(0, begins[-1], sequence_length), begins[-1])
    return np.stack([cuts[:-1], cuts[1:]], axis=1)


def pieces(windows: Windows, spans: Spans, *, rows: int) -> Iterator[Piece]:
    """The targets of at most `rows` spans, T at a time; the rows that are left over are empty.

    `windows` is the split as a stream. Raises `CorpusError` naming a shard that is damaged.
    """
    T = windows.sequence_length
    last = np.full(rows, EOS, np.int32)
    for offset in range(0, int((spans[:, 1] - spans[:, 0]).max()), T):
        targets = np.full((rows, T), PAD, np.int32)
        counts = np.zeros(rows, np.int64)
        for row, (begin, end) in enumerate(spans.tolist()):
            counts[row] = min(max(end - begin - offset, 0), T)
            windows.read_stream(begin + min(offset, end - begin), targets[row, : counts[row]])
        inputs = np.concatenate([last[:, None], targets[:, :-1]], axis=1)
        yield Piece(inputs, targets, np.arange(T) < counts[:, None])
        last = targets[:, -1]
