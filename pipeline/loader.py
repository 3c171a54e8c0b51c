"""Batches for a training or an evaluation: the rows asked for, read ahead by a thread.

The contract with the model is the `Batch`. Which windows a batch holds is decided by `order`
alone; a host asks for the rows of the global batch that its devices hold, and several hosts'
rows put together are the global batch.
"""

import itertools
import queue
import threading
import weakref
from collections.abc import Iterator, Sequence
from typing import NamedTuple

import numpy as np
import numpy.typing as npt

from pipeline.mixture import Mixture, mixed_windows
from pipeline.storage import Location
from pipeline.tokenizers import EOS, PAD
from pipeline.windows import WindowMode, Windows

Rows = npt.NDArray[np.int64] | slice
"""Positions inside the global batch. A slice is taken of its B rows; in an array, a position of B
or more is a padding row, which fills up a batch that the devices do not divide."""


# The order of so many rows is computed at once: numpy's 0.2 ms a call is most of a small batch.
_ORDER_ROWS = 4096


class Batch(NamedTuple):
    """R rows of a global batch, in the order they were asked for."""

    inputs: npt.NDArray[np.int32]
    """[R, T]: `targets` shifted right, beginning with eos."""
    targets: npt.NDArray[np.int32]
    """[R, T]: a model's ids; pad beyond the end of a window."""
    documents: npt.NDArray[np.int32]
    """[R, T]: the ordinal of the document that the input belongs to, from 1 in each row."""
    loss_mask: npt.NDArray[np.bool_]
    """[R, T]: where there is a target."""
    rows: npt.NDArray[np.int64]
    """[R]: rows of the endless sequence (training) or windows (evaluation); -1 is padding."""


class BatchStream(Iterator[Batch]):
    """Batches that a thread prepares ahead, at most `prefetch` of them finished at a time.

    The thread ends with the batches, with an error (which `next` raises), when the stream is
    closed (by `close` or at the end of a `with`) and when it is garbage collected: it holds no
    reference to the stream. A closed stream has no more batches.
    """

    def __init__(self, batches: Iterator[Batch], prefetch: int) -> None:
        """Begin to prepare `batches`; `prefetch` is at least 1."""
        if prefetch < 1:
            raise ValueError(f"prefetch: must be at least 1, got {prefetch}")
        self._queue: queue.Queue[Batch | _End] = queue.Queue(prefetch)
        self._stop = threading.Event()
        self._thread = threading.Thread(
            target=_pump,
            args=(batches, self._queue, self._stop),
            name="tvq batches",
            daemon=True,  # an exiting interpreter does not wait for it
        )
        self._end: _End | None = None
        self._release = weakref.finalize(self, _release, self._queue, self._stop)
        self._thread.start()

    def __next__(self) -> Batch:
        """The next batch; waits for it, raises what went wrong in making it."""
        if self._end is None:
            item = self._queue.get()
            if isinstance(item, Batch):
                return item
            self._end = item
            if item.error is not None:
                raise item.error
        raise StopIteration

    def close(self) -> None:
        """End the thread and wait for that; harmless when done twice."""
        self._end = self._end or _End(None)
        self._release()
        self._thread.join()

    def __enter__(self) -> "BatchStream":
        return self

    def __exit__(self, *_: object) -> None:
        self.close()


