"""What a batch is said to hold, against the stream of all tokens written out."""

import pytest
from hypothesis import given
from hypothesis import strategies as st

from pipeline.batch_contents import batch_contents
from pipeline.loader import training_batches
from pipeline.mixture import Mixture
from tests.pipeline.corpora import Documents, shards_of_documents, stream, write_corpus


def origins(shards: list[Documents]) -> list[tuple[int, int]]:
    """Of each id of the stream, its document's number and its place there; eos at the end."""
    documents = [b"".join(document) for shard in shards for document in shard]
    return [(number, at) for number, text in enumerate(documents) for at in range(len(text) + 1)]


@given(
    shards=shards_of_documents,
    sequence_length=st.integers(1, 20),
    batch_size=st.integers(1, 5),
    seed=st.integers(0, 3),
    batch=st.integers(0, 20),
    span=st.none() | st.integers(1, 3),
)
def test_spans_are_where_the_tokens_come_from(
    tmp_path_factory, shards, sequence_length, batch_size, seed, batch, span
):
    corpus = tmp_path_factory.mktemp("corpus")
    write_corpus(corpus, train=shards)
    settings = {
        "sequence_length": sequence_length,
        "batch_size": batch_size,
        "seed": seed,
        "shuffle_span": span,
    }
    rows = batch_contents(Mixture.load({str(corpus): 1}), batch=batch, **settings)
    with training_batches(corpus, start_batch=batch, **settings) as batches:
        loaded = next(batches)
    whole, where = stream(shards), origins(shards)
    lengths = [len(b"".join(document)) for shard in shards for document in shard]
    n_windows = -(-len(whole) // sequence_length)
    of_shard = [index for index, shard in enumerate(shards) for _ in stream([shard])]
    for at, row in enumerate(rows):
        assert row.row == batch * batch_size + at
        assert row.epoch == row.row // n_windows
        begin = row.window * sequence_length
        ids = whole[begin : begin + sequence_length]
        assert row.targets.tolist() == ids == loaded.targets[at][loaded.loss_mask[at]].tolist()
        assert row.shard == f"shards/test/train-{of_shard[begin]:05d}.arrow"
        covered = []
        for found in row.spans:
            number = int(found.id.removeprefix("doc"))
            assert found.tokens == lengths[number]
            covered += [(number, place) for place in range(found.begin, found.end)]
            covered += [(number, found.tokens)] * found.eos
        assert covered == where[begin : begin + sequence_length]


@given(shards=shards_of_documents, seed=st.integers(0, 3))
def test_document_windows(tmp_path_factory, shards, seed):
    corpus = tmp_path_factory.mktemp("corpus")
    write_corpus(corpus, train=shards)
    documents = [b"".join(document) for shard in shards for document in shard]
    rows = batch_contents(
        Mixture.load({str(corpus): 1}),
        batch=0,
        batch_size=len(documents),
        sequence_length=64,
        seed=seed,
        window="document",
    )
    found = {}
    for row in rows:
        (span,) = row.spans
        assert (span.begin, span.end, span.eos) == (0, span.tokens, False)
        found[span.id] = bytes((row.targets - 3).tolist())
    assert found == {f"doc{number}": text for number, text in enumerate(documents)}


def test_rows_of_a_mixture_say_their_corpus(tmp_path):
    for name, text in (("letters", b"abcdef" * 20), ("digits", b"0123456789" * 12)):
        write_corpus(tmp_path / name, train=[[[text[:30]], [text[30:]]]])
    mixture = Mixture.load({str(tmp_path / "letters"): 3, str(tmp_path / "digits"): 1})
    rows = batch_contents(mixture, batch=5, batch_size=8, sequence_length=10, seed=1)
    names = [mixture.corpora[row.corpus].name for row in rows]
    assert (names.count("letters"), names.count("digits")) == (6, 2)
    for name, row in zip(names, rows, strict=True):
        text = bytes(int(token) - 3 for token in row.targets if token != 1)
        assert text.isdigit() == (name == "digits")


def test_a_window_that_the_loader_does_not_give_is_a_defect(tmp_path, monkeypatch):
    write_corpus(tmp_path, train=[[[b"one text"], [b"and two"]]])
    mixture = Mixture.load({str(tmp_path): 1})
    real = training_batches
    monkeypatch.setattr(
        "pipeline.batch_contents.training_batches",
        lambda *args, start_batch, **settings: real(*args, start_batch=start_batch + 1, **settings),
    )
    rows = batch_contents(mixture, batch=0, batch_size=1, sequence_length=4, seed=0)
    assert rows[0].row == 1  # it goes by what the loader says that it gave
    monkeypatch.setattr(
        "pipeline.batch_contents.training_batches",
        lambda *args, seed, **settings: real(*args, seed=seed + 1, **settings),
    )
    with pytest.raises(RuntimeError, match="is not window"):
        batch_contents(mixture, batch=0, batch_size=3, sequence_length=4, seed=0)
