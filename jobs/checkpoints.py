"""Saves a training's state with Orbax, in the background, and restores it on any mesh, verified.

Orbax restores a flipped byte silently (12 of 12 tried), so the manifest holds a sum of every
leaf's bits, which does not depend on the mesh, and the length of every file.
"""

import contextlib
import logging
import threading
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import orbax.checkpoint as ocp
from jax.experimental import multihost_utils

from jobs.checkpoint_manifest import (
    FORMAT_VERSION,
    CheckpointManifest,
    DamagedCheckpointError,
    checkpoint_folder,
    complete_checkpoints,
    file_lengths,
    remove,
    write,
)
from jobs.errors import UserError
from jobs.run_directory import Fence, RunDirectory

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


_jitted_leaf_sums = jax.jit(leaf_sums)


class CheckpointWriter:
    """Saves a training's state without stopping it.

    Policy: `save` returns once the state is copied to host memory; a thread then waits for
    Orbax's commit on all hosts, and on rank 0 checks the fence, writes the manifest and removes
    all but the `keep` newest complete checkpoints. A second `save` first waits for the one before
    it. A failure of the background part is raised by the next `save` or by `close`.
    """

    def __init__(
        self,
        run: RunDirectory,
        fence: Fence,
        *,
        keep: int,
        recipe: str,
        fingerprints: dict[str, str],
    ):
        self._run = run
        self._fence = fence
        self._keep = keep
        self._recipe = recipe
        self._fingerprints = fingerprints
        self._orbax = ocp.AsyncCheckpointer(ocp.StandardCheckpointHandler())
        self._thread: threading.Thread | None = None
        self._failure: BaseException | None = None

    def save(self, state: Any, *, update: int, next_batch: int, tokens: int) -> None:
        """Begins to save `state` (sharded arrays); called by every host at the same update."""
        self.wait()
        if jax.process_index() == 0:
            self._fence.check()
            # What a killed or damaged attempt left: an old manifest must not meet new arrays.
            remove(self._run, update)
        folder = checkpoint_folder(self._run, update)
        sums = _jitted_leaf_sums(state)
        self._orbax.save(folder / "state", args=ocp.args.StandardSave(state), force=True)
        self._thread = threading.Thread(
            target=self._finish,
            args=(folder, _signatures(state), sums, (update, next_batch, tokens)),
            name="checkpoint",
        )
        self._thread.start()

    def wait(self) -> None:
        """Until the last save is committed; raises what went wrong in it."""
        if self._thread:
            self._thread.join()
            self._thread = None
        if self._failure:
            raise self._failure

    def close(self) -> None:
        """Waits for the last save and ends Orbax's threads."""
        try:
            self.wait()
        finally:
            self._orbax.close()

    def _finish(
        self,
        folder: Path,
        leaves: dict[str, str],
        sums: dict[str, jax.Array],
        position: tuple[int, int, int],
    ) -> None:
        update, next_batch, tokens = position
        try:
            self._orbax.wait_until_finished()
            if jax.process_index() != 0:
                return
            manifest = CheckpointManifest(
                format_version=FORMAT_VERSION,
                update=update,
                next_batch=next_batch,
                tokens=tokens,
                recipe=self._recipe,
                fingerprints=self._fingerprints,
                leaves=leaves,
                sums={name: int(value) for name, value in jax.device_get(sums).items()},
                files=file_lengths(folder / "state"),
            )
            self._fence.check()
            write(self._run, manifest)
            for old in complete_checkpoints(self._run)[: -self._keep]:
                remove(self._run, old.update)
        except BaseException as error:
            self._failure = error


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
        folder = checkpoint_folder(run, update)
        try:
            with _damage_of_any_host(folder):
                if update not in by_update:
                    raise DamagedCheckpointError(
                        f"{folder}: rank 0 sees a manifest, this host none"
                    )
            manifest = by_update[update]
            return restore(run, manifest, abstract_state), manifest
        except DamagedCheckpointError as damage:
            problems.append(str(damage))
            log.error("checkpoint is damaged and skipped: %s", damage)
    if not problems and any(run.checkpoints.glob("*/manifest.json")):
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
        UserError: the leaves are those of another model.
    """
    folder = checkpoint_folder(run, manifest.update)
    with _damage_of_any_host(folder):
        _check_lengths(folder / "state", manifest)
    expected = _signatures(abstract_state)
    for name in sorted(expected.keys() | manifest.leaves.keys()):
        if expected.get(name) != manifest.leaves.get(name):
            raise UserError(
                f"{folder}: holds another model than the recipe describes: {name} is"
                f" {manifest.leaves.get(name, 'absent')}, expected {expected.get(name, 'absent')};"
                " use the recipe that the run was trained with"
            )
    with _damage_of_any_host(folder):
        state = _read_state(folder / "state", abstract_state)
    for name, value in jax.device_get(_jitted_leaf_sums(state)).items():
        if int(value) != manifest.sums[name]:
            raise DamagedCheckpointError(
                f"{folder}: leaf {name} does not have the sum in the manifest"
            )
    return state


@contextlib.contextmanager
def _damage_of_any_host(folder: Path) -> Iterator[None]:
    """Raises the damage that the body finds on one host on all of them, at its end.

    Else who found it would go on to the checkpoint before while the others wait for it in the next
    collective. For the same reason the body must not contain one.
    """
    damage = None
    try:
        yield
    except DamagedCheckpointError as error:
        damage = error
    if jax.process_count() > 1:
        damaged = multihost_utils.process_allgather(np.int32(damage is not None))
        if damaged.any() and damage is None:
            hosts = ", ".join(map(str, np.flatnonzero(damaged)))
            damage = DamagedCheckpointError(
                f"{folder}: damaged for host {hosts}, whose log says why"
            )
    if damage:
        raise damage


def _check_lengths(folder: Path, manifest: CheckpointManifest) -> None:
    try:
        lengths = file_lengths(folder)
    except OSError as error:
        raise DamagedCheckpointError(f"{folder}: cannot be listed: {error!r}") from None
    for name, length in manifest.files.items():
        if lengths.get(name) != length:
            found = f"has {lengths[name]} bytes" if name in lengths else "is missing"
            raise DamagedCheckpointError(f"{folder / name} {found}, expected {length} bytes")


def _read_state(folder: Path, abstract_state: Any) -> Any:
    # `restore` ends with a barrier of the active processes, at which all others would wait for the
    # one that cannot read: each is on its own, and they meet afterwards.
    rank = jax.process_index()
    alone = ocp.options.MultiprocessingOptions(primary_host=rank, active_processes={rank})
    orbax = ocp.Checkpointer(ocp.StandardCheckpointHandler(), multiprocessing_options=alone)
    try:
        return orbax.restore(folder, args=ocp.args.StandardRestore(abstract_state))
    except Exception as error:  # Orbax, tensorstore and zstd each raise their own
        raise DamagedCheckpointError(f"{folder}: cannot be read: {error!r:.300}") from error
    finally:
        orbax.close()


def _signatures(state: Any) -> dict[str, str]:
    return {
        jax.tree_util.keystr(path): f"{leaf.dtype}[{','.join(map(str, leaf.shape))}]"
        for path, leaf in jax.tree_util.tree_leaves_with_path(state)
    }
