"""A run directory that somebody tampered with: one clear line, and the last good checkpoint."""

import dataclasses
import shutil
from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest

from jobs.checkpoints.manifest import (
    CheckpointManifest,
    DamagedCheckpointError,
    arrays_store,
    commit,
    complete_checkpoints,
    newest_update,
    readable_checkpoints,
)
from jobs.checkpoints.restore import restore_by_recipe
from jobs.cli.main import run_cli
from jobs.runs.run_directory import RunDirectory
from tests.jobs.trained_micro import train_micro
from tests.micro import write_micro

pytestmark = pytest.mark.compiles


@pytest.fixture(scope="module")
def workplace(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("tampered")
    write_micro(folder)
    train_micro(folder, "first", "training.steps=8", "training.evaluate_every=8")
    return folder


@pytest.fixture
def run(workplace: Path, tmp_path: Path) -> RunDirectory:
    """A copy, with checkpoints at 4 and 8."""
    shutil.copytree(workplace / "runs", tmp_path / "runs")
    return RunDirectory.at(tmp_path / "runs", "first")


def newest(run: RunDirectory) -> tuple[CheckpointManifest, Path]:
    manifest = complete_checkpoints(run)[-1]
    return manifest, Path(arrays_store(run, manifest).location)


def largest(folder: Path) -> Path:
    return max(
        (path for path in folder.rglob("*") if path.is_file()), key=lambda p: p.stat().st_size
    )


def byte_flipped(run: RunDirectory) -> str:
    path = largest(newest(run)[1])
    data = bytearray(path.read_bytes())
    data[len(data) // 2] ^= 0x10
    path.write_bytes(data)
    return f"{path.name} is not what was saved"


def file_missing(run: RunDirectory) -> str:
    path = largest(newest(run)[1])
    path.unlink()
    return f"{path.name} is missing, expected"


def manifest_flipped(run: RunDirectory) -> str:
    path = run.path / "checkpoints" / "00000008" / "manifest.json"
    data = bytearray(path.read_bytes())
    data[200] ^= 1
    path.write_bytes(data)
    return "manifest.json"


HARMS: list[Callable[[RunDirectory], str]] = [byte_flipped, file_missing, manifest_flipped]


def said_of(capfd: pytest.CaptureFixture[str]) -> str:
    captured = capfd.readouterr()
    text = captured.out + captured.err
    assert "Traceback" not in text, text
    return text


@pytest.mark.parametrize("harm", HARMS)
def test_damage_is_named(
    run: RunDirectory, harm: Callable[[RunDirectory], str], capfd: pytest.CaptureFixture[str]
):
    words, root = harm(run), ["--root", str(run.root)]
    assert run_cli(["checkpoints", "verify", "first", *root]) == 2
    said = said_of(capfd)
    assert "update 4: whole" in said
    assert "run first: 1 damaged: " in said
    assert words in said
    assert len([line for line in said.splitlines() if line.startswith("error")]) == 1
    # Whose figures these are must be clear: arrays are not passed over in silence or by a warning.
    whole = harm is manifest_flipped
    assert run_cli(["evaluate", "first", *root]) == (0 if whole else 2)
    said = said_of(capfd)
    assert (
        "checkpoint is damaged and skipped: " if whole else "with --update: there are 4"
    ) in said
    assert words in said


def test_who_samples_is_told_and_given_the_checkpoint_before(
    run: RunDirectory, capfd: pytest.CaptureFixture[str]
):
    words = byte_flipped(run)
    assert run_cli(["sample", "first", "--tokens", "4", "--root", str(run.root)]) == 0
    said = said_of(capfd)
    assert "checkpoint is damaged and skipped: " in said
    assert words in said


@pytest.mark.tracking
def test_a_training_goes_on_from_the_last_good_one_and_says_so(
    run: RunDirectory, workplace: Path, capfd: pytest.CaptureFixture[str]
):
    sums = complete_checkpoints(run)[-1].sums
    words = byte_flipped(run)
    train = [
        "train", str(workplace / "micro.yaml"), f"data.corpus={workplace / 'corpus'}",
        "--root", str(run.root), "--run", "first", "training.evaluate_every=8",
    ]  # fmt: skip
    assert run_cli([*train, "training.steps=12"]) == 0
    said = said_of(capfd)
    assert "checkpoint is damaged and skipped: " in said
    assert "going on after update 4 instead" in said
    assert words in said
    assert newest_update(run) == 12
    again = complete_checkpoints(run)
    assert [manifest.update for manifest in again] == [8, 12]
    assert again[0].sums == sums  # saved anew on the way, the same to the bit
    assert run_cli(["checkpoints", "verify", "first", "--root", str(run.root)]) == 0

    # What the run was begun with is stored twice, and both must say the same.
    text = (run.path / "recipe.yaml").read_text()
    (run.path / "recipe.yaml").write_text(text.replace("learning_rate: 0.01", "learning_rate: 0.1"))
    capfd.readouterr()
    assert run_cli([*train, "training.steps=16"]) == 2
    assert "recipe.yaml: is not the recipe that the run was begun with" in said_of(capfd)


@pytest.mark.parametrize("command", ["evaluate", "verify"])
def test_a_newer_format_or_another_model_is_one_line(
    run: RunDirectory, command: str, workplace: Path, capfd: pytest.CaptureFixture[str]
):
    arguments = {"evaluate": ["evaluate"], "verify": ["checkpoints", "verify"]}[command]
    arguments = [*arguments, "first", "--root", str(run.root)]
    manifest, _ = newest(run)
    commit(run, dataclasses.replace(manifest, format_version=99), lambda: None)
    assert run_cli(arguments) == 2
    said = said_of(capfd)
    assert "manifest.json: format 99 is newer than 2, which this tvq reads; upgrade tvq" in said

    leaves = manifest.leaves | {".params['embedding']['table']": "float32[259,17]"}
    commit(run, dataclasses.replace(manifest, leaves=leaves), lambda: None)
    assert run_cli(arguments) == 2
    said = said_of(capfd)
    assert "holds another model than the recipe describes: .params['embedding']['table']" in said
    assert len([line for line in said.splitlines() if line.startswith("error")]) == 1


def test_no_flipped_bit_of_any_file_of_a_checkpoint_restores_silently(run: RunDirectory):
    """Of a real train state; of every file, our manifest included, bits at random."""
    random = np.random.default_rng(4)
    folder = run.path / "checkpoints" / "00000008"
    files = [path for path in folder.rglob("*") if path.is_file()]
    assert {path.name for path in files} > {"manifest.json", "manifest.ocdbt", "_METADATA"}
    for path in files:
        content = path.read_bytes()
        for _ in range(3):
            harmed = bytearray(content)
            harmed[int(random.integers(len(content)))] ^= 1 << int(random.integers(8))
            path.write_bytes(harmed)
            found, damages = readable_checkpoints(run)
            if [manifest.update for manifest in found] == [4, 8]:
                with pytest.raises(DamagedCheckpointError) as caught:
                    restore_by_recipe(run, found[-1])
                damages = [caught.value]
            assert str(path) in str(damages[0])
            path.write_bytes(content)
    restore_by_recipe(run, complete_checkpoints(run)[-1])


def test_what_restores_runs_no_code_of_a_file(
    run: RunDirectory, workplace: Path, monkeypatch: pytest.MonkeyPatch, tmp_path: Path
):
    """With unpickling forbidden, everything that reads a checkpoint or an exported file works."""
    import pickle

    def forbidden(*_: object, **__: object) -> None:
        raise AssertionError("unpickled")

    for name in ("load", "loads", "Unpickler", "_load", "_loads", "_Unpickler"):
        monkeypatch.setattr(pickle, name, forbidden)
    root, file = ["--root", str(run.root)], str(tmp_path / "a.safetensors")
    assert run_cli(["checkpoints", "verify", "first", *root]) == 0
    assert run_cli(["checkpoints", "export", "first", "--output", file, *root]) == 0
    assert run_cli(["checkpoints", "import", file, "--run", "second", *root]) == 0
