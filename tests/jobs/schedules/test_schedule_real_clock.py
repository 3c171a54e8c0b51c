"""A flow every minute on the real clock, over a corpus that grows: three ticks, seen in MLflow."""

import hashlib
import json
import re
import shutil
import subprocess
import sys
import time
from itertools import pairwise
from pathlib import Path

import pytest

from jobs.cli.main import run_cli
from jobs.errors import ExitCode
from jobs.tracking.store import embedded_store, load
from pipeline.sources import standard_library
from tests.micro import RECIPE

TVQ = [sys.executable, "-P", "-c", "from jobs.cli.main import main; main()"]
FLOW = """\
name: nightly
prepare: books --output corpora/books --validation 0.3 --test 0
train: ./micro.yaml{more}
begin_from: champion
"""
ADD = ("schedule", "add", "nightly.yaml", "--cron", "* * * * *", "--overlap", "queue")


@pytest.mark.slow
@pytest.mark.timeout(1800)
def test_a_flow_every_minute_over_a_corpus_that_grows(tmp_path: Path, monkeypatch, capsys):
    """Each growth is one rename, so that a tick sees all of it or nothing.

    A tick that falls between two growths finds nothing new; the first that saw a growth counts.
    """
    monkeypatch.chdir(tmp_path)
    monkeypatch.delenv("TVQ_ROOT", raising=False)
    monkeypatch.delenv("MLFLOW_TRACKING_URI", raising=False)
    Path("micro.yaml").write_text(RECIPE)
    Path("nightly.yaml").write_text(FLOW.format(more=""))
    Path("books").mkdir()
    library = Path(standard_library().paths[0])
    modules = [path for path in sorted(library.glob("*.py")) if path.stat().st_size > 2000]
    flows = tmp_path / "runs" / "flows" / "nightly"

    def grow(begin: int, end: int) -> None:
        folder = Path(f"{begin}-to-{end}")
        folder.mkdir()
        for path in modules[begin:end]:
            shutil.copy(path, folder)
        folder.rename(Path("books") / folder)

    def history() -> list[dict]:
        capsys.readouterr()  # what other commands said
        assert run_cli(["schedule", "history", "nightly", "--json"]) == ExitCode.OK
        return [t for t in json.loads(capsys.readouterr().out) if "ended" in t][::-1]

    def first_that_saw(growths: int) -> dict:
        """Waits for it; returns what its flow left behind."""
        while True:
            for tick in history():
                assert tick["outcome"] == "succeeded", tick
                result = json.loads((flows / tick["tick"] / "result.json").read_text())
                if result["corpus"]["increments"] == growths:
                    return result
            assert daemon.poll() is None
            time.sleep(1)

    grow(0, 60)
    assert run_cli(list(ADD)) == ExitCode.OK
    daemon = subprocess.Popen([*TVQ, "schedule", "serve"])
    try:
        first = first_that_saw(1)
        shards = {path: _sha256(path) for path in Path("corpora").rglob("*-*.arrow")}
        grow(60, 90)
        better = first_that_saw(2)
        # A recipe that ruins what it begins with.
        Path("nightly.yaml").write_text(FLOW.format(more=" optimizer.learning_rate=3.0"))
        assert run_cli([*ADD, "--replace"]) == ExitCode.OK
        grow(90, 110)
        worse = first_that_saw(3)
        assert run_cli(["schedule", "pause", "nightly"]) == ExitCode.OK
    finally:
        daemon.terminate()
        daemon.wait(60)
    instants = [tick["tick"] for tick in history()]
    assert all(re.fullmatch(r"\d{8}T\d{4}00Z", instant) for instant in instants)
    assert len(set(instants)) == len(instants)
    assert all(tick["attempts"] == 1 for tick in history())

    # Increments: what was there was not written again, and what is new is all of what was added.
    assert shards
    assert {path: _sha256(path) for path in shards} == shards
    growths = (modules[60:90], modules[90:110])
    added = [sum(path.stat().st_size for path in paths) for paths in growths]
    tokens = [result["corpus"]["tokens"] for result in (first, better, worse)]
    assert [b - a for a, b in pairwise(tokens)] == added
    held_out = [result["corpus"]["fingerprints"]["validation"] for result in (first, better, worse)]
    assert len(set(held_out)) == 1

    # One was promoted against a champion and one was refused; both had begun from the champion.
    assert [r["verdict"]["outcome"] for r in (first, better, worse)] == [
        "promoted", "promoted", "worse",
    ]  # fmt: skip
    assert better["verdict"]["high"] < 0 < worse["verdict"]["low"]
    assert better["champion"] == worse["champion"] == better["candidate"]["run"]
    runs = [Path(result["candidate"]["run"]) for result in (first, better, worse)]
    assert len(set(runs)) == 3

    client = _mlflow(tmp_path / "runs")
    begins = [
        min(client.get_metric_history(r["candidate"]["mlflow_run_id"], "train/loss_nats_per_token"),
            key=lambda point: point.step).value
        for r in (first, better)
    ]  # fmt: skip
    assert begins[1] < begins[0] - 1
    champion = client.get_model_version_by_alias("nightly", "champion")
    assert champion.run_id == better["candidate"]["mlflow_run_id"]
    # A tick between the change of the recipe and the last growth makes another bad one.
    assert len(client.search_model_versions("name='nightly'")) >= 3
    experiment = client.get_experiment_by_name("tvq")
    assert experiment
    for result in (first, better, worse):
        [parent] = client.search_runs(
            [experiment.experiment_id], f"attributes.run_name = 'nightly-{result['tick']}'"
        )
        assert parent.info.status == "FINISHED"
        under = client.search_runs(
            [experiment.experiment_id], f"tags.`mlflow.parentRunId` = '{parent.info.run_id}'"
        )
        named = {run.info.run_name: run for run in under}
        key = f"nightly-{result['tick']}"
        trained = Path(result["candidate"]["run"]).name
        assert set(named) == {f"{key}-prepare", trained, f"{key}-judge"}
        assert named[trained].info.run_id == result["candidate"]["mlflow_run_id"]
        judged = named[f"{key}-judge"]
        assert judged.data.tags["outcome"] == result["verdict"]["outcome"]
        assert judged.data.metrics["bits_per_byte"] == result["verdict"]["bits_per_byte"]


def _sha256(path: Path) -> str:
    return hashlib.sha256(path.read_bytes()).hexdigest()


def _mlflow(root: Path):
    load()
    from mlflow import MlflowClient

    return MlflowClient(embedded_store(root).uri, embedded_store(root).uri)
