"""A corpus that lies in an object store, and one made from files there: as if all were local."""

import itertools
import time
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from pipeline.assembly import assemble
from pipeline.claims import Claim
from pipeline.errors import CorpusError
from pipeline.loader import training_batches
from pipeline.manifest import Manifest
from pipeline.plan import PrepareSettings
from pipeline.prepare import prepare
from pipeline.sources import CORPUS_MARKER, SourceSettings
from pipeline.storage import open_store
from pipeline.tasks import run_here
from pipeline.verification import verify
from tests.pipeline.test_increments import files, plant


def make(source: str | Path, corpus: str | Path):
    return prepare(
        PrepareSettings(SourceSettings((str(source),)), shard_bytes=2000), corpus, run_here
    )


@pytest.fixture
def local(tmp_path) -> Path:
    plant(tmp_path / "source", range(40))
    make(tmp_path / "source", tmp_path / "corpus")
    return tmp_path


def stored(url: str) -> dict[str, bytes]:
    store = open_store(url)
    return {e.name: store.read(e.name) for e in store.list() if e.name != "listing.json"}


def upload(folder: Path, url: str) -> None:
    for path in filter(Path.is_file, folder.rglob("*")):
        open_store(url).write(path.relative_to(folder).as_posix(), path.read_bytes())


def test_the_same_bytes_from_a_bucket_into_a_bucket(local, bucket):
    upload(local / "source", f"{bucket}/texts")
    assert not make(f"{bucket}/texts", f"{bucket}/corpora/one").reused
    assert stored(f"{bucket}/corpora/one") == files(local / "corpus")
    assert make(f"{bucket}/texts", f"{bucket}/corpora/one").reused
    assert make(f"{bucket}/texts/*.txt", f"{bucket}/corpora/one").reused
    plant(local / "source", range(40, 45))
    make(local / "source", local / "corpus")
    upload(local / "source", f"{bucket}/texts")
    # Uploaded anew, so every object has another generation; what is in them is the same.
    assert make(f"{bucket}/texts", f"{bucket}/corpora/one").rebuilt is None
    assert stored(f"{bucket}/corpora/one") == files(local / "corpus")
    assert verify(f"{bucket}/corpora/one").documents == 45


def test_a_prepare_that_broke_off_goes_on(local, bucket, object_store):
    object_store.fault("403", match="records-00002", times=1)
    with pytest.raises(CorpusError, match=r"records-00002\.arrow: cannot be read: forbidden"):
        make(local / "source", f"{bucket}/corpus")
    object_store.mend()
    with pytest.raises(CorpusError, match="unfinished"):
        Manifest.load(f"{bucket}/corpus")
    made = make(local / "source", f"{bucket}/corpus")
    assert made.resumed_shards > 0
    assert stored(f"{bucket}/corpus") == files(local / "corpus")


def test_one_prepares_at_a_time(local, bucket, monkeypatch):
    url = f"{bucket}/corpus"
    open_store(url).write(CORPUS_MARKER, b"")
    other = Claim(open_store(url))
    assert other.take() is None
    with pytest.raises(CorpusError, match=r"another prepare is writing to it \(process \d+ on"):
        make(local / "source", url)
    assert set(stored(url)) == {CORPUS_MARKER, "lease.json"}
    other.give_back()

    # Not heard of for a minute, it is taken for dead; another one is at it when it wakes up.
    def assembled(*arguments: Any) -> Manifest:
        later = Claim(open_store(url), clock=lambda: time.time() + 61)
        assert later.take() is None
        return assemble(*arguments)

    with monkeypatch.context() as patch:
        patch.setattr("pipeline.prepare.assemble", assembled)
        with pytest.raises(CorpusError, match="another prepare took over"):
            make(local / "source", url)
    with pytest.raises(CorpusError, match="unfinished"):
        Manifest.load(url)


def test_training_reads_it_through_a_cache_that_is_too_small_for_all(
    local, bucket, monkeypatch, tmp_path
):
    upload(local / "corpus", f"{bucket}/corpus")
    monkeypatch.setenv("TVQ_CACHE", str(tmp_path / "cache"))
    settings: Any = {"sequence_length": 64, "batch_size": 4, "seed": 1, "shuffle_span": 1}
    lengths = [shard.length for shard in Manifest.load(local / "corpus").splits["train"].shards]
    assert len(lengths) > 4
    limit = sum(sorted(lengths)[-3:])
    with pytest.raises(CorpusError, match=f"{limit:,}|{limit}"):
        training_batches(f"{bucket}/corpus", cache_bytes=limit - 1, **settings)
    with (
        training_batches(local / "corpus", **settings) as expected,
        training_batches(f"{bucket}/corpus", cache_bytes=limit, **settings) as batches,
    ):
        for one, other in itertools.islice(zip(expected, batches, strict=True), 60):
            assert all(np.array_equal(a, b) for a, b in zip(one, other, strict=True))
    held = sum(p.stat().st_size for p in (tmp_path / "cache").rglob("*") if p.is_file())
    assert held <= limit


def test_a_shard_that_was_changed_in_the_bucket_is_named(local, bucket, monkeypatch, tmp_path):
    upload(local / "corpus", f"{bucket}/corpus")
    monkeypatch.setenv("TVQ_CACHE", str(tmp_path / "cache"))
    shard = Manifest.load(local / "corpus").splits["train"].shards[0]
    data = bytearray((local / "corpus" / shard.path).read_bytes())
    data[len(data) // 2] ^= 1
    open_store(f"{bucket}/corpus").write(shard.path, bytes(data))
    with (
        pytest.raises(CorpusError, match=rf"{shard.path}.*chunk 0"),
        training_batches(f"{bucket}/corpus", sequence_length=64, batch_size=4, seed=0) as batches,
    ):
        for _ in itertools.islice(batches, 100):
            pass
    with pytest.raises(CorpusError, match=rf"{shard.path}.*chunk 0"):
        verify(f"{bucket}/corpus")
