"""Verification: what was written is found right, and any other byte is found and named."""

import dataclasses
import hashlib
import random
import shutil
from pathlib import Path

import pyarrow as pa
import pyarrow.ipc
import pytest

from pipeline.contamination import ContaminationSettings
from pipeline.errors import CorpusError
from pipeline.manifest import Manifest
from pipeline.sentencepiece_tokenizer import SentencePieceSettings
from pipeline.shards import CHUNK_BYTES
from pipeline.verification import Reading, verify
from tests.pipeline.corpora import write_corpus
from tests.pipeline.serial import make_corpus, stored_rows

WORDS = [f"word{number}" for number in range(400)]


def texts(first: int, count: int) -> dict[str, bytes]:
    drawn = random.Random(first)
    return {
        f"part {n % 3}/text {n:03}.txt": " ".join(drawn.choices(WORDS, k=60)).encode() + b"\n"
        for n in range(first, first + count)
    }


@pytest.fixture(scope="module")
def made(tmp_path_factory) -> Path:
    """A corpus with every kind of file, two increments and a document of each fate."""
    folder = tmp_path_factory.mktemp("verified")
    settings = {
        "contamination": ContaminationSettings(one_in=1),
        "tokenizer": "sentencepiece",
        "sentencepiece": SentencePieceSettings(vocab_size=300),
        "validation_fraction": 0.2,
        "test_fraction": 0.2,
    }
    first = texts(0, 30) | {"empty.txt": b"", "twin.txt": texts(0, 1)["part 0/text 000.txt"]}
    make_corpus(folder / "source", folder / "corpus", first, **settings)
    held_out = next(
        row["doc_id"]
        for row in stored_rows(folder / "corpus", Manifest.load(folder / "corpus"), "test")
    )
    more = texts(100, 12) | {"quoted.txt": b"So it says: " + first[held_out]}
    manifest = make_corpus(folder / "source", folder / "corpus", more, **settings)
    assert len(manifest.increments) == 2
    assert {reason: drop.count for reason, drop in manifest.drops.items()} == {
        "contaminated": 1,
        "duplicate": 1,
        "empty": 1,
    }
    return folder / "corpus"


@pytest.fixture
def corpus(made, tmp_path) -> Path:
    return Path(shutil.copytree(made, tmp_path / "a corpus"))


def test_what_was_written_is_found_right(corpus):
    reported: list[Reading] = []
    verified = verify(corpus, reported.append)
    shards = [path for path in corpus.rglob("*.arrow") if not path.name.startswith("records")]
    assert verified.shards == len(shards) > 5
    assert verified.n_bytes == sum(path.stat().st_size for path in shards)
    assert verified.records == 30 + 2 + 13
    assert verified.documents == verified.records - 3
    manifest = Manifest.load(corpus)
    rows = [row for split in manifest.splits for row in stored_rows(corpus, manifest, split)]
    assert verified.tokens == sum(len(row["tokens"]) for row in rows)
    assert [at.shards for at in reported] == list(range(len(shards) + 1))
    assert reported[-1].n_bytes == verified.n_bytes


@pytest.mark.parametrize(
    "kind",
    ["train-*.arrow", "test-*.arrow", "records-*.arrow", "*.model", "*.npy", "manifest.json"],
)
def test_a_flipped_bit_anywhere_is_found(corpus, kind):
    drawn = random.Random(kind)
    files = sorted(corpus.rglob(kind))
    for _ in range(25):
        path = drawn.choice(files)
        good = path.read_bytes()
        bad = bytearray(good)
        bad[drawn.randrange(len(bad))] ^= 1 << drawn.randrange(8)
        path.write_bytes(bad)
        with pytest.raises(CorpusError) as error:
            verify(corpus)
        assert path.name in str(error.value)
        assert len(str(error.value).splitlines()) == 1
        path.write_bytes(good)
    verify(corpus)


@pytest.mark.parametrize("kind", ["train-*", "test-*", "records-*", "*.model", "*.npy"])
def test_a_missing_or_short_file_is_named(corpus, kind):
    path = sorted(corpus.rglob(kind))[-1]
    path.write_bytes(path.read_bytes()[:-8])
    with pytest.raises(CorpusError, match=path.name):
        verify(corpus)
    path.unlink()
    with pytest.raises(CorpusError, match=rf"{path.name}: the file is missing; .*tvq prepare"):
        verify(corpus)


