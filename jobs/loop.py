"""The training loop: one function, read from top to bottom in the order in which it runs.

It knows nothing of Ray: `train` is a plain call, made once in every process of the mesh.
"""

import contextlib
import os

import jax
import numpy as np

from jobs import run_log
from jobs.checkpoints import CheckpointWriter, restore_newest
from jobs.global_batch import GlobalBatch
from jobs.host_memory import keep_freed_memory
from jobs.loop_contract import LoopSettings, Outcome
from jobs.metric_spool import MetricSpool
from jobs.recipe import to_yaml
from jobs.recorder import Recorder
from jobs.run_directory import Fence, RunDirectory
from jobs.units import NATS_PER_BIT, bits_per_byte, targets_of
from model.sharding import abstract_state, batch_sharding, make_mesh
from model.training import evaluation_step, initial_state, kmeans_codebooks, train_step
from pipeline.loader import evaluation_batches, training_batches
from pipeline.manifest import SPLITS
from pipeline.mixture import Mixture


def train(settings: LoopSettings) -> Outcome:
    """Trains from the newest checkpoint (or from the start) to the recipe's last update."""
    recipe, run = settings.recipe, RunDirectory(settings.run)
    mixture = Mixture.load(recipe.data.corpora)
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
    cut = {"sequence_length": recipe.data.sequence_length, "window": recipe.data.window}
    # A row of training holds as much of each corpus as its weight says.
    shares = list(zip(mixture.epochs(1, **cut), mixture.splits("train"), strict=True))
    row_targets = sum(share * targets_of(split, recipe.data.window) for share, split in shares)
    row_bytes = sum(share * split.n_bytes for share, split in shares)
    recorder = Recorder(
        MetricSpool(run.metrics) if primary else None,
        tokens=tokens,
        codebooks=recipe.model.quantized_keys,
        bits_per_byte=lambda nats: nats / NATS_PER_BIT * row_targets / row_bytes,
    )
    writer = CheckpointWriter(
        run,
        fence,
        keep=recipe.checkpoint.keep,
        recipe=to_yaml(recipe),
        fingerprints={split: mixture.fingerprint(split) for split in SPLITS},
    )

    # ---- Data: batch n is a function of n; each host reads the rows that its devices hold -------
    batches = training_batches(
        mixture,
        "train",
        batch_size=recipe.training.batch_size,
        seed=recipe.training.seed,
        shuffle_span=recipe.data.shuffle_span,
        start_batch=next_batch,
        rows=layout.rows,
        cache_bytes=recipe.data.cache_bytes,
        **cut,
    )

    def evaluation() -> dict[str, float]:
        """The loss over the first windows of each validation split, each target once.

        Of a mixture, also each corpus's; in the figures over all of them, a corpus counts by the
        size of its split, as if the whole of it had been covered.
        """
        losses, splits = [], mixture.splits("validation")
        for corpus in mixture.corpora:
            nats, targets = 0.0, 0
            with contextlib.closing(
                evaluation_batches(
                    corpus.path,
                    "validation",
                    batch_size=recipe.training.batch_size,
                    limit_windows=recipe.training.evaluate_windows,
                    rows=layout.rows,
                    cache_bytes=recipe.data.cache_bytes,
                    **cut,
                )
            ) as windows:
                for batch in windows:
                    sums = jax.device_get(evaluate(state, layout.place(batch)))
                    nats, targets = nats + float(sums[0]), targets + int(sums[1])
            losses.append(nats / targets)
        targets_each = [targets_of(split, recipe.data.window) for split in splits]
        bits_each = [
            bits_per_byte(loss, split, recipe.data.window)
            for loss, split in zip(losses, splits, strict=True)
        ]
        values = {
            "eval/loss_nats_per_token": float(np.average(losses, weights=targets_each)),
            "eval/bits_per_byte": float(
                np.average(bits_each, weights=[split.n_bytes for split in splits])
            ),
        }
        if len(splits) > 1:
            for corpus, bits in zip(mixture.corpora, bits_each, strict=True):
                values[f"eval/{corpus.name}/bits_per_byte"] = bits
        return values

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
