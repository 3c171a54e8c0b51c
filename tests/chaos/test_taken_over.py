"""A driver that is suspended, loses its run to another one, and wakes up: it changes nothing."""

import os
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest

from jobs.checkpoints.manifest import complete_checkpoints, newest_update
from jobs.runs.run_directory import RunDirectory
from tests.micro import write_micro

EXPIRY = 3
DRIVER = f"""
from jobs.runs.lease import Lease
Lease.__init__.__kwdefaults__.update(renew_seconds=0.3, expire_seconds={EXPIRY})
from jobs.cli.main import main
main()
"""


def start(folder: Path, name: str, *overrides: str) -> subprocess.Popen[str]:
    return subprocess.Popen(
        [
            sys.executable, "-c", DRIVER, "train", str(folder / "micro.yaml"),
            f"data.corpus={folder / 'corpus'}", "--root", str(folder / "runs"), "--run", name,
            "training.evaluate_every=400", "checkpoint.every=8", *overrides,
        ],
        stdout=subprocess.PIPE,
        stderr=subprocess.STDOUT,
        text=True,
        env={**os.environ, "PYTHONPATH": str(Path(__file__).parents[2]), "JAX_PLATFORMS": "cpu"},
    )  # fmt: skip


def contents(run: RunDirectory) -> dict[str, bytes]:
    kept = (path for path in run.path.rglob("*") if path.is_file())
    return {
        str(path.relative_to(run.path)): path.read_bytes()
        for path in kept
        if path.parent.name != "logs"  # where it says why it ended
    }


@pytest.mark.slow
@pytest.mark.tracking
def test_a_suspended_driver_that_wakes_up_after_a_takeover_writes_nothing(tmp_path: Path):
    write_micro(tmp_path)
    steps = "training.steps=400"
    sleeper = start(tmp_path, "first", steps)
    run = RunDirectory.at(tmp_path / "runs", "first")
    deadline = time.monotonic() + 300
    while not newest_update(run):
        assert sleeper.poll() is None, sleeper.communicate()
        assert time.monotonic() < deadline
        time.sleep(0.05)
    sleeper.send_signal(signal.SIGSTOP)
    asleep_at = newest_update(run)
    assert asleep_at < 400
    time.sleep(EXPIRY + 1)

    taker = start(tmp_path, "first", steps)
    output, _ = taker.communicate(timeout=300)
    assert taker.returncode == 0, output
    assert f"resuming from the checkpoint at update {asleep_at}" in output
    assert newest_update(run) == 400
    after = contents(run)

    sleeper.send_signal(signal.SIGCONT)
    output, _ = sleeper.communicate(timeout=300)
    assert sleeper.returncode == 3, output
    assert "another driver has taken the run over" in output
    assert "Traceback" not in output
    now = contents(run)
    # What was under way may still come: points, which the tracker knows by step, and arrays in the
    # folder of its own attempt at a checkpoint, which no manifest names.
    attempts = {f"checkpoints/{m.update:08d}/{m.folder}" for m in complete_checkpoints(run)}
    changed = {name for name in now.keys() | after.keys() if now.get(name) != after.get(name)}
    assert not {
        name
        for name in changed
        if not name.startswith("metrics/")
        and ("/state-" not in name or "/".join(name.split("/")[:3]) in attempts)
    }, changed

    undisturbed = start(tmp_path, "second", steps)
    output, _ = undisturbed.communicate(timeout=300)
    assert undisturbed.returncode == 0, output
    expected = complete_checkpoints(RunDirectory.at(tmp_path / "runs", "second"))[-1].sums
    assert complete_checkpoints(run)[-1].sums == expected
