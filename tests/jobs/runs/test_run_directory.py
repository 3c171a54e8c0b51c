"""Who a run belongs to, what its folder holds, and files that are whole."""

import dataclasses
import json
import multiprocessing
import queue
import signal
import subprocess
import sys
import threading
from pathlib import Path

import pytest

from jobs.errors import UserError
from jobs.runs.run_directory import RunDirectory, RunRecord, list_runs

RACERS, ATTEMPTS = 6, 10
FINGERPRINTS = {"train": "a" * 64, "validation": "b" * 64}


def snapshot(folder: Path) -> dict[str, bytes | None]:
    return {
        str(path.relative_to(folder)): path.read_bytes() if path.is_file() else None
        for path in sorted(folder.rglob("*"))
    }


# ---- Claim ---------------------------------------------------------------------------------------


def _race(root: str, number: int, barrier, results) -> None:
    for attempt in range(ATTEMPTS):
        run = RunDirectory.at(Path(root) / str(attempt), "contended")
        barrier.wait(60)
        try:
            record = run.claim(f"identity {number}", FINGERPRINTS, f"# {number}\n")
            results.put((attempt, dataclasses.asdict(record), run.recipe_text()))
        except UserError as error:
            results.put((attempt, str(error), ""))


@pytest.mark.parametrize("kind", ["threads", "processes"])
def test_of_many_that_claim_at_once_one_wins_and_all_see_the_same(tmp_path: Path, kind: str):
    context = multiprocessing.get_context("spawn")
    barrier = threading.Barrier(RACERS) if kind == "threads" else context.Barrier(RACERS)
    results = queue.SimpleQueue() if kind == "threads" else context.Queue()
    make = threading.Thread if kind == "threads" else context.Process
    racers = [
        make(target=_race, args=(str(tmp_path), number, barrier, results))
        for number in range(RACERS)
    ]
    for racer in racers:
        racer.start()
    seen = [results.get() for _ in range(RACERS * ATTEMPTS)]
    for racer in racers:
        racer.join()
    for attempt in range(ATTEMPTS):
        records = [record for number, record, _ in seen if number == attempt]
        assert len(records) == RACERS
        assert all(record == records[0] for record in records), records
        winner = records[0]["identity"].removeprefix("identity ")
        assert {recipe for n, _, recipe in seen if n == attempt} == {f"# {winner}\n"}
        assert [path.name for path in (tmp_path / str(attempt)).iterdir()] == ["contended"]


def test_a_claim_makes_the_documented_folder_and_is_never_replaced(tmp_path: Path):
    run = RunDirectory.at(tmp_path, "first")
    assert run.record() is None
    record = run.claim("abc", FINGERPRINTS, "x: 1\n")
    assert {path.name for path in run.path.iterdir()} == {
        "run.json", "recipe.yaml", "checkpoints", "metrics", "ledger", "logs",
    }  # fmt: skip
    assert record == run.record()
    assert (record.name, record.identity, record.fingerprints) == ("first", "abc", FINGERPRINTS)
    assert len(record.run_key) == 32
    before = snapshot(run.path)
    assert run.claim("other", {}, "x: 2\n") == record
    assert snapshot(run.path) == before
    assert RunDirectory.at(tmp_path, "second").claim("abc", {}, "").run_key != record.run_key


def test_an_empty_folder_can_be_claimed(tmp_path: Path):
    (tmp_path / "first").mkdir()
    run = RunDirectory.at(tmp_path, "first")
    assert run.claim("abc", {}, "").name == "first"
    assert (run.path / "recipe.yaml").exists()


def test_a_claim_that_was_killed_does_not_block_the_name(tmp_path: Path):
    # As SIGKILL leaves it: whatever the claim makes, up to each of its steps.
    command = (
        "import os, sys, pathlib; from jobs.runs import run_directory as r\n"
        "left = int(sys.argv[2])\n"
        "def trace(event, arguments):\n"
        "    global left\n"
        "    if event in ('os.mkdir', 'os.rename', 'os.link') or (\n"
        "        event == 'open' and sys.argv[1] in str(arguments[0])):\n"
        "        left -= 1\n"
        "        if left < 0: os.kill(os.getpid(), 9)\n"
        "sys.addaudithook(trace)\n"
        "r.RunDirectory.at(pathlib.Path(sys.argv[1]), 'first').claim('one', {}, 'first')\n"
    )
    ended = []
    for steps in range(1, 30):
        root = tmp_path / str(steps) / "runs"
        root.parent.mkdir()
        process = subprocess.run(
            [sys.executable, "-c", command, str(root), str(steps)],
            cwd=Path(__file__).parents[3],
            check=False,
        )
        ended.append(process.returncode)
        run = RunDirectory.at(root, "first")
        record = run.claim("two", {}, "second")
        assert run.recipe_text() == {"one": "first", "two": "second"}[record.identity]
        assert [other.name for other in list_runs(root)] == ["first"]
        if process.returncode == 0:
            break
    assert ended[:-1] == [-signal.SIGKILL] * (len(ended) - 1)
    assert ended[-1] == 0
    assert len(ended) > 4


@pytest.mark.parametrize("content", ["notes.txt", "run.json", "logs/old.txt", "file"])
def test_a_folder_that_is_not_ours_is_refused_and_left_as_it_is(tmp_path: Path, content: str):
    folder = tmp_path / "first"
    if content == "file":
        folder.write_text("mine")
    else:
        (folder / content).parent.mkdir(parents=True)
        (folder / content).write_text('{"mine": true}')
    before = snapshot(tmp_path)
    with pytest.raises(UserError, match=r"first.*(not a tvq run|not written by tvq).*--run"):
        RunDirectory.at(tmp_path, "first").claim("abc", {}, "")
    assert snapshot(tmp_path) == before


