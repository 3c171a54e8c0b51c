"""Stores against a dictionary, and an object store that fails in every way the proxy knows."""

import multiprocessing
import os
import pickle
from collections.abc import Iterator
from pathlib import Path

import pyarrow as pa
import pyarrow.parquet as pq
import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from pipeline import google_storage
from pipeline.errors import CorpusError
from pipeline.storage import LocalStore, Store, is_url, open_store

KINDS = ("local", "gs")
BIG = bytes(range(256)) * 4096 * 20  # 20 MiB: three requests of a resumable upload


@pytest.fixture(params=KINDS)
def store(request: pytest.FixtureRequest, tmp_path: Path) -> Store:
    if request.param == "local":
        return open_store(tmp_path / "store")
    return open_store(f"{request.getfixturevalue('bucket')}/a/prefix")


@pytest.fixture
def impatient(monkeypatch: pytest.MonkeyPatch) -> Iterator[None]:
    """Stalls are noticed sooner than a test likes to wait."""
    monkeypatch.setattr(google_storage, "_SILENCE_SECONDS", 0.5)
    monkeypatch.setattr(google_storage, "_REQUEST_SECONDS", 3.0)
    google_storage._connect.cache_clear()
    yield
    google_storage._connect.cache_clear()


# ---- One behaviour, wherever it lies -------------------------------------------------------------

names = st.sampled_from(["a", "b c", "d/a", "d/ü#?%41&+.txt", "d/e/f", "da/x", "d.tmp"])
operations = st.lists(
    st.one_of(
        st.tuples(st.just("write"), names, st.binary(max_size=9)),
        st.tuples(st.just("create"), names, st.binary(max_size=9)),
        st.tuples(st.just("place"), names, st.binary(max_size=9)),
        st.tuples(st.just("remove"), names),
        st.tuples(st.just("remove_tree"), st.sampled_from(["d", "d/e", "", "none"])),
    ),
    max_size=12,
)


@settings(max_examples=12, suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(operations)
def test_a_store_is_a_dictionary(store: Store, steps):
    store.remove_tree("")
    files: dict[str, bytes] = {}
    for deed, name, *rest in steps:
        data = rest[0] if rest else b""
        if deed == "write":
            store.write(name, data)
            files[name] = data
        elif deed == "create":
            assert store.create(name, data) == (files.setdefault(name, data) == data)
        elif deed == "place":
            scratch = store.scratch(name)
            scratch.write_bytes(data)
            store.place(scratch, name)
            assert not scratch.exists()
            files[name] = data
        elif deed == "remove":
            store.remove(name)
            files.pop(name, None)
        else:
            store.remove_tree(name)
            files = {n: d for n, d in files.items() if name and not n.startswith(f"{name}/")}
    for prefix in ("", "d", "none"):
        below = [n for n in sorted(files) if not prefix or n.startswith(f"{prefix}/")]
        assert [(e.name, e.size) for e in store.list(prefix)] == [(n, len(files[n])) for n in below]
    for name in ("a", "b c", "d/a", "d/ü#?%41&+.txt", "d/e/f", "da/x", "d.tmp"):
        assert store.exists(name) == (name in files)
        if name in files:
            assert store.read(name) == files[name]
            assert store.size(name) == len(files[name])
            folder, _, last = name.rpartition("/")
            assert store.child(folder).read(last) == files[name]
        else:
            for missing in (store.read, store.open, store.size):
                with pytest.raises(FileNotFoundError):
                    missing(name)


def test_a_folder_is_no_file(store: Store):
    store.write("folder/file", b"x")
    assert not store.exists("folder")
    with pytest.raises(FileNotFoundError):
        store.size("folder")
    assert list(store.list("folder/file")) == []


def test_files_are_read_from_anywhere(store: Store):
    store.write("big", BIG)
    assert store.read("big") == BIG
    with store.open("big") as file:
        assert file.read(5) == BIG[:5]
        assert file.seek(9 * 2**20 + 7) == 9 * 2**20 + 7
        assert file.read(9 * 2**20) == BIG[9 * 2**20 + 7 : 18 * 2**20 + 7]
        assert file.seek(-3, os.SEEK_END) == len(BIG) - 3
        assert file.read() == BIG[-3:]
        assert file.read(1) == b""
        file.seek(2**19 + 1)
        assert file.read() == BIG[2**19 + 1 :]
    table = pa.table({"text": [f"document {i}" for i in range(1000)]})
    sink = pa.BufferOutputStream()
    pq.write_table(table, sink)
    store.write("t.parquet", sink.getvalue().to_pybytes())
    with store.open("t.parquet") as file:
        assert pq.ParquetFile(file).read().equals(table)


def test_a_version_tells_of_a_rewrite(store: Store):
    store.write("f", b"one")
    store.write("other", b"one")
    before = {entry.name: entry.version for entry in store.list()}
    store.write("f", b"two")
    after = {entry.name: entry.version for entry in store.list()}
    assert before["f"] != after["f"]
    assert before["other"] == after["other"]


def test_names_stay_inside(store: Store):
    for name in ("../x", "a/../../x", "/etc/passwd"):
        for deed in (store.read, store.size, store.child, store.scratch, store.remove_tree):
            with pytest.raises(CorpusError, match="outside"):
                deed(name)


def test_a_store_is_picklable(store: Store):
    store.write("f", b"there")
    assert pickle.loads(pickle.dumps(store)).read("f") == b"there"
    assert pickle.loads(pickle.dumps(store)).location == store.location


def test_of_two_processes_one_creates(store: Store):
    context = multiprocessing.get_context("spawn")
    start = context.Barrier(2)
    queue = context.SimpleQueue()
    processes = [context.Process(target=_create, args=(store, start, queue, i)) for i in range(2)]
    for process in processes:
        process.start()
    won = dict(queue.get() for _ in processes)
    for process in processes:
        process.join()
    for round_ in range(5):
        [winner] = [i for i in range(2) if won[i][round_]]
        assert store.read(f"claim{round_}") == b"owner %d" % winner


def _create(store: Store, start, queue, i: int) -> None:
    store.exists("x")  # imports and connects
    won = []
    for round_ in range(5):
        start.wait()
        won.append(store.create(f"claim{round_}", b"owner %d" % i))
    queue.put((i, won))


# ---- What is refused -----------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("location", "words"),
    [
        ("s3://bucket/x", "s3:// is not supported; give a local path or gs://"),
        ("memory://x", "not supported"),
        ("gcs://bucket/x", "not supported"),
        ("gs://", "names no bucket"),
        ("gs:///x", "names no bucket"),
        ("gs://me:hunter2@bucket/x", "credentials"),
        ("s3://me:hunter2@bucket/x", "credentials"),
        ("gs://bucket/x?access_token=hunter2", "credentials"),
        ("file://server/x", "another machine"),
    ],
)
def test_locations_refused(location: str, words: str):
    assert is_url(location)
    with pytest.raises(CorpusError, match=words) as error:
        open_store(location)
    assert "\n" not in str(error.value)
    assert "hunter2" not in str(error.value)


