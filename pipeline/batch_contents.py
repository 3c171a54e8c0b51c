"""Which documents a batch of training holds: the same order and windows as the loader's."""

import contextlib
from typing import Any, NamedTuple

import numpy as np
import numpy.typing as npt

from pipeline.loader import training_batches
from pipeline.mixture import MixedCorpus, Mixture, mixed_windows
from pipeline.shard_cache import ShardCache, default_folder
from pipeline.shards import ShardReader
from pipeline.storage import open_store
from pipeline.windows import WindowMode

_SPLIT = "train"


class Span(NamedTuple):
    """The tokens of one document that lie in a window."""

    id: str
    begin: int
    end: int
    """Tokens begin to end - 1 of the document."""
    tokens: int
    """Of the whole document."""
    eos: bool
    """Its end of document lies in the window too."""


class BatchRow(NamedTuple):
    """One row of a batch."""

    row: int
    """Of the endless sequence."""
    corpus: int
    """Which of the mixture's."""
    epoch: int
    """Of that corpus, from 0."""
    window: int
    """Of its train split."""
    shard: str
    """In which its first token lies."""
    spans: list[Span]
    targets: npt.NDArray[np.int32]
    """[at most T]: the ids that the model is to predict."""


def batch_contents(
    mixture: Mixture,
    *,
    batch: int,
    batch_size: int,
    sequence_length: int,
    seed: int,
    window: WindowMode = "stream",
    shuffle_span: int | None = None,
) -> list[BatchRow]:
    """The rows of batch `batch` >= 0 of a training with these settings.

    Raises `CorpusError` as `loader.training_batches` does. The tokens are what that gave, and are
    held against where they are said to come from.
    """
    cut: Any = {"sequence_length": sequence_length, "window": window}
    stream = training_batches(
        mixture,
        batch_size=batch_size,
        seed=seed,
        shuffle_span=shuffle_span,
        start_batch=batch,
        prefetch=1,
        **cut,
    )
    with stream:
        loaded = next(stream)
    sources, orders, _, order = mixed_windows(
        mixture.weights, _SPLIT, seed=seed, shuffle_span=shuffle_span, **cut
    )
    corpora, own = order.places(loaded.rows)
    _, windows = order.windows(loaded.rows)
    found = []
    with contextlib.ExitStack() as open_caches:
        layouts = [_Layout(member, window, open_caches) for member in mixture.corpora]
        for at, (corpus, row, number) in enumerate(
            zip(corpora.tolist(), own.tolist(), windows.tolist(), strict=True)
        ):
            targets = loaded.targets[at][loaded.loss_mask[at]]
            if not np.array_equal(targets, sources[corpus].read(number)):
                raise RuntimeError(f"row {at} of batch {batch} is not window {number}")
            spans = layouts[corpus].spans(number, sequence_length)
            shards = sources[corpus].shard_windows
            shard = int(np.searchsorted(shards, number, side="right")) - 1
            found.append(
                BatchRow(
                    int(loaded.rows[at]),
                    corpus,
                    row // orders[corpus].n,
                    number,
                    sources[corpus].split.shards[shard].path,
                    spans,
                    targets,
                )
            )
    return found


class _Documents(NamedTuple):
    """The documents of a shard, and where they lie in its piece of the stream."""

    reader: ShardReader
    lengths: npt.NDArray[np.int64]
    """Tokens of each document [documents]."""
    begins: npt.NDArray[np.int64]
    """Position of each document's first token [documents]."""


class _Layout:
    """Where the documents of a corpus lie in its windows; opens the shards that it is asked of."""

    def __init__(
        self, corpus: MixedCorpus, mode: WindowMode, open_caches: contextlib.ExitStack
    ) -> None:
        self._corpus, self._mode = corpus, mode
        cache = ShardCache(open_store(corpus.path), default_folder(), None)
        self._cache = open_caches.enter_context(cache)
        self._shards = corpus.manifest.split(_SPLIT).shards
        self._opened: dict[int, _Documents] = {}
        counts = [(shard.tokens + shard.documents, shard.documents) for shard in self._shards]
        self._ends = np.cumsum([count[mode == "document"] for count in counts])

    def spans(self, window: int, sequence_length: int) -> list[Span]:
        """The documents of a window."""
        if self._mode == "document":
            index = int(np.searchsorted(self._ends, window, side="right"))
            shard = self._documents(index)
            number = window - int(self._ends[index]) + self._shards[index].documents
            length = int(shard.lengths[number])
            return [Span(self._id(shard, number), 0, length, length, eos=False)]
        begin = window * sequence_length
        end = min(begin + sequence_length, int(self._ends[-1]))
        found = []
        index = int(np.searchsorted(self._ends, begin, side="right"))
        while index < len(self._ends) and begin < end:
            shard = self._documents(index)
            first = int(self._ends[index - 1]) if index else 0
            number = int(np.searchsorted(shard.begins + first, begin, side="right")) - 1
            while number < len(shard.begins) and begin < end:
                at, length = first + int(shard.begins[number]), int(shard.lengths[number])
                stop = min(end, at + length + 1)
                found.append(
                    Span(
                        self._id(shard, number),
                        begin - at,
                        min(stop - at, length),
                        length,
                        eos=stop == at + length + 1,
                    )
                )
                begin, number = stop, number + 1
            index += 1
        return found

    def _documents(self, index: int) -> _Documents:
        if index not in self._opened:
            shard, manifest = self._shards[index], self._corpus.manifest
            reader = ShardReader(self._cache.path(shard), shard, np.dtype(manifest.tokenizer.dtype))
            lengths = np.add.reduceat(reader.lengths, reader.first_rows)
            begins = np.cumsum(lengths + 1) - lengths - 1
            self._opened[index] = _Documents(reader, lengths, begins)
        return self._opened[index]

    def _id(self, shard: _Documents, document: int) -> str:
        return shard.reader.document_id(int(shard.reader.first_rows[document]))
