"""The spans of an evaluation against plain lists of a split's ids: each target exactly once."""

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from pipeline.document_table import document_table
from pipeline.errors import CorpusError
from pipeline.evaluation_rows import evaluation_spans, pieces
from pipeline.windows import Windows
from tests.pipeline.corpora import shards_of_documents, stream, write_corpus


@given(
    shards_of_documents,
    st.integers(1, 40),
    st.integers(1, 5),
    st.sampled_from([("stream", False), ("stream", True), ("document", True)]),
)
def test_each_target_is_in_one_piece(tmp_path_factory, shards, T, rows, mode):
    window, carry = mode
    corpus = tmp_path_factory.getbasetemp() / "corpus"
    write_corpus(corpus, test=shards)
    ids = stream(shards)
    table = document_table(corpus, "test")
    spans = evaluation_spans(table, sequence_length=T, window=window, carry=carry)
    windows = Windows(corpus, "test", sequence_length=T)
    seen = []
    for at in range(0, len(spans), rows):
        batch = spans[at : at + rows]
        whole = [
            np.concatenate(parts, axis=1)
            for parts in zip(*pieces(windows, batch, rows=rows), strict=True)
        ]
        inputs, targets, mask = whole
        assert inputs.shape[0] == rows
        assert inputs.shape[1] % T == 0
        for row in range(rows):
            n = int(mask[row].sum())
            assert not mask[row, n:].any()
            assert not targets[row, n:].any()
            if row >= len(batch):
                assert n == 0
                continue
            begin, end = batch[row].tolist()
            assert targets[row, :n].tolist() == ids[begin:end]
            assert inputs[row, :n].tolist() == [1, *ids[begin : end - 1]]
            seen += range(begin, end)
    expected = [i for i, token in enumerate(ids) if window == "stream" or token != 1]
    assert sorted(seen) == expected
    if carry:
        lengths = (spans[:, 1] - spans[:, 0]).tolist()
        assert lengths == sorted(lengths, reverse=True)
        assert len(spans) == len(table.ids)


@given(shards_of_documents)
def test_the_table_of_documents(tmp_path_factory, shards):
    corpus = tmp_path_factory.getbasetemp() / "corpus"
    write_corpus(corpus, test=shards)
    table = document_table(corpus, "test")
    texts = [b"".join(document) for documents in shards for document in documents]
    assert table.ids == [f"doc{n}" for n in range(len(texts))]
    assert table.tokens.tolist() == table.n_bytes.tolist() == [len(text) for text in texts]
    words = [
        sum(len(part.split()) for part in document)
        for documents in shards
        for document in documents
    ]
    assert table.n_words.tolist() == words
    ids = stream(shards)
    assert table.begins.tolist() == [0, *(i + 1 for i, token in enumerate(ids) if token == 1)]


def test_a_window_that_cannot_hold_a_document_is_refused(tmp_path):
    write_corpus(tmp_path, test=[[[b"short"], [b"longer"]]])
    table = document_table(tmp_path, "test")
    settings = {"sequence_length": 5, "window": "document"}
    with pytest.raises(CorpusError, match="a document has 6 tokens, a window 5"):
        evaluation_spans(table, carry=False, **settings)
    assert evaluation_spans(table, carry=True, **settings).tolist() == [[6, 12], [0, 5]]
