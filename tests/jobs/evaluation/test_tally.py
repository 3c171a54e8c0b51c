"""Sums of scores by document, block and position, against sums over plain lists."""

from pathlib import Path

import numpy as np
import pytest

from jobs.evaluation.scoring import SpanScores
from jobs.evaluation.tally import Tally, bucket_borders, cut_documents, whole_documents
from pipeline.document_table import document_table
from pipeline.windows import Windows
from tests.pipeline.corpora import write_corpus

LENGTHS = [200_000, 10, 40_000, 98_304, 65_536 * 3 + 1]


def scores_of(nats: np.ndarray) -> SpanScores:
    return SpanScores(nats, nats > 1, np.zeros(len(nats), np.int32))


def test_documents_are_cut_into_equal_blocks(tmp_path: Path):
    write_corpus(tmp_path, test=[[[b"a" * n] for n in LENGTHS]])
    table = document_table(tmp_path, "test")
    windows = Windows(tmp_path, "test", sequence_length=64)
    blocks = cut_documents(table, windows, np.ones(256, np.int64))
    assert blocks.n_bytes.sum() == sum(LENGTHS)
    for number, length in enumerate(LENGTHS):
        own = blocks.n_bytes[blocks.document == number]
        assert own.sum() == length
        assert own.max() - own.min() <= 1
        assert len(own) == max(1, round(length / 65536))
    first = np.flatnonzero(np.diff(blocks.document, prepend=-1))
    np.testing.assert_array_equal(blocks.begins[first], table.begins[:-1])


def test_tokens_of_several_bytes_are_never_cut(tmp_path: Path):
    text = bytes(np.random.default_rng(0).integers(0, 8, 50_000).astype(np.uint8))
    write_corpus(tmp_path, test=[[[text]]])
    table = document_table(tmp_path, "test")
    sizes = np.array([1, 2, 3, 5, 8, 13, 21, 34])  # bytes that each id writes
    blocks = cut_documents(table, Windows(tmp_path, "test", sequence_length=64), sizes)
    total = sizes[list(text)].sum()
    assert len(blocks.n_bytes) == round(total / 65536)
    for begin, end, n_bytes in zip(
        blocks.begins, [*blocks.begins[1:], len(text)], blocks.n_bytes, strict=True
    ):
        assert sizes[list(text[begin:end])].sum() == n_bytes
    assert blocks.n_bytes.max() - blocks.n_bytes.min() <= 2 * sizes.max()


@pytest.mark.parametrize("length", [7, 64, 200, 4096])
def test_sums_are_those_of_plain_lists(tmp_path: Path, length: int):
    texts = [b"a" * n for n in (3, 500, 1, 64, 200, 130)]
    write_corpus(tmp_path, test=[[[text] for text in texts[:4]], [[text] for text in texts[4:]]])
    table = document_table(tmp_path, "test")
    n = int(table.begins[-1])
    nats = np.random.default_rng(0).gamma(2, 0.7, n).astype(np.float32)
    tally = Tally(whole_documents(table))
    for begin in range(0, n, length):
        tally.add(begin, scores_of(nats[begin : begin + length]))
    for number, (begin, end) in enumerate(
        zip(table.begins[:-1].tolist(), table.begins[1:].tolist(), strict=True)
    ):
        own = nats[begin:end].astype(np.float64)
        assert tally.nats[number] == pytest.approx(own.sum(), rel=1e-14)
        assert tally.n_tokens[number] == end - begin == len(texts[number]) + 1
        assert tally.n_correct[number] == (own > 1).sum()
    assert np.array_equal(tally.by_document(tally.nats), tally.nats)
    positions = np.arange(n) % length
    buckets = tally.positions(min(length, n))
    assert buckets[0].begin == 0
    assert buckets[-1].end == min(length, n)
    for bucket in buckets:
        inside = (positions >= bucket.begin) & (positions < bucket.end)
        assert bucket.targets == inside.sum()
        assert bucket.nats == pytest.approx(nats[inside].astype(np.float64).sum(), rel=1e-13)


def test_position_borders_double():
    assert bucket_borders(1).tolist() == [0, 1]
    assert bucket_borders(64).tolist() == [0, 64]
    assert bucket_borders(65).tolist() == [0, 64, 65]
    assert bucket_borders(1024).tolist() == [0, 64, 128, 256, 512, 1024]
