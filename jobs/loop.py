"""The training loop: one function, read from top to bottom in the order in which it runs.

It knows nothing of Ray: `train` is a plain call, made once in every process of the mesh.
"""

import contextlib
import logging
import os
from typing import Any

import jax
import numpy as np

from jobs import run_log
from jobs.background_spool import BackgroundSpool
from jobs.checkpoint_writer import CheckpointWriter
from jobs.checkpoints import failing_together, restore_newest
from jobs.errors import ExitCode, UserError
from jobs.global_batch import GlobalBatch
from jobs.goodput import Goodput
from jobs.host_memory import keep_freed_memory
from jobs.init_from import first_state
from jobs.lease import Fence
from jobs.ledger import Ledger
from jobs.loop_contract import LoopSettings, Outcome
from jobs.recipe import to_yaml
from jobs.recorder import Recorder
from jobs.run_directory import RunDirectory
from jobs.units import NATS_PER_BIT, bits_per_byte, targets_of
from model.config import validate_accumulation
from model.counts import flops_per_token
from model.sharding import abstract_state, batch_sharding, make_mesh
from model.training import (
    evaluation_step,
    go_on_from,
    initial_state,
    kmeans_codebooks,
    train_step,
)
from pipeline.loader import evaluation_batches, training_batches
from pipeline.manifest import SPLITS
from pipeline.mixture import Mixture
from pipeline.patient_store import patiently

log = logging.getLogger("tvq.loop")


