"""`tvq train --dry-run`: it says what a training would do, and does none of it."""

import json
from pathlib import Path

import pytest

from jobs import recipe as recipes
from jobs.checkpoints.manifest import CheckpointManifest, commit
from jobs.cli.main import run_cli
from jobs.runs.run_directory import RunDirectory
from pipeline.manifest import Manifest
from tests.micro import write_micro

pytestmark = pytest.mark.compiles


@pytest.fixture
def folder(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    write_micro(tmp_path)
    monkeypatch.chdir(tmp_path)
    return tmp_path


def dry(capsys: pytest.CaptureFixture[str], *overrides: str) -> str:
    command = ["train", "micro.yaml", "data.corpus=corpus", *overrides, "--dry-run"]
    assert run_cli(command) == 0
    return capsys.readouterr().out


def test_the_plan_is_the_trainings_and_nothing_is_written(
    folder: Path, capsys: pytest.CaptureFixture[str]
):
    before = sorted(folder.rglob("*"))
    cluster = ("cluster.workers=3", "cluster.devices_per_worker=2", "cluster.fsdp=2")
    plan = json.loads(dry(capsys, *cluster, "training.accumulate=2", "--json"))
    assert plan["state"] == "would begin"
    assert plan["mesh"] == {"data": 3, "fsdp": 2, "tensor": 1}
    # Of 4 rows, six devices take two each, one after the other.
    batch = plan["batch"]
    assert (batch["rows"], batch["rows_a_device"], batch["rows_a_micro_batch"]) == (4, 2, 1)
    assert batch["masked_rows"] == 6 * 2 - 4
    assert (batch["tokens"], batch["updates"], batch["tokens_an_update"]) == (256, 2, 128)
    # 40 updates are 20 batches; evaluations at 20 and 40; checkpoints at 4, 8, ... 40.
    assert (plan["batches"], plan["tokens"]) == (20, 20 * 256)
    assert (plan["evaluations"], plan["checkpoints"]) == (2, 10)
    split = Manifest.load(folder / "corpus").splits["train"]
    [data] = plan["data"]
    assert (data["fingerprint"], data["documents"]) == (split.fingerprint, split.documents)
    assert data["epochs"] == pytest.approx(20 * 4 / -(-data["targets"] // 64))
    assert plan["changed"]["training.accumulate"] == 2
    assert recipes.from_yaml((folder / "micro.yaml").read_text(), "x").model.d_model == 16
    assert sorted(folder.rglob("*")) == before

    shown = dry(capsys, "training.steps=42", "checkpoint.every=8")
    assert "on this process" in shown
    assert "batch       4 rows x 64 tokens = 256; " in shown
    assert "checkpoints every 8 updates, 6 times" in shown
    assert shown.endswith("nothing was begun (--dry-run)\n")
    assert sorted(folder.rglob("*")) == before


def test_of_a_run_that_exists_it_tells_how_it_would_go_on(
    folder: Path, capsys: pytest.CaptureFixture[str]
):
    recipe = recipes.resolve(recipes.load("micro.yaml", (f"data.corpus={folder / 'corpus'}",)))
    prints = {n: s.fingerprint for n, s in Manifest.load(folder / "corpus").splits.items()}
    run = RunDirectory.at("runs", "micro")
    run.claim(recipes.identity(recipe), prints, recipes.to_yaml(recipe))
    assert "runs/micro: would begin anew: it has no checkpoint" in dry(capsys)
    commit(run, CheckpointManifest(2, 12, 6, "", 1, {}, {}, {}, {}), lambda: None)
    assert "runs/micro: would resume from the checkpoint at update 12" in dry(capsys)
    assert "already finished at update 12" in dry(
        capsys, "training.steps=12", "training.evaluate_every=12"
    )
    command = ["train", "micro.yaml", "data.corpus=corpus", "training.seed=1", "--dry-run"]
    assert run_cli(command) == 2
    assert "exists with other mathematics; asked for (and stored): training.seed: 1 (0)" in (
        capsys.readouterr().err
    )
