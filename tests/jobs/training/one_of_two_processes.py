"""A program: one of two processes, of two devices each, that form one mesh.

    python one_of_two_processes.py PORT RANK RUN_FOLDER CORPUS RECIPE

Prints one JSON object of what it saw; `test_several_devices.py` starts both and compares. Saves
and restores a checkpoint on the way, as the training loop does on several hosts; then restores
again while rank 1 alone sees the newest checkpoint damaged. Tells the load of two machines, then of
one that both are on, and writes samples.
"""

import contextlib
import json
import shutil
import sys
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jax.sharding import NamedSharding, PartitionSpec

from jobs import recipe as recipes
from jobs.checkpoints.restore import restore_newest
from jobs.checkpoints.writer import CheckpointWriter
from jobs.recipe import CheckpointConfig
from jobs.runs.lease import Fence
from jobs.runs.run_directory import RunDirectory
from jobs.training.global_batch import GlobalBatch
from jobs.training.host_load import HostLoad
from jobs.training.programs import Programs
from jobs.training.samples import Samples
from model.sharding import batch_sharding, make_mesh
from pipeline.loader import Batch, training_batches
from pipeline.mixture import Mixture

MESHES = {"data": (4, 1, 1), "fsdp": (1, 4, 1), "mixed": (2, 1, 2), "tensor": (1, 1, 4)}
BATCH_SIZE = 6


def batches(rank: int, corpus: Path) -> dict[str, Any]:
    seen = {}
    for name, (data, fsdp, tensor) in MESHES.items():
        mesh = make_mesh(jax.devices(), data=data, fsdp=fsdp, tensor=tensor)
        layout = GlobalBatch(batch_sharding(mesh), BATCH_SIZE)
        # Row r holds r + 1 in every column; a padding row is empty, as the loader's.
        real = layout.rows < BATCH_SIZE
        column = np.where(real, layout.rows + 1, 0).astype(np.int32)[:, None]
        local = Batch(
            inputs=column,
            targets=column,
            documents=column,
            loss_mask=real[:, None],
            rows=np.where(real, layout.rows, -1),
        )
        whole = NamedSharding(mesh, PartitionSpec())
        gather = jax.jit(lambda array: array, out_shardings=whole)
        placed = layout.place(local)
        with training_batches(corpus, sequence_length=32, batch_size=BATCH_SIZE, seed=0,
                              rows=layout.rows) as stream:  # fmt: skip
            loaded = layout.place(next(stream))
        raised = jax.jit(jnp.max, out_shardings=whole)(layout.flag(rank == 1))
        seen[name] = {
            "asked": layout.rows.tolist(),
            "targets": np.asarray(gather(placed.targets))[:, 0].tolist(),
            "mask": np.asarray(gather(placed.loss_mask))[:, 0].tolist(),
            "flag": int(raised),
            "loaded": np.asarray(gather(loaded.targets))[:BATCH_SIZE].tolist(),
        }
    return seen


def checkpoint(run: RunDirectory) -> dict[str, Any]:
    mesh = make_mesh(jax.devices(), fsdp=4)
    sharding = NamedSharding(mesh, PartitionSpec("fsdp"))
    values = np.arange(40, dtype=np.float32).reshape(8, 5) ** 2
    state = {"a": jax.make_array_from_callback(values.shape, sharding, values.__getitem__)}
    fence = Fence(run, "the test")
    if jax.process_index() == 0:
        fence.raise_over_others()
    writer = CheckpointWriter(run, fence, keep=CheckpointConfig(), recipe="", fingerprints={})
    with contextlib.closing(writer):
        for update in (2, 4, 6):
            writer.save(state, update=update, next_batch=update, tokens=0, last=True)
    abstract = {"a": jax.ShapeDtypeStruct(values.shape, jnp.float32, sharding=sharding)}

    def restored(run: RunDirectory) -> dict[str, Any]:
        newest = restore_newest(run, abstract)
        assert newest is not None
        found, manifest = newest
        same = all(
            np.array_equal(np.asarray(shard.data), values[shard.index])
            for shard in found["a"].addressable_shards
        )
        return {"update": manifest.update, "same": same, "sums": manifest.sums}

    return restored(run) | {
        "damaged": {harm: restored(as_seen_by_this_host(run, harm)) for harm in HARMS}
    }


