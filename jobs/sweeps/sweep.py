"""`tvq sweep`: trainings that differ in some fields and in the seed, side by side, on Ray Tune.

Ray Tune says what is tried and what is stopped early; each training is a run like any other, under
a name made of its values. So it does not matter what Tune remembers of a sweep that was killed:
a training that had begun is found and goes on, one that is done is not done again.
"""

import contextlib
import io
import logging
import math
import os
import re
import shutil
import statistics
import threading
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

from jobs.cluster.ray_session import ray_session
from jobs.console import Console, Progress
from jobs.errors import ExitCode, UserError
from jobs.metric_names import EVAL_BITS
from jobs.runs.run_directory import RunDirectory
from jobs.sweeps.report import Trial, ranked, ranking_lines, table
from jobs.sweeps.sweep_file import SEED, Sweep, corners, load_sweep
from jobs.tracking.parent_run import ParentRun
from pipeline.claims import Claim
from pipeline.storage import LocalStore, Location, open_store

_FIGURES = "validation_bits_per_byte"
"""By seed, on the whole validation split: what a trial says at its end."""
_LOOK_SECONDS = 2.0


def sweep_command(location: str, root: Location, *, console: Console, as_json: bool) -> None:
    """Runs a sweep to its end, or goes on with it, and says which values were best."""
    sweep = load_sweep(location)
    store = open_store(root)
    if not isinstance(store, LocalStore):
        raise UserError(
            f"--root {store.location}: a sweep's root is a folder of this machine; Ray Tune in a"
            " bucket is not tested"
        )
    _check_corpora(sweep)
    folder = LocalStore(store.root / "sweeps" / sweep.name)
    claim = Claim(folder)
    if holder := claim.take():
        raise UserError(
            f"sweep {sweep.name}: is being run by process {holder.pid} on {holder.host};"
            " wait for it, or give this sweep another name",
            ExitCode.BUSY,
        )
    with claim.kept(5.0, f"sweep {sweep.name}"):
        _refuse_another(folder, sweep)
        trials = run_sweep(sweep, store.root, console)
    configurations = ranked(trials)
    if as_json:
        console.json({"name": sweep.name, "ranking": [c.as_json() for c in configurations]})
    else:
        console.table(*table(configurations))
        for line in ranking_lines(configurations, store.root):
            console.line(line)


def run_sweep(sweep: Sweep, root: Path, console: Console) -> list[Trial]:
    """Trains what is not trained yet; returns all trainings, with their figures in MLflow.

    Raises:
        UserError: it was stopped by Ctrl-C, or trainings failed; the same command goes on.
    """
    parent = ParentRun.of(sweep.recipe({}, sweep.seeds[0]), root, sweep.name, console.warning)
    parent.report(sweep.to_yaml(), {"search": sweep.search})
    os.environ.setdefault("TUNE_DISABLE_AUTO_CALLBACK_LOGGERS", "1")
    # With Tune's own handler a sweep that Ctrl-C broke off returns as one that is done.
    os.environ["TUNE_DISABLE_SIGINT_HANDLER"] = "1"
    status = "FAILED"
    try:
        with ray_session(None, cpus=sweep.parallel):
            trials = _fit(sweep, root, console)
        status = "FINISHED"
    except KeyboardInterrupt:
        status = "KILLED"
        raise
    finally:
        for run in _runs(root, sweep):
            record = run.record()
            if record and record.mlflow_run_id:
                ended = "FINISHED" if run.closed_at() is not None else "KILLED"
                parent.adopt(record.mlflow_run_id, ended)
        parent.finish(status)
    best = min((t.bits_per_byte for t in trials if t.bits_per_byte is not None), default=math.inf)
    if best < math.inf:
        parent.figures({"best/bits_per_byte": best})
    return trials


