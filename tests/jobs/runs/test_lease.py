"""Who may write to a run: one driver at a time, and of its worker groups the newest."""

import contextlib
import json
import os
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
from jobs.runs.run_directory import RunDirectory
from pipeline.claims import Claim

DRIVERS = 6


class Clock:
    """Seconds that pass when the test says so."""

    def __init__(self) -> None:
        self.now = 1_000_000.0

    def __call__(self) -> float:
        return self.now


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
    barrier, done = threading.Barrier(DRIVERS), threading.Barrier(DRIVERS)
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

    threads = [threading.Thread(target=drive) for _ in range(DRIVERS)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert len(taken) == 1
    assert refused == [ExitCode.BUSY] * (DRIVERS - 1)


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