def as_seen_by_this_host(run: RunDirectory, harm: str) -> RunDirectory:
    """The run; for rank 1 a copy of it whose newest checkpoint is harmed."""
    if jax.process_index() == 0:
        return run
    copy = RunDirectory(run.path.with_name(f"seen by rank 1, {harm}"))
    shutil.copytree(run.path, copy.path)
    HARMS[harm](copy.path / "checkpoints" / "00000006")
    return copy


def truncate(folder: Path) -> None:
    [path] = folder.glob("state-*/manifest.ocdbt")
    path.write_bytes(path.read_bytes()[:-1])


def overwrite(folder: Path) -> None:
    [path] = folder.glob("state-*/manifest.ocdbt")
    path.write_bytes(bytes(path.stat().st_size))


def unlist(folder: Path) -> None:
    (folder / "manifest.json").unlink()


HARMS = {"length": truncate, "content": overwrite, "listing": unlist}
"""What a host finds out by the length check, as it reads, and before both."""


def loads(rank: int, folder: Path, machines: tuple[str, str]) -> list[dict[str, float]]:
    """What this rank is told twice; its machine has 100 MB, of which rank 1 uses more."""
    proc = folder / f"proc-{machines[rank]}-{rank}"
    (proc / "sys/kernel/random").mkdir(parents=True)
    (proc / "sys/kernel/random/boot_id").write_text(machines[rank])
    (proc / "meminfo").write_text(f"MemTotal: 1000 kB\nMemAvailable: {750 - 500 * rank} kB\n")
    (proc / "stat").write_text("cpu 0 0 0 0 0 0 0 0\n")
    load = HostLoad(proc)
    (proc / "stat").write_text(f"cpu {20 + 60 * rank} 0 0 {80 - 60 * rank} 0 0 0 0\n")
    with jax.transfer_guard("disallow"):  # as in the loop
        return [load.values(), load.values()]


def samples(run: RunDirectory, corpus: Path, file: Path) -> dict[str, Any]:
    """Whether all parameters were at one place when a text was written, and the text."""
    fields = ("training.samples=3", "cluster.fsdp=2", "cluster.tensor=2")
    recipe = recipes.resolve(recipes.load(str(file), (f"data.corpus={corpus}", *fields)))
    mesh = make_mesh(jax.devices(), data=1, fsdp=2, tensor=2)
    programs = Programs(recipe, mesh)
    state = programs.create()
    kept = Samples(run, recipe, Mixture.load(recipe.data.corpora), mesh, programs.write)
    with contextlib.closing(kept), jax.transfer_guard("disallow"):
        assert not kept.due(7)
        assert kept.due(20)
        kept.write(state, 20)
    return {"split": not all(leaf.is_fully_replicated for leaf in jax.tree.leaves(state.params))}


def main() -> None:
    port, rank = sys.argv[1], int(sys.argv[2])
    folder, corpus, recipe = (Path(argument) for argument in sys.argv[3:])
    jax.config.update("jax_platforms", "cpu")
    jax.config.update("jax_num_cpu_devices", 2)
    jax.config.update("jax_cpu_collectives_implementation", "gloo")
    jax.distributed.initialize(f"127.0.0.1:{port}", 2, rank, initialization_timeout=120)
    run = RunDirectory(folder)
    own = folder.parent / f"of-rank-{rank}"  # whoever writes is seen
    seen = {
        "batches": batches(rank, corpus),
        "checkpoint": checkpoint(run),
        "loads": {
            "two machines": loads(rank, own, ("one", "other")),
            "one machine": loads(rank, own, ("same", "same")),
        },
        "samples": samples(RunDirectory(own), corpus, recipe),
    }
    print(json.dumps(seen), flush=True)
    jax.distributed.shutdown()


if __name__ == "__main__":
    main()