def _fit(sweep: Sweep, root: Path, console: Console) -> list[Trial]:
    from ray import tune

    storage = root / "sweeps" / sweep.name
    trainable = tune.with_resources(
        tune.with_parameters(_trial, sweep=sweep, root=str(root)), {"cpu": 1}
    )
    experiment = str(storage / "tune")
    # Tune writes the first of its files at once and the other one seconds later: killed in
    # between, it has nothing to go on with, and the trainings are found by their names.
    if tune.Tuner.can_restore(experiment) and any((storage / "tune").glob("experiment_state-*")):
        console.line(f"going on with sweep {sweep.name}")
        tuner = tune.Tuner.restore(
            experiment, trainable, resume_unfinished=True, restart_errored=True
        )
    else:
        shutil.rmtree(experiment, ignore_errors=True)
        tuner = tune.Tuner(
            trainable,
            param_space=_param_space(sweep),
            tune_config=_tune_config(sweep),
            run_config=tune.RunConfig(name="tune", storage_path=str(storage), verbose=0),
        )
    # It logs the traceback of each trial that fails, which lies in the trial's folder.
    logging.getLogger("ray.tune").setLevel(logging.CRITICAL)
    # Tune prints a table at any verbosity.
    with contextlib.redirect_stdout(io.StringIO()), _progress(sweep, root, console):
        grid = tuner.fit()
    if failed := [result for result in grid if result.error]:
        first = str(failed[0].error).strip().splitlines()[-1]
        raise UserError(
            f"sweep {sweep.name}: {len(failed)} of {len(grid)} trials failed, the first of them:"
            f" {first} ({failed[0].path}/error.txt); the same command goes on with them",
            ExitCode.FAILED,
        )
    trials = []
    for result in grid:
        if result.config is not None:
            values, seeds = _values(sweep, result.config)
            figures = (result.metrics or {}).get(_FIGURES, {})
            trials += [
                Trial(sweep.run_name(values, seed), values, seed, figures.get(str(seed)))
                for seed in seeds
            ]
    return trials


@contextlib.contextmanager
def _progress(sweep: Sweep, root: Path, console: Console) -> Iterator[None]:
    """Says how many trainings are done: Tune's own processes have no terminal of ours."""
    over = threading.Event()

    def look(progress: Progress) -> None:
        shown = -1
        while not over.is_set():
            done = sum(run.closed_at() is not None for run in _runs(root, sweep))
            if done != shown:  # the time that is left follows from one training to the next
                progress.update(done)
                shown = done
            over.wait(_LOOK_SECONDS)

    with console.progress("trained", sweep.trainings) as progress:
        thread = threading.Thread(target=look, args=(progress,), daemon=True)
        thread.start()
        try:
            yield
        finally:
            over.set()
            thread.join()


def _check_corpora(sweep: Sweep) -> None:
    """Raises what a training would about its corpus: here in one line, there once a trial."""
    from jobs.training.settled import with_corpora

    recipes = [sweep.recipe(values, sweep.seeds[0]) for values in corners(sweep.space)]
    different = {(repr(each.data), each.model.vocab_size): each for each in recipes}
    for recipe in different.values():
        with_corpora(recipe)


def _param_space(sweep: Sweep) -> dict[str, Any]:
    from ray import tune

    def domain(spec: Any) -> Any:
        if isinstance(spec, list):
            return tune.grid_search(spec) if sweep.search == "grid" else tune.choice(spec)
        [(kind, (low, high))] = spec.items()
        if kind == "integers":
            return tune.randint(low, high + 1)
        return tune.loguniform(low, high) if kind == "log_uniform" else tune.uniform(low, high)

    space = {field: domain(spec) for field, spec in sweep.space.items()}
    # An optimiser is told of the mean over the seeds: there they are one trial. (Tune's Repeater
    # does the same and forgets its groups when the sweep is restored.)
    if sweep.search != "optuna":
        space[SEED] = tune.grid_search(list(sweep.seeds))
    return space


