"""Windows against a plain list of the split's ids."""

import pytest
from hypothesis import given
from hypothesis import strategies as st

from pipeline.errors import CorpusError
from pipeline.windows import Windows
from tests.pipeline.corpora import shards_of_documents, stream, write_corpus


@given(shards_of_documents, st.integers(1, 40))
def test_stream(tmp_path_factory, shards, T):
    corpus = tmp_path_factory.getbasetemp() / "corpus"
    write_corpus(corpus, train=shards)
    ids = stream(shards)
    windows = Windows(corpus, "train", sequence_length=T)
    assert len(windows) == -(-len(ids) // T)
    for i in reversed(range(len(windows))):
        assert windows.read(i).tolist() == ids[i * T : (i + 1) * T]
    # The shard of a window is the one in which its first token lies.
    shard_of_token = [s for s, documents in enumerate(shards) for _ in stream([documents])]
    borders = windows.shard_windows.tolist()
    for s in range(len(shards)):
        assert [i for i in range(len(windows)) if shard_of_token[i * T] == s] == list(
            range(borders[s], borders[s + 1])
        )


@given(shards_of_documents)
def test_documents(tmp_path_factory, shards):
    corpus = tmp_path_factory.getbasetemp() / "corpus"
    write_corpus(corpus, train=shards)
    texts = [b"".join(document) for documents in shards for document in documents]
    longest = max(map(len, texts))
    windows = Windows(corpus, "train", sequence_length=longest, mode="document")
    assert [windows.read(i).tolist() for i in range(len(windows))] == [
        [byte + 3 for byte in text] for text in texts
    ]
    assert windows.shard_windows.tolist()[1:] == [
        sum(map(len, shards[: s + 1])) for s in range(len(shards))
    ]
    if longest > 1:
        with pytest.raises(CorpusError, match=f"has {longest} tokens, a window has {longest - 1}"):
            Windows(corpus, "train", sequence_length=longest - 1, mode="document")


def test_windows_do_not_see_where_shards_and_parts_end(tmp_path):
    write_corpus(tmp_path / "a", train=[[[b"one ", b"two"], [b"three"]], [[b"four"]]])
    write_corpus(tmp_path / "b", train=[[[b"one two"]], [[b"thr", b"ee"], [b"four"]]])
    a, b = (Windows(tmp_path / name, "train", sequence_length=4) for name in "ab")
    assert [a.read(i).tolist() for i in range(len(a))] == [
        b.read(i).tolist() for i in range(len(b))
    ]


def test_shards_are_opened_when_they_are_read(tmp_path):
    write_corpus(tmp_path, train=[[[b"one"]], [[b"two"]]])
    (tmp_path / "shards/test/train-00001.arrow").unlink()
    windows = Windows(tmp_path, "train", sequence_length=4)
    assert windows.read(0).tolist() == [byte + 3 for byte in b"one"] + [1]
    with pytest.raises(CorpusError, match=r"train-00001\.arrow: the file is missing"):
        windows.read(1)


def test_mistakes(tmp_path):
    write_corpus(tmp_path, train=[[[b"one"]]])
    with pytest.raises(CorpusError, match="split 'test' is empty"):
        Windows(tmp_path, "test", sequence_length=4)
    windows = Windows(tmp_path, "train", sequence_length=3)
    with pytest.raises(IndexError, match=r"0\.\.1, got 2"):
        windows.read(2)
    with pytest.raises(ValueError, match="sequence_length: must be at least 1"):
        Windows(tmp_path, "train", sequence_length=0)
