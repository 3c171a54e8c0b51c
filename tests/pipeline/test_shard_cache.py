"""The shard cache against a brute-force list, an object store that fails, and other processes."""

import itertools
import multiprocessing
import os
import re
import signal
import threading
import time
from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from pipeline.errors import CorpusError
from pipeline.shard_cache import ShardCache, default_folder
from pipeline.shards import CHUNK_BYTES, Shard, ShardReader
from pipeline.storage import Store, open_store
from tests.pipeline.corpora import write_shard

N = 5


def wait_until(holds: Callable[[], bool]) -> None:
    while not holds():  # the test's own time limit ends it
        time.sleep(0.01)


@pytest.fixture
def local(tmp_path: Path) -> Path:
    return tmp_path / "corpus"


@pytest.fixture
def shards(local: Path) -> list[Shard]:
    """Shards of different bytes and equal length."""
    return [write_shard(local, f"shards/{i}.arrow", [[b"%d" % i * 500]]) for i in range(N)]


@pytest.fixture
def store(bucket: str, local: Path, shards: list[Shard]) -> Store:
    store = open_store(f"{bucket}/corpus")
    for shard in shards:
        store.write(shard.path, (local / shard.path).read_bytes())
    return store


@pytest.fixture
def big(local: Path, bucket: str, shards: list[Shard]) -> Shard:
    """A shard of three chunks."""
    text = np.random.default_rng(0).integers(0, 256, 2 * CHUNK_BYTES + 9, np.uint8).tobytes()
    shard = write_shard(local, "shards/big.arrow", [[text]])
    store = open_store(f"{bucket}/corpus")
    store.write(shard.path, (local / shard.path).read_bytes())
    assert len(shard.sums) == 3
    return shard


def files(folder: Path) -> set[str]:
    return {path.name for path in folder.iterdir()} - {".lock"}


# ---- Bytes ---------------------------------------------------------------------------------------


def test_bytes_are_the_shard(store: Store, local: Path, shards, big, tmp_path, object_store):
    with ShardCache(store, tmp_path / "cache", None) as cache:
        for shard in (*shards, big, big):
            path = cache.path(shard)
            assert path.read_bytes() == (local / shard.path).read_bytes()
    assert len(files(tmp_path / "cache")) == N + 1
    object_store.requests.clear()
    with ShardCache(store, tmp_path / "cache", None) as cache:
        assert cache.path(big).read_bytes() == (local / big.path).read_bytes()
    assert object_store.requests == []


def test_a_local_corpus_is_not_copied(local: Path, shards, tmp_path):
    with ShardCache(open_store(local), tmp_path / "cache", 1) as cache:
        cache.prefetch(shards)
        assert cache.path(shards[0]) == local / shards[0].path
        cache.release(shards[0])
        cache.check_limit(shards, N)
    assert not (tmp_path / "cache").exists()


def test_equal_shards_share_a_file(store: Store, shards, tmp_path, bucket, local):
    other = open_store(f"{bucket}/other")
    other.write(shards[0].path, (local / shards[0].path).read_bytes())
    with ShardCache(store, tmp_path, None) as one, ShardCache(other, tmp_path, None) as two:
        assert one.path(shards[0]) == two.path(shards[0])


def test_default_folder(monkeypatch, tmp_path):
    monkeypatch.setenv("TVQ_CACHE", str(tmp_path))
    assert default_folder() == tmp_path
    monkeypatch.delenv("TVQ_CACHE")
    assert default_folder() == Path.home() / ".cache" / "tvq" / "shards"


# ---- What is damaged -----------------------------------------------------------------------------


@pytest.mark.parametrize("damage", ["flip", "cut", "longer"])
def test_a_damaged_cached_file_is_fetched_again(store, local, shards, tmp_path, damage):
    folder = tmp_path / "cache"
    with ShardCache(store, folder, None) as cache:
        path = cache.path(shards[0])
    right = path.read_bytes()
    spoilt = {
        "flip": right[:400] + bytes([right[400] ^ 1]) + right[401:],
        "cut": right[:-1],
        "longer": right + b"x",
    }
    path.write_bytes(spoilt[damage])
    with ShardCache(store, folder, shards[0].length) as cache:
        assert cache.path(shards[0]).read_bytes() == right
    assert len(files(folder)) == 1


def test_bytes_changed_on_the_way_are_fetched_again(store, local, big, tmp_path, object_store):
    fetches = "big.arrow?alt=media"  # of this test: another's thread may still be at it
    object_store.fault("change-reply", re.escape(fetches), times=2, after=1)
    with ShardCache(store, tmp_path / "cache", None) as cache:
        assert cache.path(big).read_bytes() == (local / big.path).read_bytes()
        assert len([r for r in object_store.requests if fetches in r]) == 3 + 2


