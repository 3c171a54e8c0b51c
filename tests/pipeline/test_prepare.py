"""`prepare` on real Ray: the same bytes however it runs and whatever kills it, and no surprises."""

import contextlib
import hashlib
import json
import os
import signal
import subprocess
import sys
import time
from pathlib import Path
from typing import Any

import pyarrow as pa
import pytest

from pipeline.errors import CorpusError
from pipeline.manifest import Manifest
from pipeline.plan import PrepareSettings
from pipeline.sources import SourceSettings
from pipeline.tokenizers import make_tokenizer
from pipeline.verification import verify

pytestmark = pytest.mark.ray

ROOT = Path(__file__).parents[2]

# A corpus as people have them. Ranges of 15,000 bytes make some thirty of its hundred documents.
TEXTS = {
    "leer.txt": b"",
    "nul.txt": b"text\0text" * 2000,
    "a copy.txt": b"The same text.\n" * 9,
    "the copy.txt": b"The same text.\n" * 9,
    "sub folder/Größe und 漢字.txt": "Größe 漢字 😀\n".encode() * 99,
    "crlf.txt": b"one\r\ntwo\r\n",
    "bom.txt": b"\xef\xbb\xbfafter a byte order mark",
    "latin1.txt": b"caf\xe9 \xff\xfe",
    "space.txt": b"\n",
} | {f"chapter {i}/{i * 7 % 10}.txt": b"Word %d of it.\n" % i * (i * 7) for i in range(1, 100)}


def range_of_each_text() -> dict[str, int]:
    """A range ends as soon as it has 15,000 bytes, dropped documents counted."""
    ranges, number, held = {}, 0, 0
    for name in sorted(TEXTS):
        ranges[name] = number
        held += len(TEXTS[name])
        if held >= 15_000:
            number, held = number + 1, 0
    return ranges


def plant(source: Path) -> None:
    for name, text in TEXTS.items():
        path = source / name
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_bytes(text)


def settings(source: Path, **changed: Any) -> PrepareSettings:
    changed.setdefault("shard_bytes", 15_000)
    return PrepareSettings(SourceSettings((str(source),)), **changed)


def files(folder: Path) -> dict[str, bytes]:
    """What is in a corpus, but for the listing of its sources, which knows time."""
    return {
        path.relative_to(folder).as_posix(): path.read_bytes()
        for path in folder.rglob("*")
        if path.is_file() and path.name != "listing.json"
    }


@pytest.fixture(scope="module")
def prepare(ray_local):
    from pipeline.prepare import prepare
    from pipeline.ray_tasks import run_tasks

    return lambda settings, output, *progress: prepare(settings, output, run_tasks, *progress)


@pytest.fixture
def source(tmp_path) -> Path:
    plant(tmp_path / "my texts")
    return tmp_path / "my texts"


@pytest.fixture(scope="module")
def clean(prepare, tmp_path_factory) -> tuple[Path, Path]:
    """(source, corpus) of an undisturbed run on both CPUs."""
    folder = tmp_path_factory.mktemp("clean")
    plant(folder / "source")
    assert not prepare(settings(folder / "source"), folder / "corpus").reused
    return folder / "source", folder / "corpus"


