"""Killed again and again in every phase, a training ends as if nothing had happened."""

import random
import time
from pathlib import Path

import jax
import pytest

from jobs.checkpoints.manifest import newest_update
from jobs.errors import ExitCode
from tests.chaos.training_under_fire import Training
from tests.micro import write_micro
from tests.runs import final_sums, losses, state_difference

pytestmark = [pytest.mark.ray, pytest.mark.tracking, pytest.mark.slow, pytest.mark.timeout(3600)]

KINDS = (
    "worker 0", "other worker", "driver", "stopped worker", "saving", "restoring", "evaluating",
)  # fmt: skip
SEED = 5
STEPS = 480
GROUP = (
    "cluster.workers=2", f"training.steps={STEPS}", "checkpoint.every=8",
    "training.evaluate_every=24", "cluster.heartbeat_seconds=15",
)  # fmt: skip


def test_ten_kills_leave_no_trace(tmp_path: Path):
    write_micro(tmp_path)
    calm = Training(tmp_path, "calm", *GROUP)
    calm.finished()

    chance = random.Random(SEED)
    schedule = [*chance.sample(KINDS, len(KINDS)), *chance.choices(KINDS, k=3)]
    shaken = Training(tmp_path, "shaken", *GROUP)
    recoveries, since = [], -1
    try:
        for kind in schedule:
            for _ in range(5):
                shaken.at_work(since)
                met = shaken.kill(kind)
                killed_at, since = time.monotonic(), len(shaken.events) - 1
                shaken.wait("a new group", lambda: shaken.newest("state ready") > since)  # noqa: B023
                recoveries.append((kind, met, time.monotonic() - killed_at))
                if met:
                    break
            assert recoveries[-1][1], f"{kind} was never met"
        shaken.finished()
    finally:
        shaken.close()
    for kind, met, seconds in recoveries:
        print(f"{kind:15} {'met' if met else 'missed'}: at work again after {seconds:.1f} s")
    assert {kind for kind, met, _ in recoveries if met} == set(KINDS)
    assert sum(met for _, met, _ in recoveries) >= 10
    assert final_sums(shaken.run, STEPS) == final_sums(calm.run, STEPS)
    assert losses(shaken.run) == losses(calm.run)
    assert [step for step, _ in losses(shaken.run)] == list(range(1, STEPS + 1))


def test_two_then_one_then_three_workers_are_one_training(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
):
    """Stopped with SIGTERM in between; in double precision, against one process."""
    monkeypatch.setenv("JAX_ENABLE_X64", "1")
    write_micro(tmp_path)
    fields = ("model.dtype=float64", "checkpoint.every=8", "optimizer.schedule_steps=400")
    calm = Training(tmp_path, "calm", "cluster.workers=0", "training.steps=400", *fields)
    calm.finished()
    saved = [0]
    for workers in (2, 1, 3):
        run = Training(
            tmp_path, "moved", f"cluster.workers={workers}", "training.steps=400", *fields
        )
        if workers == 3:
            run.finished()
            break
        run.wait("an update", lambda run=run: run.newest("state ready") >= 0)
        run.wait("a checkpoint", lambda run=run: newest_update(run.run) >= saved[-1] + 8)
        saved.append(run.stopped(ExitCode.PREEMPTED))
    assert 0 < saved[1] < saved[2] < 400
    starts = [event["update"] for event in run.events if event["event"] == "state ready"]
    assert set(starts) <= {saved[2]}
    jax.config.update("jax_enable_x64", True)
    try:
        assert state_difference(run.run, calm.run) < 1e-9
    finally:
        jax.config.update("jax_enable_x64", False)
    found, expected = dict(losses(run.run)), dict(losses(calm.run))
    assert list(found) == list(expected) == list(range(1, 401))
    assert all(abs(found[step] - expected[step]) < 3e-7 * expected[step] for step in expected)
