"""Training end to end: what is killed and resumed equals what was never disturbed, bit for bit."""

import json
import os
import shutil
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest

from jobs import recipe as recipes
from jobs import run_log
from jobs.checkpoint_manifest import complete_checkpoints
from jobs.console import Console
from jobs.errors import ExitCode, UserError
from jobs.run_directory import RunDirectory
from jobs.tracking import reading
from jobs.tracking.store import embedded_store
from jobs.train import Trained, newest_update, train
from tests.micro import write_micro

TVQ = [sys.executable, "-c", "from jobs.cli import main; main()"]
LOSS = "train/loss_nats_per_token"
STEPS = 40


@pytest.fixture(scope="module")
def workplace(tmp_path_factory) -> Path:
    folder = tmp_path_factory.mktemp("a place with spaces")
    write_micro(folder)
    return folder


def start(folder: Path, name: str, *overrides: str) -> subprocess.Popen:
    command = [*TVQ, "train", "./micro.yaml", "data.corpus=corpus", "--run", name, *overrides]
    return subprocess.Popen(
        command, cwd=folder, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True
    )


def finished(process: subprocess.Popen, code: int = 0) -> str:
    output, _ = process.communicate(timeout=200)
    assert process.returncode == code, output
    return output


def wait_for_update(run: RunDirectory, update: int, process: subprocess.Popen) -> None:
    deadline = time.monotonic() + 120
    while newest_update(run) < update:
        assert process.poll() is None, process.communicate()[0]
        assert time.monotonic() < deadline, "no checkpoint appeared"
        time.sleep(0.02)


def final_sums(run: RunDirectory) -> dict[str, int]:
    """Sums over every bit of the whole train state at the end."""
    last = complete_checkpoints(run)[-1]
    assert last.update == STEPS
    return last.sums


def losses(run: RunDirectory) -> list[tuple[int, float]]:
    record = run.record()
    assert record is not None
    assert record.mlflow_run_id is not None
    return reading.history(embedded_store(run.root).uri, record.mlflow_run_id, LOSS)


def summary(run: RunDirectory) -> reading.RunSummary:
    record = run.record()
    assert record is not None
    assert record.mlflow_run_id is not None
    return reading.run(embedded_store(run.root).uri, record.mlflow_run_id)


@pytest.fixture(scope="module")
def undisturbed(workplace) -> RunDirectory:
    finished(start(workplace, "undisturbed"))
    return RunDirectory(workplace / "runs" / "undisturbed")


@pytest.mark.tracking
def test_driver_killed_and_resumed_equals_undisturbed(workplace, undisturbed):
    run = RunDirectory(workplace / "runs" / "killed")
    process = start(workplace, "killed")
    wait_for_update(run, 8, process)
    process.kill()
    process.wait()
    assert newest_update(run) < STEPS, "killed too late to prove anything"

    output = finished(start(workplace, "killed"))
    assert "resuming from the checkpoint at update" in output
    assert final_sums(run) == final_sums(undisturbed)
    assert losses(run) == losses(undisturbed)
    assert [step for step, _ in losses(run)] == list(range(1, STEPS + 1))
    assert summary(run).status == "FINISHED"


@pytest.mark.tracking
@pytest.mark.slow
def test_ctrl_c_saves_and_the_same_command_goes_on(workplace, undisturbed):
    run = RunDirectory(workplace / "runs" / "stopped")
    process = start(workplace, "stopped")
    wait_for_update(run, 4, process)
    process.send_signal(signal.SIGINT)
    output = finished(process, code=ExitCode.INTERRUPTED)
    assert "which is saved; the same command goes on" in output
    assert "Traceback" not in output
    stopped_at = newest_update(run)
    assert f"stopped at update {stopped_at}" in output
    assert summary(run).status == "KILLED"

    finished(start(workplace, "stopped"))
    assert final_sums(run) == final_sums(undisturbed)
    assert losses(run) == losses(undisturbed)


@pytest.mark.tracking
def test_finished_run_is_left_as_it_is(workplace, undisturbed):
    before = {path: path.stat().st_mtime_ns for path in undisturbed.path.rglob("*")}
    output = finished(start(workplace, "undisturbed"))
    assert f"already finished at update {STEPS}; nothing to do" in output
    assert {path: path.stat().st_mtime_ns for path in undisturbed.path.rglob("*")} == before


@pytest.mark.tracking
def test_finished_run_that_mlflow_does_not_know_as_such_is_completed(workplace, undisturbed):
    """As after a server that was down at the end, or a kill behind the last commit."""
    run = RunDirectory(workplace / "runs" / "reopened")
    shutil.copytree(undisturbed.path, run.path)
    (run.path / "closed.json").unlink()
    fields = json.loads((run.path / "run.json").read_text())
    fields |= {"name": "reopened", "run_key": "another", "mlflow_run_id": None}
    (run.path / "run.json").write_text(json.dumps(fields))
    output = finished(start(workplace, "reopened"))
    assert f"already finished at update {STEPS}; completing it in MLflow" in output
    assert summary(run).status == "FINISHED"
    assert "nothing to do" in finished(start(workplace, "reopened"))


