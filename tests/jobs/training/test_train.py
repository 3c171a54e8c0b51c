"""Training end to end: what is killed and resumed equals what was never disturbed, bit for bit."""

import contextlib
import dataclasses
import io
import json
import os
import shutil
import signal
import subprocess
import sys
import time
from pathlib import Path

import jax
import pytest

from jobs import recipe as recipes
from jobs.cli.main import run_cli
from jobs.console import Console
from jobs.errors import ExitCode, UserError
from jobs.runs import run_log
from jobs.runs.run_directory import RunDirectory
from jobs.training.train import newest_update, train
from tests.conftest import XLA_FLAGS
from tests.micro import write_micro
from tests.runs import final_sums, losses, state_difference, summary

TVQ = [sys.executable, "-c", "from jobs.cli.main import main; main()"]
STEPS = 40


@pytest.fixture(scope="module")
def workplace(tmp_path_factory) -> Path:
    folder = tmp_path_factory.mktemp("a place with spaces")
    write_micro(folder)
    return folder


def start(folder: Path, name: str, *overrides: str) -> subprocess.Popen:
    """A driver that can be killed; its devices are those of the tests' own process."""
    return subprocess.Popen(
        [*TVQ, *command_of(name, *overrides)],
        cwd=folder,
        stdout=subprocess.PIPE,
        stderr=subprocess.STDOUT,
        text=True,
        env={**os.environ, "JAX_PLATFORMS": "cpu", "XLA_FLAGS": XLA_FLAGS},
    )


def command_of(name: str, *overrides: str) -> list[str]:
    return ["train", "./micro.yaml", "data.corpus=corpus", "--run", name, *overrides]


def tvq(folder: Path, *arguments: str, code: int = 0) -> str:
    """What the command prints; in this process, where nothing has to be imported again."""
    output, errors = io.StringIO(), io.StringIO()
    with (
        contextlib.chdir(folder),
        contextlib.redirect_stdout(output),
        contextlib.redirect_stderr(errors),
    ):
        ended = run_cli(list(arguments))
    assert ended == code, output.getvalue() + errors.getvalue()
    return output.getvalue() if "--json" in arguments else output.getvalue() + errors.getvalue()


def finished(process: subprocess.Popen, code: int) -> str:
    output, _ = process.communicate(timeout=200)
    assert process.returncode == code, output
    return output


def wait_for_update(run: RunDirectory, update: int, process: subprocess.Popen) -> None:
    deadline = time.monotonic() + 250  # a loaded machine takes half of it to compile
    while newest_update(run) < update:
        assert process.poll() is None, process.communicate()[0]
        assert time.monotonic() < deadline, "no checkpoint appeared"
        time.sleep(0.02)


@pytest.fixture(scope="module")
def undisturbed(workplace) -> RunDirectory:
    tvq(workplace, *command_of("undisturbed"))
    return RunDirectory(workplace / "runs" / "undisturbed")


@pytest.mark.tracking
def test_driver_killed_and_resumed_equals_undisturbed(workplace, undisturbed):
    run = RunDirectory(workplace / "runs" / "killed")
    process = start(workplace, "killed")
    wait_for_update(run, 8, process)
    process.kill()
    process.wait()
    assert newest_update(run) < STEPS, "killed too late to prove anything"

    output = tvq(workplace, *command_of("killed"))
    assert "resuming from the checkpoint at update" in output
    assert final_sums(run, STEPS) == final_sums(undisturbed, STEPS)
    assert losses(run) == losses(undisturbed)
    assert [step for step, _ in losses(run)] == list(range(1, STEPS + 1))
    assert summary(run).status == "FINISHED"


@pytest.mark.tracking
@pytest.mark.parametrize(
    ("asked", "code"),
    [
        (signal.SIGTERM, ExitCode.PREEMPTED),
        pytest.param(signal.SIGINT, ExitCode.INTERRUPTED, marks=pytest.mark.slow),
    ],
)
def test_asked_to_stop_it_saves_and_the_same_command_goes_on(workplace, undisturbed, asked, code):
    name = f"stopped-{asked.name}"
    run = RunDirectory(workplace / "runs" / name)
    process = start(workplace, name)
    wait_for_update(run, 4, process)
    process.send_signal(asked)
    output = finished(process, code)
    assert "which is saved; the same command goes on" in output
    assert "Traceback" not in output
    stopped_at = newest_update(run)
    assert f"stopped at update {stopped_at}" in output
    assert stopped_at < STEPS
    assert summary(run).status == "KILLED"

    tvq(workplace, *command_of(name))
    assert final_sums(run, STEPS) == final_sums(undisturbed, STEPS)
    assert losses(run) == losses(undisturbed)


@pytest.mark.tracking
def test_finished_run_is_left_as_it_is(workplace, undisturbed):
    before = {path: path.stat().st_mtime_ns for path in undisturbed.path.rglob("*")}
    output = tvq(workplace, *command_of("undisturbed"))
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
    (run.path / "samples").mkdir()
    (run.path / "samples" / f"{STEPS:08d}.txt").write_text("what it wrote then")
    output = tvq(workplace, *command_of("reopened"))
    assert f"already finished at update {STEPS}; completing it in MLflow" in output
    assert summary(run).status == "FINISHED"
    [sent] = (workplace / "runs").glob("mlartifacts/**/artifacts/samples/*")
    assert (sent.name, sent.read_text()) == (f"{STEPS:08d}.txt", "what it wrote then")
    assert "nothing to do" in tvq(workplace, *command_of("reopened"))