def test_locations(tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    monkeypatch.chdir(tmp_path)
    assert open_store("x/y").location == str(tmp_path / "x" / "y")
    assert open_store(Path("/x")).location == "/x"
    assert open_store("file:///a%20b/c").location == "/a b/c"
    assert open_store("gs://bucket/x/").child("y").location == "gs://bucket/x/y"
    assert open_store("gs://bucket").location == "gs://bucket"
    assert not is_url("x/y")
    assert not is_url("C:/x")


def test_local_errors_are_one_line(tmp_path: Path):
    store = LocalStore(tmp_path)
    store.write("file", b"")
    with pytest.raises(CorpusError, match=r"file/x: cannot be written \(.*\)$"):
        store.write("file/x", b"")
    with pytest.raises(FileNotFoundError):
        store.read("file/x")
    (tmp_path / "folder").mkdir()
    with pytest.raises(CorpusError, match=r"folder: cannot be read \(Is a directory\)$"):
        store.read("folder")


# ---- An object store that fails ------------------------------------------------------------------


def test_failures_that_pass(bucket: str, object_store):
    store = open_store(bucket)
    object_store.fault("503", "POST .*upload", times=2)
    store.write("f", b"one")
    object_store.fault("cut-upload", "POST .*upload", times=1)
    store.write("f", b"two")
    assert object_store.stored(f"{bucket}/f") == b"two"
    for action, match in (("503", "/o/f$"), ("cut-reply", "alt=media"), ("lose-reply", "/o[?]")):
        object_store.fault(action, f"GET .*{match}", times=1)
    assert store.read("f") == b"two"
    assert [entry.name for entry in store.list()] == ["f"]
    object_store.fault("lose-reply", "DELETE", times=1)
    store.remove("f")
    assert not store.exists("f")


def test_a_claim_whose_answer_is_lost_is_ours(bucket: str, object_store):
    store = open_store(bucket)
    object_store.fault("lose-reply", "POST .*upload", times=1)
    assert store.create("claim", b"owner 1")
    assert not store.create("claim", b"owner 2")
    assert object_store.stored(f"{bucket}/claim") == b"owner 1"


@pytest.mark.parametrize(
    ("action", "after"),
    [
        ("cut-upload", 2),
        ("lose-reply", 1),
        *(
            pytest.param(action, after, marks=pytest.mark.slow)
            for action in ("503", "cut-upload", "lose-reply", "cut-reply")
            for after in (0, 1, 2, 3)  # the beginning, then a request for each piece
        ),
    ],
)
def test_an_upload_of_many_requests_is_whole(bucket: str, object_store, tmp_path, action, after):
    """Wherever it fails, and whatever the emulator makes of a piece that comes twice."""
    store = open_store(bucket)
    object_store.fault(action, "(POST|PUT) .*upload", times=1, after=after)
    scratch = store.scratch("shards/one.arrow")
    scratch.write_bytes(BIG)
    store.place(scratch, "shards/one.arrow")
    assert not scratch.exists()
    assert object_store.stored(f"{bucket}/shards/one.arrow") == BIG


def test_bytes_changed_on_the_way_are_sent_again(bucket: str, object_store):
    store = open_store(bucket)
    object_store.fault("change-upload", "upload_id", times=1, after=1)
    store.write("f", BIG)
    assert object_store.stored(f"{bucket}/f") == BIG
    object_store.fault("change-upload", "upload_id", after=1)
    with pytest.raises(CorpusError, match="f: sent 3 times, and the store then held other bytes"):
        store.write("f", BIG)
    assert not store.exists("f")


@pytest.mark.parametrize("size", [5, pytest.param(len(BIG), marks=pytest.mark.slow)])
@pytest.mark.parametrize("action", ["stall", "stall-upload"])
def test_a_stalled_upload_goes_on(bucket: str, object_store, impatient, action, size):
    store = open_store(bucket)
    object_store.fault(action, "(POST|PUT) .*upload", times=1, after=int(size > 5))
    store.write("f", BIG[:size])
    assert object_store.stored(f"{bucket}/f") == BIG[:size]


def test_a_stalled_read_goes_on(bucket: str, object_store, impatient):
    store = open_store(bucket)
    store.write("f", b"text")
    for path in ("alt=media", "/o/f$", "/o[?]"):
        object_store.fault("stall", f"GET .*{path}", times=1)
    assert store.read("f") == b"text"
    assert [entry.name for entry in store.list()] == ["f"]


def test_a_store_that_forbids_is_named_at_once(bucket: str, object_store, capfd):
    store = open_store(f"{bucket}/corpus")
    object_store.fault("403")
    for deed in (
        lambda: store.read("f"),
        lambda: store.exists("f"),
        lambda: store.write("f", b"x"),
        lambda: store.write("f", BIG),
        lambda: store.create("f", b"x"),
        lambda: store.remove("f"),
        lambda: list(store.list()),
    ):
        object_store.requests.clear()
        with pytest.raises(CorpusError, match=f"{bucket}/corpus.*: forbidden without") as error:
            deed()
        assert "\n" not in str(error.value)
        assert len(object_store.requests) == 1
    assert capfd.readouterr().err == ""


def test_a_bucket_that_is_missing_is_named(bucket: str):
    store = open_store("gs://no-such-bucket/corpus")
    for deed in (
        lambda: store.read("f"),
        lambda: store.exists("f"),
        lambda: store.write("f", b"x"),
        lambda: store.write("f", BIG),
        lambda: store.create("f", b"x"),
        lambda: list(store.list()),
    ):
        with pytest.raises(CorpusError, match="there is no bucket no-such-bucket; create it"):
            deed()
    store.remove("f")


def test_an_object_replaced_while_it_is_read(bucket: str):
    store = open_store(bucket)
    store.write("f", BIG)
    with store.open("f") as file:
        assert file.read(3) == BIG[:3]
        store.write("f", BIG[::-1])
        file.seek(2**24)
        with pytest.raises(CorpusError, match="f: replaced or removed while it was read"):
            file.read(3)


@pytest.mark.slow
def test_a_store_that_stays_ill_or_away_is_named(bucket: str, object_store, monkeypatch, capfd):
    store = open_store(f"{bucket}/corpus")
    object_store.fault("503")
    with pytest.raises(CorpusError, match="corpus/f: cannot be read: the store answered 503; try"):
        store.read("f")
    monkeypatch.setenv("STORAGE_EMULATOR_HOST", "http://127.0.0.1:1")
    with pytest.raises(
        CorpusError, match=r"cannot be reached .*; check STORAGE_EMULATOR_HOST=http"
    ):
        store.read("f")
    assert capfd.readouterr().err == ""


def test_credentials_that_are_named_but_missing(monkeypatch, tmp_path):
    monkeypatch.delenv("STORAGE_EMULATOR_HOST", raising=False)
    monkeypatch.setenv("GOOGLE_APPLICATION_CREDENTIALS", str(tmp_path / "none.json"))
    google_storage._connect.cache_clear()
    with pytest.raises(CorpusError, match=r"GOOGLE_APPLICATION_CREDENTIALS=.*none.json.*not found"):
        open_store("gs://bucket/x").read("f")


def test_a_path_of_the_home_folder(tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    monkeypatch.setenv("HOME", str(tmp_path))
    open_store("~/corpora/books").write("a", b"1")
    assert (tmp_path / "corpora" / "books" / "a").read_bytes() == b"1"
