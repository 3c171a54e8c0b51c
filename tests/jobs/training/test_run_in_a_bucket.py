"""A run whose folder is a prefix of a bucket, on the emulator: the same as on disk, or one line."""

import json
import os
import re
import signal
import subprocess
import sys
import time
from pathlib import Path

import numpy as np
import pytest

from jobs.checkpoints.manifest import (
    DamagedCheckpointError,
    arrays_store,
    complete_checkpoints,
    newest_update,
    unfinished_updates,
)
from jobs.cli.main import run_cli
from jobs.runs.run_directory import RunDirectory
from tests.jobs.trained_micro import train_micro
from tests.micro import write_micro
from tests.services import ObjectStoreServer

STEPS = 16


@pytest.fixture(scope="module")
def workplace(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("bucket work")
    write_micro(folder)
    return folder


def command(workplace: Path, root: str, name: str = "first", *overrides: str) -> list[str]:
    return [
        sys.executable, "-c", "from jobs.cli.main import main; main()", "train",
        str(workplace / "micro.yaml"), f"data.corpus={workplace / 'corpus'}", "--root", root,
        "--run", name, f"training.steps={STEPS}", "training.evaluate_every=8",
        f"tracking.uri=sqlite:///{workplace / 'mlflow.db'}", *overrides,
    ]  # fmt: skip


def start(workplace: Path, root: str, *overrides: str) -> subprocess.Popen[str]:
    return subprocess.Popen(
        command(workplace, root, "first", *overrides),
        stdout=subprocess.PIPE,
        stderr=subprocess.STDOUT,
        text=True,
        env={**os.environ, "PYTHONPATH": str(Path(__file__).parents[3]), "JAX_PLATFORMS": "cpu"},
    )


def finished(process: subprocess.Popen[str], code: int = 0) -> str:
    output, _ = process.communicate(timeout=900)
    assert process.returncode == code, output
    assert "Traceback" not in output, output
    return output


def sums(run: RunDirectory) -> dict[str, int]:
    return complete_checkpoints(run)[-1].sums


@pytest.fixture(scope="module")
def undisturbed(workplace: Path) -> dict[str, int]:
    root = workplace / "runs"
    finished(start(workplace, str(root)))
    return sums(RunDirectory.at(root, "first"))


# ---- Training ------------------------------------------------------------------------------------


@pytest.mark.tracking
@pytest.mark.compiles
def test_begun_and_resumed_in_a_bucket_equals_trained_on_disk(
    workplace: Path, bucket: str, capfd: pytest.CaptureFixture[str]
):
    """In this process, for speed; what is killed and what fails has processes of its own below."""
    fields = ("training.evaluate_every=8", "optimizer.schedule_steps=16")
    expected = sums(train_micro(workplace, "whole", "training.steps=16", *fields))
    root = f"{bucket}/runs"
    train_micro(workplace, "first", "training.steps=8", *fields, root=root)
    train = [
        "train", str(workplace / "micro.yaml"), f"data.corpus={workplace / 'corpus'}", *fields,
        "--root", root, "--run", "first", "training.steps=16",
        f"tracking.uri=sqlite:///{workplace / 'mlflow.db'}",
    ]  # fmt: skip
    assert run_cli(train) == 0
    said = capfd.readouterr()
    assert "resuming from the checkpoint at update 8" in said.out
    run = RunDirectory.at(root, "first")
    assert f"checkpoints in {run.location}/checkpoints" in said.out
    assert "checkpoint" not in said.err
    assert sums(run) == expected
    kept = complete_checkpoints(run)
    assert [manifest.update for manifest in kept][-1] == STEPS
    assert len(kept) <= 2
    assert "eval/bits_per_byte" in kept[-1].metrics
    assert unfinished_updates(run) == []
    assert run_cli(train) == 0
    assert "already finished" in capfd.readouterr().out


@pytest.mark.tracking
@pytest.mark.slow
def test_while_an_upload_stalls_the_updates_go_on(
    workplace: Path, undisturbed: dict[str, int], bucket: str, object_store: ObjectStoreServer
):
    """Nothing of the first checkpoint is answered while eight more updates are made."""
    object_store.fault("stall", r"checkpoints(/|%2F)0000")
    process = start(workplace, f"{bucket}/runs")
    assert process.stdout is not None
    said = ""
    while "update 12 is skipped" not in said:  # or the test's time limit
        line = process.stdout.readline()
        assert line, said
        said += line
    assert "checkpoint at update 8 is skipped: the one before is still being stored" in said
    run = RunDirectory.at(f"{bucket}/runs", "first")
    assert newest_update(run) == 0
    object_store.mend()
    output = finished(process)
    assert "Traceback" not in output
    assert sums(run) == undisturbed
    assert [manifest.update for manifest in complete_checkpoints(run)][-1] == STEPS


@pytest.mark.tracking
@pytest.mark.slow
@pytest.mark.parametrize("seed", range(3))
def test_killed_while_uploading_and_resumed_equals_undisturbed(
    workplace: Path,
    undisturbed: dict[str, int],
    bucket: str,
    object_store: ObjectStoreServer,
    seed: int,
):
    """The kill hits a save: between two uploads of the second checkpoint."""
    after = int(np.random.default_rng(seed).integers(12))
    object_store.fault("stall-upload", r"POST /upload.*checkpoints(/|%2F)00000008", after=after)
    process = start(workplace, f"{bucket}/runs", "checkpoint.every=8")
    run = RunDirectory.at(f"{bucket}/runs", "first")
    uploads = r"checkpoints%2F00000008"
    deadline = time.monotonic() + 120
    while not any(
        "POST /upload" in request and (uploads in request or "checkpoints/00000008" in request)
        for request in list(object_store.requests)
    ):
        assert process.poll() is None, process.communicate()
        assert time.monotonic() < deadline
        time.sleep(0.02)
    time.sleep(0.5)
    process.send_signal(signal.SIGKILL)
    process.communicate()
    object_store.mend()
    assert newest_update(run) < 8
    finished(start(workplace, f"{bucket}/runs", "checkpoint.every=8"))
    assert sums(run) == undisturbed


@pytest.mark.tracking
@pytest.mark.slow
def test_a_store_that_is_not_well_does_not_end_the_training(
    workplace: Path, undisturbed: dict[str, int], bucket: str, object_store: ObjectStoreServer
):
    object_store.fault("503", "POST /upload", times=6, after=20)
    object_store.fault("stall-upload", r"POST /upload.*checkpoints", times=1, after=10)
    finished(start(workplace, f"{bucket}/runs"))
    assert sums(RunDirectory.at(f"{bucket}/runs", "first")) == undisturbed


@pytest.mark.tracking
@pytest.mark.slow
def test_refused_midway_the_training_ends_with_one_line_and_claims_nothing(
    workplace: Path, undisturbed: dict[str, int], bucket: str, object_store: ObjectStoreServer
):
    object_store.fault("403", r"POST /upload.*checkpoints(/|%2F)000000(08|12|16)")
    output = finished(start(workplace, f"{bucket}/runs"), code=4)
    assert "checkpoint at update 16 could not be stored" in output
    run = RunDirectory.at(f"{bucket}/runs", "first")
    assert newest_update(run) == 4
    object_store.mend()
    finished(start(workplace, f"{bucket}/runs"))
    assert sums(run) == undisturbed


@pytest.mark.tracking
@pytest.mark.parametrize(
    ("case", "said"),
    [
        ("wrong bucket", "there is no bucket"),
        ("no permission", "forbidden"),
        ("no tracking", "tracking.uri"),
    ],
)
def test_a_bucket_that_cannot_be_used_is_one_line(
    workplace: Path,
    bucket: str,
    object_store: ObjectStoreServer,
    case: str,
    said: str,
    capfd: pytest.CaptureFixture[str],
):
    root, tracking = f"{bucket}/runs", f"tracking.uri=sqlite:///{workplace / 'mlflow.db'}"
    if case == "wrong bucket":
        root = "gs://there-is-none/runs"
    elif case == "no permission":
        object_store.fault("403")
    else:
        tracking = "tracking.uri=null"
    train = ["train", str(workplace / "micro.yaml"), f"data.corpus={workplace / 'corpus'}"]
    assert run_cli([*train, "--root", root, "--run", "first", tracking]) == 2
    shown = capfd.readouterr()
    errors = [line for line in shown.err.splitlines() if line.startswith("error")]
    assert len(errors) == 1, shown
    assert said in errors[0]
    assert "Traceback" not in shown.out + shown.err


@pytest.mark.tracking
@pytest.mark.slow
def test_a_bucket_that_is_gone_midway_is_one_line_and_nothing_is_claimed(
    workplace: Path, bucket: str, object_store: ObjectStoreServer
):
    process = start(workplace, f"{bucket}/runs", "training.steps=4000", "checkpoint.keep=9")
    run = RunDirectory.at(f"{bucket}/runs", "first")
    while newest_update(run) < 8:
        assert process.poll() is None, process.communicate()
        time.sleep(0.1)
    object_store.fault("404")
    output = finished(process, code=4)
    assert re.search(r"error.*the checkpoint at update 4000 could not be stored", output), output
    assert len([line for line in output.splitlines() if line.startswith("error")]) == 1
    object_store.mend()
    assert 8 <= newest_update(run) < 4000


@pytest.mark.compiles
@pytest.mark.slow
def test_exported_and_imported_the_parameters_are_the_same_to_the_bit(
    workplace: Path, bucket: str, capsys: pytest.CaptureFixture[str]
):
    import jax

    from jobs.evaluation.trained_model import load_trained_model
    from model.training import evaluation_step
    from pipeline.loader import evaluation_batches

    runs, file = str(workplace / "runs"), workplace / "model.safetensors"
    train_micro(workplace, "exported", "training.steps=4", "training.evaluate_every=4")
    export = ["checkpoints", "export", "exported", "--root", runs, "--output", str(file)]
    assert run_cli(export) == 0
    assert run_cli(export) == 2
    assert "is there already" in capsys.readouterr().err
    again = ["checkpoints", "import", str(file), "--run", "copy", "--root", f"{bucket}/runs"]
    assert run_cli(again) == 0
    assert run_cli(again) == 2
    assert "exists already" in capsys.readouterr().err
    assert run_cli(["checkpoints", "verify", "copy", "--root", f"{bucket}/runs"]) == 0

    model = load_trained_model(RunDirectory.at(runs, "exported"))
    copy = load_trained_model(RunDirectory.at(f"{bucket}/runs", "copy"))
    batch = next(
        iter(
            evaluation_batches(workplace / "corpus", "validation", batch_size=4, sequence_length=64)
        )
    )
    nats = [
        np.asarray(jax.jit(evaluation_step, static_argnums=0)(
            one.recipe.model, one.params, one.codebooks, batch
        ))
        for one in (model, copy)
    ]  # fmt: skip
    assert copy.update == model.update == 4
    assert nats[0].tobytes() == nats[1].tobytes()
    harmed = file.read_bytes()[:-8]
    (workplace / "short.safetensors").write_bytes(harmed)
    again = ["checkpoints", "import", str(workplace / "short.safetensors"), "--run", "b"]
    assert run_cli([*again, "--root", runs]) == 2
    assert "cannot be read as a safetensors file" in capsys.readouterr().err
    flipped = bytearray(file.read_bytes())
    flipped[-9] ^= 1
    (workplace / "flipped.safetensors").write_bytes(flipped)
    again = ["checkpoints", "import", str(workplace / "flipped.safetensors"), "--run", "b"]
    assert run_cli([*again, "--root", runs]) == 2
    assert "is damaged: ." in capsys.readouterr().err


# ---- Damage --------------------------------------------------------------------------------------


@pytest.mark.compiles
def test_a_flipped_bit_of_any_object_is_detected(bucket: str):
    from jobs.checkpoints.restore import restore
    from tests.jobs.checkpoints.small_checkpoints import (
        abstract,
        assert_same,
        copied,
        save,
        small_state,
    )

    run = RunDirectory.at(bucket, "first")
    run.claim("identity", {}, "")
    save(run, small_state(2), 2)
    [manifest] = complete_checkpoints(run)
    store, expected = arrays_store(run, manifest), copied(small_state(2))
    random = np.random.default_rng(11)
    for name in manifest.files:
        content = store.read(name)
        harmed = bytearray(content)
        harmed[int(random.integers(len(content)))] ^= 1 << int(random.integers(8))
        store.write(name, bytes(harmed))
        with pytest.raises(DamagedCheckpointError) as caught:
            restore(run, manifest, abstract(small_state()))
        assert f"{store.location}/{name}" in str(caught.value)
        store.write(name, content)
    assert_same(copied(restore(run, manifest, abstract(small_state()))), expected)
    store.remove("manifest.ocdbt")
    with pytest.raises(DamagedCheckpointError, match=r"manifest\.ocdbt is missing"):
        restore(run, manifest, abstract(small_state()))
    assert json.loads(run.store.read("run.json"))["name"] == "first"
