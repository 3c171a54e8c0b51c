"""A corpus that grows: what is there stays, new text trains, and what is held out stays so.

Without Ray: tasks run here, one after the other or in a drawn order.
"""

import hashlib
import os
import random
from pathlib import Path
from typing import Any

import pyarrow as pa
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from sentencepiece import SentencePieceProcessor

from pipeline.contamination import ContaminationSettings
from pipeline.errors import CorpusError
from pipeline.formats import FormatSettings
from pipeline.manifest import Manifest, tokenizer_of
from pipeline.near_duplicates import NearDuplicateSettings
from pipeline.plan import PrepareSettings
from pipeline.prepare import Prepared, prepare
from pipeline.sentencepiece_tokenizer import SentencePieceSettings
from pipeline.sources import SourceSettings
from pipeline.stored_documents import stored_documents
from pipeline.verification import verify

WORDS = [f"{first}{second}" for first in ("ka", "mo", "ri", "su") for second in "bdfglnprst"]


def text(seed: int, words: int = 60) -> str:
    drawn = random.Random(seed)
    return " ".join(drawn.choice(WORDS) for _ in range(words)) + "\n"


def plant(source: Path, names: range, words: int = 60) -> None:
    source.mkdir(exist_ok=True)
    for name in names:
        (source / f"{name:03d}.txt").write_text(text(name, words))


def make(source: Path, corpus: Path, seed: int = 0, **changed: Any) -> Prepared:
    """Prepare with ranges of 2,000 bytes; `seed` draws the order in which tasks end."""
    options = {k: changed.pop(k) for k in ("refresh_held_out",) if k in changed}
    changed.setdefault("shard_bytes", 2000)
    wanted = PrepareSettings(SourceSettings((str(source),)), **changed)

    def run(function, payloads):
        order = list(range(len(payloads)))
        random.Random(seed).shuffle(order)
        for index in order:
            yield index, function(*payloads[index])

    return prepare(wanted, corpus, run, **options)


def files(folder: Path) -> dict[str, bytes]:
    return {
        path.relative_to(folder).as_posix(): path.read_bytes()
        for path in folder.rglob("*")
        if path.is_file() and path.name != "listing.json"
    }


def shards(corpus: Path) -> dict[str, bytes]:
    return {name: data for name, data in files(corpus).items() if name.startswith("shards/")}


def documents(corpus: Path, split: str) -> dict[str, bytes]:
    """What plain Arrow reads of a split of a byte corpus, in stored order."""
    found: dict[str, bytes] = {}
    for shard in Manifest.load(corpus).splits[split].shards:
        for row in pa.ipc.open_file(str(corpus / shard.path)).read_all().to_pylist():
            found[row["doc_id"]] = found.get(row["doc_id"], b"") + bytes(row["tokens"])
    return found


@pytest.fixture
def source(tmp_path) -> Path:
    plant(tmp_path / "source", range(60))
    return tmp_path / "source"


def test_new_files_train_and_all_else_stays(source, tmp_path):
    corpus = tmp_path / "corpus"
    first = make(source, corpus).manifest
    old = shards(corpus)
    plant(source, range(60, 80))
    (source / "copy.txt").write_text(text(3))
    grown = make(source, corpus)
    assert not grown.reused
    assert grown.resumed_shards == len([name for name in old if "records" not in name])
    manifest = grown.manifest
    assert old.items() <= shards(corpus).items()
    for name in ("validation", "test"):
        assert manifest.splits[name] == first.splits[name]
    train = documents(corpus, "train")
    assert set(train) == {f"{i:03d}.txt" for i in range(80)} - set(
        documents(corpus, "validation") | documents(corpus, "test")
    )
    # Behind those that were there.
    assert list(train)[-20:] == [f"{i:03d}.txt" for i in range(60, 80)]
    assert [(i.plan_id, i.train_fingerprint) for i in manifest.increments] == [
        (first.plan_id, first.splits["train"].fingerprint),
        (manifest.plan_id, manifest.splits["train"].fingerprint),
    ]
    assert manifest.drops["duplicate"].examples == ("copy.txt",)
    verify(corpus)