def test_a_root_that_cannot_be_written_is_one_clear_line():
    with pytest.raises(UserError, match=r"cannot be made .*--root") as caught:
        RunDirectory.at(Path("/proc/self/runs"), "first").claim("abc", {}, "")
    assert "\n" not in str(caught.value)


def test_a_root_that_is_a_file_is_one_clear_line(tmp_path: Path):
    (tmp_path / "runs").write_text("")
    with pytest.raises(UserError, match=r"runs/first: .*--root"):
        RunDirectory.at(tmp_path / "runs", "first").claim("abc", {}, "")


@pytest.mark.parametrize(
    "name",
    ["", ".", "..", ".hidden", "a/b", "/abs", "a b", "-x", "ä", "a\n", "x" * 101, "models",
     "mlartifacts", "corpora"],
)  # fmt: skip
def test_a_bad_name_is_refused(tmp_path: Path, name: str):
    with pytest.raises(UserError, match=r"run name .*--run") as caught:
        RunDirectory.at(tmp_path, name)
    assert "\n" not in str(caught.value)


@pytest.mark.parametrize("name", ["a", "tiny-2", "2026.01", "A_b", "x" * 100])
def test_a_good_name_is_a_folder_under_the_root(tmp_path: Path, name: str):
    run = RunDirectory.at(tmp_path, name)
    assert (run.path, run.root, run.name) == (tmp_path / name, tmp_path, name)


def test_a_newer_format_is_refused_and_a_damaged_record_named(run: RunDirectory):
    fields = json.loads((run.path / "run.json").read_text())
    (run.path / "run.json").write_text(json.dumps(fields | {"format_version": 2, "new": 1}))
    with pytest.raises(UserError, match=r"format 2 is newer than 1.*upgrade"):
        run.record()
    for text in ("{", "[]", "{}", '{"format_version": 1}', '{"format_version": "x"}', ""):
        (run.path / "run.json").write_text(text)
        with pytest.raises(UserError, match=r"run\.json: damaged"):
            run.record()
        with pytest.raises(UserError, match=r"run\.json: damaged"):
            run.claim("abc", {}, "")
    (run.path / "run.json").write_bytes(b"\xff\xfe")
    with pytest.raises(UserError, match=r"run\.json: damaged"):
        run.record()


def test_a_run_is_found_by_name_or_path_and_others_are_listed(run: RunDirectory, tmp_path: Path):
    assert RunDirectory.existing(run.root, "first").path == run.path
    assert RunDirectory.existing(tmp_path, str(run.path)).path == run.path
    RunDirectory.at(run.root, "second").claim("abc", {}, "")
    (run.path.parent / "models").mkdir()
    assert [other.name for other in list_runs(run.root)] == ["first", "second"]
    with pytest.raises(UserError, match=r"'third': not found under .*there are first, second"):
        RunDirectory.existing(run.root, "third")
    with pytest.raises(UserError, match="there are none yet: `tvq train`"):
        RunDirectory.existing(tmp_path / "empty", "third")


def test_the_tracker_id_is_stored_beside_the_rest(run: RunDirectory):
    before = run.record()
    assert isinstance(before, RunRecord)
    run.store_tracking("http://host", "42")
    noted = dataclasses.replace(before, mlflow_run_id="42", tracking_uri="http://host")
    assert run.record() == noted


def test_a_run_is_closed_at_the_update_last_noted(run: RunDirectory):
    assert run.closed_at() is None
    run.note_closed(40)
    run.note_closed(48)
    assert RunDirectory(run.path).closed_at() == 48


def test_a_stop_is_asked_for_and_taken_back(run: RunDirectory):
    assert not run.stop_requested()
    run.request_stop(True)
    run.request_stop(True)
    assert RunDirectory(run.path).stop_requested()
    run.request_stop(False)
    run.request_stop(False)
    assert not run.stop_requested()


# ---- Files ---------------------------------------------------------------------------------------


def test_a_reader_sees_whole_files_while_their_writer_is_killed(tmp_path: Path):
    path = tmp_path / "a file.json"
    # 300 kB: one write call of the writer takes several of the kernel.
    command = (
        "import json, sys, itertools, pathlib; from pipeline.storage import open_store\n"
        "for n in itertools.count(int(sys.argv[2])):\n"
        "    text = json.dumps({'n': n, 'x': [n] * 40000})\n"
        "    open_store(pathlib.Path(sys.argv[1])).write('a file.json', text.encode())\n"
        "    print(n, flush=True)\n"
    )
    path.write_text(json.dumps({"n": 0, "x": [0] * 40000}))
    seen = set()
    for life in range(3):
        process = subprocess.Popen(
            [sys.executable, "-c", command, str(path.parent), str((life + 1) * 1000)],
            cwd=Path(__file__).parents[3],
            stdout=subprocess.PIPE,
        )
        assert process.stdout is not None
        process.stdout.readline()
        for _ in range(20):
            fields = json.loads(path.read_text())
            assert fields["x"] == [fields["n"]] * 40000
            seen.add(fields["n"])
        process.kill()
        process.wait()
        process.stdout.close()
        fields = json.loads(path.read_text())
        assert fields["x"] == [fields["n"]] * 40000
        assert fields["n"] >= (life + 1) * 1000
    assert len(seen) > 3
