"""The manifest: back as it was written, or refused by name."""

import contextlib
import json

import pytest

from pipeline.errors import CorpusError, NewerFormatError
from pipeline.manifest import Drops, FingerprintBuilder, Manifest, _checksum
from tests.pipeline.corpora import write_corpus


@pytest.fixture
def corpus(tmp_path):
    folder = tmp_path / "a corpus"
    write_corpus(folder, train=[[[b"one"], [b"two ", b"parts"]], [[b"three"]]], test=[[[b"x"]]])
    return folder


def test_it_comes_back(corpus):
    manifest = Manifest.load(corpus)
    before = (corpus / "manifest.json").read_bytes()
    manifest.save(corpus)
    assert (corpus / "manifest.json").read_bytes() == before
    train = manifest.splits["train"]
    assert (train.documents, train.tokens, train.n_bytes, train.n_words) == (3, 17, 17, 4)
    assert [shard.rows for shard in train.shards] == [3, 1]
    with pytest.raises(CorpusError, match="no split 'dev'; there are: train, validation, test"):
        manifest.split("dev")
    with pytest.raises(CorpusError, match="split 'validation' is empty"):
        manifest.split("validation")


def test_no_corpus(corpus, tmp_path):
    with pytest.raises(CorpusError, match="there is no such folder; make a corpus with `tvq prep"):
        Manifest.load(tmp_path / "nowhere")
    with pytest.raises(CorpusError, match=r"not a prepared corpus, it has no manifest\.json"):
        Manifest.load(tmp_path)
    (tmp_path / ".tvq-corpus").touch()
    with pytest.raises(CorpusError, match="unfinished"):
        Manifest.load(tmp_path)


def test_every_changed_byte_is_noticed(corpus):
    path = corpus / "manifest.json"
    good = path.read_bytes()
    manifest, unnoticed = Manifest.load(corpus), 0
    for at in range(0, len(good), 7):
        path.write_bytes(good[:at] + bytes([good[at] ^ 1]) + good[at + 1 :])
        with contextlib.suppress(CorpusError):
            # Only white space between the values may change, of which the checksum says nothing.
            assert Manifest.load(corpus) == manifest
            unnoticed += 1
    assert unnoticed < len(good) / 7 / 4
    path.write_bytes(good[: len(good) // 2])
    with pytest.raises(CorpusError, match=r"manifest\.json: damaged"):
        Manifest.load(corpus)
    path.write_text("[1]")
    with pytest.raises(CorpusError, match=r"manifest\.json: damaged"):
        Manifest.load(corpus)


def test_a_newer_format_is_refused(corpus):
    path = corpus / "manifest.json"
    value = json.loads(path.read_text())
    path.write_text(json.dumps(value | {"format_version": 3, "unheard_of": []}))
    with pytest.raises(
        NewerFormatError, match="in format 3 by a newer tvq, this one reads up to 2"
    ):
        Manifest.load(corpus)


def test_a_fingerprint_sees_documents_not_parts(tmp_path):
    def fingerprint(*shards):
        return write_corpus(tmp_path, train=shards).splits["train"].fingerprint

    whole = fingerprint([[b"one two"], [b"three"]])
    assert fingerprint([[b"one ", b"two"]], [[b"three"]]) == whole
    assert fingerprint([[b"three"], [b"one two"]]) != whole
    assert fingerprint([[b"one two"], [b"thref"]]) != whole
    # printf 'tvq split 1 uint8\n["a", 3, "00"]\n["ü/b c", 3, "00"]\n' | sha256sum
    golden = "be35f4fccb2a3117b187485c13a3e71c394e95ab29c2df9151c1a05649841157"
    builder = FingerprintBuilder("uint8")
    builder.add("a", 3, "00")
    builder.add("ü/b c", 3, "00")
    assert builder.fingerprint() == golden


def test_an_older_format_is_read(corpus):
    path = corpus / "manifest.json"
    value = json.loads(path.read_text())
    del value["checksum"], value["increments"], value["held_out_index"]
    del value["tokenizer"]["file"]
    value |= {"format_version": 1, "sources": [], "drops": {"empty": ["a", "b"]}}
    path.write_text(json.dumps(value | {"checksum": _checksum(value)}))
    manifest = Manifest.load(corpus)
    assert manifest.splits["train"].documents == 3
    assert manifest.drops == {"empty": Drops(2, ("a", "b"))}
    assert manifest.increments == ()
