"""Who asks a training to stop, and what its driver then exits with."""

import os
import signal
import threading
import time
from pathlib import Path

import pytest

from jobs.cluster.ray_worker import ends_when_stalled
from jobs.errors import ExitCode
from jobs.runs.run_directory import RunDirectory
from jobs.training.stopping import StopReason, StopRequests


class Clock:
    now = 0.0

    def __call__(self) -> float:
        return self.now


@pytest.fixture
def run(tmp_path: Path) -> RunDirectory:
    run = RunDirectory.at(tmp_path, "first")
    run.claim("identity", {}, "")
    return run


def wait_until(condition) -> None:
    deadline = time.monotonic() + 60
    while not condition():
        assert time.monotonic() < deadline
        time.sleep(0.01)


def test_sigterm_asks_for_a_stop_and_is_overdue_after_the_grace_period(run):
    clock = Clock()
    stops = StopRequests(run, 25, clock=clock)
    before = signal.getsignal(signal.SIGTERM)
    with stops.heard():
        assert not stops.terminated
        os.kill(os.getpid(), signal.SIGTERM)
        wait_until(run.stop_requested)
        clock.now = 24
        assert stops.terminated
        assert not stops.overdue
        os.kill(os.getpid(), signal.SIGTERM)  # again: the period does not begin anew
        clock.now = 26
        assert stops.overdue
    assert signal.getsignal(signal.SIGTERM) is before
    assert stops.exit_code is ExitCode.PREEMPTED


def test_ctrl_c_takes_its_time(run):
    clock = Clock()
    stops = StopRequests(run, 25, clock=clock)
    stops.interrupt()
    clock.now = 1000
    assert run.stop_requested()
    assert not stops.overdue
    assert stops.exit_code is ExitCode.INTERRUPTED


def test_a_request_of_another_command_is_a_preemption(run):
    run.request_stop(True)
    assert StopRequests(run, 25).exit_code is ExitCode.PREEMPTED


def test_only_the_main_thread_hears_sigterm(run):
    heard = []

    def work() -> None:
        before = signal.getsignal(signal.SIGTERM)
        with StopRequests(run, 25).heard():
            heard.append(signal.getsignal(signal.SIGTERM) is before)

    thread = threading.Thread(target=work)
    thread.start()
    thread.join()
    assert heard == [True]


def test_the_request_of_a_person_counts_most():
    assert max(StopReason) is StopReason.REQUESTED
    assert not StopReason.NONE


def test_a_process_in_which_nothing_goes_on_ends_itself():
    clock, ended = Clock(), []
    with ends_when_stalled(
        0.5, clock=clock, end=lambda *call: ended.append((*call, clock.now))
    ) as alive:
        for clock.now in (0.4, 0.8, 1.2):
            alive()
        time.sleep(0.2)  # several looks, none after more than 0.5 on its clock
        assert ended == []
        clock.now = 1.8
        wait_until(lambda: ended)
    assert ended == [(os.getpid(), signal.SIGKILL, 1.8)]
