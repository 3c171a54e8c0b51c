"""Tests for a process of four devices; `test_several_devices.py` runs them in one."""

import contextlib
import functools
import itertools
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from jobs.checkpoints.manifest import complete_checkpoints
from jobs.checkpoints.restore import leaf_sums, restore_newest
from jobs.checkpoints.writer import CheckpointWriter
from jobs.recipe import CheckpointConfig
from jobs.runs.lease import Fence, Lease
from jobs.runs.run_directory import RunDirectory
from jobs.training.global_batch import GlobalBatch
from model.config import PRESETS, OptimizerConfig
from model.sharding import abstract_state, batch_sharding, make_mesh
from model.training import initial_state
from pipeline.loader import Batch, training_batches
from tests.micro import write_micro

MESHES = {
    # name: (devices, data, fsdp, tensor)
    "one": (1, 1, 1, 1),
    "two-data": (2, 2, 1, 1),
    "two-fsdp": (2, 1, 2, 1),
    "two-tensor": (2, 1, 1, 2),
    "four-data": (4, 4, 1, 1),
    "four-fsdp": (4, 1, 4, 1),
    "four-mixed": (4, 1, 2, 2),
    "four-data-tensor": (4, 2, 1, 2),
}


def mesh_of(name: str) -> jax.sharding.Mesh:
    devices, data, fsdp, tensor = MESHES[name]
    return make_mesh(jax.devices()[:devices], data=data, fsdp=fsdp, tensor=tensor)


# ---- Checkpoints ---------------------------------------------------------------------------------


MODEL = PRESETS["tiny"]


def abstract_on(name: str, state: Any) -> Any:
    return abstract_state(mesh_of(name), MODEL, lambda: state)


@pytest.fixture(scope="module", params=["adamw", "lion", "adafactor"])
def state(request: pytest.FixtureRequest) -> Any:
    """The tiny model's train state with a distinct number in every place."""
    optimizer = OptimizerConfig(name=request.param, schedule_steps=9)
    shapes = jax.eval_shape(lambda: initial_state(MODEL, optimizer, 0))
    random = np.random.default_rng(0)
    return jax.tree.map(
        lambda leaf: random.integers(1, 2**31, leaf.shape).astype(leaf.dtype), shapes
    )


def test_there_are_four_devices():
    assert len(jax.devices()) == 4


@pytest.mark.parametrize("saved_on", ["two-data", "four-mixed"])
def test_a_checkpoint_restores_on_every_mesh(state: Any, saved_on: str, tmp_path: Path):
    run = RunDirectory.at(tmp_path, "first")
    run.claim("identity", {}, "")
    placed = jax.tree.map(
        jax.device_put, state, jax.tree.map(lambda a: a.sharding, abstract_on(saved_on, state))
    )
    with Lease(run).held() as lease:
        fence = Fence(run, lease.owner)
        fence.raise_over_others()
        writer = CheckpointWriter(
            run, fence, keep=CheckpointConfig(keep=1), recipe="", fingerprints={}
        )
        with contextlib.closing(writer):
            writer.save(placed, update=2, next_batch=1, tokens=3)
    [manifest] = complete_checkpoints(run)
    # The sums do not know the mesh: those of the unsharded arrays on one device are the oracle.
    alone = jax.jit(leaf_sums)(jax.tree.map(jnp.asarray, state))
    assert manifest.sums == {name: int(value) for name, value in alone.items()}
    for name in ("one", "two-tensor", "four-fsdp", "four-mixed"):
        target = abstract_on(name, state)
        restored = restore_newest(run, target)
        assert restored is not None
        found = restored[0]
        for (path, leaf), wanted, original in zip(
            jax.tree_util.tree_leaves_with_path(found),
            jax.tree.leaves(target),
            jax.tree.leaves(state),
            strict=True,
        ):
            assert leaf.sharding.is_equivalent_to(wanted.sharding, leaf.ndim), (name, path)
            assert leaf.dtype == original.dtype, (name, path)
            assert np.asarray(leaf).tobytes() == original.tobytes(), (name, path)


def test_a_mesh_splits_the_state(state: Any):
    # Else the test above proves nothing.
    for name in ("two-fsdp", "two-tensor", "four-fsdp", "four-mixed"):
        leaves = jax.tree.leaves(abstract_on(name, state))
        assert any(not leaf.sharding.is_fully_replicated for leaf in leaves), name