def train(settings: LoopSettings) -> Outcome:
    """Trains from the newest checkpoint (or from the start) to the recipe's last update."""
    recipe, run = settings.recipe, RunDirectory(settings.run, patient=True)
    mixture = patiently(lambda: Mixture.load(recipe.data.corpora), "the corpus")
    primary = jax.process_index() == 0
    run_log.open_log(run.logs, f"rank-{jax.process_index()}")
    keep_freed_memory()
    run_log.event("group start", rank=jax.process_index(), worker_pid=os.getpid())
    ledger = Ledger(run.store) if primary else None
    goodput = Goodput(ledger, settings.lease_owner)

    # ---- Mesh: which device does what -----------------------------------------------------------
    axes = recipe.cluster
    mesh = make_mesh(jax.devices(), data=axes.data, fsdp=axes.fsdp, tensor=axes.tensor)
    layout = GlobalBatch(batch_sharding(mesh), recipe.training.batch_size)
    rows = layout.padded_size // (mesh.shape["data"] * mesh.shape["fsdp"])
    validate_accumulation(rows, recipe.training.accumulate, "a device")

    # ---- State: sharded from the first moment, or the newest intact checkpoint ------------------
    def create():
        return initial_state(recipe.model, recipe.optimizer, recipe.training.seed)

    abstract = abstract_state(mesh, recipe.model, create)
    shardings = jax.tree.map(lambda leaf: leaf.sharding, abstract)
    fence = Fence(run, settings.lease_owner)
    with failing_together(run.location):
        if primary:
            fence.raise_over_others()
    with goodput.phase("start"):
        restored = restore_newest(run, abstract)
        if restored:
            state, checkpoint = restored
            update, next_batch, tokens = checkpoint.update, checkpoint.next_batch, checkpoint.tokens
        else:
            if recipe.training.init_from:
                state = first_state(run, recipe, abstract)
            else:
                state = jax.jit(create, out_shardings=shardings)()
            update, next_batch, tokens = 0, 0, 0
    goodput.begin_at(update)
    run_log.event("state ready", update=update, restored=restored is not None)

    # ---- Steps: compiled at their first call ----------------------------------------------------
    step = jax.jit(
        lambda state, batch, stop: (
            *train_step(
                recipe.model,
                recipe.optimizer,
                recipe.training.update_length,
                state,
                batch,
                accumulate=recipe.training.accumulate,
                spike_deviations=recipe.training.spike_deviations,
            ),
            stop.max(),
        ),
        out_shardings=(shardings, None, None),
        donate_argnums=0,
    )
    start_codebooks = jax.jit(
        lambda state, batch: kmeans_codebooks(
            recipe.model,
            recipe.training.update_length,
            state,
            batch,
            accumulate=recipe.training.accumulate,
        ),
        out_shardings=shardings,
        donate_argnums=0,
    )
    go_on = jax.jit(go_on_from, out_shardings=shardings, donate_argnums=0)
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
    flops = flops_per_token(recipe.model, recipe.data.sequence_length)
    peak = (recipe.cluster.peak_flops or 0) * mesh.size
    spool = BackgroundSpool(run.metrics) if primary else None
    recorder = Recorder(
        spool,
        run=run.name,
        batch_size=recipe.training.batch_size,
        tokens=tokens,
        skipped_in_a_row=int(jax.device_get(state.spikes.in_a_row)),
        ledger=ledger,
        goodput=goodput,
        codebooks=recipe.model.quantized_keys,
        bits_per_byte=lambda nats: nats / NATS_PER_BIT * row_targets / row_bytes,
        mfu=(lambda rate: rate * flops / peak) if peak else None,
    )
    writer = CheckpointWriter(
        run,
        fence,
        keep=recipe.checkpoint,
        recipe=to_yaml(recipe),
        fingerprints={split: mixture.fingerprint(split) for split in SPLITS},
        before_commit=spool.wait if spool else lambda: None,
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

    # ---- Fall back: nothing could be applied for long, so the state itself may be spoiled --------
    limit = recipe.training.max_skipped * recipe.updates_per_batch
    fallen_to, fell_at, falls = -1, -1, 0

    def fall_back(state: Any) -> Any:
        """The state of the newest checkpoint, at this batch: counters never go back."""
        nonlocal fallen_to, fell_at, falls
        recorder.flush()
        if recorder.skipped_in_a_row < limit:  # the batch that was under way could be applied
            return state
        writer.wait()
        now = state._replace(params=None, codebooks=None, optimizer=None)
        for leaf in jax.tree.leaves((state.params, state.codebooks, state.optimizer)):
            leaf.delete()  # there may be no room for two states
        with jax.transfer_guard("allow"):
            restored = restore_newest(run, abstract)
        found = restored[1].update if restored else -1
        falls = falls + 1 if found == fallen_to else 1
        fallen_to, fell_at = found, update
        first = next_batch - recorder.skipped_in_a_row // recipe.updates_per_batch
        if restored is None or falls > recipe.training.max_fallbacks:
            again = f"gone back to the checkpoint at update {found} {falls - 1} times before"
            raise UserError(
                f"run {run.name}: no update of batches {first} to {next_batch - 1} could be"
                f" applied, {again if restored else 'and there is no checkpoint to go back to'};"
                f" `tvq inspect --run {run.name} --step {first}` shows the first one's documents;"
                " begin another run with a lower optimizer.learning_rate or without them",
                ExitCode.UNSTABLE,
            )
        log.warning(
            "no update of batches %d to %d could be applied: back to the state of update %d,"
            " on with batch %d",
            first, next_batch - 1, found, next_batch,
        )  # fmt: skip
        recorder.skipped_in_a_row = 0
        return go_on(restored[0], now)

    # ---- Loop: a batch is T/U updates; what a step returns is read one batch late ---------------
    stop_reduced, stopped = None, False
    calling = goodput.phase("compile")
    with (
        contextlib.closing(ledger) if ledger else contextlib.nullcontext(),
        contextlib.closing(goodput),
        contextlib.closing(spool) if spool else contextlib.nullcontext(),
        contextlib.closing(batches),
        contextlib.closing(writer),
        jax.transfer_guard("disallow"),
    ):
        while update < recipe.training.steps and not stopped:
            with goodput.phase("data_wait"):
                batch = layout.place(next(batches))
            stop = layout.flag(run.stop_requested())
            with calling:
                random = update == 0 and not recipe.training.init_from
                if random and recipe.model.kmeans_iterations:
                    state = start_codebooks(state, batch)
                state, metrics, stop = step(state, batch, stop)
            calling = contextlib.nullcontext()
            update, next_batch = update + recipe.updates_per_batch, next_batch + 1
            recorder.updates(update, metrics)
            if recorder.skipped_in_a_row >= limit:
                state = fall_back(state)
            # A reduction of all processes' flags: all of them stop at the same batch.
            stopped = stop_reduced is not None and bool(jax.device_get(stop_reduced))
            stop_reduced = stop
            last = update == recipe.training.steps
            scores = None
            if last or update % recipe.training.evaluate_every == 0:
                scores = recorder.evaluation(update, goodput.phase("evaluation")(evaluation))
            if last or stopped or update % recipe.checkpoint.every == 0:
                recorder.flush()
            # While updates are skipped, the state may be what they are skipped for.
            good = not recorder.skipped_in_a_row and update != fell_at
            due = good and update % recipe.checkpoint.every == 0
            if last or stopped or due:
                with goodput.phase("checkpoint"):
                    writer.save(
                        state,
                        update=update,
                        next_batch=next_batch,
                        tokens=recorder.tokens,
                        metrics=scores,
                        last=last or stopped,
                    )
                goodput.saved(update)
                recorder.figures(update, writer.figures() | goodput.values())
        recorder.flush()
    run_log.event("group end", update=update, stopped=stopped)
    return Outcome(update, stopped and update < recipe.training.steps, goodput.summary())
