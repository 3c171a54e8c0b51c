"""The shard: what is in the file, what is there after a death, what is found out when opened."""

import gc
import hashlib
import resource
from pathlib import Path

import numpy as np
import pyarrow as pa
import pytest
from hypothesis import given

from pipeline.errors import CorpusError
from pipeline.shards import Row, ShardReader, ShardWriter, check_sums
from tests.pipeline.corpora import shards_of_documents, write_shard

UINT8 = np.dtype(np.uint8)


@given(shards_of_documents)
def test_plain_arrow_reads_the_rows(tmp_path_factory, drawn):
    documents = [document for part in drawn for document in part]
    corpus = tmp_path_factory.getbasetemp()
    shard = write_shard(corpus, "s.arrow", documents)
    with pa.ipc.open_file(str(corpus / "s.arrow")) as file:
        rows = file.read_all().to_pylist()
    assert [(r["doc_id"], r["part"], bytes(r["tokens"])) for r in rows] == [
        (f"doc{n}", p, text)
        for n, document in enumerate(documents)
        for p, text in enumerate(document)
    ]
    texts = [b"".join(document) for document in documents]
    assert (shard.rows, shard.documents) == (len(rows), len(documents))
    assert shard.tokens == shard.n_bytes == sum(map(len, texts)) == sum(r["n_bytes"] for r in rows)
    assert shard.n_words == sum(r["n_words"] for r in rows)
    assert shard.longest_document == max(map(len, texts))
    reader = ShardReader(corpus / shard.path, shard, UINT8)
    assert [reader.tokens(i).tobytes() for i in range(shard.rows)] == [
        text for document in documents for text in document
    ]


def test_many_batches_and_chunks(tmp_path):
    rng = np.random.default_rng(0)
    documents = [[rng.bytes(3_000_000), rng.bytes(2_000_000)] for _ in range(4)]
    shard = write_shard(tmp_path, "s.arrow", documents)
    data = (tmp_path / "s.arrow").read_bytes()
    chunk = 8 * 1024 * 1024
    assert shard.length == len(data) > 2 * chunk
    assert list(shard.sums) == [
        hashlib.sha256(data[i : i + chunk]).hexdigest() for i in range(0, len(data), chunk)
    ]
    reader = ShardReader(tmp_path / shard.path, shard, UINT8)
    assert reader.tokens(5).tobytes() == documents[2][1]
    assert reader.first_rows.tolist() == [0, 2, 4, 6]
    assert [p.name for p in tmp_path.iterdir()] == ["s.arrow"]


def test_a_document_in_two_batches_and_a_batch_of_more_than_there_was_room_for(tmp_path):
    rng, sizes = np.random.default_rng(1), (1_250_000, 3_000_000, 1_000_000, 1_250_000)
    tokens = [rng.integers(0, 2**16, n, np.uint16) for n in sizes]
    writer = ShardWriter(tmp_path, "s.arrow", np.dtype(np.uint16))
    for part, some in zip((0, 1, 0, 1), tokens, strict=True):
        writer.append(Row("doc", part, some, 7, 2))
    shard = writer.finish()
    with pa.ipc.open_file(str(tmp_path / "s.arrow")) as file:
        assert [file.get_batch(i).num_rows for i in range(file.num_record_batches)] == [1, 1, 2]
    assert (shard.rows, shard.documents, shard.tokens) == (4, 2, sum(sizes))
    assert (shard.longest_document, shard.n_bytes, shard.n_words) == (4_250_000, 28, 8)
    reader = ShardReader(tmp_path / "s.arrow", shard, np.dtype(np.uint16))
    assert all(np.array_equal(reader.tokens(row), some) for row, some in enumerate(tokens))


def test_small_documents_share_batches(tmp_path):
    shard = write_shard(tmp_path, "s.arrow", [[b"%d" % i] for i in range(20_000)])
    with pa.ipc.open_file(str(tmp_path / "s.arrow")) as file:
        assert file.num_record_batches == 2
    assert ShardReader(tmp_path / shard.path, shard, UINT8).tokens(19_999).tobytes() == b"19999"


def test_a_full_disk_leaves_nothing_behind(tmp_path, capfd):
    soft, hard = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (10_000, hard))  # no file may grow longer
    writer = ShardWriter(tmp_path, "s.arrow", UINT8)
    try:
        writer.append(Row("doc", 0, np.zeros(20_000, np.uint8), 20_000, 0))
        with pytest.raises(CorpusError, match=r"cannot be written \(File too large\)"):
            writer.finish()
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, (soft, hard))
        writer.abort()
    del writer
    gc.collect()
    assert list(tmp_path.iterdir()) == []
    assert capfd.readouterr() == ("", "")


def damaged(corpus: Path, change) -> CorpusError:
    shard = write_shard(corpus, "x y/s.arrow", [[b"text"], [b"more"]])
    change(corpus / "x y/s.arrow")
    with pytest.raises(CorpusError, match=r"x y/s\.arrow: .*`tvq prepare` again") as caught:
        ShardReader(corpus / shard.path, shard, UINT8)
    return caught.value


def test_damage_is_found_when_it_is_opened(tmp_path):
    assert "is missing" in str(damaged(tmp_path, Path.unlink))
    assert "bytes, the manifest says" in str(
        damaged(tmp_path, lambda path: path.write_bytes(path.read_bytes()[:-1]))
    )
    assert "bytes, the manifest says 0" not in str(
        damaged(tmp_path, lambda path: path.write_bytes(b""))
    )
    damaged(tmp_path, lambda path: path.write_bytes(bytes(path.stat().st_size)))


def test_another_shard_in_its_place_is_found(tmp_path):
    shard = write_shard(tmp_path, "s.arrow", [[b"text"], [b"more"]])
    write_shard(tmp_path, "s.arrow", [[b"text", b"more"]])
    assert (tmp_path / "s.arrow").stat().st_size == shard.length
    with pytest.raises(CorpusError, match=r"\(2, 1, 8\), the manifest says \(2, 2, 8\)"):
        ShardReader(tmp_path / shard.path, shard, UINT8)
    with pytest.raises(CorpusError, match="its columns are not those of a shard of uint16"):
        ShardReader(tmp_path / shard.path, shard, np.dtype(np.uint16))


@pytest.mark.parametrize(("byte", "chunk"), [(0, 0), (8 * 2**20 - 1, 0), (8 * 2**20, 1), (-1, 1)])
def test_a_flipped_byte_is_named(tmp_path, byte, chunk):
    shard = write_shard(tmp_path, "s.arrow", [[bytes(3 * 2**20)] * 3])
    check_sums(tmp_path, shard)
    with (tmp_path / "s.arrow").open("r+b") as file:
        file.seek(byte, 2 if byte < 0 else 0)
        old = file.read(1)
        file.seek(-1, 1)
        file.write(bytes([old[0] ^ 1]))
    with pytest.raises(CorpusError, match=rf"s\.arrow: chunk {chunk} \(bytes {chunk * 8388608} to"):
        check_sums(tmp_path, shard)
