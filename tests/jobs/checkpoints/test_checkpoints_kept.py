"""Which checkpoints are kept, which saves are skipped, and what `tvq checkpoints` says of them."""

import contextlib
import json
import logging
import math
import threading
from pathlib import Path

import jax.numpy as jnp
import pytest
from hypothesis import given
from hypothesis import strategies as st

from jobs.checkpoints.manifest import CheckpointManifest, complete_checkpoints, newest_update, pin
from jobs.checkpoints.retention import retained
from jobs.checkpoints.writer import CheckpointWriter
from jobs.cli.main import run_cli
from jobs.errors import UserError
from jobs.recipe import CheckpointConfig, Recipe, to_yaml
from jobs.runs.lease import Fence, Lease
from jobs.runs.run_directory import RunDirectory
from tests.logged import logged

METRIC = "eval/bits_per_byte"


def manifest(update: int, score: float | None) -> CheckpointManifest:
    metrics = {} if score is None else {METRIC: score}
    return CheckpointManifest(2, update, update, "", 0, {}, {}, {}, {}, metrics)


SCORES = st.one_of(st.none(), st.just(math.nan), st.sampled_from([0.5, 1.0, 1.5, math.inf]))


@given(
    st.dictionaries(st.integers(1, 40), SCORES, max_size=8),
    st.sets(st.integers(1, 40)),
    st.integers(1, 4),
    st.one_of(st.none(), st.integers(1, 9)),
    st.integers(0, 3),
)
def test_each_checkpoint_is_kept_for_a_reason_and_no_other(
    scores: dict[int, float | None], pinned: set[int], keep: int, every: int | None, best: int
):
    """Each on its own: how many beat it, as the recipe's fields are worded."""
    policy = CheckpointConfig(keep=keep, keep_every=every, keep_best=best)
    kept = retained([manifest(*item) for item in scores.items()], pinned, policy)
    for update, score in scores.items():
        newer = sum(other > update for other in scores)
        ahead = sum(
            other_score is not None
            and score is not None
            and (other_score < score or (other_score == score and other > update))
            for other, other_score in scores.items()
        )
        reasons = (
            newer < keep,
            every is not None and update % every == 0,
            score is not None and not math.isnan(score) and ahead < best,
            update in pinned,
        )
        assert (update in kept) == any(reasons), (update, reasons)
    assert kept <= scores.keys()


@pytest.fixture
def run(tmp_path: Path) -> RunDirectory:
    run = RunDirectory.at(tmp_path, "first")
    run.claim("identity", {}, to_yaml(Recipe()))
    return run


@contextlib.contextmanager
def writing(run: RunDirectory, keep: CheckpointConfig, before_commit=lambda: None):
    with Lease(run).held() as lease:
        fence = Fence(run, lease.owner)
        fence.raise_over_others()
        writer = CheckpointWriter(
            run, fence, keep=keep, recipe=to_yaml(Recipe(checkpoint=keep)), fingerprints={},
            before_commit=before_commit,
        )  # fmt: skip
        with contextlib.closing(writer):
            yield writer


def save(writer: CheckpointWriter, update: int, score: float = 1.0, last: bool = True) -> None:
    writer.save(
        {"a": jnp.full(4, update, jnp.float32)},
        update=update, next_batch=update, tokens=0, metrics={METRIC: score}, last=last,
    )  # fmt: skip


def test_a_save_that_would_wait_is_skipped_and_the_last_one_waits(run: RunDirectory):
    stored, reached = threading.Event(), threading.Event()

    def slow_store() -> None:
        reached.set()
        assert stored.wait(60)

    with (
        logged("tvq.checkpoints", logging.WARNING) as said,
        writing(run, CheckpointConfig(keep=9), slow_store) as writer,
    ):
        save(writer, 2, last=False)
        assert reached.wait(60)
        save(writer, 4, last=False)
        save(writer, 6, last=False)
        assert writer.figures()["checkpoint/skipped"] == 2
        assert complete_checkpoints(run) == []
        threading.Timer(0.2, stored.set).start()
        save(writer, 8)
        assert [found.update for found in complete_checkpoints(run)] == [2, 8]
        assert writer.figures()["checkpoint/upload_lag_seconds"] > 0
    assert [line for line in said if "update 4 is skipped" in line]
    assert [line for line in said if "update 6 is skipped" in line]


