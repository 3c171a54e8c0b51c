"""`tvq train`: begins a run, or goes on with it, and tracks it to its end."""

import contextlib
import os
import threading
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import NamedTuple

from jobs import recipe as recipes
from jobs.checkpoints.manifest import (
    checkpoint_store,
    complete_checkpoints,
    newest_update,
    unfinished_updates,
)
from jobs.console import Console
from jobs.errors import ExitCode, UserError
from jobs.lineage.code_diff import CodeDiff, code_diff
from jobs.lineage.provenance import note_start, provenance
from jobs.metric_names import TOKENS_PER_SECOND, TRAIN_LOSS
from jobs.recipe import Recipe
from jobs.runs import run_log
from jobs.runs.lease import Lease, LeaseLostError
from jobs.runs.metric_spool import MetricPoint
from jobs.runs.run_directory import RunDirectory
from jobs.runs.run_figures import CURVES, curves_png
from jobs.runs.sample_files import SAMPLES, sample_files
from jobs.tracking.store import Store, embedded_store, without_credentials
from jobs.tracking.tracker import Tracker
from jobs.training.loop_contract import Outcome
from jobs.training.settled import begin_or_resume, changed_fields, with_corpora
from jobs.training.stopping import StopReason, StopRequests
from jobs.training.trainer import run_loop, worker_session
from model.counts import flops_per_token, parameter_count
from pipeline.errors import CorpusError
from pipeline.mixture import Mixture
from pipeline.storage import Location, is_url

_LOOK_SECONDS = 0.5
_LOOK_STORE_SECONDS = 2.0
"""Between two looks at a run in an object store, where each is paid for."""


class Trained(NamedTuple):
    """What a training left behind."""

    run: RunDirectory
    update: int
    """Its last update, which is in a checkpoint."""
    reused: bool
    """Whether the run had finished before and no update was made."""


def train(
    recipe: Recipe,
    *,
    root: Location,
    name: str,
    console: Console,
    stated: frozenset[str] | None = None,
    on_points: Callable[[list[MetricPoint]], None] | None = None,
) -> Trained:
    """Trains run `name` by `recipe` to its last update, from its newest checkpoint if it has one.

    Args:
        recipe: as loaded; what it leaves open is resolved here.
        root: folder of the runs.
        name: of the run.
        console: to narrate on.
        stated: the fields that the user stated, which a run that is resumed must have been begun
            with; for all others the stored ones stand. None: all fields.
        on_points: is given the metric points as they arrive, in another thread.

    Raises:
        UserError: a mistake to mend, a run that another process holds, a training that failed, or
            one that was stopped by Ctrl-C, SIGTERM, a stop request or Ray's preemption notice
            (saved; the same command goes on).
    """
    recipe, mixture = with_corpora(recipe)
    run = RunDirectory.at(root, name)
    recipe, record = begin_or_resume(run, recipe, mixture, stated)
    _narrate(console, run, recipe, mixture)

    done = newest_update(run)
    finished = done >= recipe.training.steps
    if finished and run.closed_at() == done:
        console.line(f"already finished at update {done}; nothing to do (longer: training.steps=N)")
        return Trained(run, done, reused=True)
    if finished:
        console.line(f"already finished at update {done}; completing it in MLflow")
    elif done:
        console.line(f"resuming from the checkpoint at update {done}")

    with Lease(run).held() as lease:
        run = RunDirectory(run.location, patient=True)
        run_log.open_log(run.logs, "driver")
        note_start(run)
        store = store_of(recipe, run.root)
        tracker = Tracker.start(
            store.uri,
            recipe.tracking.experiment,
            name,
            record.run_key,
            record.mlflow_run_id,
            artifact_location=store.artifact_location,
            say=console.warning,
        )
        run.request_stop(False)
        status, patience = "FAILED", 60.0
        stops = StopRequests(run, recipe.cluster.grace_seconds)
        try:
            differences = "\n".join(recipes.difference(recipe, Recipe())) + "\n"
            tracker.log_recipe(recipes.flatten(recipe), recipes.to_yaml(recipe), differences)
            _log_provenance(tracker, recipe, console)
            _log_corpora(tracker, mixture)

            def loop() -> Outcome:
                if finished:
                    return Outcome(done, StopReason.NONE)
                return run_loop(run, recipe, lease.owner)

            with contextlib.ExitStack() as session:
                if not finished:
                    session.enter_context(worker_session(recipe.cluster, console.warning))
                session.enter_context(stops.heard())
                outcome = _supervise(
                    run, recipe, loop, lease, tracker, store, console, stops, on_points
                )
            status = "KILLED" if outcome.stopped else "FINISHED"
            if not outcome.stopped:
                tracker.log_curves("plots/curves.png", CURVES, curves_png)
        except KeyboardInterrupt:
            status, patience = "KILLED", 5.0
            raise
        except LeaseLostError:
            status = None  # all that follows is the new holder's to do
            raise
        except UserError as error:
            status = "KILLED" if error.code is ExitCode.PREEMPTED else status
            raise
        finally:
            patience = 5.0 if stops.terminated else patience
            if status:
                complete = tracker.finish(status, patience)
                with _outage_told(console):  # what the training ended of is what counts
                    _note_tracking(run, tracker, store)
                    if complete and status == "FINISHED":
                        run.note_closed(newest_update(run))
                    run.request_stop(False)
            run_log.close_log()
    if outcome.stopped:
        raise UserError(
            f"run {name}: stopped at update {outcome.update}, which is saved; the same command goes"
            " on from there",
            stops.exit_code,
        )
    if not finished:
        console.line(
            f"trained to update {outcome.update}; checkpoints in {run.location}/checkpoints"
        )
        console.line(outcome.goodput)
    return Trained(run, outcome.update, reused=finished)


