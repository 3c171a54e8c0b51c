"""The mixture: exact proportions, each corpus in its own order, any row found at once."""

import hashlib
import itertools
import math
import shutil
from collections import Counter
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from pipeline.errors import CorpusError
from pipeline.loader import Batch, training_batches
from pipeline.manifest import Manifest
from pipeline.mixture import LARGEST_PERIOD, Mixture, MixtureOrder, whole_weights
from pipeline.order import Order
from pipeline.windows import Windows
from tests.pipeline.corpora import shards_of_documents, stream, write_corpus
from tests.pipeline.test_loader import check_row, same, take

members = st.lists(st.tuples(st.integers(1, 9), st.integers(1, 30)), min_size=1, max_size=3)
"""Of each corpus its weight and its windows."""


def mixed(members: list[tuple[int, int]], seed: int = 0) -> MixtureOrder:
    prints = [str(index) * 64 for index in range(len(members))]
    orders = [
        Order(np.array([0, n]), fingerprint=text, seed=seed)
        for (_, n), text in zip(members, prints, strict=True)
    ]
    return MixtureOrder(orders, [w for w, _ in members], fingerprints=prints, seed=seed)


def simulated(weights: list[int], prints: list[str], seed: int, n: int) -> list[tuple[int, int]]:
    """The oracle: (corpus, own row) of n rows, dealt one after the other in Python's integers."""
    if len(weights) == 1:
        return [(0, row) for row in range(n)]
    members = "+".join(f"{w}*{text}" for w, text in zip(weights, prints, strict=True))
    digest = hashlib.sha512(f"tvq mixture 1 {members} {seed}".encode()).digest()
    key = int.from_bytes(digest[:8], "little")

    def hashed(row: int) -> int:
        x = (row * 0x9E3779B97F4A7C15 + key) % 2**64
        x = (x ^ x >> 30) * 0xBF58476D1CE4E5B9 % 2**64
        x = (x ^ x >> 27) * 0x94D049BB133111EB % 2**64
        return x ^ x >> 31

    rows: list[tuple[int, int]] = []
    next_own = [0] * len(weights)
    while len(rows) < n:
        period = sorted(range(len(rows), len(rows) + sum(weights)), key=hashed)
        corpus_of = {}
        for corpus, weight in enumerate(weights):
            corpus_of |= dict.fromkeys(period[:weight], corpus)
            period = period[weight:]
        for row in sorted(corpus_of):
            rows.append((corpus_of[row], next_own[corpus_of[row]]))
            next_own[corpus_of[row]] += 1
    return rows[:n]


@given(members, st.integers(0, 3))
def test_it_is_the_simulated_sequence(members, seed):
    weights = [weight for weight, _ in members]
    prints = [str(index) * 64 for index in range(len(members))]
    n = 5 * sum(weights) + 2
    corpora, own = mixed(members, seed).places(np.arange(n))
    assert list(zip(corpora.tolist(), own.tolist(), strict=True)) == simulated(
        weights, prints, seed, n
    )


@given(members, st.integers(0, 10**6))
def test_every_period_holds_the_weights_exactly(members, period):
    weights = [weight for weight, _ in members]
    W = sum(weights)
    corpora, own = mixed(members).places(np.arange(period * W, (period + 1) * W))
    if len(members) > 1:
        assert Counter(corpora.tolist()) == dict(enumerate(weights))
    for corpus, weight in enumerate(weights):
        rows = own[corpora == corpus].tolist()
        assert rows == list(range(period * weight, (period + 1) * weight))


