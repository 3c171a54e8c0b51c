"""A flow every minute on the real clock, over a corpus that grows: three ticks, seen in MLflow."""

import json
import re
import shutil
import subprocess
import sys
import time
from pathlib import Path

import pytest

from jobs.cli.main import run_cli
from jobs.errors import ExitCode
from jobs.tracking.parent_run import children
from jobs.tracking.store import embedded_store
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
    monkeypatch.chdir(tmp_path)
    monkeypatch.delenv("TVQ_ROOT", raising=False)
    monkeypatch.delenv("MLFLOW_TRACKING_URI", raising=False)
    Path("micro.yaml").write_text(RECIPE)
    Path("nightly.yaml").write_text(FLOW.format(more=""))
    Path("books").mkdir()
    library = Path(standard_library().paths[0])
    modules = [path for path in sorted(library.glob("*.py")) if path.stat().st_size > 2000]

    def grow(begin: int, end: int) -> None:
        for path in modules[begin:end]:
            shutil.copy(path, "books")

    def history() -> list[dict]:
        capsys.readouterr()  # what other commands said
        assert run_cli(["schedule", "history", "nightly", "--json"]) == ExitCode.OK
        return [t for t in json.loads(capsys.readouterr().out) if "ended" in t][::-1]

    def wait_for(n_ticks: int) -> None:
        while len(history()) < n_ticks:
            assert daemon.poll() is None
            time.sleep(2)

    grow(0, 60)
    assert run_cli(list(ADD)) == ExitCode.OK
    daemon = subprocess.Popen([*TVQ, "schedule", "serve"])
    try:
        wait_for(1)
        grow(60, 90)
        wait_for(2)
        # A recipe that ruins what it begins with.
        Path("nightly.yaml").write_text(FLOW.format(more=" optimizer.learning_rate=3.0"))
        assert run_cli([*ADD, "--replace"]) == ExitCode.OK
        grow(90, 110)
        n_done = len(history())
        wait_for(n_done + 2)  # one may have begun with the old file
        assert run_cli(["schedule", "pause", "nightly"]) == ExitCode.OK
    finally:
        daemon.terminate()
        daemon.wait(60)
    ticks = history()
    assert {tick["outcome"] for tick in ticks} == {"succeeded"}, ticks
    instants = [tick["tick"] for tick in ticks]
    assert all(re.fullmatch(r"\d{8}T\d{4}00Z", instant) for instant in instants)
    assert len(set(instants)) == len(instants)
    results = [
        json.loads((tmp_path / "runs" / "flows" / "nightly" / tick / "result.json").read_text())
        for tick in instants
    ]
    assert results[0]["verdict"]["outcome"] == "promoted"
    assert results[-1]["verdict"]["outcome"] == "worse"
    assert results[-1]["champion"] == results[-2]["champion"]
    assert results[-1]["corpus"]["increments"] >= 2
    assert len({result["corpus"]["fingerprints"]["validation"] for result in results}) == 1
    for tick, result in zip(instants, results, strict=True):
        under = children(embedded_store(tmp_path / "runs"), "tvq", f"nightly-{tick}")
        [judged] = [run for run in under if run["name"].endswith("-judge")]
        assert judged["tags"]["outcome"] == result["verdict"]["outcome"]