def store_of(recipe: Recipe, root: Location) -> Store:
    """Where MLflow is: the recipe's URI, the environment's, else a SQLite file beside the runs."""
    uri = recipe.tracking.uri or os.environ.get("MLFLOW_TRACKING_URI")
    return Store(uri) if uri else embedded_store(root)


def store_of_run(run: RunDirectory) -> Store:
    """The store that holds the run's MLflow run, with the environment's credentials for it."""
    record = run.record()
    return recorded_store(record.tracking_uri if record else None, run.root)


def recorded_store(tracking_uri: str | None, root: Location) -> Store:
    """The store that a record names, which holds no credentials; None: the one beside the runs."""
    if tracking_uri is None:
        return embedded_store(root)
    uri = os.environ.get("MLFLOW_TRACKING_URI", "")
    return Store(uri if without_credentials(uri) == tracking_uri else tracking_uri)


def _narrate(console: Console, run: RunDirectory, recipe: Recipe, mixture: Mixture) -> None:
    count = parameter_count(recipe.model)
    batch_tokens = recipe.training.batch_size * recipe.data.sequence_length
    least, most = recipe.cluster.least_workers, recipe.cluster.most_workers
    workers = f"{most}" if least == most else f"{least} to {most}"
    where = f"{workers} Ray worker{'s' * (most > 1)}" if most else "this process"
    console.line(f"run       {run.location}")
    stated = changed_fields(recipe).items()
    console.line(f"recipe    {' '.join(f'{name}={value}' for name, value in stated)}")
    console.line(
        f"model     {count.trained:,} parameters + {count.codebook:,} in codebooks,"
        f" {flops_per_token(recipe.model, recipe.data.sequence_length) / 1e6:,.1f} MFLOP a token"
    )
    mixed = len(mixture.corpora) > 1
    for corpus, split in zip(mixture.corpora, mixture.splits("train"), strict=True):
        share = f"{corpus.name}, {corpus.weight} of {mixture.period} windows: " if mixed else ""
        console.line(
            f"data      {share}{split.tokens:,} tokens of {split.documents:,} documents,"
            f" fingerprint {split.fingerprint[:16]}"
        )
    console.line(
        f"training  {recipe.training.steps:,} updates, {batch_tokens:,} tokens a batch of"
        f" {recipe.updates_per_batch} updates, on {where}"
    )
    if mixed:
        rows = recipe.training.steps // recipe.updates_per_batch * recipe.training.batch_size
        cut = {"sequence_length": recipe.data.sequence_length, "window": recipe.data.window}
        counts = zip(mixture.corpora, mixture.epochs(rows, **cut), strict=True)
        each = ", ".join(f"{corpus.name} {epochs:.2f} epochs" for corpus, epochs in counts)
        console.line(f"epochs    {each} over the training")


def _log_corpora(tracker: Tracker, mixture: Mixture) -> None:
    for name, context in (("train", "training"), ("validation", "evaluation")):
        for corpus, split in zip(mixture.corpora, mixture.splits(name), strict=True):
            tracker.log_corpus(
                f"{corpus.name}-{name}",
                split.fingerprint,
                str(corpus.path),
                {
                    "documents": split.documents,
                    "tokens": split.tokens,
                    "bytes": split.n_bytes,
                    "words": split.n_words,
                    "tokenizer": mixture.tokenizer.kind,
                },
                {"doc_id": "string", "tokens": "integer"},
                context,
            )


def _log_provenance(tracker: Tracker, recipe: Recipe, console: Console) -> None:
    now = provenance()
    diff = CodeDiff(None, None)
    if now.dirty and not recipe.tracking.log_diff:
        diff = CodeDiff(None, "tracking.log_diff=false")
    elif now.dirty:
        diff = code_diff()
        if diff.patch is None and diff.left_out is None:  # submitted: the checkout is elsewhere
            diff = CodeDiff(None, "not on this machine")
        if diff.left_out:
            console.warning(f"the code's changes are not stored with the run: {diff.left_out}")
    tracker.log_provenance(now, diff)