def test_bytes_that_stay_wrong_are_named(store, local, big, tmp_path):
    data = bytearray((local / big.path).read_bytes())
    data[CHUNK_BYTES] ^= 1
    store.write(big.path, bytes(data))
    folder = tmp_path / "cache"
    with ShardCache(store, folder, None) as cache:
        begin, end = CHUNK_BYTES, 2 * CHUNK_BYTES
        words = rf"corpus/shards/big.arrow: chunk 1 \(bytes {begin} to {end}\) is not what"
        with pytest.raises(CorpusError, match=words):
            cache.path(big)
        assert files(folder) == set()
        store.write(big.path, bytes(data[:-1]))
        with pytest.raises(CorpusError, match=r"big.arrow: chunk 1"):
            cache.path(big)
        store.remove(big.path)
        with pytest.raises(CorpusError, match=r"corpus/shards/big.arrow: missing"):
            cache.path(big)
    assert files(folder) == set()


def test_a_store_that_fails_for_a_while(store, local, big, tmp_path, object_store):
    for action in ("503", "cut-reply"):
        object_store.fault(action, "alt=media", times=1, after=1)
    with ShardCache(store, tmp_path / "cache", None) as cache:
        assert cache.path(big).read_bytes() == (local / big.path).read_bytes()


def test_a_store_that_forbids(store, shards, tmp_path, object_store):
    object_store.fault("403", "/o/")
    with ShardCache(store, tmp_path / "cache", None) as cache:
        cache.prefetch(shards)
        with pytest.raises(CorpusError, match=r"shards/0.arrow: cannot be read: forbidden"):
            cache.path(shards[0])
        object_store.mend()
        assert cache.path(shards[0]).exists()


def test_a_full_disk_or_a_folder_not_ours(store, shards, tmp_path):
    (tmp_path / "file").write_bytes(b"")
    with (
        ShardCache(store, tmp_path / "file" / "cache", None) as cache,
        pytest.raises(CorpusError, match=r"cannot be written \(Not a directory\); .* TVQ_CACHE"),
    ):
        cache.path(shards[0])


# ---- The limit -----------------------------------------------------------------------------------

deeds = st.sampled_from([("path",), ("release",), ("path", "release")])
visits = st.lists(st.tuples(deeds, st.integers(0, N - 1)), min_size=15, max_size=30)