def test_a_grown_corpus_is_found_mended_and_made_again_byte_for_byte(source, tmp_path):
    for folder in ("one", "two"):
        for files_ in (range(60), range(60, 80), range(80, 90)):
            plant(source, files_)
            made = make(source, tmp_path / folder, seed=len(folder) + files_.start)
        for name in range(60, 90):
            (source / f"{name:03d}.txt").unlink()
    assert files(tmp_path / "one") == files(tmp_path / "two")
    plant(source, range(90))
    corpus = tmp_path / "one"
    whole = files(corpus)
    for path in source.iterdir():
        os.utime(path, (7, 7))
    assert make(source, corpus).reused
    for increment in made.manifest.increments:
        lost = [name for name in whole if increment.plan_id[:16] in name]
        for name in (lost[0], lost[-1]):
            (corpus / name).unlink()
        assert not make(source, corpus).reused
        assert files(corpus) == whole


def test_held_out_documents_stay_whatever_the_settings(source, tmp_path):
    corpus = tmp_path / "corpus"
    make(source, corpus)
    held_out = [documents(corpus, name) for name in ("validation", "test")]
    plant(source, range(60, 200))
    make(source, corpus)
    made = make(source, corpus, shard_bytes=9000)
    assert made.rebuilt is None
    assert [documents(corpus, name) for name in ("validation", "test")] == held_out
    refreshed = make(source, corpus, refresh_held_out=True)
    assert len(refreshed.manifest.increments) == 1
    assert [documents(corpus, name) for name in ("validation", "test")] != held_out


def test_a_file_that_changed_or_went_is_a_rebuild_and_says_so(source, tmp_path):
    corpus = tmp_path / "corpus"
    make(source, corpus)
    plant(source, range(60, 70))
    make(source, corpus)
    (source / "064.txt").write_text("another text\n")
    assert make(source, corpus).rebuilt == "064.txt has changed"
    assert len(Manifest.load(corpus).increments) == 1
    plant(source, range(70, 75))
    make(source, corpus)
    (source / "005.txt").unlink()
    made = make(source, corpus)
    assert made.rebuilt == "005.txt is no longer there"
    assert "005.txt" not in documents(corpus, "train")
    clean = tmp_path / "clean"
    make(source, clean)
    assert files(corpus) == files(clean)


def test_new_text_is_held_against_what_is_held_out(source, tmp_path):
    corpus, strict = tmp_path / "corpus", {
        "contamination": ContaminationSettings(one_in=1),
        "near_duplicates": NearDuplicateSettings(),
    }  # fmt: skip
    plant(source, range(60), words=200)
    make(source, corpus, **strict)
    held_out = next(iter(documents(corpus, "test").values())).decode()
    trained = next(iter(documents(corpus, "train").values())).decode()
    plant(source, range(60, 65), words=200)
    (source / "quotes.txt").write_text(text(500, 2000) + held_out + text(501, 2000))
    (source / "retyped.txt").write_text(trained.replace(WORDS[0], WORDS[1], 2))
    made = make(source, corpus, **strict).manifest
    assert {reason: drop.examples for reason, drop in made.drops.items()} == {
        "contaminated": ("quotes.txt",),
        "near duplicate": ("retyped.txt",),
    }
    whole = files(corpus)
    (corpus / str(made.held_out_index)).unlink()
    make(source, corpus, **strict)
    assert files(corpus) == whole


def test_a_new_file_of_a_held_out_split_is_dropped_with_its_reason(tmp_path):
    source, corpus = tmp_path / "source", tmp_path / "corpus"
    for split in ("train", "valid", "test"):
        (source / split).mkdir(parents=True)
        (source / split / "a.txt").write_text(split)
    make(source, corpus, split_by="name")
    assert list(documents(corpus, "validation")) == ["valid/a.txt"]
    (source / "test" / "b.txt").write_text("new test")
    (source / "train" / "b.txt").write_text("new train")
    made = make(source, corpus, split_by="name").manifest
    assert made.drops["held-out splits are frozen"].examples == ("test/b.txt",)
    assert list(documents(corpus, "train")) == ["train/a.txt", "train/b.txt"]