@given(members)
def test_each_corpus_comes_in_its_own_order_epoch_after_epoch(members):
    W = sum(weight for weight, _ in members)
    periods = max(-(-3 * n // weight) for weight, n in members)  # three epochs of each, at least
    corpora, windows = mixed(members).windows(np.arange(periods * W))
    for corpus, (weight, n) in enumerate(members):
        alone = Order(np.array([0, n]), fingerprint=str(corpus) * 64, seed=0)
        mine = windows[corpora == corpus]
        assert mine.tolist() == alone.windows(np.arange(periods * weight)).tolist()
        for epoch in range(3):  # one that runs out begins again, while others are still behind
            assert sorted(mine[epoch * n : (epoch + 1) * n].tolist()) == list(range(n))


@given(members, st.data())
def test_any_rows_are_those_of_the_sequence(members, data):
    n = 4 * sum(weight for weight, _ in members)
    corpora, windows = mixed(members).windows(np.arange(n))
    rows = data.draw(st.lists(st.lists(st.integers(0, n - 1), min_size=2, max_size=2), max_size=9))
    rows = np.array(rows, int).reshape(-1, 2)
    some = mixed(members).windows(rows)
    assert some[0].tolist() == corpora[rows].tolist()
    assert some[1].tolist() == windows[rows].tolist()


@pytest.mark.parametrize("weights", [[3, 1], [1, 1, 1], [4095, 1], [1000, 2000, 3]])
def test_it_seeks_at_once(weights):
    order = mixed([(weight, 10**12) for weight in weights])
    W, r = sum(weights), 10**15
    corpora, own = order.places([r])
    period, position = divmod(r, W)
    # By the formula, from the corpora of the row's period alone.
    around, _ = order.places(np.arange(period * W, r + 1))
    assert corpora[0] == around[-1]
    rank = int((around[:position] == corpora[0]).sum())
    assert own[0] == period * weights[corpora[0]] + rank
    with pytest.raises(IndexError, match="begin at 0"):
        order.places([-1])


# A change here changes the order of every mixture that is under way: never edit, only add.
# By `simulated` and the `scalar_permutation` of test_order: seed 7, five windows in each corpus.
GOLDEN: dict[tuple[int, ...], tuple[list[int], list[int]]] = {
    (3, 1): (
        [0, 0, 1, 0, 0, 1, 0, 0, 0, 0, 0, 1, 0, 0, 0, 1],
        [0, 2, 2, 1, 3, 1, 4, 3, 0, 1, 2, 3, 4, 0, 3, 0],
    ),
    (1, 1, 1): (
        [1, 2, 0, 0, 1, 2, 2, 0, 1, 0, 1, 2, 0, 2, 1, 1],
        [2, 3, 0, 2, 1, 2, 1, 1, 3, 3, 0, 0, 4, 4, 4, 2],
    ),
    (2, 5, 9): (
        [2, 2, 2, 2, 2, 0, 2, 1, 1, 1, 2, 2, 2, 1, 0, 1],
        [3, 2, 1, 0, 4, 0, 0, 2, 1, 3, 3, 2, 1, 0, 2, 4],
    ),
}


@pytest.mark.parametrize("weights", GOLDEN)
def test_golden_vectors(weights):
    corpora, windows = mixed([(weight, 5) for weight in weights], seed=7).windows(np.arange(16))
    assert (corpora.tolist(), windows.tolist()) == GOLDEN[weights]


def test_what_it_depends_on():
    rows = np.arange(200)
    base = mixed([(3, 50), (2, 50)]).places(rows).corpora
    assert (mixed([(3, 50), (2, 50)], seed=1).places(rows).corpora != base).any()
    assert (mixed([(2, 50), (3, 50)]).places(rows).corpora != base).any()
    assert (mixed([(3, 7), (2, 999)]).places(rows).corpora == base).all()  # not on lengths
    # Periods are shuffled differently: no stripe of rows is one corpus's for ever.
    assert len({tuple(period) for period in base.reshape(-1, 5).tolist()}) > 5


def test_it_shuffles():
    """All 10 arrangements of three and two, about 1,000 times each of 10,000 periods."""
    corpora = mixed([(3, 50), (2, 50)]).places(np.arange(50_000)).corpora.reshape(-1, 5)
    counts = Counter(map(tuple, corpora.tolist()))
    assert len(counts) == 10
    # The chi-squared statistic of 9 degrees of freedom stays below 34 in 9,999 of 10,000 cases.
    assert sum((count - 1000) ** 2 / 1000 for count in counts.values()) < 34


@pytest.mark.parametrize(
    ("given", "whole"),
    [
        ([3, 1], [3, 1]),
        ([2, 2], [1, 1]),
        ([5], [1]),
        ([0.7, 0.3], [7, 3]),
        ([0.25, 1, 1e-2], [25, 100, 1]),
        ([1, 4095], [1, 4095]),
        ([8190, 2], [4095, 1]),
    ],
)
def test_weights_become_the_smallest_whole_numbers(given, whole):
    paths = [str(index) for index in range(len(given))]
    weights = whole_weights(dict(zip(paths, given, strict=True)))
    assert list(weights.items()) == list(zip(paths, whole, strict=True))


@pytest.mark.parametrize(
    ("given", "message"),
    [
        ({}, "names no corpus"),
        ({"a": 1, "b": 0}, "the weight of b must be more than 0, got 0"),
        ({"a": -1}, "the weight of a must be more than 0, got -1"),
        ({"a": math.nan}, "got nan"),
        ({"a": math.inf}, "got inf"),
        ({"a": 1, "b": 4096}, "proportion 1:4096, which adds up to 4097, and may add up to 4096"),
        ({"a": 0.3333, "b": 0.6667}, "3333:6667"),
    ],
)
def test_other_weights_are_refused(given, message):
    assert LARGEST_PERIOD == 4096
    with pytest.raises(CorpusError, match=message):
        whole_weights(given)


@pytest.fixture
def folder(tmp_path) -> Path:
    for name, length in (("wiki", 90), ("books", 40), ("code", 25)):
        text = [[[name.encode() * length]] * 3]
        write_corpus(tmp_path / name, train=text, validation=text)
    return tmp_path


def test_where_corpora_lie_and_how_they_are_named_changes_nothing(folder):
    wiki, books = folder / "wiki", folder / "books"
    mixture = Mixture.load({wiki: 3, books: 1})
    moved = folder / "elsewhere" / "b"
    shutil.copytree(books, moved)
    again = Mixture.load({moved: 0.25, wiki: 0.75})
    for split in ("train", "validation", "test"):
        assert again.fingerprint(split) == mixture.fingerprint(split)
        assert again.difference(split, mixture.fingerprint(split)) is None
    settings: dict[str, Any] = {"sequence_length": 9, "batch_size": 4, "seed": 0}
    ours = take(training_batches(mixture, **settings), 9)
    theirs = take(training_batches(again, **settings), 9)
    assert all(same(a, b) for a, b in zip(ours, theirs, strict=True))
    assert {corpus.name: corpus.weight for corpus in mixture.corpora} == {"wiki": 3, "books": 1}


def test_one_corpus_alone_is_itself(folder):
    wiki = folder / "wiki"
    mixture = Mixture.load({wiki: 5})
    split = Manifest.load(wiki).splits["train"]
    assert mixture.fingerprint("train") == split.fingerprint
    assert mixture.period == 1
    settings: dict[str, Any] = {"sequence_length": 9, "batch_size": 4, "seed": 0}
    pairs = zip(
        take(training_batches(mixture, **settings), 9),
        take(training_batches(wiki, **settings), 9),
        strict=True,
    )
    assert all(same(a, b) for a, b in pairs)


def test_it_says_what_differs(folder):
    wiki, books, code = (folder / name for name in ("wiki", "books", "code"))
    mixture = Mixture.load({wiki: 3, books: 1})
    other = Mixture.load({wiki: 1, books: 1})
    says = other.difference("train", mixture.fingerprint("train"))
    assert says is not None
    begun, _, here = says.partition(", here ")
    assert begun.startswith("with other weights: there they are ")
    assert {*begun.removeprefix("with other weights: there they are ").split(", ")} == {
        "wiki 3",
        "books 1",
    }
    assert {*here.split(", ")} == {"wiki 1", "books 1"}
    assert other.difference("validation", mixture.fingerprint("validation")) is None
    for third in (Mixture.load({wiki: 3, code: 1}), Mixture.load({wiki: 1})):
        for split in ("train", "validation"):
            says = third.difference(split, mixture.fingerprint(split))
            assert says is not None
            assert f"on another corpus: the {split} split there has fingerprint" in says
            assert third.corpora[0].manifest.splits[split].fingerprint[:16] in says


def test_epochs(folder):
    mixture = Mixture.load({folder / "wiki": 3, folder / "books": 1})
    for window in ("stream", "document"):
        T = 400 if window == "document" else 7
        epochs = mixture.epochs(1000, sequence_length=T, window=window)
        for corpus, count in zip(mixture.corpora, epochs, strict=True):
            windows = Windows(corpus.path, "train", sequence_length=T, mode=window)
            assert count == pytest.approx(1000 * {"wiki": 3, "books": 1}[corpus.name] / 4
                                          / len(windows))  # fmt: skip


def test_names_tell_corpora_apart(tmp_path):
    paths = [tmp_path / "wiki" / "corpus", tmp_path / "books & more" / "corpus"]
    for path in paths:
        write_corpus(path, train=[[[path.parent.name.encode()]]])
    mixture = Mixture.load(dict.fromkeys(paths, 1))
    assert {c.path: c.name for c in mixture.corpora} == dict(
        zip(map(str, paths), ["wiki-corpus", "books _ more-corpus"], strict=True)
    )
    for first, second in itertools.permutations(("a?", "a&")):
        write_corpus(tmp_path / first, train=[[[first.encode()]]])
        write_corpus(tmp_path / second, train=[[[second.encode()]]])
        mixture = Mixture.load({tmp_path / first: 1, tmp_path / second: 1})
        assert len({corpus.name for corpus in mixture.corpora}) == 2


def test_corpora_that_do_not_mix_are_refused_and_named(folder):
    wiki, books = folder / "wiki", folder / "books"
    shutil.copytree(wiki, folder / "copy")
    with pytest.raises(CorpusError, match=r"wiki.*have the same train split.*sum of their weights"):
        Mixture.load({wiki: 1, books: 1, folder / "copy": 1})
    manifest = Manifest.load(books)
    for tokenizer in (
        replace(manifest.tokenizer, fingerprint="f" * 64),
        replace(manifest.tokenizer, vocab_size=300),
    ):
        replace(manifest, tokenizer=tokenizer).save(books)
        with pytest.raises(CorpusError, match=r"wiki has .*of 259 ids, .*books has .*one tokeni"):
            Mixture.load({wiki: 1, books: 1})
    with pytest.raises(CorpusError, match="nowhere: there is no such folder"):
        Mixture.load({wiki: 1, folder / "nowhere": 1})
    with pytest.raises(CorpusError, match=r"wiki: the split 'test' is empty"):
        Mixture.load({wiki: 1}).splits("test")


@given(
    st.lists(st.tuples(shards_of_documents, st.integers(1, 4)), min_size=1, max_size=3),
    st.integers(1, 12),
    st.integers(1, 5),
    st.one_of(st.none(), st.integers(1, 3)),
    st.lists(st.tuples(st.integers(1, 8), st.integers(0, 4)), min_size=1, max_size=4),
    st.randoms(use_true_random=False),
)
def test_hosts_that_come_and_go_see_one_mixture(
    tmp_path_factory, members, T, B, span, schedule, random
):
    """Stop after some batches, go on with another number of hosts: nothing is lost or repeated."""
    base = tmp_path_factory.getbasetemp() / "mixed"
    shutil.rmtree(base, ignore_errors=True)
    weights, texts = {}, {}
    for index, (shards, weight) in enumerate(members):
        path = base / str(index)
        # A document of its own: two corpora of one train split are refused.
        texts[path] = [*shards, [[b"corpus", b"%d" % index]]]
        write_corpus(path, train=texts[path])
        weights[path] = weight
    mixture = Mixture.load(weights)
    settings: dict[str, Any] = {
        "sequence_length": T,
        "batch_size": B,
        "seed": 3,
        "shuffle_span": span,
    }
    seen: list[Batch] = []
    for n_hosts, n_batches in schedule:
        owner = [random.randrange(n_hosts) for _ in range(B)]
        rows = [np.array([r for r in range(B) if owner[r] == h], int) for h in range(n_hosts)]
        hosts = [
            take(training_batches(mixture, start_batch=len(seen), rows=own, **settings), n_batches)
            for own in rows
        ]
        places = np.argsort(np.concatenate(rows))
        for parts in zip(*hosts, strict=True):
            seen.append(Batch._make(np.concatenate(a)[places] for a in zip(*parts, strict=True)))
    whole = take(training_batches(mixture, **settings), len(seen))
    assert all(same(a, b) for a, b in zip(seen, whole, strict=True))

    # And that one sequence is the simulated one, with each corpus's windows in its own order.
    prints = [corpus.manifest.splits["train"].fingerprint for corpus in mixture.corpora]
    expected = simulated([c.weight for c in mixture.corpora], prints, 3, len(seen) * B)
    orders = [
        Order(
            Windows(corpus.path, "train", sequence_length=T).shard_windows,
            fingerprint=text,
            seed=3,
            shuffle_span=span,
        )
        for corpus, text in zip(mixture.corpora, prints, strict=True)
    ]
    for row, (corpus, own) in enumerate(expected):
        n, r = divmod(row, B)
        assert whole[n].rows[r] == row
        window = int(orders[corpus].windows([own])[0])
        ids = stream(texts[Path(mixture.corpora[corpus].path)])
        check_row(ids[window * T : (window + 1) * T], T, whole[n], r)


def test_rows_beyond_the_batch_are_padding(folder):
    mixture = Mixture.load({folder / "wiki": 3, folder / "books": 1})
    settings: dict[str, Any] = {"sequence_length": 4, "batch_size": 3, "seed": 0, "start_batch": 7}
    (full,) = take(training_batches(mixture, **settings), 1)
    (batch,) = take(training_batches(mixture, rows=np.array([4, 2, 3, 0]), **settings), 1)
    assert batch.rows.tolist() == [-1, full.rows[2], -1, full.rows[0]]
    assert not batch.loss_mask[[0, 2]].any()
    assert (batch.targets[[1, 3]] == full.targets[[2, 0]]).all()
