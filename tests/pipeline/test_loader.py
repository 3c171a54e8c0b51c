"""Batches against their definition, whoever asks for which rows from where."""

import gc
import itertools
import threading
import time
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from pipeline.errors import CorpusError
from pipeline.loader import Batch, BatchStream, evaluation_batches, training_batches
from pipeline.manifest import Manifest
from pipeline.order import Order
from pipeline.windows import Windows
from tests.pipeline.corpora import shards_of_documents, stream, write_corpus


def take(batches: BatchStream, n: int) -> list[Batch]:
    with batches:
        return list(itertools.islice(batches, n))


def check_row(ids: list[int], T: int, batch: Batch, r: int) -> None:
    """One row, by the words of `Batch`, in plain Python."""
    pad = [0] * (T - len(ids))
    inputs = [1, *ids, *pad][:T]
    assert batch.targets[r].tolist() == ids + pad
    assert batch.inputs[r].tolist() == inputs
    assert batch.loss_mask[r].tolist() == [True] * len(ids) + [False] * len(pad)
    assert batch.documents[r].tolist() == [inputs[: t + 1].count(1) for t in range(T)]


def same(a: Batch, b: Batch) -> bool:
    return all((x == y).all() and x.dtype == y.dtype for x, y in zip(a, b, strict=True))


@given(
    shards_of_documents,
    st.integers(1, 12),
    st.integers(1, 5),
    st.one_of(st.none(), st.integers(1, 3)),
    st.integers(0, 40),
)
def test_training(tmp_path_factory, shards, T, B, span, start):
    corpus = tmp_path_factory.getbasetemp() / "corpus"
    write_corpus(corpus, train=shards)
    ids = stream(shards)
    order = Order(
        Windows(corpus, "train", sequence_length=T).shard_windows,
        fingerprint=Manifest.load(corpus).splits["train"].fingerprint,
        seed=3,
        shuffle_span=span,
    )
    settings: dict[str, Any] = {
        "sequence_length": T,
        "batch_size": B,
        "seed": 3,
        "shuffle_span": span,
    }
    for n, batch in enumerate(take(training_batches(corpus, start_batch=start, **settings), 3)):
        rows = list(range((start + n) * B, (start + n + 1) * B))
        assert batch.rows.tolist() == rows
        assert [array.dtype for array in batch] == [np.int32] * 3 + [bool, np.int64]
        for r, window in enumerate(order.windows(rows).tolist()):
            check_row(ids[window * T : (window + 1) * T], T, batch, r)


@given(
    shards_of_documents,
    st.integers(1, 12),
    st.integers(1, 5),
    st.one_of(st.none(), st.integers(1, 3)),
    st.integers(0, 3),
)
def test_every_window_once_an_epoch(tmp_path_factory, shards, T, B, span, epoch):
    corpus = tmp_path_factory.getbasetemp() / "corpus"
    write_corpus(corpus, train=shards)
    ids = stream(shards)
    windows = [ids[begin : begin + T] for begin in range(0, len(ids), T)]
    first, end = epoch * len(windows), (epoch + 1) * len(windows)
    settings: dict[str, Any] = {
        "sequence_length": T,
        "batch_size": B,
        "seed": 3,
        "shuffle_span": span,
    }
    # From the batch in which the epoch begins, maybe in its middle, to that in which it ends.
    start, stop = first // B, -(-end // B)
    batches = take(training_batches(corpus, start_batch=start, **settings), stop - start)
    assert [row for batch in batches for row in batch.rows] == list(range(start * B, stop * B))
    seen = [
        batch.targets[r][batch.loss_mask[r]].tolist()
        for batch in batches
        for r, row in enumerate(batch.rows.tolist())
        if first <= row < end
    ]
    assert sorted(seen) == sorted(windows)
    # The batches at both of its borders are the same to whoever starts there.
    for batch in (start, stop - 1):
        (alone,) = take(training_batches(corpus, start_batch=batch, **settings), 1)
        assert same(alone, batches[batch - start])


@given(
    st.integers(1, 9),
    st.lists(st.tuples(st.integers(1, 8), st.integers(0, 3)), min_size=1, max_size=4),
    st.randoms(use_true_random=False),
)
def test_hosts_that_come_and_go_see_one_sequence(tmp_path_factory, B, schedule, random):
    """Stop after some batches, go on with another number of hosts: nothing is lost or repeated."""
    corpus = tmp_path_factory.getbasetemp() / "hosts"
    if not corpus.exists():
        write_corpus(corpus, train=[[[bytes(range(65, 65 + n))] for n in (3, 9, 1, 12)]] * 2)
    settings: dict[str, Any] = {"sequence_length": 5, "batch_size": B, "seed": 0}
    done = 0
    seen: list[Batch] = []
    for n_hosts, n_batches in schedule:
        owner = [random.randrange(n_hosts) for _ in range(B)]
        rows = [np.array([r for r in range(B) if owner[r] == h], int) for h in range(n_hosts)]
        hosts = [
            take(training_batches(corpus, start_batch=done, rows=own, **settings), n_batches)
            for own in rows
        ]
        places = np.argsort(np.concatenate(rows))
        for parts in zip(*hosts, strict=True):
            seen.append(Batch._make(np.concatenate(a)[places] for a in zip(*parts, strict=True)))
        done += n_batches
    whole = take(training_batches(corpus, **settings), done)
    assert all(same(a, b) for a, b in zip(seen, whole, strict=True))


