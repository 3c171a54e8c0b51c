"""Corpora that were damaged, and a store that fails for a while: named, mended, nothing lost."""

import itertools
import os
from pathlib import Path

import pytest

from pipeline import google_storage
from pipeline.contamination import ContaminationSettings
from pipeline.errors import CorpusError
from pipeline.loader import training_batches
from pipeline.manifest import Manifest
from pipeline.near_duplicates import NearDuplicateSettings
from pipeline.plan import PrepareSettings
from pipeline.prepare import Prepared, prepare
from pipeline.sentencepiece_tokenizer import SentencePieceSettings
from pipeline.sources import SourceSettings
from pipeline.storage import open_store
from pipeline.tasks import run_here
from pipeline.verification import verify
from tests.pipeline.test_corpus_in_a_bucket import stored
from tests.pipeline.test_increments import files, plant


def make(source: Path, corpus: Path | str, **changed) -> Prepared:
    options = {k: changed.pop(k) for k in ("refresh_held_out",) if k in changed}
    changed.setdefault("shard_bytes", 2000)
    wanted = PrepareSettings(SourceSettings((str(source),)), **changed)
    return prepare(wanted, corpus, run_here, **options)


EVERYTHING = {
    "near_duplicates": NearDuplicateSettings(similarity=0.8),
    "contamination": ContaminationSettings(),
    "tokenizer": "sentencepiece",
    "sentencepiece": SentencePieceSettings(vocab_size=300),
}


@pytest.fixture
def corpus(tmp_path) -> Path:
    plant(tmp_path / "source", range(60))
    make(tmp_path / "source", tmp_path / "corpus", **EVERYTHING)
    return tmp_path / "corpus"


def read_an_epoch(corpus: Path) -> None:
    manifest = Manifest.load(corpus)
    n = -(-(manifest.splits["train"].tokens + manifest.splits["train"].documents) // 64 // 4)
    with training_batches(corpus, sequence_length=64, batch_size=4, seed=0) as batches:
        for _ in itertools.islice(batches, n + 1):
            pass


def cut_short(path: Path) -> None:
    os.truncate(path, path.stat().st_size - 7)


def flip(path: Path) -> None:
    data = bytearray(path.read_bytes())
    data[len(data) // 2] ^= 1
    path.write_bytes(data)


@pytest.mark.parametrize("damage", [cut_short, Path.unlink])
@pytest.mark.parametrize("which", [0, -1])
def test_a_shard_that_is_cut_or_gone_is_named_and_made_again(corpus, damage, which):
    whole = files(corpus)
    shard = Manifest.load(corpus).splits["train"].shards[which].path
    damage(corpus / shard)
    for reading in (read_an_epoch, verify):
        with pytest.raises(CorpusError, match=shard):
            reading(corpus)
    made = make(corpus.parent / "source", corpus, **EVERYTHING)
    assert not made.reused
    assert made.resumed_shards > 3
    assert files(corpus) == whole


def test_a_changed_byte_is_named_and_mended_as_the_message_says(corpus):
    whole = files(corpus)
    shard = Manifest.load(corpus).splits["train"].shards[1].path
    flip(corpus / shard)
    with pytest.raises(CorpusError, match=rf"{shard}.*delete the file and run `tvq prepare`"):
        verify(corpus)
    (corpus / shard).unlink()
    make(corpus.parent / "source", corpus, **EVERYTHING)
    assert files(corpus) == whole


@pytest.mark.parametrize("what", ["records", "tokenizer", "held-out"])
@pytest.mark.parametrize("damage", [cut_short, Path.unlink])
def test_what_lies_beside_the_shards_is_named_and_made_again(corpus, what, damage):
    whole, manifest = files(corpus), Manifest.load(corpus)
    names = {
        "records": manifest.increments[0].records[1].path,
        "tokenizer": str(manifest.tokenizer.file),
        "held-out": str(manifest.held_out_index),
    }
    name = names[what]
    damage(corpus / name)
    with pytest.raises(CorpusError, match=name):
        verify(corpus)
    if damage is cut_short and what != "records":  # its length is not kept: as the message says
        (corpus / name).unlink()
    make(corpus.parent / "source", corpus, **EVERYTHING)
    assert files(corpus) == whole


@pytest.mark.parametrize("what", ["tokenizer", "held-out"])
def test_a_changed_byte_of_what_increments_share_is_named_before_it_is_used(corpus, what):
    manifest, source = Manifest.load(corpus), corpus.parent / "source"
    name = str({"tokenizer": manifest.tokenizer.file, "held-out": manifest.held_out_index}[what])
    whole = (corpus / name).read_bytes()
    flip(corpus / name)
    with pytest.raises(CorpusError, match=rf"{name}: it "):
        verify(corpus)
    plant(source, range(60, 63))
    with pytest.raises(CorpusError, match=rf"{name}: it was changed.*delete the file and run"):
        make(source, corpus, **EVERYTHING)
    assert Manifest.load(corpus) == manifest
    (corpus / name).unlink()
    assert len(make(source, corpus, **EVERYTHING).manifest.increments) == 2
    assert (corpus / name).read_bytes() == whole
    verify(corpus)


@pytest.mark.parametrize("listing_too", [False, True])
def test_the_manifest_of_an_older_plan_is_named_and_replaced(corpus, listing_too):
    source = corpus.parent / "source"
    old = {name: (corpus / name).read_bytes() for name in ("manifest.json", "listing.json")}
    (source / "003.txt").write_text("changed " * 50)
    assert make(source, corpus, **EVERYTHING).rebuilt == "003.txt has changed"
    whole = files(corpus)
    (corpus / "manifest.json").write_bytes(old["manifest.json"])
    if listing_too:
        (corpus / "listing.json").write_bytes(old["listing.json"])
    for reading in (read_an_epoch, verify):
        with pytest.raises(CorpusError, match=r"shards/.*missing"):
            reading(corpus)
    if listing_too:
        assert make(source, corpus, **EVERYTHING).rebuilt is not None
    else:  # what to freeze is not known: nothing is decided without being asked
        with pytest.raises(CorpusError, match=r"records-00000.*missing.*--refresh-held-out"):
            make(source, corpus, **EVERYTHING)
        make(source, corpus, refresh_held_out=True, **EVERYTHING)
    assert files(corpus) == whole


# ---- An object store that fails for a while ------------------------------------------------------


@pytest.mark.slow
def test_a_store_that_answers_503_and_stalls(bucket, object_store, tmp_path, monkeypatch):
    monkeypatch.setattr(google_storage, "_SILENCE_SECONDS", 0.5)
    monkeypatch.setattr(google_storage, "_REQUEST_SECONDS", 3.0)
    google_storage._connect.cache_clear()
    plant(tmp_path / "source", range(40))
    make(tmp_path / "source", tmp_path / "clean")
    for action, match, after in (
        ("503", "", 3), ("stall", "", 15), ("503", "records", 1), ("stall-upload", "upload", 9),
        ("lose-reply", "upload", 14), ("cut-reply", "GET", 20), ("503", "manifest", 0),
    ):  # fmt: skip
        object_store.fault(action, match, times=1, after=after)
    try:
        made = make(tmp_path / "source", f"{bucket}/corpus")
        assert not object_store._faults or all(f.times == 0 for f in object_store._faults)
        object_store.mend()
        assert stored(f"{bucket}/corpus") == files(tmp_path / "clean")
        assert not made.reused
        assert verify(f"{bucket}/corpus").documents == 40
        assert open_store(f"{bucket}/corpus").exists("manifest.json")
    finally:
        google_storage._connect.cache_clear()