def training_batches(
    corpus: Location | Mixture,
    split: str = "train",
    *,
    sequence_length: int,
    batch_size: int,
    seed: int,
    window: WindowMode = "stream",
    shuffle_span: int | None = None,
    start_batch: int = 0,
    rows: Rows = slice(None),
    prefetch: int = 2,
    cache_bytes: int | None = None,
) -> BatchStream:
    """The batches of an endless training, from batch `start_batch` on.

    Batch n holds the rows nB..nB+B-1 of the endless sequence of a corpus (`order.Order`) or of a
    mixture of them (`mixture.MixtureOrder`), B being `batch_size`; so it may lie across the end of
    an epoch, and starting at any n costs nothing. The shards of an object store are fetched ahead
    of need into the cache (`shard_cache`). Raises `CorpusError` at once for what the manifests
    show, and from `next` for a shard that is missing or damaged.
    """
    positions = _positions(rows, batch_size)
    weights = corpus.weights if isinstance(corpus, Mixture) else {str(corpus): 1}
    mixed = mixed_windows(
        weights,
        split,
        sequence_length=sequence_length,
        seed=seed,
        window=window,
        shuffle_span=shuffle_span,
        cache_bytes=cache_bytes,
    )
    sources, order = mixed.sources, mixed.order

    # No more than an epoch: a tiny split would need the permutations of a thousand of them.
    ahead = max(1, min(_ORDER_ROWS, order.n) // batch_size)

    def batches() -> Iterator[Batch]:
        for batch in itertools.count(start_batch, ahead):
            firsts = np.arange(batch, batch + ahead)[:, None] * batch_size
            is_row = positions < batch_size
            wanted = np.where(is_row, positions + firsts, -1)
            mixed.fetch_ahead(int(firsts[0, 0]))
            corpora, windows = order.windows(np.where(is_row, wanted, 0))
            windows = np.where(is_row, windows, -1)
            for of_batch in zip(wanted, corpora, windows, strict=True):
                yield _read(sources, *of_batch)

    return BatchStream(batches(), prefetch)


def evaluation_batches(
    corpus: Location,
    split: str,
    *,
    sequence_length: int,
    batch_size: int,
    window: WindowMode = "stream",
    limit_windows: int | None = None,
    rows: Rows = slice(None),
    prefetch: int = 2,
    cache_bytes: int | None = None,
) -> BatchStream:
    """The windows of a split in order, each once, or the first `limit_windows` of them.

    Every host gets the same number of batches; the last is filled up with padding rows.
    """
    positions = _positions(rows, batch_size)
    windows = Windows(
        corpus,
        split,
        sequence_length=sequence_length,
        mode=window,
        shards_at_once=2,
        cache_bytes=cache_bytes,
    )
    n = len(windows) if limit_windows is None else min(limit_windows, len(windows))

    def batches() -> Iterator[Batch]:
        windows.prefetch(range(len(windows.split.shards)))
        for first in range(0, n, batch_size):
            chosen = positions + first
            chosen = np.where((positions < batch_size) & (chosen < n), chosen, -1)
            yield _read([windows], chosen, np.zeros_like(chosen), chosen)

    return BatchStream(batches(), prefetch)


class _End(NamedTuple):
    """No batch follows; with the error that ended them."""

    error: BaseException | None


def _pump(
    batches: Iterator[Batch], out: "queue.Queue[Batch | _End]", stop: threading.Event
) -> None:
    """The thread: it never waits once `stop` is set and the queue has been emptied."""
    end = _End(None)
    try:
        for batch in batches:
            if stop.is_set():
                return
            out.put(batch)
            if stop.is_set():
                return
    except BaseException as error:
        end = _End(error)
    if not stop.is_set():
        out.put(end)


def _release(out: "queue.Queue[Batch | _End]", stop: threading.Event) -> None:
    """Let the thread end. It may put one more item, for which the emptied queue has room."""
    stop.set()
    while True:
        try:
            out.get_nowait()
        except queue.Empty:
            return


def _positions(rows: Rows, batch_size: int) -> npt.NDArray[np.int64]:
    if batch_size < 1:
        raise ValueError(f"batch_size: must be at least 1, got {batch_size}")
    if isinstance(rows, slice):
        return np.arange(batch_size)[rows]
    positions = np.asarray(rows, np.int64)
    if positions.size and int(positions.min()) < 0:
        raise ValueError("rows: positions inside the global batch begin at 0")
    return positions


def _read(
    sources: Sequence[Windows],
    rows: npt.NDArray[np.int64],
    corpora: npt.NDArray[np.int64],
    windows: npt.NDArray[np.int64],
) -> Batch:
    """Make a batch of the `windows` [R] of the sources `corpora` [R], window -1 being padding."""
    targets = np.full((len(windows), sources[0].sequence_length), PAD, np.int32)
    for row, (corpus, window) in enumerate(zip(corpora.tolist(), windows.tolist(), strict=True)):
        if window >= 0:
            sources[corpus].read_into(window, targets[row])
    inputs = np.empty_like(targets)
    inputs[:, 0] = EOS
    inputs[:, 1:] = targets[:, :-1]
    documents = np.cumsum(inputs == EOS, axis=1, dtype=np.int32)
    return Batch(inputs, targets, documents, targets != PAD, rows)
