"""Checkpoints of a small state, saved as a driver saves them, and comparing what comes back."""

import contextlib
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jax.sharding import SingleDeviceSharding

from jobs.checkpoints.manifest import arrays_store, complete_checkpoints
from jobs.checkpoints.writer import CheckpointWriter
from jobs.recipe import CheckpointConfig
from jobs.runs.lease import Fence, Lease
from jobs.runs.run_directory import RunDirectory


def checkpoint_folder(run: RunDirectory, update: int) -> Path:
    return run.path / "checkpoints" / f"{update:08d}"


def arrays_folder(run: RunDirectory, update: int) -> Path:
    """Where the arrays of the complete checkpoint lie."""
    [manifest] = [found for found in complete_checkpoints(run) if found.update == update]
    return Path(arrays_store(run, manifest).location)


@contextlib.contextmanager
def writing(run: RunDirectory, keep: int = 2, fence: Fence | None = None):
    """A writer of a driver that holds the lease."""
    with Lease(run).held() as lease:
        fence = fence or Fence(run, lease.owner)
        fence._owner = lease.owner
        fence.raise_over_others()
        fingerprints = {"train": "a" * 64}
        writer = CheckpointWriter(
            run, fence, keep=CheckpointConfig(keep=keep), recipe="# it\n", fingerprints=fingerprints
        )
        with contextlib.closing(writer):
            yield writer


def save(run: RunDirectory, state: Any, *updates: int, keep: int = 2) -> None:
    with writing(run, keep) as writer:
        for update in updates:
            writer.save(
                state, update=update, next_batch=update // 2, tokens=update * 100, last=True
            )


def abstract(state: Any) -> Any:
    sharding = SingleDeviceSharding(jax.devices()[0])
    return jax.tree.map(
        lambda leaf: jax.ShapeDtypeStruct(leaf.shape, leaf.dtype, sharding=sharding), state
    )


def copied(state: Any) -> Any:
    """Host copies that no donation can reach."""
    return jax.tree.map(lambda leaf: np.array(leaf, copy=True), state)


def assert_same(found: Any, expected: Any) -> None:
    """Bitwise, dtypes and structure included."""
    assert jax.tree.structure(found) == jax.tree.structure(expected)
    for path, leaf in jax.tree_util.tree_leaves_with_path(expected):
        other = dict(jax.tree_util.tree_leaves_with_path(found))[path]
        assert (other.dtype, other.shape) == (leaf.dtype, leaf.shape), path
        assert np.asarray(other).tobytes() == np.asarray(leaf).tobytes(), path


def small_state(seed: int = 0) -> dict[str, Any]:
    random = np.random.default_rng(seed)
    return {
        "weights": jnp.asarray(random.normal(size=(40, 50)), jnp.float32),
        "inner": {
            "half": jnp.asarray(random.normal(size=(30, 7)), jnp.bfloat16),
            "count": jnp.int32(7),
            "key": jnp.asarray([1, 2**31 + 5], jnp.uint32),
            "flags": jnp.asarray([True, False, True]),
        },
    }
