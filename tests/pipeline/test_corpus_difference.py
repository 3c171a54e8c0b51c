"""The difference of two corpora, against a comparison of all their texts in dictionaries."""

import collections
import shutil
from pathlib import Path

from hypothesis import given, settings
from hypothesis import strategies as st

from pipeline.corpus_difference import Change, difference
from pipeline.filters import FilterSettings
from pipeline.manifest import Manifest
from pipeline.sentencepiece_tokenizer import SentencePieceSettings
from tests.pipeline.corpora import write_corpus
from tests.pipeline.serial import contents, make_corpus

BASE = {f"{n}.txt": b"Text number %d.\n" % n * (n + 1) for n in range(24)}


def expected_changes(here, there, texts_here, texts_there):
    """From the texts that went in, and those that pyarrow finds in the shards."""
    kept_here, kept_there = (contents(corpus, Manifest.load(corpus)) for corpus in (here, there))

    def fate(name, texts, kept):
        if name in kept:
            return kept[name][0]
        return "dropped: empty" if not texts[name] else "dropped: duplicate"

    changes = collections.Counter()
    for name in texts_here.keys() | texts_there.keys():
        one = fate(name, texts_here, kept_here) if name in texts_here else ""
        other = fate(name, texts_there, kept_there) if name in texts_there else ""
        if not one or not other:
            changes[Change("only here" if one else "only there", one, other)] += 1
            continue
        if one != other:
            changes[Change("fate", one, other)] += 1
        if texts_here[name] != texts_there[name]:
            changes[Change("text", one, other)] += 1
    return changes


edits = st.dictionaries(
    st.sampled_from([*BASE, "new.txt", "1.5.txt", "z/last.txt"]),
    st.none() | st.sampled_from([b"", b"other\n", b"twin\n", *list(BASE.values())[:3]]),
    max_size=6,
)


@settings(max_examples=12)
@given(edits=edits, cut=st.sampled_from([60, 400, 10**6]))
def test_documents(tmp_path_factory, edits, cut):
    folder = tmp_path_factory.mktemp("difference")
    there = {name: text for name, text in (BASE | edits).items() if text is not None}
    make_corpus(folder / "a", folder / "here", BASE, shard_bytes=300)
    make_corpus(folder / "b", folder / "there", there, shard_bytes=cut)
    found = difference(folder / "here", folder / "there")
    expected = expected_changes(folder / "here", folder / "there", BASE, there)
    assert {change: changed.count for change, changed in found.records.items()} == expected
    assert found.sources == {
        "both": len(BASE.keys() & there.keys()),
        "here": len(BASE.keys() - there.keys()),
        "there": len(there.keys() - BASE.keys()),
    }
    assert found.same == (not found.splits)
    assert found.reordered == []
    cuts = [] if cut == 300 else ["shard_bytes"]
    assert [one.name for one in found.settings] == cuts
    by_hand = {
        name: [
            (n, t)
            for n, (s, t) in contents(folder / "here", Manifest.load(folder / "here")).items()
            if s == name
        ]
        != [
            (n, t)
            for n, (s, t) in contents(folder / "there", Manifest.load(folder / "there")).items()
            if s == name
        ]
        for name in ("train", "validation", "test")
    }
    assert [one.name for one in found.splits] == [
        name for name, differs in by_hand.items() if differs
    ]


def test_equal_corpora(tmp_path):
    make_corpus(tmp_path / "a", tmp_path / "here", BASE)
    make_corpus(tmp_path / "b", tmp_path / "there", BASE)
    found = difference(tmp_path / "here", tmp_path / "there")
    assert found.same
    assert (found.settings, found.versions, found.tokenizer, found.records) == ([], [], [], {})
    assert (found.ancestor, found.not_compared) == (None, [])


def test_a_grown_corpus_and_what_it_was(tmp_path):
    make_corpus(tmp_path / "a", tmp_path / "here", BASE)
    Path(shutil.copytree(tmp_path / "here", tmp_path / "then"))
    make_corpus(tmp_path / "a", tmp_path / "here", {"10a.txt": b"new", "zz.txt": b""})
    found = difference(tmp_path / "here", tmp_path / "then")
    assert found.ancestor == ("there", 1)
    assert difference(tmp_path / "then", tmp_path / "here").ancestor == ("here", 1)
    assert {change: changed.examples for change, changed in found.records.items()} == {
        Change("only here", "train", ""): ["10a.txt"],
        Change("only here", "dropped: empty", ""): ["zz.txt"],
    }
    assert [one.name for one in found.splits] == ["train"]


def test_the_same_documents_in_another_order(tmp_path):
    held_out = {"validation_fraction": 0.0, "test_fraction": 0.0}
    first = dict(list(BASE.items())[::2])
    make_corpus(tmp_path / "a", tmp_path / "here", first, **held_out)
    make_corpus(tmp_path / "a", tmp_path / "here", BASE, **held_out)
    make_corpus(tmp_path / "b", tmp_path / "there", BASE, **held_out)
    found = difference(tmp_path / "here", tmp_path / "there")
    assert (found.records, found.reordered, found.increments) == ({}, ["train"], (2, 1))
    assert not found.same
    assert found.ancestor is None


def test_other_settings_and_tokenizer(tmp_path):
    make_corpus(tmp_path / "a", tmp_path / "here", BASE)
    make_corpus(
        tmp_path / "a",
        tmp_path / "there",
        {},
        filters=FilterSettings(min_bytes=100),
        tokenizer="sentencepiece",
        sentencepiece=SentencePieceSettings(vocab_size=280),
    )
    found = difference(tmp_path / "here", tmp_path / "there")
    changed = {one.name: (one.here, one.there) for one in found.settings}
    assert changed["filters.min_bytes"] == (1, 100)
    assert changed["tokenizer"] == ("bytes", "sentencepiece")
    assert changed["sentencepiece.vocab_size"] == (None, 280)
    assert "kind" in [one.name for one in found.tokenizer]
    short = {name for name, text in BASE.items() if len(text) < 100}
    dropped = [c for change, c in found.records.items() if change.there.startswith("dropped: ")]
    assert sum(changed.count for changed in dropped) == len(short)
    assert {name for changed in dropped for name in changed.examples} <= short
    assert "tokens" not in {change.what for change in found.records}


def test_other_tokens_of_the_same_text(tmp_path):
    """A tampered corpus, say: the records say other tokens, nothing else differs."""
    make_corpus(tmp_path / "a", tmp_path / "here", BASE, shard_bytes=10**6)
    make_corpus(tmp_path / "a", tmp_path / "there", {}, shard_bytes=10**6)
    from tests.pipeline.test_verification import rewrite_records

    rewrite_records(
        tmp_path / "there", 0, "tokens", lambda row: row["tokens"] + (row["doc_id"] == "7.txt")
    )
    (change,) = difference(tmp_path / "here", tmp_path / "there").records
    split = contents(tmp_path / "here", Manifest.load(tmp_path / "here"))["7.txt"][0]
    assert change == Change("tokens", split, split)


def test_records_that_are_missing(tmp_path):
    make_corpus(tmp_path / "a", tmp_path / "here", BASE)
    write_corpus(tmp_path / "there", train=[[[b"x"]]], validation=[[[b"y"]]])
    found = difference(tmp_path / "here", tmp_path / "there")
    assert (found.not_compared, found.sources, found.records) == (["there"], None, {})
    assert [one.name for one in found.splits] == ["train", "validation", "test"]
    assert found.reordered == []