@pytest.mark.tracking
@pytest.mark.slow
def test_longer_run_continues_under_the_schedule_it_began_with(workplace, undisturbed):
    name = "longer"
    tvq(workplace, *command_of(name))
    tvq(workplace, *command_of(name, "training.steps=48"))
    run = RunDirectory(workplace / "runs" / name)
    assert newest_update(run) == 48
    assert losses(run)[:STEPS] == losses(undisturbed)
    stored = recipes.from_yaml(run.recipe_text(), "test")
    assert stored.optimizer.schedule_steps == STEPS


@pytest.mark.tracking
def test_other_mathematics_on_the_same_run_is_refused(workplace, undisturbed):
    before = undisturbed.recipe_text()
    output = tvq(workplace, *command_of("undisturbed", "training.seed=1"), code=ExitCode.USER)
    assert "training.seed: 1 (0)" in output
    assert "--run" in output
    assert undisturbed.recipe_text() == before


@pytest.mark.tracking
def test_second_training_on_the_same_run_is_refused(workplace):
    run = RunDirectory(workplace / "runs" / "busy")
    first = start(workplace, "busy", "training.steps=4000")
    try:
        wait_for_update(run, 4, first)
        again = command_of("busy", "training.steps=4000")
        output = tvq(workplace, *again, code=ExitCode.BUSY)
        assert f"process {first.pid}" in output
        assert len(output.strip().splitlines()[-1]) < 400
    finally:
        first.kill()
        first.wait()


@pytest.mark.tracking
def test_evaluation_covers_the_split_and_equals_itself(workplace, undisturbed):
    command = ["evaluate", "undisturbed", "--split", "test", "--json"]
    figures, again = (json.loads(tvq(workplace, *command)) for _ in range(2))
    for name in ("nats_per_token", "bits_per_byte", "targets"):
        assert again[name] == figures[name]
    assert figures["targets"] == figures["n_bytes"] + figures["documents"]
    assert figures["bits_per_byte"] < 8
    stored = summary(undisturbed).metrics
    assert stored["test/bits_per_byte"] == pytest.approx(figures["bits_per_byte"])


@pytest.mark.tracking
def test_samples_repeat_with_their_seed(workplace, undisturbed):
    def text(seed: int) -> str:
        command = ["sample", "undisturbed", "--tokens", "40", "--seed", str(seed), "--json"]
        return json.loads(tvq(workplace, *command))["samples"][0]["text"]

    assert text(1) == text(1)
    assert text(1) != text(2)


@pytest.fixture
def float64(monkeypatch):
    monkeypatch.setenv("JAX_ENABLE_X64", "1")  # for the workers
    jax.config.update("jax_enable_x64", True)  # the loop runs in another thread of this process
    yield
    jax.config.update("jax_enable_x64", False)


@pytest.mark.ray
@pytest.mark.tracking
@pytest.mark.timeout(900)
def test_a_killed_worker_and_another_number_of_them_leave_the_curve_as_it_is(
    workplace, float64, monkeypatch
):
    """Two workers, one killed, for most of the run; then this process's two devices."""
    # The workers' devices are counted by the recipe; this halves their compilation.
    monkeypatch.setenv("XLA_FLAGS", "--xla_backend_optimization_level=0")
    killed, part = [], 32

    def trained(name: str, workers: int, steps: int = STEPS, on_points=None) -> RunDirectory:
        fields = ("model.dtype=float64", f"training.steps={steps}", "checkpoint.every=8")
        recipe = recipes.load(
            str(workplace / "micro.yaml"),
            (f"data.corpus={workplace / 'corpus'}", f"cluster.workers={workers}", *fields),
        )
        schedule = dataclasses.replace(recipe.optimizer, schedule_steps=STEPS)
        return train(
            dataclasses.replace(recipe, optimizer=schedule),
            root=workplace / "runs",
            name=name,
            console=Console(quiet=True),
            on_points=on_points,
        ).run

    def kill(points) -> None:
        run = RunDirectory(workplace / "runs" / "shaken")
        if not killed and points[-1].step >= 8 and newest_update(run):
            killed.append(run_log.events(run.logs, "rank-1", "group start")[-1]["worker_pid"])
            os.kill(killed[0], signal.SIGKILL)

    calm = trained("calm", 0)
    shaken = trained("shaken", 2, part, kill)
    starts = run_log.events(shaken.logs, "rank-1", "state ready")
    updates = [start["update"] for start in starts]
    assert updates in ([0, 8], [0, 16], [0, 24])
    assert len(killed) == 1
    trained("shaken", 0)
    assert run_log.events(shaken.logs, "rank-0", "state ready")[-1]["update"] == part
    expected, found = dict(losses(calm)), dict(losses(shaken))
    assert list(found) == list(expected) == list(range(1, STEPS + 1))
    # The figures are float32, so that 1e-9 is equality but for the last place.
    assert all(abs(found[step] - expected[step]) < 3e-7 for step in expected)
    assert state_difference(calm, shaken) < 1e-9


@pytest.mark.tracking
def test_corpus_of_another_fingerprint_is_refused_on_resume(workplace, undisturbed, tmp_path):
    from tests.pipeline.corpora import write_corpus

    other = tmp_path / "other"
    text = [[[b"other text " * 50]] * 4]
    write_corpus(other, train=text, validation=text, test=text)
    recipe = recipes.load(str(workplace / "micro.yaml"), (f"data.corpus={other}",))
    with pytest.raises(UserError, match="was begun on another corpus"):
        train(recipe, root=workplace / "runs", name="undisturbed", console=Console(quiet=True))