def test_plain_arrow_reads_what_was_in_the_files(clean):
    corpus = clean[1]
    manifest = json.loads((corpus / "manifest.json").read_text())
    texts: dict[str, bytes] = {}
    ranges = range_of_each_text()
    for name, split in manifest["splits"].items():
        ids = set()
        words = 0
        for shard in split["shards"]:
            data = (corpus / shard["path"]).read_bytes()
            assert shard["sums"] == [hashlib.sha256(data).hexdigest()]
            with pa.memory_map(str(corpus / shard["path"])) as file:
                rows = pa.ipc.open_file(file).read_all().to_pylist()
            assert shard["n_words"] == sum(row["n_words"] for row in rows)
            for row in rows:
                assert row["part"] == 0
                assert shard["path"].endswith(f"/{name}-{ranges[row['doc_id']]:05d}.arrow")
                assert row["n_bytes"] == len(row["tokens"])
                texts[row["doc_id"]] = bytes(row["tokens"])
                words += len(bytes(row["tokens"]).split())
                ids.add(row["doc_id"])
        assert ids, name
        assert split["documents"] == len(ids)
        assert split["tokens"] == split["n_bytes"] == sum(len(texts[i]) for i in ids)
        assert split["n_words"] == words
    dropped = {"empty": ["leer.txt"], "binary": ["nul.txt"], "duplicate": ["the copy.txt"]}
    assert manifest["drops"] == {
        reason: {"count": len(ids), "examples": ids} for reason, ids in dropped.items()
    }
    assert texts == {k: v for k, v in TEXTS.items() if [k] not in dropped.values()}
    records = {}
    for file in manifest["increments"][0]["records"]:
        for row in pa.ipc.open_file(str(corpus / file["path"])).read_all().to_pylist():
            assert (row["file"], row["row"]) == (row["doc_id"], -1)
            records[row["file"]] = (row["n_bytes"], row["sha256"])
            assert (row["split"] == "") == (row["reason"] != "")
            assert row["reason"] == "".join(r for r, ids in dropped.items() if row["file"] in ids)
    assert records == {k: (len(v), hashlib.sha256(v).digest()) for k, v in TEXTS.items()}
    info = Manifest.load(corpus).tokenizer
    assert make_tokenizer(info.kind, info.fingerprint).vocab_size == info.vocab_size == 259
    assert verify(corpus).shards == sum(len(s["shards"]) for s in manifest["splits"].values()) > 30


def test_another_place_another_time_one_cpu_are_the_same_bytes(clean, source, prepare, tmp_path):
    import ray.data

    for path in source.rglob("*.txt"):
        os.utime(path, (1, 1))
    options = ray.data.DataContext.get_current().execution_options
    options.resource_limits = options.resource_limits.copy(cpu=1)
    try:
        assert not prepare(settings(source), tmp_path / "corpus").reused
    finally:
        options.resource_limits = options.resource_limits.copy(cpu=float("inf"))
    assert files(tmp_path / "corpus") == files(clean[1])


KILLED = """
import sys
from pathlib import Path
from typing import Any
import ray
ray.init(num_cpus=1, include_dashboard=False, log_to_driver=False, logging_level="ERROR",
         object_store_memory=100 * 2**20, _node_ip_address="127.0.0.1", _temp_dir=sys.argv[3])
from pipeline.prepare import PrepareSettings, prepare
from pipeline.ray_tasks import run_tasks
from pipeline.sources import SourceSettings
settings = PrepareSettings(SourceSettings((sys.argv[1],)), shard_bytes=15_000)
prepare(settings, Path(sys.argv[2]), run_tasks)
"""


def test_killed_in_the_middle_and_taken_up(clean, source, prepare, tmp_path, ray_short_folder):
    corpus = tmp_path / "corpus"
    terminal, theirs = os.openpty()
    process = subprocess.Popen(
        [sys.executable, "-c", KILLED, source, corpus, ray_short_folder],
        cwd=ROOT,
        stdout=theirs,
        stderr=theirs,
    )
    os.close(theirs)
    try:
        while len(list(corpus.glob("shards/*/range-*.json"))) < 5 and process.poll() is None:
            time.sleep(0.002)
    finally:
        process.send_signal(signal.SIGKILL)
    status, printed = process.wait(), b""
    os.set_blocking(terminal, False)
    with contextlib.suppress(OSError):  # nothing was printed, or nobody has the terminal any more
        printed = os.read(terminal, 10_000)
    os.close(terminal)
    assert (status, printed) == (-signal.SIGKILL, b"")  # the terminal belongs to the caller
    assert not (corpus / "manifest.json").exists()
    with pytest.raises(CorpusError, match="unfinished, it has no manifest"):
        Manifest.load(corpus)
    (corpus / "shards/0123456789abcdef").mkdir()  # and what an older run left
    prepared = prepare(settings(source), corpus)
    assert 5 <= prepared.resumed_shards < len(files(clean[1])) - 2
    assert files(corpus) == files(clean[1])


