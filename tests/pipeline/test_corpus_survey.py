"""The card's figures, held against the texts that a corpus was made of."""

import collections

import numpy as np
import pytest

from pipeline.corpus_survey import document, fates, original, samples, similar_ids, survey
from pipeline.manifest import tokenizer_of
from tests.pipeline.corpora import write_corpus
from tests.pipeline.serial import contents, make_corpus

TEXTS = {
    **{f"a/{n:02}.txt": b"x" * n + b"\n" for n in range(60)},
    "long.txt": b"a longer line\n" * 500,
    "twin.txt": b"xx\n",
    "empty.txt": b"",
}


@pytest.fixture(scope="module")
def made(tmp_path_factory):
    folder = tmp_path_factory.mktemp("survey")
    make_corpus(folder / "source", folder / "corpus", TEXTS, shard_bytes=500)
    more = {"b/lines.jsonl": b"".join(b'{"text": "line %d"}\n' % n for n in range(200))}
    manifest = make_corpus(folder / "source", folder / "corpus", more, shard_bytes=500)
    assert len(manifest.increments) == 2
    return folder / "corpus", manifest


def test_counts_are_those_of_the_texts(made):
    corpus, manifest = made
    found = survey(corpus, manifest)
    lines = sum(len(b"line %d" % n) for n in range(200))
    assert found.files == len(TEXTS) + 1
    assert found.records == len(TEXTS) + 200
    assert found.n_bytes == sum(map(len, TEXTS.values())) + lines
    for split, counts in found.lengths.items():
        expected = collections.Counter(
            len(text).bit_length() - 1
            for name, text in contents(corpus, manifest).values()
            if name == split
        )
        assert dict(enumerate(counts.tolist())) == {k: expected[k] for k in range(len(counts))}
    assert len(found.lengths["train"]) == len(TEXTS["long.txt"]).bit_length()


def test_a_corpus_without_records(tmp_path):
    found = survey(tmp_path, write_corpus(tmp_path, train=[[[b"text"]]]))
    assert (found.files, found.records) == (0, 0)


def test_samples_lie_evenly(made):
    corpus, manifest = made
    tokenizer = tokenizer_of(corpus, manifest)
    of_train = [(n, t) for n, (s, t) in contents(corpus, manifest).items() if s == "train"]
    drawn = list(samples(corpus, manifest, tokenizer, "train", count=3, max_bytes=20))
    wanted = [of_train[len(of_train) * k // 6] for k in (1, 3, 5)]
    assert [(s.id, s.tokens, s.text) for s in drawn] == [(n, len(t), t[:20]) for n, t in wanted]
    few = list(samples(corpus, manifest, tokenizer, "test", count=10**4, max_bytes=10**9))
    of_test = {n: t for n, (s, t) in contents(corpus, manifest).items() if s == "test"}
    assert {s.id: s.text for s in few} == of_test


def test_every_document_is_found(made):
    corpus, manifest = made
    tokenizer = tokenizer_of(corpus, manifest)
    for name, (split, text) in list(contents(corpus, manifest).items())[::9]:
        (fate,) = fates(corpus, manifest, name)
        assert (fate.split, fate.tokens, fate.n_bytes) == (split, len(text), len(text))
        assert document(corpus, manifest, tokenizer, fate).text == text


def test_the_dropped_say_why(made):
    corpus, manifest = made
    (empty,) = fates(corpus, manifest, "empty.txt")
    assert (empty.split, empty.reason, original(corpus, manifest, empty)) == ("", "empty", None)
    (twin,) = fates(corpus, manifest, "twin.txt")
    assert twin.reason == "duplicate"
    same = original(corpus, manifest, twin)
    assert same is not None
    assert same.id == "a/02.txt"
    assert fates(corpus, manifest, "nobody") == []
    assert similar_ids(corpus, manifest, "TWI") == ["twin.txt"]
    assert np.char.startswith(similar_ids(corpus, manifest, "lines"), "b/lines.jsonl#").all()
