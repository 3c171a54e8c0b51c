"""Scores the spans of a split, a batch at a time, on the devices of this process.

The batches are the same whoever scores them and wherever: their number of rows depends on T
alone. What comes of a batch is the nats of each of its targets; sums are the business of who asked
(`jobs/evaluation/tally.py`), in one process and in one order.
"""

import contextlib
import functools
import queue
from collections import deque
from collections.abc import Iterable, Iterator
from concurrent.futures import Future, ThreadPoolExecutor
from typing import Any, NamedTuple

import numpy as np
import numpy.typing as npt

from jobs.compiler_options import compiler_options
from jobs.evaluation.trained_model import TrainedModel
from model.config import ModelConfig
from pipeline.evaluation_rows import Spans, pieces
from pipeline.windows import Windows

_TOKENS = 16384
_MOST_ROWS = 16


class Job(NamedTuple):
    """What is scored, for every worker the same."""

    split: str
    corpora: tuple[str, ...]
    """Where they lie, in the order of `Batch.corpus`."""
    length: int
    """T."""
    longest: int
    """Targets of the longest span."""
    batches: int
    """How many there are in all."""

    rows: int
    """B: spans scored side by side on a device."""


class Batch(NamedTuple):
    """Spans to be scored side by side."""

    corpus: int
    spans: Spans
    """At most B of them."""


class SpanScores(NamedTuple):
    """Of each target of one span, in order."""

    nats: npt.NDArray[np.float32]
    """[n]"""
    correct: npt.NDArray[np.bool_]
    """[n]: whether it was the likeliest."""
    targets: npt.NDArray[np.int32]
    """[n]: a model's ids."""


def rows_of(length: int) -> int:
    """B, for spans that are scored T targets at a time: of T alone, so that the figures do not
    depend on the machine."""
    return min(max(_TOKENS // length, 1), _MOST_ROWS)


def batches(corpus: int, spans: Spans, rows: int) -> list[Batch]:
    """The spans of one corpus, `rows` at a time."""
    return [Batch(corpus, spans[at : at + rows]) for at in range(0, len(spans), rows)]


@functools.lru_cache(maxsize=4)
def _compiled(model: ModelConfig) -> Any:
    """One function for all devices and evaluations, so that each shape is compiled once."""
    import jax

    from model.scoring import token_scores

    return jax.jit(
        functools.partial(token_scores, model),
        donate_argnames="cache",
        compiler_options=compiler_options(),
    )


class Scorer:
    """A model on one device, and its own view of the corpora. Only one thread may use it."""

    def __init__(self, trained: TrainedModel, job: Job, device: Any) -> None:
        """Copies the model to the device and compiles."""
        import jax

        from model.transformer import initial_cache

        model = trained.recipe.model
        self._job, self._data, self._device = job, trained.recipe.data, device
        self._windows: dict[int, Windows] = {}
        self._arrays = jax.device_put((trained.params, trained.codebooks), device)
        capacity = -(-job.longest // job.length) * job.length
        self._empty = functools.partial(initial_cache, model, job.rows, capacity)
        self._step = _compiled(model)
        nothing = np.zeros((job.rows, job.length), np.int32)
        jax.block_until_ready(self._call(self._new_cache(), nothing, nothing, nothing > 0))

    def score(self, batch: Batch) -> list[SpanScores]:
        """The scores of each span of the batch.

        Raises `CorpusError` naming a shard that is damaged.
        """
        import jax

        cache, waiting = self._new_cache(), deque()
        nats, correct, targets = [], [], []

        def fetch() -> None:
            piece, scores = waiting.popleft()
            nats.append(jax.device_get(scores.nats))
            correct.append(jax.device_get(scores.correct))
            targets.append(piece.targets)

        for piece in pieces(self._stream(batch.corpus), batch.spans, rows=self._job.rows):
            scores = self._call(cache, *piece)
            cache = scores.cache
            waiting.append((piece, scores._replace(cache=None)))
            if len(waiting) > 1:  # the device is at the next piece meanwhile
                fetch()
        fetch()
        lengths = (batch.spans[:, 1] - batch.spans[:, 0]).tolist()
        whole = [np.concatenate(parts, axis=1) for parts in (nats, correct, targets)]
        return [
            SpanScores(*(array[row, :length] for array in whole))
            for row, length in enumerate(lengths)
        ]

    def _call(self, cache: Any, *piece: npt.NDArray) -> Any:
        import jax

        return self._step(*self._arrays, cache, *jax.device_put(piece, self._device))

    def _new_cache(self) -> Any:
        import jax

        return jax.device_put(self._empty(), self._device)

    def _stream(self, corpus: int) -> Windows:
        if corpus not in self._windows:
            self._windows[corpus] = Windows(
                self._job.corpora[corpus],
                self._job.split,
                sequence_length=self._job.length,
                shards_at_once=2,
                cache_bytes=self._data.cache_bytes,
            )
        return self._windows[corpus]


class ScoringHere:
    """Scores on every device of this process, in a thread each. Several threads may use it."""

    def __init__(self, trained: TrainedModel, job: Job) -> None:
        """Compiles, for no more devices than there are batches."""
        import jax

        devices = jax.local_devices()[: job.batches]
        self._scorers: queue.Queue[Scorer] = queue.Queue()
        for device in devices:
            self._scorers.put(Scorer(trained, job, device))
        self._n = len(devices)

    def scores(self, batches: Iterable[Batch]) -> Iterator[list[SpanScores]]:
        """Of each batch, in their order; at most two a device are ahead of who reads."""
        pool = ThreadPoolExecutor(self._n, thread_name_prefix="tvq scoring")
        ahead: deque[Future[list[SpanScores]]] = deque()
        with contextlib.ExitStack() as stack:
            stack.callback(pool.shutdown, cancel_futures=True)
            for batch in batches:
                ahead.append(pool.submit(self.score, batch))
                if len(ahead) > 2 * self._n:
                    yield ahead.popleft().result()
            while ahead:
                yield ahead.popleft().result()

    def score(self, batch: Batch) -> list[SpanScores]:
        """Of each of its spans, once a device is free."""
        scorer = self._scorers.get()
        try:
            return scorer.score(batch)
        finally:
            self._scorers.put(scorer)