def test_a_second_run_does_nothing(clean, prepare):
    source, corpus = clean
    before = {path: path.stat().st_mtime_ns for path in corpus.rglob("*")}
    prepared = prepare(settings(source), corpus)
    assert prepared.reused
    assert prepared.manifest == Manifest.load(corpus)
    assert {path: path.stat().st_mtime_ns for path in corpus.rglob("*")} == before


def test_progress_is_told(source, prepare, tmp_path):
    import ray.data

    context = ray.data.DataContext.get_current()
    before = context.enable_progress_bars
    told = []
    prepare(settings(source), tmp_path / "corpus", told.append)
    total = len(TEXTS), sum(map(len, TEXTS.values()))
    for stage in ("scan", "write"):
        steps = [p for p in told if p.stage == stage]
        assert [p.done for p in steps] == list(range(steps[0].total + 1))
        assert (steps[0].records, steps[0].n_bytes) == (0, 0)
        assert (steps[-1].records, steps[-1].n_bytes) == total
    assert context.enable_progress_bars == before


def test_other_settings_replace_the_corpus_at_the_end(source, prepare, tmp_path):
    corpus = tmp_path / "corpus"
    old = prepare(settings(source), corpus).manifest
    seen = set()
    new = prepare(
        settings(source, shard_bytes=60_000),
        corpus,
        lambda _: seen.add(Manifest.load(corpus).plan_id),
    ).manifest
    assert seen == {old.plan_id}  # the old corpus stays readable to the last
    assert new.plan_id != old.plan_id
    for name, split in new.splits.items():
        assert split.fingerprint == old.splits[name].fingerprint
        assert len(split.shards) < len(old.splits[name].shards)
    assert set(files(corpus)) == {*new.files, "manifest.json", ".tvq-corpus"}
    (source / "crlf.txt").write_bytes(b"changed")
    changed = prepare(settings(source, shard_bytes=60_000), corpus)
    assert not changed.reused
    assert (
        sum(
            changed.manifest.splits[name].fingerprint != split.fingerprint
            for name, split in new.splits.items()
        )
        == 1
    )
    verify(corpus)