def test_a_file_without_records_makes_no_increment(source, tmp_path):
    corpus = tmp_path / "corpus"
    make(source, corpus, format=FormatSettings(kind="lines"))
    before = files(corpus)
    (source / "empty.txt").write_bytes(b"")
    for _ in range(2):
        assert make(source, corpus, format=FormatSettings(kind="lines")).reused
    assert files(corpus) == before


@settings(max_examples=15)  # each writes some hundred files, and waits for the disk
@given(
    st.lists(st.lists(st.sampled_from("abcdefgh"), max_size=6), min_size=3, max_size=8),
    st.integers(10, 200),
    st.integers(0, 99),
)
def test_records_of_any_files_in_any_order_of_tasks(tmp_path_factory, lines, limit, seed):
    """Against brute force: every line once, the first of equal ones, in the order of files."""
    folder = tmp_path_factory.mktemp("drawn")
    source = folder / "source"
    source.mkdir()
    expected, seen = {}, set()
    for number, values in enumerate(lines):
        (source / f"{number}.txt").write_text("".join(f"{value * 9}\n" for value in values))
        for row, value in enumerate(values):
            if value not in seen:
                expected[f"{number}.txt#{row}"] = value.encode() * 9
            seen.add(value)
    chosen = {"format": FormatSettings(kind="lines"), "shard_bytes": limit}
    if len(expected) < 3:
        with pytest.raises(CorpusError, match="left to split"):
            make(source, folder / "corpus", seed, **chosen)
        return
    make(source, folder / "corpus", seed, **chosen)
    stored = [documents(folder / "corpus", name) for name in ("train", "validation", "test")]
    assert all(stored)
    for split in stored:
        assert list(split) == [doc_id for doc_id in expected if doc_id in split]
    assert stored[0] | stored[1] | stored[2] == expected
    assert sum(map(len, stored)) == len(expected)
    make(source, folder / "again", seed + 1, **chosen)
    assert files(folder / "corpus") == files(folder / "again")
    digest = hashlib.sha256(b"tvq split 1 uint8\n")
    for doc_id, content in stored[0].items():
        sha256 = hashlib.sha256(content).hexdigest()
        digest.update(f'["{doc_id}", {len(content)}, "{sha256}"]\n'.encode())
    train = Manifest.load(folder / "corpus").splits["train"]
    assert train.fingerprint == digest.hexdigest()


def test_a_tokenizer_is_trained_once_and_stays(source, tmp_path):
    corpus, pieces = tmp_path / "corpus", {
        "tokenizer": "sentencepiece",
        "sentencepiece": SentencePieceSettings(vocab_size=330),
    }  # fmt: skip
    first = make(source, corpus, **pieces).manifest
    model = (corpus / str(first.tokenizer.file)).read_bytes()
    plant(source, range(60, 70))
    (source / "latin1.txt").write_bytes(b"caf\xe9")
    grown = make(source, corpus, seed=5, **pieces).manifest
    assert grown.tokenizer == first.tokenizer
    assert grown.drops["not UTF-8"].examples == ("latin1.txt",)
    # Plain SentencePiece reads the file and writes the text back.
    plain = SentencePieceProcessor(model_proto=model)
    tokenizer = tokenizer_of(corpus, grown)
    assert tokenizer.vocab_size == 330
    stored = {
        document.id: b"".join(tokenizer.decode(part) for part in document.parts)
        for split in ("train", "validation", "test")
        for document in stored_documents(corpus, grown, split)
    }
    assert stored == {f"{i:03d}.txt": text(i).encode() for i in range(70)}
    assert len(plain.encode(text(0))) < len(text(0)) / 2
    tokens = sum(split.tokens for split in grown.splits.values())
    assert tokens < sum(map(len, stored.values())) / 2
    whole = files(corpus)
    (corpus / str(first.tokenizer.file)).unlink()
    make(source, corpus, **pieces)
    assert files(corpus) == whole
