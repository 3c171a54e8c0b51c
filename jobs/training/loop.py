"""The training loop: one function, read from top to bottom in the order in which it runs.

It knows nothing of Ray: `train` is a plain call, made once in every process of the mesh.
"""

import contextlib
import os
import socket
from collections.abc import Iterator
from functools import partial
from typing import Protocol

import jax

from jobs.checkpoints.init_from import first_state
from jobs.checkpoints.restore import failing_together, jitted_leaf_sums, restore_newest
from jobs.checkpoints.writer import CheckpointWriter
from jobs.cluster.ray_metrics import RayMetrics
from jobs.corpora.batch_inspection import documents_of_batch
from jobs.recipe import to_yaml
from jobs.runs import run_log
from jobs.runs.background_spool import BackgroundSpool
from jobs.runs.lease import Fence
from jobs.runs.ledger import Ledger
from jobs.runs.run_directory import RunDirectory
from jobs.training.codebook_watch import CodebookWatch
from jobs.training.compile_cache import use_compile_cache
from jobs.training.fallback import Fallback
from jobs.training.global_batch import GlobalBatch
from jobs.training.goodput import Goodput
from jobs.training.host_load import HostLoad
from jobs.training.host_memory import keep_freed_memory
from jobs.training.loop_contract import LoopSettings, Outcome
from jobs.training.memory_use import memory_use
from jobs.training.profile_trace import ProfileTrace
from jobs.training.programs import Programs
from jobs.training.recorder import Recorder
from jobs.training.samples import Samples
from jobs.training.stopping import Notice, StopReason
from jobs.training.validation import Validation
from jobs.units import training_units
from model.sharding import batch_sharding, make_mesh
from pipeline.errors import CorpusError
from pipeline.loader import training_batches
from pipeline.mixture import Mixture
from pipeline.patient_store import patiently


