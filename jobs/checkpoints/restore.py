"""Restores a training's state on any mesh, verified.

Orbax restores a flipped byte silently (12 of 12 tried), so the manifest holds a sum of every
leaf's bits, which does not depend on the mesh and sees what happens on the way to the devices, and
length and MD5 of every file, which also see what changed no leaf (138 of 216 flipped bits: Orbax
keeps what it does not read).
"""

import contextlib
import logging
from collections.abc import Iterator
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import orbax.checkpoint as ocp
from jax.experimental import multihost_utils

from jobs.checkpoints.manifest import (
    CheckpointManifest,
    DamagedCheckpointError,
    arrays_store,
    checkpoint_store,
    complete_checkpoints,
    file_lengths,
    readable_checkpoints,
)
from jobs.checkpoints.store_faults import may_pass, of_the_store
from jobs.errors import UserError
from jobs.recipe import from_yaml
from jobs.runs.lease import LeaseLostError
from jobs.runs.run_directory import RunDirectory
from model.sharding import abstract_state, make_mesh
from model.training import initial_state
from pipeline.errors import CorpusError, PassingFaultError
from pipeline.storage import Store, is_url

log = logging.getLogger("tvq.checkpoints")


def leaf_sums(state: Any) -> dict[str, jax.Array]:
    """A uint32 sum over every leaf's (bits, index), the same on every mesh.

    Each 32-bit word is mixed with its index by a bijection, so that any change of one word, and
    with near certainty any exchange of words, changes the sum. Sums of integers do not depend on
    the order, hence not on the sharding.
    """
    paths = jax.tree_util.tree_leaves_with_path(state)
    return {jax.tree_util.keystr(path): _mixed_sum(leaf) for path, leaf in paths}


def _mixed_sum(leaf: jax.Array) -> jax.Array:
    if leaf.dtype == jnp.bool_:
        leaf = leaf.astype(jnp.uint8)
    width = min(leaf.dtype.itemsize * 8, 32)
    words = jax.lax.bitcast_convert_type(leaf, jnp.dtype(f"uint{width}")).astype(jnp.uint32)
    index = jnp.zeros(words.shape, jnp.uint32)
    stride = 1
    for axis in reversed(range(words.ndim)):
        index += jax.lax.broadcasted_iota(jnp.uint32, words.shape, axis) * jnp.uint32(
            stride & 0xFFFFFFFF
        )
        stride *= words.shape[axis]
    mixed = words ^ (index * jnp.uint32(0x9E3779B9))
    mixed = (mixed ^ (mixed >> 16)) * jnp.uint32(0x85EBCA6B)
    mixed = (mixed ^ (mixed >> 13)) * jnp.uint32(0xC2B2AE35)
    return jnp.sum(mixed ^ (mixed >> 16), dtype=jnp.uint32)


jitted_leaf_sums = jax.jit(leaf_sums)


def restore_newest(run: RunDirectory, abstract_state: Any) -> tuple[Any, CheckpointManifest] | None:
    """The newest checkpoint that is intact, on the mesh of `abstract_state`'s shardings.

    A damaged one is named in the log and skipped for the one before. None where there is no
    checkpoint at all. All hosts try those that rank 0 sees, and skip one together.

    Raises:
        UserError: there are checkpoints and all are damaged.
    """
    candidates = complete_checkpoints(run)
    updates = np.array([m.update for m in candidates[-8:]] + [-1] * (8 - len(candidates)), np.int32)
    if jax.process_count() > 1:
        updates = multihost_utils.broadcast_one_to_all(updates)
        candidates = complete_checkpoints(run)  # after rank 0 looked
    by_update = {manifest.update: manifest for manifest in candidates}
    problems = []
    for update in reversed([int(update) for update in updates if update >= 0]):
        folder = checkpoint_store(run, update).location
        try:
            with failing_together(folder):
                if update not in by_update:
                    raise DamagedCheckpointError(
                        f"{folder}: rank 0 sees a manifest, this host none"
                    )
            manifest = by_update[update]
            return restore(run, manifest, abstract_state), manifest
        except DamagedCheckpointError as damage:
            problems.append(str(damage))
            log.error("checkpoint is damaged and skipped: %s", damage)
    if not problems and readable_checkpoints(run)[1]:
        problems = ["their manifests are damaged; the log names them"]
    if problems:
        raise UserError(f"no checkpoint of run {run.name} is intact: {'; '.join(problems)}")
    return None


