"""Runs whose driver was killed, as MLflow shows them when somebody looks."""

import json
import os
import signal
import subprocess
import sys
from pathlib import Path

import pytest

from jobs.runs.lease import Lease
from jobs.runs.run_directory import RunDirectory
from jobs.tracking.dead_runs import end_dead_runs
from jobs.tracking.store import Store
from jobs.tracking.tracker import Tracker
from pipeline.claims import holder_of
from tests.jobs.tracking.tracked_training import REPOSITORY, client, run_id_of

pytestmark = pytest.mark.tracking


def begun(root: Path, name: str, store: Store) -> tuple[RunDirectory, Tracker, str]:
    """A run that MLflow holds for running."""
    run = RunDirectory(root / name)
    record = run.claim("identity", {}, "recipe: 1\n")
    tracker = Tracker.start(
        store.uri, "dead", name, record.run_key, artifact_location=store.artifact_location
    )
    run_id = run_id_of(tracker)
    run.store_tracking(store.uri, run_id)
    return run, tracker, run_id


def driver_that_is_killed(run: RunDirectory) -> float:
    """A process takes the run's lease and is killed; when it renewed the lease last."""
    program = f"""
import time
from jobs.runs.lease import Lease
from jobs.runs.run_directory import RunDirectory
with Lease(RunDirectory({run.location!r})).held():
    print("held", flush=True)
    time.sleep(600)
"""
    driver = subprocess.Popen(
        [sys.executable, "-c", program],
        env={**os.environ, "PYTHONPATH": str(REPOSITORY)},
        stdout=subprocess.PIPE,
    )
    assert driver.stdout
    assert driver.stdout.readline() == b"held\n"
    driver.send_signal(signal.SIGKILL)
    driver.wait()
    driver.stdout.close()
    holder = holder_of(run.store)
    assert holder
    return holder.heartbeat


def test_a_run_whose_driver_was_killed_is_ended_and_goes_on_when_it_is_begun_again(
    store: Store, tmp_path: Path
):
    said: list[str] = []
    run, _tracker, run_id = begun(tmp_path, "killed", store)
    last_seen = driver_that_is_killed(run)
    assert client(store).get_run(run_id).info.status == "RUNNING"
    for _ in range(2):
        end_dead_runs([run], said.append)
    assert said == ["run killed was killed; MLflow says so now"]
    info = client(store).get_run(run_id).info
    assert (info.status, info.end_time) == ("KILLED", round(last_seen * 1000))

    _, again, again_id = begun(tmp_path, "killed", store)
    assert again_id == run_id
    assert client(store).get_run(run_id).info.status == "RUNNING"
    assert again.finish("FINISHED")
    assert client(store).get_run(run_id).info.status == "FINISHED"


def test_one_that_is_trained_or_ended_by_itself_is_left_alone(store: Store, tmp_path: Path):
    said: list[str] = []
    held, _, held_id = begun(tmp_path, "held", store)
    # MLflow was not told of its end: it was finished, and is completed when it is begun again.
    untold, _, untold_id = begun(tmp_path, "untold", store)
    with Lease(untold).held():
        pass
    with Lease(held).held():
        end_dead_runs([held, untold], said.append)
    for run_id in (held_id, untold_id):
        assert client(store).get_run(run_id).info.status == "RUNNING"
    assert said == []


def test_a_store_that_does_not_answer_is_said_once(tmp_path: Path):
    said: list[str] = []
    runs = [RunDirectory(tmp_path / name) for name in "ab"]
    for run in runs:
        run.claim("identity", {}, "recipe: 1\n")
        run.store_tracking("http://user:secret@127.0.0.1:9", "0" * 32)
        lease = {"owner": "x", "host": "elsewhere", "pid": 1, "heartbeat": 0.0}
        (run.path / "lease.json").write_text(json.dumps(lease))
    end_dead_runs(runs, said.append)
    [line] = said
    assert "127.0.0.1:9" in line
    assert "secret" not in line