def train(settings: LoopSettings, notice: Notice = lambda: StopReason.NONE) -> Outcome:
    """Trains from the newest checkpoint (or from the start) to the recipe's last update.

    Args:
        settings: the same in every process.
        notice: what this process has been told, asked once a batch.
    """
    keep_freed_memory()  # before JAX is used
    recipe, run = settings.recipe, RunDirectory(settings.run, patient=True)
    training = recipe.training
    primary = jax.process_index() == 0
    run_log.open_log(run.logs, f"rank-{jax.process_index()}")
    who = {"rank": jax.process_index(), "host": socket.gethostname(), "worker_pid": os.getpid()}
    run_log.event("group start", **who)
    fence = Fence(run, settings.lease_owner)
    ledger = Ledger(run.store, fence.check) if primary else None
    goodput = Goodput(ledger, settings.lease_owner)
    use_compile_cache(recipe.cluster.compile_cache)

    # ---- Mesh: which device does what -----------------------------------------------------------
    axes = recipe.cluster
    mesh = make_mesh(jax.devices(), data=axes.data, fsdp=axes.fsdp, tensor=axes.tensor)
    layout = GlobalBatch(batch_sharding(mesh), training.batch_size, training.accumulate)
    programs = Programs(recipe, mesh)

    # ---- State: sharded from the first moment, or the newest intact checkpoint ------------------
    with failing_together(run.location):
        if primary:
            fence.raise_over_others()
    run_log.event("restore start")
    restored, codebooks_taken = restore_newest(run, programs.abstract), False
    if restored:
        state, checkpoint = restored
        update, next_batch, tokens = checkpoint.update, checkpoint.next_batch, checkpoint.tokens
    else:
        if training.init_from:
            state, codebooks_taken = first_state(run, recipe, programs.abstract)
        else:
            state = programs.create()
        jitted_leaf_sums(state)  # compiled now, and not while the first save holds up the loop
        update, next_batch, tokens = 0, 0, 0

    # ---- Data: batch n is a function of n; each host reads the rows that its devices hold -------
    mixture = patiently(lambda: Mixture.load(recipe.data.corpora), "the corpus")
    batches = training_batches(
        mixture,
        "train",
        sequence_length=recipe.data.sequence_length,
        window=recipe.data.window,
        batch_size=training.batch_size,
        seed=training.seed,
        shuffle_span=recipe.data.shuffle_span,
        start_batch=next_batch,
        rows=layout.rows,
        cache_bytes=recipe.data.cache_bytes,
    )

    # ---- Records: metrics into the spool, the state into checkpoints ----------------------------
    spool = BackgroundSpool(run.metrics) if primary else None
    units = training_units(recipe, mixture, mesh.size)
    recorder = Recorder(
        spool,
        run=run.name,
        batch_size=training.batch_size,
        tokens=tokens,
        skipped_in_a_row=int(jax.device_get(state.spikes.in_a_row)),
        ledger=ledger,
        documents=partial(documents_of_batch, recipe, mixture),
        goodput=goodput,
        codebooks=CodebookWatch(recipe.model.n_codes) if recipe.model.quantized_keys else None,
        bits_per_byte=units.bits_per_byte,
        mfu=units.mfu,
    )
    samples = Samples(run, recipe, mixture, mesh, programs.write) if training.samples else None

    def before_commit() -> None:
        for each in (samples, spool):
            if each is not None:
                each.wait()

    writer = CheckpointWriter(
        run,
        fence,
        keep=recipe.checkpoint,
        recipe=to_yaml(recipe),
        fingerprints=mixture.fingerprints(),
        before_commit=before_commit,
    )
    validation = Validation(recipe, mixture, layout, programs.evaluate)
    fallback = Fallback(run, recipe, programs)
    profile = ProfileTrace(run, training.profile if primary else None)
    watched = RayMetrics(run, recorder.latest) if primary else None
    host = HostLoad()
    goodput.begin_at(update)
    run_log.event("state ready", update=update, restored=restored is not None)

    # ---- Loop: a batch is T/U updates; what a step returns is read one batch late ---------------
    told, stopped, fell_at = None, StopReason.NONE, -1
    calling = goodput.phase("compile")
    with contextlib.ExitStack() as closing:
        # The last one first.
        for each in (ledger, goodput, spool, batches, samples, writer, profile, watched):
            if each is not None:
                closing.enter_context(_closed(each))
        closing.enter_context(jax.transfer_guard("disallow"))
        while update < training.steps and not stopped:
            with goodput.phase("data_wait"):
                batch = layout.place(next(batches))
            with goodput.phase("coordination"):
                stop = StopReason.REQUESTED if run.stop_requested() else notice()
            flags = layout.flag(stop)
            profile.before(update, recipe.updates_per_batch, state)
            with calling, profile.step(update + recipe.updates_per_batch):
                random = update == 0 and not codebooks_taken
                if random and recipe.model.kmeans_iterations:
                    state = programs.start_codebooks(state, batch)
                state, metrics, flags = programs.step(state, batch, flags)
            calling = contextlib.nullcontext()
            update, next_batch = update + recipe.updates_per_batch, next_batch + 1
            recorder.updates(update, metrics)

            if fallback.is_due(recorder.skipped_in_a_row):
                recorder.flush()  # unless the batch under way could be applied
                if fallback.is_due(recorder.skipped_in_a_row):
                    writer.wait()
                    state = fallback.go_back(state, next_batch, recorder.skipped_in_a_row)
                    recorder.skipped_in_a_row, fell_at = 0, update

            # A reduction over all processes: all of them stop at the same batch.
            stopped = StopReason(0 if told is None else int(jax.device_get(told)))
            told = flags
            last = update == training.steps

            scores = None
            if last or update % training.evaluate_every == 0:
                measure = goodput.phase("evaluation")(validation.measure)
                scores = recorder.evaluation(update, partial(measure, state, update))
            if samples is not None and samples.due(update):
                write = goodput.phase("evaluation")(samples.write)
                recorder.evaluation(update, partial(write, state, update))
            if last or stopped or update % recipe.checkpoint.every == 0:
                recorder.flush()
                # While updates are skipped, the state may be what they are skipped for.
                good = not recorder.skipped_in_a_row and update != fell_at
                if last or stopped or good:
                    with goodput.phase("checkpoint"):
                        writer.save(
                            state,
                            update=update,
                            next_batch=next_batch,
                            tokens=recorder.tokens,
                            metrics=scores,
                            last=last or bool(stopped),
                        )
                    goodput.saved(update)
                recorder.figures(
                    update, writer.figures() | goodput.values() | memory_use() | host.values()
                )
        recorder.flush()
    run_log.event("group end", update=update, stopped=stopped.name)
    early = stopped if update < training.steps else StopReason.NONE
    return Outcome(update, early, goodput.summary())


class _Closable(Protocol):
    def close(self) -> None: ...


@contextlib.contextmanager
def _closed(each: _Closable) -> Iterator[None]:
    """Closes at the end; of what fails then, what the training failed of before is told."""
    try:
        yield
    except BaseException:
        with contextlib.suppress(CorpusError):
            each.close()
        raise
    each.close()