def _tune_config(sweep: Sweep) -> Any:
    from ray import tune
    from ray.tune.schedulers import ASHAScheduler
    from ray.tune.search import BasicVariantGenerator, ConcurrencyLimiter

    scheduler = None
    if stopping := sweep.early_stopping:
        steps = sweep.recipe({}, sweep.seeds[0]).training.steps
        scheduler = ASHAScheduler(
            time_attr="update",
            # Never at its end: a training that got there is evaluated on the whole split.
            max_t=steps + 1,
            grace_period=stopping.after,
            reduction_factor=stopping.reduction,
        )
    n_trials = 1
    if sweep.search == "optuna":
        import optuna
        from ray.tune.search.optuna import OptunaSearch

        optuna.logging.set_verbosity(optuna.logging.WARNING)
        search: Any = OptunaSearch(metric=EVAL_BITS, mode="min", seed=0)
        search = ConcurrencyLimiter(search, max_concurrent=sweep.parallel)
        n_trials = sweep.trials
    else:
        # Fixed draws, the same for each seed: what is begun again tries the same.
        search = BasicVariantGenerator(
            constant_grid_search=True, random_state=0, max_concurrent=sweep.parallel
        )
        if sweep.search == "random":
            n_trials = sweep.trials
    return tune.TuneConfig(
        metric=EVAL_BITS,
        mode="min",
        num_samples=n_trials,
        search_alg=search,
        scheduler=scheduler,
        trial_dirname_creator=_folder_name,
    )


def _folder_name(trial: Any) -> str:
    return trial.trial_id  # Tune's own holds all values: too long a name for a folder


def _values(sweep: Sweep, config: Mapping[str, Any]) -> tuple[dict[str, Any], tuple[int, ...]]:
    """The varied fields and the seeds of a trial."""
    values = {field: _plain(config[field]) for field in sweep.space}
    return values, (config[SEED],) if SEED in config else sweep.seeds


def _plain(value: Any) -> Any:
    return value.item() if hasattr(value, "item") else value


def _trial(config: dict[str, Any], sweep: Sweep, root: str) -> None:
    """One trial, in a process of Ray's: a training, or one after the other with each seed.

    What may stop it early are the evaluations of the first. A training that becomes unstable is an
    answer too: its figure is infinite, and the sweep goes on.
    """
    from ray import tune

    from jobs.evaluation.evaluate import evaluate_run
    from jobs.runs.metric_spool import MetricPoint
    from jobs.training.train import train

    values, seeds = _values(sweep, config)
    quiet = Console(io.StringIO(), io.StringIO(), quiet=True)
    reported = 0

    def report(points: list[MetricPoint]) -> None:
        nonlocal reported
        for point in points:
            if EVAL_BITS in point.values and point.step > reported:
                reported = point.step
                tune.report({EVAL_BITS: point.values[EVAL_BITS], "update": point.step})

    lasts, figures, update = [], {}, 0
    for seed in seeds:
        try:
            trained = train(
                sweep.recipe(values, seed),
                root=root,
                name=sweep.run_name(values, seed),
                console=quiet,
                on_points=report if seed == seeds[0] else None,
            )
        except UserError as error:
            if error.code is not ExitCode.UNSTABLE:
                raise
            figures[str(seed)] = math.inf
            lasts.append(math.inf)
            continue
        evaluation = evaluate_run(trained.run, "validation", reuse=True, console=quiet)
        update = trained.update
        bits = evaluation.bits_per_byte
        figures[str(seed)] = bits if math.isfinite(bits) else math.inf
        lasts.append(_last_evaluation(trained.run, bits))
    tune.report({EVAL_BITS: statistics.fmean(lasts), "update": update, _FIGURES: figures})


def _last_evaluation(run: RunDirectory, otherwise: float) -> float:
    """The metric of the newest checkpoint that has one."""
    from jobs.checkpoints.manifest import complete_checkpoints

    found = [m.metrics[EVAL_BITS] for m in complete_checkpoints(run) if EVAL_BITS in m.metrics]
    return found[-1] if found else otherwise


def _runs(root: Path, sweep: Sweep) -> list[RunDirectory]:
    # In full: a sweep `rates-b` is none of `rates`.
    ours = re.compile(rf"{re.escape(sweep.name)}-[0-9a-f]{{8}}-s\d+")
    folders = sorted(root.glob(f"{sweep.name}-*/run.json"))
    return [RunDirectory(path.parent) for path in folders if ours.fullmatch(path.parent.name)]


def _refuse_another(folder: LocalStore, sweep: Sweep) -> None:
    """Raises UserError if a sweep of this name was begun by another file."""
    text = sweep.to_yaml().encode()
    if not folder.create("sweep.yaml", text) and folder.read("sweep.yaml") != text:
        raise UserError(
            f"sweep {sweep.name}: was begun with another file ({folder.location}/sweep.yaml); give"
            " this one another name"
        )