def test_a_lost_or_short_shard_is_made_again(clean, source, prepare, tmp_path):
    corpus = tmp_path / "corpus"
    shards = [s.path for s in prepare(settings(source), corpus).manifest.splits["train"].shards]
    (corpus / shards[3]).unlink()
    os.truncate(corpus / shards[5], 100)
    assert not prepare(settings(source), corpus).reused
    assert files(corpus) == files(clean[1])
    data = bytearray((corpus / "manifest.json").read_bytes())
    data[len(data) // 2] ^= 1
    (corpus / "manifest.json").write_bytes(data)
    prepare(settings(source), corpus)
    assert files(corpus) == files(clean[1])


def test_a_file_that_changes_meanwhile_is_refused(source, prepare, tmp_path):
    corpus = tmp_path / "corpus"
    prepare(settings(source), corpus)
    before = files(corpus)

    def disturb(progress):
        if progress.stage == "write" and progress.done == 0:
            (source / "crlf.txt").write_bytes(b"oNe\r\ntwo\r\n")

    with pytest.raises(CorpusError, match=r"my texts/crlf\.txt: changed while it was being prep"):
        prepare(settings(source, shard_bytes=10**5), corpus, disturb)
    after = files(corpus)
    assert before.items() <= after.items()  # the old corpus is untouched
    assert not any(name.endswith(".tmp") for name in after)

    def remove(progress):
        if progress.stage == "write" and progress.done == 0:
            (source / "bom.txt").unlink()

    with pytest.raises(CorpusError, match=r"bom\.txt: cannot be read \(No such file"):
        prepare(settings(source, shard_bytes=10**6), corpus, remove)
    prepare(settings(source), corpus)
    verify(corpus)


def test_interrupted_from_the_keyboard_and_taken_up(clean, source, prepare, tmp_path):
    def interrupt(progress):
        if progress.stage == "write" and progress.done == 4:
            raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        prepare(settings(source), tmp_path / "corpus", interrupt)
    assert prepare(settings(source), tmp_path / "corpus").resumed_shards >= 4
    assert files(tmp_path / "corpus") == files(clean[1])


def test_two_at_once_are_refused(source, prepare, tmp_path):
    errors = []

    def again(progress):
        if progress.stage == "write" and progress.done == 0:
            with pytest.raises(CorpusError) as caught:
                prepare(settings(source), tmp_path / "corpus")
            errors.append(str(caught.value))

    prepare(settings(source), tmp_path / "corpus", again)
    assert errors == [f"{tmp_path / 'corpus'}: another prepare is writing to it; wait for it"]


def test_a_folder_that_is_not_ours_is_left_alone(source, clean, prepare, tmp_path):
    theirs = tmp_path / "thesis"
    theirs.mkdir()
    (theirs / "chapter.tex").write_text("years of work")
    with pytest.raises(CorpusError, match="thesis: not empty and not a corpus made by tvq"):
        prepare(settings(source), theirs)
    (theirs / "manifest.json").write_text("{}")
    with pytest.raises(CorpusError, match="thesis: not empty and not a corpus made by tvq"):
        prepare(settings(source), theirs)
    assert files(theirs) == {"chapter.tex": b"years of work", "manifest.json": b"{}"}
    with pytest.raises(CorpusError, match=r"chapter\.tex: not a folder"):
        prepare(settings(source), theirs / "chapter.tex")

    newer = tmp_path / "newer"
    newer.mkdir()
    value = json.loads((clean[1] / "manifest.json").read_text())
    (newer / "manifest.json").write_text(json.dumps(value | {"format_version": 3}))
    (newer / ".tvq-corpus").touch()
    before = files(newer)
    with pytest.raises(CorpusError, match="in format 3 by a newer tvq"):
        prepare(settings(source), newer)
    assert files(newer) == before


def test_an_empty_folder_and_one_inside_the_source_are_fine(source, prepare):
    (source / "corpus").mkdir()
    first = prepare(settings(source), source / "corpus")
    second = prepare(settings(source), source / "corpus")
    assert second.reused
    assert sum(f.records for f in first.manifest.increments[0].records) == len(TEXTS)


@pytest.mark.parametrize(
    ("changed", "message"),
    [
        ({"tokenizer": "byte"}, "^tokenizer: there is no tokenizer 'byte'"),
        ({"test_fraction": 1.5}, "^--test: must be at least 0 and below 1, got 1.5"),
        ({"validation_fraction": 0.6, "test_fraction": 0.5}, "must leave something to train on"),
        ({"shard_bytes": 0}, "^shard_bytes: must be at least 1, got 0"),
    ],
)
def test_wrong_settings_are_named(source, prepare, tmp_path, changed, message):
    with pytest.raises(CorpusError, match=message):
        prepare(settings(source, **changed), tmp_path / "corpus")
    assert not (tmp_path / "corpus").exists()


def test_no_such_source_and_too_few_documents(prepare, tmp_path):
    with pytest.raises(CorpusError, match="nowhere: no such file or folder"):
        prepare(settings(tmp_path / "nowhere"), tmp_path / "corpus")
    few = tmp_path / "few"
    few.mkdir()
    for name in ("a", "b", "c"):
        (few / name).write_text("the same")
    with pytest.raises(CorpusError, match=r"1 document is left .* at least 3 are needed"):
        prepare(settings(few), tmp_path / "corpus")
    assert not (tmp_path / "corpus").exists()
    assert prepare(settings(few, validation_fraction=0, test_fraction=0), tmp_path / "corpus")
    with pytest.raises(CorpusError, match="split 'test' is empty"):
        Manifest.load(tmp_path / "corpus").split("test")
    for name in ("a", "b", "c"):
        (few / name).write_text(name)
    splits = prepare(settings(few), tmp_path / "corpus").manifest.splits
    assert [split.documents for split in splits.values()] == [1, 1, 1]