def test_a_save_that_fails_is_said_and_the_next_one_is_stored(run: RunDirectory):
    failures = [OSError("the disk is full")]

    def store() -> None:
        if failures:
            raise failures.pop()

    with writing(run, CheckpointConfig(), store) as writer:
        save(writer, 2, last=False)
        writer.wait()
        assert newest_update(run) == 0
        save(writer, 4, last=False)
        writer.wait()
        assert newest_update(run) == 4
        assert writer.figures()["checkpoint/failed"] == 1


def test_a_last_save_that_cannot_be_stored_ends_the_training(
    run: RunDirectory, monkeypatch: pytest.MonkeyPatch
):
    def store() -> None:
        raise OSError("the disk is full")

    monkeypatch.setattr("jobs.checkpoints.writer._LAST_PAUSE_SECONDS", 0.0)
    with (
        writing(run, CheckpointConfig(), store) as writer,
        pytest.raises(UserError, match=r"update 2 could not be stored \(the disk is full\)"),
    ):
        save(writer, 2)
    assert complete_checkpoints(run) == []


def test_the_best_the_regular_and_the_pinned_outlive_the_newest(
    run: RunDirectory, capsys: pytest.CaptureFixture[str]
):
    with writing(run, CheckpointConfig(keep=1, keep_every=6, keep_best=1)) as writer:
        for update, score in ((2, 0.5), (4, 0.9), (6, 0.8), (8, 0.7), (10, 0.9)):
            save(writer, update, score)
            if update == 4:
                pin(run, 4, True)
    assert [found.update for found in complete_checkpoints(run)] == [2, 4, 6, 10]
    root = ["--root", str(run.path.parent)]
    (run.path / "checkpoints" / "00000012" / "state-0-1").mkdir(parents=True)
    (run.path / "checkpoints" / "00000012" / "state-0-1" / "half").write_bytes(b"x")
    assert run_cli(["checkpoints", "list", "first", "--json", *root]) == 0
    listed = json.loads(capsys.readouterr().out)
    assert [row["update"] for row in listed["checkpoints"]] == [2, 4, 6, 10]
    assert [row["update"] for row in listed["checkpoints"] if row["pinned"]] == [4]
    assert listed["unfinished"] == [12]
    assert run_cli(["checkpoints", "list", "first", *root]) == 0
    assert "eval/bits_per_byte=0.5" in capsys.readouterr().out
    assert run_cli(["checkpoints", "pin", "first", "5", *root]) == 2
    assert "has no checkpoint at update 5; there are 2, 4, 6, 10" in capsys.readouterr().err
    assert run_cli(["checkpoints", "pin", "first", "4", "--off", *root]) == 0
    capsys.readouterr()
    assert run_cli(["checkpoints", "prune", "first", "--json", *root]) == 0
    assert json.loads(capsys.readouterr().out) == {"retired": [4], "unfinished": [12]}
    assert [found.update for found in complete_checkpoints(run)] == [2, 6, 10]


def test_prune_leaves_a_pinned_checkpoint_whose_manifest_is_damaged(
    run: RunDirectory, capsys: pytest.CaptureFixture[str]
):
    with writing(run, CheckpointConfig(keep=3)) as writer:
        for update in (2, 4, 6):
            save(writer, update)
    pin(run, 2, True)
    for update in (2, 4):
        (run.path / "checkpoints" / f"{update:08d}" / "manifest.json").write_bytes(b"{")
    root = ["--root", str(run.path.parent)]
    assert run_cli(["checkpoints", "prune", "first", "--json", *root]) == 0
    assert json.loads(capsys.readouterr().out)["unfinished"] == [4]
    assert (run.path / "checkpoints" / "00000002").is_dir()
    assert not (run.path / "checkpoints" / "00000004").exists()