@given(
    shards_of_documents,
    st.integers(1, 12),
    st.integers(1, 5),
    st.one_of(st.none(), st.integers(0, 9)),
)
def test_evaluation_covers_every_token_once(tmp_path_factory, shards, T, B, limit):
    corpus = tmp_path_factory.getbasetemp() / "corpus"
    write_corpus(corpus, validation=shards)
    batches = evaluation_batches(
        corpus, "validation", sequence_length=T, batch_size=B, limit_windows=limit
    )
    ids = stream(shards) if limit is None else stream(shards)[: limit * T]
    rows, targets = [], []
    for batch in batches:
        assert batch.targets.shape == (B, T)
        rows += batch.rows.tolist()
        targets += batch.targets[batch.loss_mask].tolist()
        for r, window in enumerate(batch.rows.tolist()):
            check_row(ids[window * T : (window + 1) * T] if window >= 0 else [], T, batch, r)
    assert targets == ids
    n = -(-len(ids) // T)
    assert rows == [*range(n), *[-1] * (-n % B)]


def test_rows_beyond_the_batch_are_padding(corpus):
    settings: dict[str, Any] = {"sequence_length": 4, "batch_size": 3}
    wide = np.array([4, 2, 3, 0])
    for batches, whole in (
        (
            training_batches(corpus, seed=0, rows=wide, **settings),
            training_batches(corpus, seed=0, **settings),
        ),
        (
            evaluation_batches(corpus, "train", rows=wide, **settings),
            evaluation_batches(corpus, "train", **settings),
        ),
    ):
        (batch,), (full,) = take(batches, 1), take(whole, 1)
        assert batch.rows.tolist() == [-1, full.rows[2], -1, full.rows[0]]
        assert not batch.loss_mask[[0, 2]].any()
        assert not batch.targets[[0, 2]].any()
        assert (batch.targets[[1, 3]] == full.targets[[2, 0]]).all()
    (half,) = take(training_batches(corpus, seed=0, rows=slice(1, 3), **settings), 1)
    (full,) = take(training_batches(corpus, seed=0, **settings), 1)
    assert same(half, Batch._make(array[1:3] for array in full))


def test_document_windows(corpus):
    settings: dict[str, Any] = {"sequence_length": 30, "batch_size": 2, "window": "document"}
    batches = list(evaluation_batches(corpus, "train", **settings))
    texts = [
        (b.targets[r][b.loss_mask[r]] - 3).astype(np.uint8).tobytes()
        for b in batches
        for r in range(2)
    ]
    assert texts == [b"first document", b"second", b"third one", b""]
    assert len({tuple(b.rows) for b in take(training_batches(corpus, seed=0, **settings), 3)}) == 3


@pytest.fixture
def corpus(tmp_path) -> Path:
    folder = tmp_path / "a corpus"
    write_corpus(folder, train=[[[b"first ", b"document"], [b"second"]], [[b"third one"]]])
    return folder


def threads() -> list[threading.Thread]:
    return [thread for thread in threading.enumerate() if thread.name == "tvq batches"]


def wait_until_none() -> None:
    for _ in range(500):
        if not threads():
            return
        time.sleep(0.01)
    raise AssertionError(f"still running: {threads()}")


def test_the_thread_ends_when_it_is_closed(corpus):
    batches = training_batches(corpus, sequence_length=4, batch_size=2, seed=0, prefetch=1)
    next(batches)
    assert len(threads()) == 1
    batches.close()
    assert not threads()
    batches.close()
    with pytest.raises(StopIteration):
        next(batches)


def test_the_thread_ends_when_nobody_holds_the_batches(corpus):
    batches = training_batches(corpus, sequence_length=4, batch_size=2, seed=0)
    next(batches)
    del batches
    gc.collect()
    wait_until_none()


def test_the_thread_ends_with_the_batches_and_with_an_error(corpus):
    assert len(list(evaluation_batches(corpus, "train", sequence_length=4, batch_size=2))) == 4
    wait_until_none()
    (corpus / "shards/test/train-00001.arrow").write_bytes(b"short")
    batches = evaluation_batches(corpus, "train", sequence_length=4, batch_size=4)
    next(batches)
    with pytest.raises(CorpusError, match=r"train-00001\.arrow: it has 5 bytes, the manifest says"):
        next(batches)
    with pytest.raises(StopIteration):
        next(batches)
    wait_until_none()


def test_it_reads_ahead_no_further_than_asked(corpus):
    made = []
    batch = next(training_batches(corpus, sequence_length=4, batch_size=2, seed=0))

    def count():
        for n in itertools.count():
            made.append(n)
            yield batch

    with BatchStream(count(), prefetch=3) as batches:
        for taken in range(1, 5):
            next(batches)
            for _ in range(500):  # three in the queue, and one in the hand of the thread
                if len(made) == taken + 4:
                    break
                time.sleep(0.01)
            time.sleep(0.02)
            assert len(made) == taken + 4