def test_the_chunk_is_named(tmp_path):
    write_corpus(tmp_path, train=[[[bytes(CHUNK_BYTES)], [b"a" * CHUNK_BYTES]]])
    assert verify(tmp_path).records == 0
    path = tmp_path / "shards/test/train-00000.arrow"
    data = bytearray(path.read_bytes())
    data[CHUNK_BYTES + 9] ^= 4
    path.write_bytes(data)
    with pytest.raises(CorpusError, match=r"chunk 1 \(bytes 8388608 to 16777216\) was changed"):
        verify(tmp_path)


def test_the_first_damage_is_named(tmp_path):
    write_corpus(tmp_path, train=[[[b"one"], [b"two ", b"parts"]], [[b"three"]]], test=[[[b"x"]]])
    assert verify(tmp_path).shards == 3
    second = tmp_path / "shards/test/train-00001.arrow"
    data = bytearray(second.read_bytes())
    data[200] ^= 16
    second.write_bytes(data)
    with pytest.raises(CorpusError, match=r"train-00001\.arrow: chunk 0 \(bytes 0 to"):
        verify(tmp_path)
    (tmp_path / "shards/test/test-00000.arrow").unlink()
    with pytest.raises(CorpusError, match=r"test-00000\.arrow: the file is missing"):
        verify(tmp_path)


def rewrite_shard(corpus: Path, manifest: Manifest, split: str, change) -> Manifest:
    """Change the first shard's table, and let the manifest say what the new file is."""
    shard = manifest.splits[split].shards[0]
    path = corpus / shard.path
    with pa.ipc.open_file(pa.BufferReader(path.read_bytes())) as file:
        table = change(file.read_all())
    with pa.OSFile(str(path), "wb") as sink, pa.ipc.new_file(sink, table.schema) as writer:
        writer.write_table(table)
    data = path.read_bytes()
    sums = (hashlib.sha256(data).hexdigest(),)
    new = dataclasses.replace(shard, length=len(data), sums=sums)
    shards = (new, *manifest.splits[split].shards[1:])
    splits = dict(manifest.splits)
    splits[split] = dataclasses.replace(splits[split], shards=shards)
    manifest = dataclasses.replace(manifest, splits=splits)
    manifest.save(corpus)
    return manifest


def another_token(table: pa.Table) -> pa.Table:
    rows = table.to_pylist()
    rows[-1]["tokens"][0] ^= 1
    return pa.Table.from_pylist(rows, table.schema)


def another_id(table: pa.Table) -> pa.Table:
    rows = table.to_pylist()
    rows[0]["doc_id"] += "x"
    return pa.Table.from_pylist(rows, table.schema)


def reordered(table: pa.Table) -> pa.Table:
    return pa.Table.from_pylist(table.to_pylist()[::-1], table.schema)


@pytest.mark.parametrize("change", [another_token, another_id, reordered])
@pytest.mark.parametrize("split", ["train", "test"])
def test_a_consistent_forgery_is_caught_by_the_fingerprint(corpus, tmp_path, change, split):
    rewrite_shard(corpus, Manifest.load(corpus), split, change)
    with pytest.raises(CorpusError, match=rf"fingerprint of the split {split}.*records-0000"):
        verify(corpus)
    plain = tmp_path / "plain"
    manifest = write_corpus(plain, **{split: [[[b"one"], [b"two"]], [[b"three"]]]})
    rewrite_shard(plain, manifest, split, change)
    with pytest.raises(CorpusError, match=f"fingerprint of the split {split}"):
        verify(plain)


