"""Who a run belongs to, who may write to it, and files that are whole."""

import contextlib
import dataclasses
import json
import multiprocessing
import os
import queue
import signal
import socket
import subprocess
import sys
import threading
import time
from collections.abc import Iterator
from pathlib import Path

import pytest

from jobs.errors import ExitCode, UserError
from jobs.runs.lease import Fence, Lease, LeaseLostError
from jobs.runs.run_directory import RunDirectory, RunRecord, list_runs
from pipeline.claims import Claim

RACERS, ATTEMPTS = 6, 10
FINGERPRINTS = {"train": "a" * 64, "validation": "b" * 64}


class Clock:
    """Seconds that pass when the test says so."""

    def __init__(self) -> None:
        self.now = 1_000_000.0

    def __call__(self) -> float:
        return self.now


@pytest.fixture
def run(tmp_path: Path) -> RunDirectory:
    """A claimed run, in a folder with a space."""
    run = RunDirectory.at(tmp_path / "my runs", "first")
    run.claim("identity", FINGERPRINTS, "training: {}\n")
    return run


@contextlib.contextmanager
def sleeping_process() -> Iterator[subprocess.Popen[bytes]]:
    process = subprocess.Popen([sys.executable, "-c", "import time; time.sleep(600)"])
    try:
        yield process
    finally:
        process.kill()
        process.wait()


def start_ticks(pid: int) -> str:
    """The 22nd field of /proc/PID/stat: proc(5). A name may hold spaces and parentheses."""
    return Path(f"/proc/{pid}/stat").read_text().rsplit(") ", 1)[1].split(" ")[22 - 3]


def lease_of(run: RunDirectory, pid: int, *, heartbeat: float, **changes: object) -> dict:
    """Writes a lease as the driver in process `pid` would have."""
    fields = {
        "owner": "f" * 32,
        "host": socket.gethostname(),
        "pid": pid,
        "process_start": start_ticks(pid),
        "heartbeat": heartbeat,
    } | changes
    (run.path / "lease.json").write_text(json.dumps(fields))
    return fields


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


# ---- Lease ---------------------------------------------------------------------------------------


def test_a_second_driver_is_refused_by_owner_host_and_age(run: RunDirectory):
    clock = Clock()
    with sleeping_process() as other:
        before = lease_of(run, other.pid, heartbeat=clock.now - 42)
        with (
            pytest.raises(UserError) as caught,
            Lease(run, clock=clock).held(),
        ):
            pass
    assert caught.value.code == ExitCode.BUSY == 3
    for part in (f"process {other.pid}", socket.gethostname(), "42 s ago", "first", "ffffffff"):
        assert part in str(caught.value)
    assert json.loads((run.path / "lease.json").read_text()) == before


def test_two_leases_of_one_process_exclude_each_other(run: RunDirectory):
    with (
        Lease(run).held(),
        pytest.raises(UserError, match=f"process {os.getpid()}"),
        Lease(run).held(),
    ):
        pass
    with Lease(run).held():
        pass


