"""The training loop: one function, read from top to bottom in the order in which it runs.

It knows nothing of Ray: `train` is a plain call, made once in every process of the mesh.
"""

import contextlib
import os
from pathlib import Path

import jax

from jobs import run_log
from jobs.checkpoints import CheckpointWriter, restore_newest
from jobs.global_batch import GlobalBatch
from jobs.host_memory import keep_freed_memory
from jobs.loop_contract import LoopSettings, Outcome
from jobs.metric_spool import MetricSpool
from jobs.recipe import to_yaml
from jobs.recorder import Recorder
from jobs.run_directory import Fence, RunDirectory
from jobs.units import bits_per_byte
from model.sharding import abstract_state, batch_sharding, make_mesh
from model.training import evaluation_step, initial_state, kmeans_codebooks, train_step
from pipeline.loader import evaluation_batches, training_batches
from pipeline.manifest import Manifest


def train(settings: LoopSettings) -> Outcome:
    """Trains from the newest checkpoint (or from the start) to the recipe's last update."""
    recipe, run = settings.recipe, RunDirectory(settings.run)
    corpus = Path(recipe.data.corpus or "")
    manifest = Manifest.load(corpus)
    primary = jax.process_index() == 0
    run_log.open_log(run.logs, f"rank-{jax.process_index()}")
    keep_freed_memory()
    run_log.event("group start", rank=jax.process_index(), worker_pid=os.getpid())

    # ---- Mesh: which device does what -----------------------------------------------------------
    axes = recipe.cluster
    mesh = make_mesh(jax.devices(), data=axes.data, fsdp=axes.fsdp, tensor=axes.tensor)
    layout = GlobalBatch(batch_sharding(mesh), recipe.training.batch_size)

    # ---- State: sharded from the first moment, or the newest intact checkpoint ------------------
    def create():
        return initial_state(recipe.model, recipe.optimizer, recipe.training.seed)

    abstract = abstract_state(mesh, recipe.model, create)
    shardings = jax.tree.map(lambda leaf: leaf.sharding, abstract)
    fence = Fence(run, settings.lease_owner)
    if primary:
        fence.raise_over_others()
    restored = restore_newest(run, abstract)
    if restored:
        state, checkpoint = restored
        update, next_batch, tokens = checkpoint.update, checkpoint.next_batch, checkpoint.tokens
    else:
        state = jax.jit(create, out_shardings=shardings)()
        update, next_batch, tokens = 0, 0, 0
    run_log.event("state ready", update=update, restored=restored is not None)

    # ---- Steps: compiled at their first call ----------------------------------------------------
    step = jax.jit(
        lambda state, batch, stop: (
            *train_step(
                recipe.model, recipe.optimizer, recipe.training.update_length, state, batch
            ),
            stop.max(),
        ),
        out_shardings=(shardings, None, None),
        donate_argnums=0,
    )
    start_codebooks = jax.jit(
        lambda state, batch: kmeans_codebooks(
            recipe.model, recipe.training.update_length, state, batch
        ),
        out_shardings=shardings,
        donate_argnums=0,
    )
    evaluate = jax.jit(
        lambda state, batch: (
            evaluation_step(recipe.model, state.params, state.codebooks, batch).sum(),
            batch.loss_mask.sum(),
        )
    )

    # ---- Records: metrics into the spool, the state into checkpoints ---------------------------
    recorder = Recorder(
        MetricSpool(run.metrics) if primary else None,
        tokens=tokens,
        codebooks=recipe.model.quantized_keys,
        bits_per_byte=lambda nats: bits_per_byte(
            nats, manifest.splits["train"], recipe.data.window
        ),
    )
    writer = CheckpointWriter(
        run,
        fence,
        keep=recipe.checkpoint.keep,
        recipe=to_yaml(recipe),
        fingerprints={name: split.fingerprint for name, split in manifest.splits.items()},
    )

    # ---- Data: batch n is a function of n; each host reads the rows that its devices hold -------
    cut = {"sequence_length": recipe.data.sequence_length, "window": recipe.data.window}
    batches = training_batches(
        corpus,
        "train",
        batch_size=recipe.training.batch_size,
        seed=recipe.training.seed,
        shuffle_span=recipe.data.shuffle_span,
        start_batch=next_batch,
        rows=layout.rows,
        **cut,
    )

    def evaluation() -> dict[str, float]:
        """The loss over the first windows of the validation split, each target once."""
        nats, targets = 0.0, 0
        with contextlib.closing(
            evaluation_batches(
                corpus,
                "validation",
                batch_size=recipe.training.batch_size,
                limit_windows=recipe.training.evaluate_windows,
                rows=layout.rows,
                **cut,
            )
        ) as windows:
            for batch in windows:
                sums = jax.device_get(evaluate(state, layout.place(batch)))
                nats, targets = nats + float(sums[0]), targets + int(sums[1])
        per_token = nats / targets
        split = manifest.splits["validation"]
        return {
            "eval/loss_nats_per_token": per_token,
            "eval/bits_per_byte": bits_per_byte(per_token, split, recipe.data.window),
        }

    # ---- Loop: a batch is T/U updates; what a step returns is read one batch late ---------------
    stop_reduced, stopped = None, False
    with contextlib.closing(batches), contextlib.closing(writer), jax.transfer_guard("disallow"):
        while update < recipe.training.steps and not stopped:
            batch = layout.place(next(batches))
            if update == 0 and recipe.model.kmeans_iterations:
                state = start_codebooks(state, batch)
            stop = layout.flag(run.stop_requested())
            state, metrics, stop = step(state, batch, stop)
            update, next_batch = update + recipe.updates_per_batch, next_batch + 1
            recorder.updates(update, metrics)
            # A reduction of all processes' flags: all of them stop at the same batch.
            stopped = stop_reduced is not None and bool(jax.device_get(stop_reduced))
            stop_reduced = stop
            last = update == recipe.training.steps
            if last or update % recipe.training.evaluate_every == 0:
                recorder.evaluation(update, evaluation)
            if last or stopped or update % recipe.checkpoint.every == 0:
                recorder.flush()
                writer.save(state, update=update, next_batch=next_batch, tokens=recorder.tokens)
        recorder.flush()
    run_log.event("group end", update=update, stopped=stopped)
    return Outcome(update, stopped and update < recipe.training.steps)