def test_other_columns_of_a_forgery_are_caught(corpus):
    def more_words(table):
        rows = table.to_pylist()
        rows[0]["n_words"] += 1
        return pa.Table.from_pylist(rows, table.schema)

    def another_part(table):
        rows = table.to_pylist()
        rows[0]["part"], rows[1]["part"] = 0, 1  # the second document is lost in the first
        return pa.Table.from_pylist(rows, table.schema)

    manifest = Manifest.load(corpus)
    path = corpus / manifest.splits["train"].shards[0].path
    good = path.read_bytes()
    rewrite_shard(corpus, manifest, "train", more_words)
    with pytest.raises(CorpusError, match=r"train-00000\.arrow: n_words is"):
        verify(corpus)
    path.write_bytes(good)
    rewrite_shard(corpus, manifest, "train", another_part)
    with pytest.raises(CorpusError, match=r"documents, tokens\) are|parts of a document"):
        verify(corpus)


@pytest.mark.parametrize("field", ["n_words", "n_bytes", "tokens", "documents"])
def test_sums_that_do_not_add_up_are_caught(corpus, field):
    manifest = Manifest.load(corpus)
    split = manifest.splits["validation"]
    split = dataclasses.replace(split, **{field: getattr(split, field) + 1})
    dataclasses.replace(manifest, splits=manifest.splits | {"validation": split}).save(corpus)
    with pytest.raises(CorpusError, match=f"{field} of the split validation"):
        verify(corpus)


def rewrite_records(corpus: Path, increment: int, column: str, change) -> None:
    """Change the first records file that it changes, and let the manifest say what it is."""
    manifest = Manifest.load(corpus)
    old = manifest.increments[increment]
    for described in old.records:
        path = corpus / described.path
        with pa.ipc.open_file(pa.BufferReader(path.read_bytes())) as file:
            table = file.read_all()
        changed = [change(row) for row in table.to_pylist()]
        if changed != table.column(column).to_pylist():
            break
    else:
        raise AssertionError("no records file is changed by it")
    index = table.schema.get_field_index(column)
    field = table.schema.field(index)
    table = table.set_column(index, field, pa.array(changed, field.type))
    with pa.OSFile(str(path), "wb") as sink, pa.ipc.new_file(sink, table.schema) as writer:
        writer.write_table(table)
    data = path.read_bytes()
    sha256 = hashlib.sha256(data).hexdigest()
    files = list(old.records)
    files[files.index(described)] = dataclasses.replace(described, length=len(data), sha256=sha256)
    increments = list(manifest.increments)
    increments[increment] = dataclasses.replace(old, records=tuple(files))
    dataclasses.replace(manifest, increments=tuple(increments)).save(corpus)


@pytest.mark.parametrize("increment", [0, 1])
@pytest.mark.parametrize(
    ("column", "change", "expected"),
    [
        ("tokens", lambda row: row["tokens"] + bool(row["split"]), r"records-0000\d\.arrow has '"),
        ("doc_id", lambda row: row["doc_id"] + "x", r"records-0000\d\.arrow has '"),
        ("reason", lambda row: row["reason"] and "whim", "documents dropped is"),
        ("split", lambda row: "", "documents dropped is"),
    ],
)
def test_records_that_disagree_are_caught(corpus, increment, column, change, expected):
    rewrite_records(corpus, increment, column, change)
    with pytest.raises(CorpusError, match=expected):
        verify(corpus)


def test_a_forged_lineage_is_caught(corpus):
    manifest = Manifest.load(corpus)
    first = dataclasses.replace(manifest.increments[0], train_fingerprint="0" * 64)
    dataclasses.replace(manifest, increments=(first, *manifest.increments[1:])).save(corpus)
    with pytest.raises(CorpusError, match="fingerprint of train at the end of increment 1 is"):
        verify(corpus)


def test_a_corpus_in_an_object_store(corpus, bucket):
    """Each byte comes from the store, and nothing of it stays here."""
    from pipeline.storage import open_store

    store = open_store(f"{bucket}/verified")
    for path in corpus.rglob("*"):
        if path.is_file():
            store.write(path.relative_to(corpus).as_posix(), path.read_bytes())
    assert verify(store.location) == verify(corpus)
    name = Manifest.load(corpus).splits["train"].shards[0].path
    data = bytearray(store.read(name))
    data[100] ^= 1
    store.write(name, bytes(data))
    with pytest.raises(CorpusError, match=r"train-00000\.arrow: chunk 0 .*not what the manifest"):
        verify(store.location)