# ---- Batches -------------------------------------------------------------------------------------

T = 6


@pytest.fixture(scope="module")
def corpus(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return write_micro(tmp_path_factory.mktemp("corpus"))[0]


def global_table(batch_size: int, padded: int) -> Batch:
    """A padded batch in which every token tells its row and column; padding as the loader's."""
    real = np.arange(padded) < batch_size
    grid = np.arange(padded * T, dtype=np.int32).reshape(padded, T) + 1000
    return Batch(
        inputs=np.where(real[:, None], grid, 0).astype(np.int32),
        targets=np.where(real[:, None], grid + 1, 0).astype(np.int32),
        documents=np.where(real[:, None], grid % 7, 0).astype(np.int32),
        loss_mask=np.repeat(real[:, None], T, axis=1),
        rows=np.where(real, np.arange(padded) + 10, -1).astype(np.int64),
    )


@pytest.mark.parametrize(("name", "batch_size"), list(itertools.product(MESHES, (1, 4, 5))))
def test_every_row_lies_on_the_mesh_once(name: str, batch_size: int):
    devices, data, fsdp, tensor = MESHES[name]
    layout = GlobalBatch(batch_sharding(mesh_of(name)), batch_size)
    # The least multiple of the devices along the rows that holds the batch.
    padded = next(n for n in itertools.count(batch_size) if n % (data * fsdp) == 0)
    assert layout.padded_size == padded
    assert layout.rows.tolist() == list(range(padded))  # one host holds them all
    expected = global_table(batch_size, padded)
    placed = layout.place(Batch._make(array[layout.rows] for array in expected))
    for field in ("inputs", "targets", "documents", "loss_mask"):
        array = getattr(placed, field)
        assert array.dtype == getattr(expected, field).dtype
        np.testing.assert_array_equal(np.asarray(array), getattr(expected, field))
        # On the devices: each row on `tensor` of them, whole.
        held = [
            row
            for shard in array.addressable_shards
            for row in range(*shard.index[0].indices(padded))
            if shard.data.shape[1] == T
        ]
        assert sorted(held) == sorted(list(range(padded)) * tensor)
        assert len({shard.device for shard in array.addressable_shards}) == devices
    assert placed.rows.dtype == np.uint32
    assert np.asarray(placed.rows).tolist() == [
        row if row >= 0 else 2**32 - 1 for row in expected.rows.tolist()
    ]
    # A compiled reduction over the mesh counts each real target once.
    total = jax.jit(lambda b: (b.targets * b.loss_mask).sum())(placed)
    assert int(total) == int(expected.targets.sum())
    assert int(placed.loss_mask.sum()) == batch_size * T


@pytest.mark.parametrize("name", ["one", "two-tensor", "four-data", "four-mixed"])
def test_what_the_loader_gives_for_the_rows_is_the_batch_and_padding(name: str, corpus: Path):
    layout = GlobalBatch(batch_sharding(mesh_of(name)), 3)
    cut = functools.partial(training_batches, corpus, sequence_length=32, batch_size=3, seed=0)
    asked, whole = cut(rows=layout.rows), cut()
    with asked, whole:
        for _ in range(3):
            placed, expected = layout.place(next(asked)), next(whole)
            for field in ("inputs", "targets", "documents", "loss_mask"):
                array = np.asarray(getattr(placed, field))
                np.testing.assert_array_equal(array[:3], getattr(expected, field))
            assert not np.asarray(placed.loss_mask)[3:].any()
            assert np.asarray(placed.rows)[:3].tolist() == expected.rows.tolist()


@pytest.mark.parametrize("name", list(MESHES))
def test_the_flag_of_a_host_is_seen_by_all_devices(name: str):
    layout = GlobalBatch(batch_sharding(mesh_of(name)), 3)
    with jax.transfer_guard("disallow"):
        raised = [jax.device_get(jax.jit(jnp.max)(layout.flag(flag))) for flag in (False, True)]
    assert [int(flag) for flag in raised] == [0, 1]


def test_placing_is_the_one_transfer_that_the_guard_lets_through():
    layout = GlobalBatch(batch_sharding(mesh_of("four-data")), 4)
    batch = global_table(4, 4)
    with jax.transfer_guard("disallow"):
        layout.place(batch)
        with pytest.raises(Exception, match=r"[Dd]isallowed"):
            jnp.sin(batch.inputs)
