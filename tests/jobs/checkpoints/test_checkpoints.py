"""Checkpoints: what was saved is what is restored, by whoever holds the run and by nobody else."""

import contextlib
import time
from pathlib import Path
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from jobs.checkpoints.manifest import complete_checkpoints
from jobs.checkpoints.restore import restore_newest
from jobs.runs.lease import Fence, LeaseLostError
from jobs.runs.run_directory import RunDirectory
from model.config import PRESETS, OptimizerConfig
from model.training import TrainState, initial_state, train_step
from pipeline.loader import Batch
from tests.jobs.checkpoints.small_checkpoints import (
    abstract,
    arrays_folder,
    assert_same,
    checkpoint_folder,
    copied,
    save,
    small_state,
    writing,
)

pytestmark = pytest.mark.compiles


@pytest.fixture
def run(tmp_path: Path) -> RunDirectory:
    run = RunDirectory.at(tmp_path / "my runs", "first")
    run.claim("identity", {}, "")
    return run


class Training(NamedTuple):
    """The tiny model, and a step that donates its state."""

    initial: TrainState
    step: Any

    def batch(self, number: int) -> Batch:
        tokens = np.random.default_rng(number).integers(3, 259, (2, 33), np.int32)
        return Batch(
            inputs=tokens[:, :-1],
            targets=tokens[:, 1:],
            documents=np.ones((2, 32), np.int32),
            loss_mask=np.ones((2, 32), bool),
            rows=np.arange(2, dtype=np.uint32),  # pyright: ignore[reportArgumentType]
        )

    def trained(self, *batches: int) -> TrainState:
        state = jax.tree.map(jnp.array, self.initial)
        for number in batches:
            state, _ = self.step(state, self.batch(number))
        return state


@pytest.fixture(scope="module")
def tiny() -> Training:
    model, optimizer = PRESETS["tiny"], OptimizerConfig(schedule_steps=100)
    # Compiles in half the time; how fast a step is does not matter here.
    fast = {"xla_backend_optimization_level": 0, "xla_llvm_disable_expensive_passes": True}
    return Training(
        jax.jit(lambda: initial_state(model, optimizer, 3), compiler_options=fast)(),
        jax.jit(
            lambda state, batch: train_step(model, optimizer, 16, state, batch),
            donate_argnums=0,
            compiler_options=fast,
        ),
    )


def test_a_trained_state_comes_back_to_the_bit_and_goes_on_alike(tiny: Training, run: RunDirectory):
    state = tiny.trained(0, 1, 2)
    expected = copied(state)
    with writing(run) as writer:
        writer.save(state, update=6, next_batch=3, tokens=192)
        # The next steps donate the very buffers that are being saved.
        for number in range(3, 9):
            state, _ = tiny.step(state, tiny.batch(number))
        jax.block_until_ready(state)
    restored = restore_newest(run, abstract(tiny.initial))
    assert restored is not None
    state_again, manifest = restored
    assert_same(state_again, expected)
    assert int(state_again.updates) == manifest.update == 6
    assert int(state_again.batches) == manifest.next_batch == 3
    assert manifest.tokens == 192
    assert manifest.recipe == "# it\n"
    assert manifest.fingerprints == {"train": "a" * 64}
    assert manifest.leaves[".params['embedding']['table']"] == "float32[259,128]"
    assert manifest.leaves[".updates"] == "int32[]"
    assert len(manifest.leaves) == len(jax.tree.leaves(tiny.initial))
    for number in range(3, 9):
        state_again, _ = tiny.step(state_again, tiny.batch(number))
    assert_same(copied(state_again), copied(state))


def test_a_large_state_may_be_donated_while_it_is_written(run: RunDirectory):
    # 64 MB take longer to write than many steps.
    state = {"large": jnp.arange(2**24, dtype=jnp.float32)}
    expected = copied(state)
    step = jax.jit(lambda state: jax.tree.map(lambda leaf: leaf * 0, state), donate_argnums=0)
    with writing(run) as writer:
        writer.save(state, update=2, next_batch=1, tokens=1)
        for _ in range(10):
            state = step(state)
        jax.block_until_ready(state)
    restored = restore_newest(run, abstract(state))
    assert restored is not None
    assert_same(restored[0], expected)