def restore(run: RunDirectory, manifest: CheckpointManifest, abstract_state: Any) -> Any:
    """The state of one checkpoint, its lengths and leaf sums verified; called by every host.

    Args:
        run: the run that it belongs to.
        manifest: which one.
        abstract_state: the tree of `jax.ShapeDtypeStruct`s with shardings to restore onto.

    Raises:
        DamagedCheckpointError: a file or a leaf is not what the manifest says, on any host.
        CorpusError: the store does not let it be read, on any host.
        UserError: the leaves are those of another model.
    """
    store = arrays_store(run, manifest)
    folder = checkpoint_store(run, manifest.update).location
    with failing_together(folder):
        _check_files(store, manifest)
    expected = signatures(abstract_state)
    for name in sorted(expected.keys() | manifest.leaves.keys()):
        if expected.get(name) != manifest.leaves.get(name):
            raise UserError(
                f"{folder}: holds another model than the recipe describes: {name} is"
                f" {manifest.leaves.get(name, 'absent')}, expected {expected.get(name, 'absent')};"
                " use the recipe that the run was trained with"
            )
    with failing_together(folder):
        state = _read_state(store.location, abstract_state)
    for name, value in jax.device_get(jitted_leaf_sums(state)).items():
        if int(value) != manifest.sums[name]:
            raise DamagedCheckpointError(
                f"{folder}: leaf {name} does not have the sum in the manifest"
            )
    return state


def restore_by_recipe(
    run: RunDirectory, manifest: CheckpointManifest, mesh: jax.sharding.Mesh | None = None
) -> Any:
    """The state of one checkpoint, by the recipe that it holds, not by one that is asked for.

    Args:
        run, manifest: which one.
        mesh: to restore onto; None: this process's first device.

    Raises:
        DamagedCheckpointError: a file or a leaf is not what the manifest says.
    """
    recipe = from_yaml(manifest.recipe, f"the recipe of checkpoint {manifest.update}")
    abstract = abstract_state(
        mesh or make_mesh(jax.devices()[:1]),
        recipe.model,
        lambda: initial_state(recipe.model, recipe.optimizer, 0),
    )
    return restore(run, manifest, abstract)


@contextlib.contextmanager
def failing_together(where: str) -> Iterator[None]:
    """Raises what the body raises on one host on all of them, at its end.

    Else who found damage would go on to the checkpoint before while the others wait for it in the
    next collective. For the same reason the body must not contain one.
    """
    raised: Exception | None = None
    try:
        yield
    except _TOGETHER as error:
        raised = error
    if jax.process_count() > 1:
        kind = next((n for n, one in enumerate(_TOGETHER, 1) if isinstance(raised, one)), 0)
        kinds = multihost_utils.process_allgather(np.int32(kind))
        if kinds.max() > kind:  # all go on alike: the gravest kind stands for all hosts
            hosts = ", ".join(map(str, np.flatnonzero(kinds == kinds.max())))
            raised = _TOGETHER[kinds.max() - 1](f"{where}: failed on host {hosts}: see its log")
    if raised:
        raise raised


_TOGETHER = (DamagedCheckpointError, CorpusError, LeaseLostError, UserError)
"""In this order a later one outweighs."""


def _check_files(store: Store, manifest: CheckpointManifest) -> None:
    """Raises DamagedCheckpointError if a file is not the one that was saved."""
    lengths = file_lengths(store)
    for name, length in manifest.files.items():
        if lengths.get(name) != length:
            found = f"has {lengths[name]} bytes" if name in lengths else "is missing"
            raise DamagedCheckpointError(
                f"{store.location}/{name} {found}, expected {length} bytes"
            )
    if jax.process_index() != 0:  # one host reads it all: on a file server each would
        return
    for name, digest in manifest.digests.items():
        if digest and store.md5(name) != digest:
            raise DamagedCheckpointError(
                f"{store.location}/{name} is not what was saved: it has another MD5"
            )


def _read_state(folder: str, abstract_state: Any) -> Any:
    # `restore` ends with a barrier of the active processes, at which all others would wait for the
    # one that cannot read: each is on its own, and they meet afterwards.
    rank = jax.process_index()
    alone = ocp.options.MultiprocessingOptions(primary_host=rank, active_processes={rank})
    orbax = ocp.Checkpointer(ocp.StandardCheckpointHandler(), multiprocessing_options=alone)
    try:
        return orbax.restore(folder, args=ocp.args.StandardRestore(abstract_state))
    except Exception as error:  # Orbax, tensorstore and zstd each raise their own
        said = " ".join(f"{error!r}".split())[:300]
        if is_url(folder) and of_the_store(error):
            # No damage: to go back to the checkpoint before would lose work for an outage.
            kind = PassingFaultError if may_pass(error) else CorpusError
            raise kind(f"{folder}: the store does not let it be read: {said}") from error
        raise DamagedCheckpointError(f"{folder}: cannot be read: {said}") from error
    finally:
        orbax.close()


def signatures(state: Any) -> dict[str, str]:
    return {
        jax.tree_util.keystr(path): f"{leaf.dtype}[{','.join(map(str, leaf.shape))}]"
        for path, leaf in jax.tree_util.tree_leaves_with_path(state)
    }
