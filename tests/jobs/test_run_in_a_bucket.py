"""A run whose folder is a prefix of a bucket, on the emulator: the same as on disk, or one line."""

import json
import os
import signal
import subprocess
import sys
import time
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from jobs.checkpoint_manifest import (
    DamagedCheckpointError,
    arrays_store,
    complete_checkpoints,
    newest_update,
)
from jobs.errors import UserError
from jobs.lease import Fence, Lease, LeaseLostError
from jobs.run_directory import RunDirectory, list_runs
from jobs.run_log import LogTail, close_log, event, events, open_log
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
        sys.executable, "-c", "from jobs.cli import main; main()", "train",
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
        env={**os.environ, "PYTHONPATH": str(Path(__file__).parents[2]), "JAX_PLATFORMS": "cpu"},
    )


def finished(process: subprocess.Popen[str], code: int = 0) -> str:
    output, _ = process.communicate(timeout=300)
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


# ---- The folder ----------------------------------------------------------------------------------


def test_of_many_that_claim_at_once_one_wins(bucket: str):
    from concurrent.futures import ThreadPoolExecutor

    def claim(number: int) -> tuple[str, str]:
        run = RunDirectory.at(f"{bucket}/runs", "first")
        record = run.claim(f"identity {number}", {}, f"# {number}\n")
        return record.identity, run.recipe_text()

    with ThreadPoolExecutor(6) as pool:
        seen = set(pool.map(claim, range(6)))
    [(identity, text)] = seen
    assert text == f"# {identity.removeprefix('identity ')}\n"
    assert [run.name for run in list_runs(f"{bucket}/runs")] == ["first"]
    run = RunDirectory.existing(f"{bucket}/runs", "first")
    assert run.location == f"{bucket}/runs/first"
    assert RunDirectory.existing("elsewhere", run.location).location == run.location
    with pytest.raises(UserError, match=r"'third': not found under gs://.*there are first"):
        RunDirectory.existing(f"{bucket}/runs", "third")


def test_a_prefix_of_somebody_else_is_refused(bucket: str):
    run = RunDirectory.at(bucket, "first")
    run.store.write("notes.txt", b"mine")
    with pytest.raises(UserError, match=r"gs://.*first: is there and is not a tvq run"):
        run.claim("identity", {}, "")
    assert [entry.name for entry in run.store.list()] == ["notes.txt"]


def test_a_second_driver_is_refused_and_a_superseded_one_never_holds_again(bucket: str):
    run = RunDirectory.at(bucket, "first")
    run.claim("identity", {}, "")
    now = 1_000_000.0
    with Lease(run, clock=lambda: now, renew_seconds=600).held() as old:
        with (
            pytest.raises(UserError, match="is being trained"),
            Lease(run, clock=lambda: now).held(),
        ):
            pass
        before = run.store.read("lease.json")
        now += 61
        with Lease(run, clock=lambda: now, renew_seconds=600).held() as new:
            run.store.write("lease.json", before)  # the old one, asleep in the midst of a renewal
            with pytest.raises(LeaseLostError, match="another driver"):
                Fence(run, old.owner).raise_over_others()
            Fence(run, new.owner).raise_over_others()


def test_a_stop_is_seen_without_waiting(bucket: str):
    run = RunDirectory.at(bucket, "first")
    run.claim("identity", {}, "")
    for wanted in (True, False):
        RunDirectory(run.location).request_stop(wanted)
        deadline = time.monotonic() + 60
        while run.stop_requested() != wanted:
            assert time.monotonic() < deadline
            time.sleep(0.05)


def test_logs_of_two_starts_are_one_file(bucket: str):
    for number in (1, 2):
        open_log(f"{bucket}/logs", "rank-0")
        tail = LogTail(f"{bucket}/logs", "rank-0")
        event("start", number=number)
        close_log()
        assert [line["number"] for line in tail.read()] == [number]
    numbers = [line["number"] for line in events(f"{bucket}/logs", "rank-0", "start")]
    assert numbers == [1, 2]


# ---- Training ------------------------------------------------------------------------------------