def test_nothing_saved_is_nothing_restored(run: RunDirectory):
    assert complete_checkpoints(run) == []
    assert restore_newest(run, abstract(small_state())) is None


def test_the_newest_are_kept_and_the_newest_is_restored(run: RunDirectory):
    with writing(run, keep=2) as writer:
        for update in (2, 4, 6, 100):
            writer.save(
                small_state(update), update=update, next_batch=update // 2, tokens=0, last=True
            )
    assert [manifest.update for manifest in complete_checkpoints(run)] == [6, 100]
    assert sorted(path.name for path in (run.path / "checkpoints").iterdir()) == [
        "00000006",
        "00000100",
    ]
    restored = restore_newest(run, abstract(small_state()))
    assert restored is not None
    assert_same(restored[0], small_state(100))


def test_a_checkpoint_saved_anew_replaces_the_one_before(run: RunDirectory):
    save(run, small_state(1), 2)
    first = arrays_folder(run, 2)
    killed = checkpoint_folder(run, 2) / "state-0-1.orbax-checkpoint-tmp"
    killed.mkdir()
    (killed / "half").write_text("as a killed attempt leaves it")
    save(run, small_state(2), 2)
    restored = restore_newest(run, abstract(small_state()))
    assert restored is not None
    assert_same(restored[0], small_state(2))
    second = arrays_folder(run, 2)
    assert second != first
    names = {path.name for path in checkpoint_folder(run, 2).iterdir()}
    assert names == {second.name, "manifest.json"}


class FenceThatFalls(Fence):
    """A fence that is raised over by another group right before its check: the commit."""

    checks = 0

    def check(self, *, group: bool = True) -> None:
        self.checks += group
        if group and self.checks == 1:
            other = Fence(self._run, self._owner)
            other.raise_over_others()
        super().check(group=group)


def test_who_lost_the_run_while_saving_does_not_commit(run: RunDirectory):
    save(run, small_state(1), 2)
    fence = FenceThatFalls(run, "")
    with (
        pytest.raises(LeaseLostError, match="newer worker group"),
        writing(run, fence=fence) as writer,
    ):
        writer.save(small_state(2), update=4, next_batch=2, tokens=0)
    assert fence.checks == 1
    assert [manifest.update for manifest in complete_checkpoints(run)] == [2]
    assert arrays_folder(run, 2).is_dir()


def test_new_arrays_never_meet_an_old_manifest(run: RunDirectory):
    save(run, small_state(1), 2)
    fence = FenceThatFalls(run, "")
    with contextlib.suppress(LeaseLostError), writing(run, fence=fence) as writer:
        writer.save(small_state(2), update=2, next_batch=1, tokens=0)
    restored = restore_newest(run, abstract(small_state()))
    assert restored is not None
    assert_same(restored[0], small_state(1))
    # What was written in vain is gone, too.
    assert [*checkpoint_folder(run, 2).glob("state-*")] == [arrays_folder(run, 2)]


def test_who_lost_the_run_before_saving_changes_nothing(run: RunDirectory):
    save(run, small_state(1), 2)
    with writing(run) as writer:
        (run.path / "lease.json").write_text('{"owner": "another"}')
        with pytest.raises(LeaseLostError, match="another driver"):
            writer.save(small_state(2), update=2, next_batch=1, tokens=0, last=True)
    restored = restore_newest(run, abstract(small_state()))
    assert restored is not None
    assert_same(restored[0], small_state(1))


def test_a_failure_in_the_background_is_raised_by_the_next_save(run: RunDirectory):
    with contextlib.suppress(LeaseLostError), writing(run, fence=FenceThatFalls(run, "")) as writer:
        writer.save(small_state(), update=2, next_batch=1, tokens=0)
        while writer._lost is None:
            time.sleep(0.01)
        with pytest.raises(LeaseLostError):
            writer.save(small_state(), update=4, next_batch=2, tokens=0)
    assert not checkpoint_folder(run, 4).exists()
    assert complete_checkpoints(run) == []
