"""The dump against the scores that went into it, read by plain pyarrow."""

import contextlib
from pathlib import Path

import numpy as np
import pyarrow.parquet as pq
import pytest

from jobs.errors import UserError
from jobs.evaluation.score_dump import SCHEMA, ScoreDump
from jobs.evaluation.scoring import SpanScores
from pipeline.document_table import DocumentTable

LENGTHS = np.array([3, 1, 40, 7, 12])
TABLE = DocumentTable([f"books/{n}" for n in range(5)], LENGTHS, LENGTHS, LENGTHS)
N = int(TABLE.begins[-1])


def scores(seed: int = 0) -> SpanScores:
    draws = np.random.default_rng(seed)
    nats = draws.gamma(2, 0.5, N).astype(np.float32)
    return SpanScores(nats, draws.random(N) < 0.5, draws.integers(1, 259, N).astype(np.int32))


def part(whole: SpanScores, begin: int, end: int) -> SpanScores:
    here = slice(begin, end)
    return SpanScores(whole.nats[here], whole.correct[here], whole.targets[here])


@pytest.mark.parametrize("length", [1, 5, 16, N])
def test_each_target_is_a_row(tmp_path: Path, monkeypatch, length: int):
    # Several row groups, each of several spans.
    monkeypatch.setattr("jobs.evaluation.score_dump._ROWS", 20)
    path, whole = tmp_path / "dump.parquet", scores()
    with ScoreDump(path) as dump:
        for begin in range(0, N, length):
            dump.add("a", TABLE, begin, part(whole, begin, begin + length))
        dump.add("b", TABLE, 4, part(whole, 4, 6))
        assert not path.exists()
    table = pq.read_table(path)
    assert table.schema.remove_metadata().equals(SCHEMA)
    rows = table.to_pydict()
    documents = [(n, p) for n, size in enumerate(LENGTHS) for p in range(size + 1)]
    assert rows["corpus"] == ["a"] * N + ["b"] * 2
    assert rows["doc_id"][:N] == [TABLE.ids[n] for n, _ in documents]
    assert rows["position"][:N] == [p for _, p in documents]
    assert rows["context"][:N] == [i % length for i in range(N)]
    assert rows["doc_id"][N:] == ["books/1"] * 2
    assert rows["position"][N:] == [0, 1]
    np.testing.assert_array_equal(np.float32(rows["logprob"][:N]), -whole.nats)
    assert rows["token"][:N] == whole.targets.tolist()
    assert rows["correct"][:N] == whole.correct.tolist()
    assert [p.name for p in tmp_path.iterdir()] == ["dump.parquet"]


def test_a_dump_that_fails_leaves_what_was_there(tmp_path: Path):
    path = tmp_path / "dump.parquet"
    path.write_bytes(b"the one before")
    with contextlib.suppress(InterruptedError), ScoreDump(path) as dump:
        dump.add("a", TABLE, 0, scores())
        raise InterruptedError
    assert path.read_bytes() == b"the one before"
    assert [p.name for p in tmp_path.iterdir()] == ["dump.parquet"]
    with pytest.raises(UserError, match="cannot be written"):
        ScoreDump(tmp_path / "none" / "dump.parquet")
