"""A training whose batches cannot be used: against the same training by hand without them."""

import functools
import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import jax
import numpy as np
import pytest

from jobs import recipe as recipes
from jobs.cli.main import run_cli
from jobs.errors import ExitCode, UserError
from jobs.runs.lease import Lease
from jobs.runs.metric_spool import read_segment, segments
from jobs.runs.run_directory import RunDirectory
from jobs.training import loop
from jobs.training.loop_contract import LoopSettings
from model.training import go_on_from, initial_state, train_step
from pipeline.loader import training_batches
from pipeline.manifest import Manifest, Split
from tests.jobs.training.skipped_batches import skipped_batches
from tests.micro import write_micro

pytestmark = pytest.mark.compiles

OVERRIDES = (
    # Batches of two updates.
    "training.steps=24",
    "training.max_skipped=2",
    "training.evaluate_every=24",
    "checkpoint.every=4",
    "checkpoint.keep=9",
)
BEYOND = 10_000
"""A token that no vocabulary has: its loss is NaN."""


@pytest.fixture(scope="module")
def workplace(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("falling back")
    write_micro(folder)
    return folder


def recipe_in(folder: Path, *overrides: str) -> recipes.Recipe:
    loaded = recipes.load(
        str(folder / "micro.yaml"), (f"data.corpus={folder / 'corpus'}", *OVERRIDES, *overrides)
    )
    return recipes.resolve(loaded)


def corpus_splits(folder: Path) -> dict[str, Split]:
    return Manifest.load(folder / "corpus").splits


def trained(
    folder: Path, name: str, damaged: set[int], monkeypatch: pytest.MonkeyPatch, *overrides: str
) -> tuple[RunDirectory, list[Any]]:
    """Trains with one token of the damaged batches broken; returns what was saved at the end."""
    recipe, saved = recipe_in(folder, *overrides), []

    def breaking(*arguments: Any, start_batch: int, **named: Any) -> Any:
        with training_batches(*arguments, start_batch=start_batch, **named) as batches:
            for n, batch in enumerate(batches, start=start_batch):
                if n in damaged:
                    batch.targets[1, 3] = BEYOND
                yield batch

    class Keeping(loop.CheckpointWriter):
        def save(self, state: Any, **named: Any) -> None:
            saved.append(jax.device_get(state))
            super().save(state, **named)
            self.wait()  # else which checkpoints there are is a matter of speed

    monkeypatch.setattr(loop, "training_batches", breaking)
    monkeypatch.setattr(loop, "CheckpointWriter", Keeping)
    run = RunDirectory.at(folder / "runs", name)
    prints = {name: split.fingerprint for name, split in corpus_splits(folder).items()}
    run.claim("identity", prints, recipes.to_yaml(recipe))
    with Lease(run).held() as lease:
        loop.train(LoopSettings(run.location, recipe, lease.owner))
    return run, saved


def by_hand(folder: Path) -> tuple[Callable[[Any, int], Any], Any]:
    """A function from (state, batch index) to the state after it, and the state at the start."""
    recipe = recipe_in(folder)
    step = jax.jit(
        functools.partial(train_step, recipe.model, recipe.optimizer, recipe.training.update_length)
    )
    with training_batches(
        folder / "corpus",
        "train",
        sequence_length=recipe.data.sequence_length,
        batch_size=recipe.training.batch_size,
        seed=recipe.training.seed,
    ) as batches:
        held = [next(batches) for _ in range(12)]
        held = [batch._replace(rows=batch.rows.astype(np.uint32)) for batch in held]

    def go(state: Any, n: int) -> Any:
        return step(state, held[n])[0]

    start = jax.jit(functools.partial(initial_state, recipe.model, recipe.optimizer))(
        recipe.training.seed
    )
    return go, start


def skip(state: Any) -> Any:
    """The state behind a batch that was left out."""
    return state._replace(updates=state.updates + 2, batches=state.batches + 1)


def alike(actual: Any, expected: Any) -> None:
    assert (actual.updates, actual.batches) == (expected.updates, expected.batches)
    for part in ("params", "optimizer", "codebooks"):
        for ours, theirs in zip(
            jax.tree.leaves(getattr(actual, part)),
            jax.tree.leaves(getattr(expected, part)),
            strict=True,
        ):
            np.testing.assert_allclose(ours, theirs, atol=1e-5, rtol=1e-4)


def test_bad_batches_are_left_out_and_many_lead_back_to_the_checkpoint(
    workplace: Path, monkeypatch, capsys
):
    """Batch 1 alone, then batches 5 to 7, of batches of two updates."""
    run, saved = trained(workplace, "many", {1, 5, 6, 7}, monkeypatch)
    go, state = by_hand(workplace)
    state = skip(go(state, 0))
    state = go(go(state, 2), 3)
    at_eight = state
    state = go(state, 4)
    for _ in range(5, 8):
        state = skip(state)
    state = go_on_from(at_eight, state)
    for n in range(8, 12):
        state = go(state, n)
    alike(saved[-1], state)
    # Those at updates 4 (nothing could be applied), 12 and 16 were due, and left out.
    assert [int(state.updates) for state in saved] == [8, 20, 24]

    first, *_ = skipped = skipped_batches(run.store)
    assert [batch.batch for batch in skipped] == [1, 5, 6, 7]
    assert (first.first_row, first.last_row) == (4, 7)
    assert [update.update for update in first.updates] == [3, 4]
    log = (run.path / "logs" / "rank-0.jsonl").read_text()
    assert "`tvq inspect --run many --step 1` shows its documents" in log
    assert run_cli(["inspect", "--run", run.location, "--step", "1", "--json"]) == 0
    shown = json.loads(capsys.readouterr().out)
    assert first.documents == list(
        dict.fromkeys(document["id"] for row in shown["rows"] for document in row["documents"])
    )
    assert [update["update"] for update in shown["skipped"]] == [3, 4]
    assert run_cli(["inspect", "--run", run.location, "--step", "1"]) == 0
    assert "update 3 was skipped: loss nan nats per token" in capsys.readouterr().out

    points = [
        point for name in segments(run.metrics) for point in read_segment(run.metrics, name).points
    ]
    steps = [p.step for p in points if "train/loss_nats_per_token" in p.values]
    assert steps == list(range(1, 25))  # no step twice, though the state went back
    name = "train/skipped_updates"
    assert [p.values[name] for p in points if p.step == 24 and name in p.values] == [8]
    assert any("goodput/step_seconds" in p.values for p in points)
    assert any(p.values.get("memory/host_rss_bytes", 0) > 10e6 for p in points)


@pytest.mark.parametrize(
    ("first", "words"),
    [
        (5, "checkpoint at update 8 2 times"),
        pytest.param(0, "there is no checkpoint", marks=pytest.mark.slow),
    ],
)
def test_a_training_that_cannot_go_on_ends_and_names_the_batch(
    workplace: Path, monkeypatch, first: int, words: str
):
    damaged = set(range(first, 100))
    with pytest.raises(UserError, match=words) as caught:
        trained(
            workplace, f"from-{first}", damaged, monkeypatch,
            "training.steps=48", "training.evaluate_every=48", "training.max_fallbacks=2",
        )  # fmt: skip
    assert caught.value.code == ExitCode.UNSTABLE
    assert "tvq inspect --run" in str(caught.value)
