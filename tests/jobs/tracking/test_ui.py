"""`tvq ui`: MLflow's server on the embedded store, and a training tracked through a server."""

import json
import os
import signal
import socket
import subprocess
import sys
import time
import urllib.request
from pathlib import Path

import pytest

from jobs import ui
from jobs.errors import UserError
from jobs.runs.metric_spool import MetricPoint, MetricSpool, segments
from jobs.tracking.reading import history
from jobs.tracking.store import Store, embedded_store
from jobs.tracking.tracker import Tracker
from tests.services import free_port

pytestmark = pytest.mark.tracking

REPOSITORY = Path(__file__).parents[3]
LOSS = "train/loss_nats_per_token"


def test_a_folder_without_runs_is_a_user_error_and_stays_empty(tmp_path: Path):
    with (
        pytest.raises(UserError, match="no runs are tracked there yet"),
        ui.serve(embedded_store(tmp_path), tmp_path / "log"),
    ):
        pass
    assert list(tmp_path.iterdir()) == []


def test_a_taken_port_is_a_user_error(tmp_path: Path):
    (tmp_path / "mlflow.db").touch()
    with socket.socket() as taken:
        taken.bind(("127.0.0.1", 0))
        taken.listen()
        port = taken.getsockname()[1]
        with (
            pytest.raises(UserError, match=f"port {port}"),
            ui.serve(embedded_store(tmp_path), tmp_path / "log", port),
        ):
            pass


def test_a_server_elsewhere_is_named_without_its_password(tmp_path: Path):
    said: list[str] = []
    store = Store("http://user:secret@tracking.example:5000")
    ui.show(store, "e", log=tmp_path / "log", say=said.append)
    assert said == ["the runs are on an MLflow server; open http://***@tracking.example:5000"]


@pytest.mark.slow
def test_a_server_that_cannot_start_says_why(tmp_path: Path):
    (tmp_path / "mlflow.db").write_text("this is no SQLite file, as a glance at it shows")
    with (
        pytest.raises(UserError, match=r"did not start; it said: .*not a database"),
        ui.serve(embedded_store(tmp_path), tmp_path / "log"),
    ):
        pass


def processes_with(text: str) -> list[str]:
    found = []
    for folder in Path("/proc").glob("[0-9]*"):
        try:
            environment = (folder / "environ").read_bytes()
            command = (folder / "cmdline").read_bytes()
        except OSError:
            continue
        if text.encode() in environment and b"mlflow" in command:
            found.append(command.decode())
    return found


@pytest.mark.slow
@pytest.mark.parametrize("signal_number", [signal.SIGINT, signal.SIGTERM])
def test_the_ui_shows_the_experiment_and_ctrl_c_ends_every_process(
    tmp_path: Path, signal_number: int
):
    from mlflow import MlflowClient

    root = tmp_path / "a root"
    store = embedded_store(root)
    tracker = Tracker.start(store.uri, "ä b", "r", "k", artifact_location=store.artifact_location)
    tracker.log_text("a.txt", "x")
    run_id = tracker.wait_for_run()
    assert run_id
    assert tracker.finish("FINISHED")
    experiment = MlflowClient(store.uri).get_run(run_id).info.experiment_id
    program = f"""
from pathlib import Path
from jobs import ui
from jobs.tracking.store import embedded_store
root = Path({str(root)!r})
def say(message):
    print(message, flush=True)
ui.show(embedded_store(root), "ä b", log=root / "logs" / "ui.log", say=say)
say("ended")
"""
    process = subprocess.Popen(
        [sys.executable, "-c", program],
        env={**os.environ, "PYTHONPATH": str(REPOSITORY)},
        stdout=subprocess.PIPE,
        stderr=subprocess.STDOUT,
        text=True,
    )
    assert process.stdout
    assert "starting" in process.stdout.readline()
    line = process.stdout.readline()
    url = line.split()[1]
    page = f"/#/experiments/{experiment}/runs?compareRunsMode=CHART&workflowType=machine_learning"
    assert url.endswith(page), line
    base = url.partition("/#")[0]
    assert base.startswith("http://127.0.0.1:")
    search = urllib.request.Request(
        f"{base}/api/2.0/mlflow/runs/search",
        json.dumps({"experiment_ids": [experiment]}).encode(),
        {"Content-Type": "application/json"},
    )
    with urllib.request.urlopen(search) as answer:
        [run] = json.load(answer)["runs"]
    assert run["info"]["status"] == "FINISHED"
    got = f"{base}/get-artifact?run_id={run['info']['run_id']}&path=a.txt"
    with urllib.request.urlopen(got) as answer:
        assert answer.read() == b"x"
    assert len(processes_with(store.uri)) == 2
    process.send_signal(signal_number)
    assert process.communicate(timeout=60)[0] == "ended\n"
    assert process.returncode == 0
    assert processes_with(store.uri) == []


@pytest.mark.slow
def test_a_training_tracked_through_a_server_that_comes_late_and_dies_loses_nothing(
    tmp_path: Path,
):
    root = tmp_path / "server root"
    store = embedded_store(root)
    first = Tracker.start(store.uri, "e", "first", "k0", artifact_location=store.artifact_location)
    assert first.finish("FINISHED")  # The database exists.
    port = free_port()
    said: list[str] = []
    uri = f"http://127.0.0.1:{port}"
    tracker = Tracker.start(uri, "e2", "r", "k", say=said.append)
    folder = tmp_path / "metrics"
    tracker.attach_spool(folder, lambda points: None)
    tracker.log_recipe({"a": {"b": 1}}, "a: 1\n", "")
    tracker.log_corpus("c", "f" * 64, "/c", {"tokens": 1}, {"tokens": "integer"})

    def write(updates: range) -> None:
        spool = MetricSpool(folder)
        for update in updates:
            values = {LOSS: 1 / update, "eval/bits_per_byte": float("nan")}
            spool.append(MetricPoint(update, update, update * 1000, values))
        spool.flush()

    write(range(1, 101))
    while not said:
        time.sleep(0.1)
    with ui.serve(store, root / "log", port):
        while len(said) < 2:  # Operations go after the points, so none of these are left either.
            time.sleep(0.1)
        assert not segments(folder)
    write(range(101, 201))  # The server is down.
    tracker.log_checkpoint(200, "/c/200", {LOSS: 1 / 200})
    while len(said) < 3:
        time.sleep(0.1)
    with ui.serve(store, root / "log", port):
        run_id = tracker.wait_for_run()
        assert run_id
        assert tracker.finish("FINISHED", limit_s=120.0)
        assert history(uri, run_id, LOSS) == [(u, 1 / u) for u in range(1, 201)]
    outage, recovery, *again = said
    assert "does not take" in outage
    assert "answers again" in recovery
    assert len(again) == 2