@pytest.mark.tracking
@pytest.mark.slow
def test_longer_run_continues_under_the_schedule_it_began_with(workplace, undisturbed):
    name = "longer"
    finished(start(workplace, name))
    finished(start(workplace, name, "training.steps=48"))
    run = RunDirectory(workplace / "runs" / name)
    assert newest_update(run) == 48
    assert losses(run)[:STEPS] == losses(undisturbed)
    stored = recipes.from_yaml(run.recipe_text(), "test")
    assert stored.optimizer.schedule_steps == STEPS


@pytest.mark.tracking
def test_other_mathematics_on_the_same_run_is_refused(workplace, undisturbed):
    before = undisturbed.recipe.read_text()
    output = finished(start(workplace, "undisturbed", "training.seed=1"), code=ExitCode.USER)
    assert "training.seed: 1 (0)" in output
    assert "--run" in output
    assert undisturbed.recipe.read_text() == before


@pytest.mark.tracking
def test_second_training_on_the_same_run_is_refused(workplace):
    run = RunDirectory(workplace / "runs" / "busy")
    first = start(workplace, "busy", "training.steps=4000")
    try:
        wait_for_update(run, 4, first)
        output = finished(start(workplace, "busy", "training.steps=4000"), code=ExitCode.BUSY)
        assert f"process {first.pid}" in output
        assert len(output.strip().splitlines()[-1]) < 400
    finally:
        first.kill()
        first.wait()


@pytest.mark.tracking
def test_evaluation_covers_the_split_and_equals_itself(workplace, undisturbed):
    command = [*TVQ, "evaluate", "undisturbed", "--split", "test", "--json"]
    run = subprocess.run(command, cwd=workplace, capture_output=True, text=True, check=True)
    figures = json.loads(run.stdout)
    again = subprocess.run(command, cwd=workplace, capture_output=True, text=True, check=True)
    for name in ("nats_per_token", "bits_per_byte", "targets"):
        assert json.loads(again.stdout)[name] == figures[name]
    assert figures["targets"] == figures["n_bytes"] + figures["documents"]
    assert figures["bits_per_byte"] < 8
    stored = summary(undisturbed).metrics
    assert stored["test/bits_per_byte"] == pytest.approx(figures["bits_per_byte"])


@pytest.mark.tracking
def test_samples_repeat_with_their_seed(workplace, undisturbed):
    def text(seed: int) -> str:
        command = [*TVQ, "sample", "undisturbed", "--tokens", "40", "--seed", str(seed), "--json"]
        run = subprocess.run(command, cwd=workplace, capture_output=True, text=True, check=True)
        return json.loads(run.stdout)["samples"][0]["text"]

    assert text(1) == text(1)
    assert text(1) != text(2)


def _trained_on_ray(folder: Path, name: str, kill_after: int | None = None) -> Trained:
    recipe = recipes.load(
        str(folder / "micro.yaml"), (f"data.corpus={folder / 'corpus'}", "cluster.workers=2")
    )
    root = folder / "runs"
    run = RunDirectory.at(root, name)
    killed = []

    def kill(points) -> None:
        if kill_after and not killed and points[-1].step >= kill_after and newest_update(run):
            killed.append(run_log.events(run.logs, "rank-1", "group start")[-1]["worker_pid"])
            os.kill(killed[0], signal.SIGKILL)

    trained = train(recipe, root=root, name=name, console=Console(quiet=True), on_points=kill)
    assert bool(killed) == bool(kill_after)
    return trained


@pytest.mark.ray
@pytest.mark.tracking
def test_killed_worker_comes_back_to_the_same_curve(workplace, undisturbed):
    from jobs.ray_session import ray_session

    with ray_session(None, cpus=2):
        calm = _trained_on_ray(workplace, "ray-calm").run
        # A long run, so that the kill meets it at work.
        shaken = _trained_on_ray(workplace, "ray-killed", kill_after=10).run
    starts = run_log.events(shaken.logs, "rank-1", "state ready")
    assert len(starts) == 2
    assert starts[0]["update"] == 0
    assert 0 < starts[1]["update"] < STEPS
    assert final_sums(shaken) == final_sums(calm)
    assert losses(shaken) == losses(calm)
    assert [step for step, _ in losses(shaken)] == list(range(1, STEPS + 1))
    # Two processes against one: the same batches, sums in another order.
    one = dict(losses(undisturbed))
    assert all(abs(value - one[step]) < 1e-4 for step, value in losses(calm)[:4])


@pytest.mark.tracking
def test_corpus_of_another_fingerprint_is_refused_on_resume(workplace, undisturbed, tmp_path):
    from tests.pipeline.corpora import write_corpus

    other = tmp_path / "other"
    text = [[[b"other text " * 50]] * 4]
    write_corpus(other, train=text, validation=text, test=text)
    recipe = recipes.load(str(workplace / "micro.yaml"), (f"data.corpus={other}",))
    with pytest.raises(UserError, match="was begun on another corpus"):
        train(recipe, root=workplace / "runs", name="undisturbed", console=Console(quiet=True))