def _note_tracking(run: RunDirectory, tracker: Tracker, store: Store) -> bool:
    """Notes where the run is in MLflow, as soon as the store has answered; whether it has."""
    run_id = tracker.wait_for_run(0)
    if run_id:
        beside = store.artifact_location is not None
        run.store_tracking(None if beside else without_credentials(store.uri), run_id)
    return bool(run_id)


@contextlib.contextmanager
def _outage_told(console: Console) -> Iterator[None]:
    """Warns of a store that does not do as it is asked; the training goes on or ends as it did."""
    try:
        yield
    except CorpusError as error:
        console.warning(str(error))


def _supervise(
    run: RunDirectory,
    recipe: Recipe,
    loop: Callable[[], Outcome],
    lease: Lease,
    tracker: Tracker,
    store: Store,
    console: Console,
    stops: StopRequests,
    on_points: Callable[[list[MetricPoint]], None] | None,
) -> Outcome:
    """Runs the loop in a thread, so that Ctrl-C reaches us and not Ray, and watches over it."""
    result: list[Outcome | BaseException] = []
    ended = threading.Event()

    def work() -> None:
        try:
            result.append(loop())
        except BaseException as error:
            result.append(error)
        finally:
            ended.set()

    rate: float | None = None
    tracked: set[int] = set()
    present: set[int] = set()

    def show(points: list[MetricPoint]) -> None:
        nonlocal rate
        for point in points:
            rate = point.values.get(TOKENS_PER_SECOND, rate)  # a batch's last has it
            nats = point.values.get(TRAIN_LOSS)
            if nats is not None:
                progress.update(point.step, nats_per_token=nats, tokens_per_second=rate)
        if on_points:
            on_points(points)

    noted = False

    def track(*, last: bool = False) -> None:
        nonlocal noted
        noted = noted or _note_tracking(run, tracker, store)
        folder = run if last else watched
        manifests, before = complete_checkpoints(folder), len(tracked)
        for manifest in manifests:
            if manifest.update not in tracked:
                where = checkpoint_store(run, manifest.update).location
                uri = where if is_url(where) else Path(where).as_uri()
                tracker.log_checkpoint(manifest.update, uri, manifest.metrics)
                tracked.add(manifest.update)
        if last or len(tracked) > before:
            tracker.log_missing(
                SAMPLES, sample_files(folder.store), folder.store.child(SAMPLES).read
            )
        if last or present - {manifest.update for manifest in manifests}:
            # What has files left is damaged, or about to be gone: not for us to call deleted.
            now = {manifest.update for manifest in manifests} | {*unfinished_updates(folder)}
            tracker.log_present(now)
            present.clear()
            present.update(now)
        present.update(manifest.update for manifest in manifests)

    def look() -> None:
        nonlocal groups, outage
        try:
            track()
            lines = log.read()
        except CorpusError as error:  # looked at again: nothing here is worth ending a training
            if not outage:
                console.warning(f"{error}; the training goes on")
            outage = True
            return
        outage = False
        for line in lines:
            if line["level"] in ("WARNING", "ERROR"):
                console.warning(line["message"])
            elif line.get("event") == "state ready":
                groups += 1
                if groups > 1:
                    console.line(
                        f"the workers were started again; they go on after update {line['update']}"
                    )
                elif line["update"] != expected:  # the newest is damaged, as a warning has said
                    console.line(f"going on after update {line['update']} instead")

    log = run_log.LogTail(run.logs, "rank-0")
    watched = RunDirectory(run.location)  # whose looks need not wait for a store
    pause = _LOOK_STORE_SECONDS if is_url(run.location) else _LOOK_SECONDS
    groups, outage, expected = 0, False, newest_update(run)
    with console.training(recipe.training.steps) as progress:
        tracker.attach_spool(run.metrics, show)
        threading.Thread(target=work, name="training", daemon=True).start()
        # Not Thread.join: Ctrl-C during it makes Python 3.11 take the thread for dead.
        while not ended.is_set():
            try:
                ended.wait(pause)
                if stops.overdue:
                    saved = newest_update(run)
                    after = (
                        f"goes on from the checkpoint at update {saved}" if saved else "begins anew"
                    )
                    raise UserError(
                        f"run {run.name}: not saved within cluster.grace_seconds"
                        f" ({stops.grace_seconds:g} s) of SIGTERM; the same command {after}",
                        ExitCode.PREEMPTED,
                    )
                lease.check()
                look()
            except KeyboardInterrupt:
                if stops.interrupted:
                    raise
                stops.interrupt()
                console.line("Ctrl-C: saving at the next batch, then stopping (again: at once)")
                with _outage_told(console):
                    run.request_stop(True)
        tracker.detach_spool()
        look()  # what was logged at the very end
        with _outage_told(console):
            track(last=True)
    [outcome] = result
    if isinstance(outcome, BaseException):
        raise outcome
    return outcome