@pytest.mark.tracking
def test_trained_in_a_bucket_equals_trained_on_disk(
    workplace: Path, undisturbed: dict[str, int], bucket: str
):
    output = finished(start(workplace, f"{bucket}/runs"))
    run = RunDirectory.at(f"{bucket}/runs", "first")
    assert f"{run.location}/checkpoints" in output
    assert newest_update(run) == STEPS
    assert sums(run) == undisturbed
    assert len(complete_checkpoints(run)) <= 2
    assert "eval/bits_per_byte" in complete_checkpoints(run)[-1].metrics
    assert "already finished" in finished(start(workplace, f"{bucket}/runs"))


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
    workplace: Path, bucket: str, object_store: ObjectStoreServer, case: str, said: str
):
    root, overrides = f"{bucket}/runs", []
    if case == "wrong bucket":
        root = "gs://there-is-none/runs"
    elif case == "no permission":
        object_store.fault("403")
    else:
        overrides = ["tracking.uri=null"]
    output = finished(start(workplace, root, *overrides), code=2)
    assert said in output
    assert len([line for line in output.splitlines() if line.startswith("error")]) == 1


@pytest.mark.tracking
def test_exported_and_imported_the_parameters_are_the_same_to_the_bit(
    workplace: Path, undisturbed: dict[str, int], bucket: str, capsys: pytest.CaptureFixture[str]
):
    import jax

    from jobs.cli import run_cli
    from jobs.trained_model import load_trained_model
    from model.training import evaluation_step
    from pipeline.loader import evaluation_batches

    runs, file = str(workplace / "runs"), workplace / "model.safetensors"
    export = ["checkpoints", "export", "first", "--root", runs, "--output", str(file)]
    assert run_cli(export) == 0
    assert run_cli(export) == 2
    assert "is there already" in capsys.readouterr().err
    again = ["checkpoints", "import", str(file), "--run", "copy", "--root", f"{bucket}/runs"]
    assert run_cli(again) == 0
    assert run_cli(again) == 2
    assert "exists already" in capsys.readouterr().err
    assert run_cli(["checkpoints", "verify", "copy", "--root", f"{bucket}/runs"]) == 0

    model = load_trained_model(RunDirectory.at(runs, "first"))
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
    assert copy.update == model.update == STEPS
    assert nats[0].tobytes() == nats[1].tobytes()
    harmed = file.read_bytes()[:-8]
    (workplace / "short.safetensors").write_bytes(harmed)
    again = ["checkpoints", "import", str(workplace / "short.safetensors"), "--run", "b"]
    assert run_cli([*again, "--root", runs]) == 2
    assert "cannot be read as a safetensors file" in capsys.readouterr().err


# ---- Damage --------------------------------------------------------------------------------------


@pytest.mark.compiles
@pytest.mark.filterwarnings("ignore::pytest.PytestUnraisableExceptionWarning")
@pytest.mark.filterwarnings("ignore:coroutine:RuntimeWarning")
def test_a_flipped_byte_of_any_object_is_detected_or_harmless(bucket: str):
    from jobs.checkpoints import restore
    from tests.jobs.test_checkpoints import abstract, assert_same, copied, save, small_state

    run = RunDirectory.at(bucket, "first")
    run.claim("identity", {}, "")
    save(run, small_state(2), 2)
    [manifest] = complete_checkpoints(run)
    store, expected = arrays_store(run, manifest), copied(small_state(2))
    random, detected = np.random.default_rng(11), set[str]()
    for name in manifest.files:
        content = store.read(name)
        for _ in range(2):
            harmed = bytearray(content)
            harmed[int(random.integers(len(content)))] ^= 1 << int(random.integers(8))
            store.write(name, bytes(harmed))
            try:
                found: Any = restore(run, manifest, abstract(small_state()))
            except DamagedCheckpointError as damage:
                detected.add(name)
                assert store.location in str(damage) or "leaf [" in str(damage)  # noqa: PT017
            else:
                assert_same(copied(found), expected)
        store.write(name, content)
    assert_same(copied(restore(run, manifest, abstract(small_state()))), expected)
    assert len(detected) >= 3, detected
    store.remove("manifest.ocdbt")
    with pytest.raises(DamagedCheckpointError, match=r"manifest\.ocdbt is missing"):
        restore(run, manifest, abstract(small_state()))
    assert json.loads(run.store.read("run.json"))["name"] == "first"