@settings(max_examples=20, suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(visits, st.integers(1, N - 1))
def test_eviction_is_least_recently_used(store, shards, tmp_path_factory, visits, room):
    """Against a list of what is there, oldest first, and a count of the uses of each."""
    length = max(shard.length for shard in shards)
    assert {shard.length for shard in shards} == {length}
    folder = tmp_path_factory.mktemp("cache")
    there: list[int] = []
    uses = [0] * N
    with ShardCache(store, folder, room * length, clock=itertools.count(1).__next__) as cache:
        names: dict[int, str] = {}
        for deed, i in ((deed, i) for deeds, i in visits for deed in deeds):
            if deed == "release":
                cache.release(shards[i])
                if uses[i]:
                    uses[i] -= 1
                    if uses[i] == 0:
                        there.remove(i)
                        there.append(i)
                continue
            unused = [j for j in there if not uses[j]]
            if i not in there and len(there) == room and not unused:
                with pytest.raises(CorpusError, match=f"raise its limit to {(room + 1) * length}$"):
                    cache.path(shards[i])
                continue
            names[i] = cache.path(shards[i]).name
            if i in there:
                there.remove(i)
            elif len(there) == room:
                there.remove(unused[0])
            there.append(i)
            uses[i] += 1
            assert files(folder) == {names[j] for j in there}


def test_a_limit_too_small_is_refused_with_the_figure(store, shards, tmp_path):
    length = shards[0].length
    with ShardCache(store, tmp_path / "cache", 2 * length - 1) as cache:
        cache.check_limit(shards, 1)
        with pytest.raises(CorpusError, match=f"cache may hold {2 * length - 1} bytes.* need"):
            cache.check_limit(shards, 2)
    with (
        ShardCache(store, tmp_path / "cache", length - 1) as cache,
        pytest.raises(CorpusError, match=f"raise its limit to {length}$"),
    ):
        cache.path(shards[0])


# ---- Ahead of need -------------------------------------------------------------------------------


def fetched(object_store, shards: list[Shard]) -> list[int]:
    """The shards whose bytes were asked for, in order."""
    names = [shard.path.replace("/", "%2F") for shard in shards]
    asked = [r for r in object_store.requests if "alt=media" in r]
    return [i for r in asked for i, name in enumerate(names) if name in r]


def test_prefetch_is_in_order_and_needs_no_second_fetch(store, shards, tmp_path, object_store):
    with ShardCache(store, tmp_path / "cache", None) as cache:
        cache.prefetch([shards[i] for i in (3, 1, 4)])
        wait_until(lambda: len(fetched(object_store, shards)) == 3)
        for i in (3, 1, 4):
            cache.path(shards[i])
        assert fetched(object_store, shards) == [3, 1, 4]


def test_prefetch_leaves_what_is_in_use_and_goes_on_when_it_is_given_back(
    store, shards, tmp_path, object_store
):
    folder = tmp_path / "cache"
    with ShardCache(store, folder, 2 * shards[0].length) as cache:
        paths = [cache.path(shards[i]) for i in (0, 1)]
        cache.prefetch([shards[2], shards[3]])
        wait_until(lambda: cache._thread is None)
        assert fetched(object_store, shards) == [0, 1]
        cache.release(shards[1])
        wait_until(lambda: fetched(object_store, shards) == [0, 1, 2])
        wait_until(lambda: cache._thread is None)
        # There is room for one: 3 does not take the place of 2, which is needed before it.
        assert paths[0].exists()
        assert not paths[1].exists()
        cache.release(shards[0])
        wait_until(lambda: fetched(object_store, shards) == [0, 1, 2, 3])
        cache.path(shards[2])
        cache.path(shards[3])
        assert fetched(object_store, shards) == [0, 1, 2, 3]


def test_what_is_asked_for_comes_before_what_is_only_next(store, shards, tmp_path):
    with ShardCache(store, tmp_path / "cache", 2 * shards[0].length) as cache:
        cache.prefetch([shards[1], shards[2]])
        cache.path(shards[3])
        cache.path(shards[4])


def test_closing_ends_a_fetch(store, big, tmp_path, object_store):
    object_store.fault("stall", "alt=media", times=1, after=1)
    folder = tmp_path / "cache"
    cache = ShardCache(store, folder, None)
    cache.prefetch([big])
    wait_until(lambda: len([r for r in object_store.requests if "alt=media" in r]) == 2)
    object_store.mend()
    cache.close()
    cache.close()
    assert not [thread for thread in threading.enumerate() if thread.name == "tvq shards"]
    assert not [name for name in files(folder) if name.endswith(".partial")]


def test_a_mapped_shard_outlives_its_file(store, local, shards, tmp_path):
    with ShardCache(store, tmp_path / "cache", shards[0].length) as cache:
        path = cache.path(shards[0])
        reader = ShardReader(path, shards[0], np.dtype(np.uint8))
        cache.release(shards[0])
        cache.path(shards[1])
        assert not path.exists()
        assert bytes(reader.tokens(0)) == b"0" * 500


# ---- Other processes -----------------------------------------------------------------------------


def _use(store: Store, folder: Path, limit: int | None, shard: Shard, tell, hold) -> None:
    with ShardCache(store, folder, limit) as cache:
        tell.wait()
        data = cache.path(shard).read_bytes()
        hold.put(data)
        tell.wait()


def test_two_processes_fetch_a_shard_once(store, local, big, tmp_path, object_store):
    context = multiprocessing.get_context("spawn")
    barrier, answers = context.Barrier(2), context.SimpleQueue()
    arguments = (store, tmp_path / "cache", None, big, barrier, answers)
    processes = [context.Process(target=_use, args=arguments) for _ in range(2)]
    for process in processes:
        process.start()
    assert [answers.get(), answers.get()] == [(local / big.path).read_bytes()] * 2
    for process in processes:
        process.join()
    assert len([r for r in object_store.requests if "alt=media" in r]) == 3


def test_what_another_process_uses_stays(store, shards, tmp_path, object_store):
    context = multiprocessing.get_context("spawn")
    barrier, answers = context.Barrier(2), context.SimpleQueue()
    folder, limit = tmp_path / "cache", shards[0].length
    other = context.Process(target=_use, args=(store, folder, limit, shards[0], barrier, answers))
    other.start()
    barrier.wait()
    answers.get()
    with ShardCache(store, folder, limit) as cache:
        with pytest.raises(CorpusError, match=f"raise its limit to {2 * limit}$"):
            cache.path(shards[1])
        barrier.wait()
        other.join()
        assert cache.path(shards[1]).exists()
        assert len(files(folder)) == 1


def test_a_process_killed_while_it_fetches(store, local, big, tmp_path, object_store):
    object_store.fault("stall", "alt=media", times=1, after=1)
    context = multiprocessing.get_context("spawn")
    barrier, answers = context.Barrier(2), context.SimpleQueue()
    folder = tmp_path / "cache"
    other = context.Process(target=_use, args=(store, folder, None, big, barrier, answers))
    other.start()
    barrier.wait()
    wait_until(lambda: len([r for r in object_store.requests if "alt=media" in r]) == 2)
    [partial] = files(folder)
    assert partial.endswith(".partial")
    assert other.pid
    os.kill(other.pid, signal.SIGKILL)
    other.join()
    with ShardCache(store, folder, big.length) as cache:
        assert cache.path(big).read_bytes() == (local / big.path).read_bytes()
    [name] = files(folder)
    assert name.endswith(".arrow")