def test_of_many_drivers_that_find_an_expired_lease_one_takes_it(run: RunDirectory):
    clock = Clock()
    lease_of(run, os.getpid(), heartbeat=clock.now - 61)
    barrier, done = threading.Barrier(RACERS), threading.Barrier(RACERS)
    taken, refused = [], []

    def drive() -> None:
        lease = Lease(run, clock=clock)
        barrier.wait()
        try:
            with lease.held():
                taken.append(lease.owner)
                done.wait(30)
        except UserError as error:
            refused.append(error.code)
            done.wait(30)

    threads = [threading.Thread(target=drive) for _ in range(RACERS)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert len(taken) == 1
    assert refused == [ExitCode.BUSY] * (RACERS - 1)


@pytest.mark.parametrize(("age", "free"), [(59, False), (61, True)])
@pytest.mark.parametrize("host", ["here", "elsewhere"])
def test_a_lease_of_a_living_driver_expires_after_a_minute(
    run: RunDirectory, age: float, free: bool, host: str
):
    clock = Clock()
    name = socket.gethostname() if host == "here" else "elsewhere"
    lease_of(run, os.getppid(), heartbeat=clock.now - age, host=name)
    taken = False
    with contextlib.suppress(UserError), Lease(run, clock=clock).held():
        taken = True
    assert taken == free


def test_a_lease_from_another_host_is_not_judged_by_our_processes(run: RunDirectory):
    clock = Clock()
    with sleeping_process() as other:
        lease_of(run, other.pid, heartbeat=clock.now, host="elsewhere")
    with pytest.raises(UserError, match="elsewhere"), Lease(run, clock=clock).held():
        pass


@pytest.mark.parametrize("waited_for", [True, False], ids=["gone", "zombie"])
def test_the_lease_of_a_killed_driver_is_free_at_once(run: RunDirectory, waited_for: bool):
    clock = Clock()
    with sleeping_process() as other:
        lease_of(run, other.pid, heartbeat=clock.now)
        other.send_signal(signal.SIGKILL)
        # WNOWAIT: until it is dead, without taking it out of the process table.
        os.waitid(os.P_PID, other.pid, os.WEXITED | os.WNOWAIT)
        if waited_for:
            other.wait()
        with Lease(run, clock=clock).held() as lease:
            fields = json.loads((run.path / "lease.json").read_text())
    assert fields == {
        "owner": lease.owner,
        "host": socket.gethostname(),
        "pid": os.getpid(),
        "process_start": start_ticks(os.getpid()),
        "heartbeat": clock.now,
    }


def test_a_recycled_process_id_does_not_hold_the_lease(run: RunDirectory):
    clock = Clock()
    with sleeping_process() as other:
        lease_of(run, other.pid, heartbeat=clock.now, process_start="1")
        with Lease(run, clock=clock).held():
            pass


def test_a_held_lease_is_renewed_and_given_back(run: RunDirectory):
    clock = Clock()
    path = run.path / "lease.json"
    with Lease(run, clock=clock, renew_seconds=0.01).held():
        clock.now += 30
        deadline = time.monotonic() + 30
        while json.loads(path.read_text())["heartbeat"] != clock.now:
            assert time.monotonic() < deadline
            time.sleep(0.01)
    assert not path.exists()


def test_a_lease_is_given_back_when_the_training_fails(run: RunDirectory):
    with pytest.raises(ZeroDivisionError), Lease(run).held():
        raise ZeroDivisionError
    assert not (run.path / "lease.json").exists()
    assert not [thread for thread in threading.enumerate() if thread.name == "lease"]


def test_who_lost_the_lease_stops_and_leaves_it_to_the_new_holder(run: RunDirectory):
    clock = Clock()
    # As a driver that was suspended: it does not renew, another takes over, it wakes up.
    with Lease(run, clock=clock, renew_seconds=600).held() as old:
        fence = Fence(run, old.owner)
        fence.raise_over_others()
        fence.check()
        clock.now += 61
        with Lease(run, clock=clock, renew_seconds=600).held() as new:
            with pytest.raises(LeaseLostError, match="another driver"):
                fence.check()
            with pytest.raises(LeaseLostError, match="another driver"):
                Fence(run, old.owner).raise_over_others()
            Fence(run, new.owner).raise_over_others()
            woken = Claim(run.store, clock=clock)
            woken.owner = old.owner
            assert not woken.renew()  # it is not its own any more
            assert json.loads((run.path / "lease.json").read_text())["owner"] == new.owner
        with pytest.raises(LeaseLostError):
            fence.check()
        # The old one gives back: it must not take the lease of a third away.
        third = lease_of(run, os.getppid(), heartbeat=clock.now)
    assert json.loads((run.path / "lease.json").read_text()) == third


def test_an_older_worker_group_may_not_commit(run: RunDirectory):
    with Lease(run).held() as lease:
        first, second = Fence(run, lease.owner), Fence(run, lease.owner)
        with pytest.raises(LeaseLostError, match="newer worker group"):
            first.check()  # none was raised yet
        first.raise_over_others()
        first.check()
        second.raise_over_others()
        second.check()
        with pytest.raises(LeaseLostError, match="newer worker group"):
            first.check()


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
