"""`tvq bench train --ray`: what Ray, checkpoints and the start of a training cost.

The same training of a few updates runs as a worker of a Ray cluster of its own and, bare, in a
process that has never heard of Ray, in the order bare, Ray, Ray, bare: a machine whose speed drifts
steadily then favours neither. Each is timed by what it recorded itself.
"""

import dataclasses
import itertools
import multiprocessing
import os
import statistics
import tempfile
import time
from collections.abc import Mapping
from concurrent.futures import ProcessPoolExecutor
from pathlib import Path
from typing import Any, NamedTuple

from jobs import recipe as recipes
from jobs.bench.measurement import Spread
from jobs.cluster import accelerators
from jobs.cluster.ray_session import ray_session
from jobs.cluster.ray_worker import run_loop_in_worker
from jobs.console import Console
from jobs.errors import UserError
from jobs.recipe import Recipe
from jobs.runs.lease import Lease
from jobs.runs.ledger import Ledger
from jobs.runs.metric_spool import MetricPoint, read_segment, segments
from jobs.runs.run_directory import RunDirectory
from jobs.training.loop_contract import LoopSettings, Outcome
from jobs.training.settled import with_corpora
from jobs.training.trainer import on_workers

TARGET_SECONDS = 1e-3
"""That Ray may add to an update."""
TARGET_SHARE = 0.02
"""Of the time, that saving may take with a save every 50 updates."""
SAVE_EVERY = 50
_STARTS = ("Ray", "a worker", "join", "imports", "restore", "first step")
"""The parts of a start, in order."""


class Timed(NamedTuple):
    """What a training took, in seconds."""

    update: float
    """An update, from the first batch's end to the last one's; saves and all included."""
    coordination: float
    """Of an update: asking whether to stop, in the goodput ledger."""
    step: float
    """An update without saves and waits: the median."""
    saving: float
    """Of all the time between the first batch and the last, the share held up by saves."""
    longest_save: float
    """That the loop was held up by one, but for the last, which is waited for."""
    last_save: float
    starts: dict[str, float]
    """From the command to the end of the first step, by part; of a bare one, those it has."""


def ray_command(
    name: str,
    overrides: tuple[str, ...],
    *,
    rounds: int,
    updates: int,
    console: Console,
    as_json: bool = False,
) -> None:
    """Times the recipe's training, with and without Ray, in `rounds` blocks of four runs.

    Raises:
        UserError: no corpus, an impossible recipe, too few updates.
    """
    with tempfile.TemporaryDirectory(prefix="tvq-bench-") as folder:
        recipe = _prepared(recipes.load(name, overrides), updates, Path(folder) / "compiled")
        _describe(console, name, recipe, rounds)
        numbers = itertools.count()

        def timed(workers: int) -> Timed:
            run = RunDirectory.at(Path(folder), f"run-{next(numbers)}")
            cluster = dataclasses.replace(recipe.cluster, workers=workers)
            return _timed(run, dataclasses.replace(recipe, cluster=cluster))

        bare: list[Timed] = []
        rayed: list[Timed] = []
        with console.progress("run", 4 * rounds + 1) as progress:
            timed(0)  # fills the compile cache
            for round_ in range(rounds):
                for place, workers in enumerate((0, 1, 1, 0)):
                    progress.update(4 * round_ + place + 1)
                    (rayed if workers else bare).append(timed(workers))
            progress.update(4 * rounds + 1)
    tree = _summary(bare, rayed)
    if as_json:
        console.json({"bench": "train --ray", "name": name, "updates": updates, **tree})
    else:
        _show(console, tree)


def _prepared(recipe: Recipe, updates: int, compiled: Path) -> Recipe:
    """The recipe for so many updates, with nothing in them but steps and saves."""
    each = recipe.updates_per_batch
    every, steps = -(-SAVE_EVERY // each) * each, -(-updates // each) * each
    if steps < 2 * every:
        raise UserError(f"--updates: must be at least {2 * every}, for a save besides the last one")
    recipe = dataclasses.replace(
        recipe,
        training=dataclasses.replace(
            recipe.training, steps=steps, evaluate_every=steps,
            evaluate_windows=recipe.training.batch_size, samples=0,
        ),
        optimizer=dataclasses.replace(recipe.optimizer, warmup_steps=0),
        checkpoint=dataclasses.replace(recipe.checkpoint, every=every),
        cluster=dataclasses.replace(
            recipe.cluster, compile_cache=os.fspath(compiled), accelerator="cpu",
            data=-1, fsdp=1, tensor=1, devices_per_worker=None,
        ),
    )  # fmt: skip
    return recipes.resolve(with_corpora(recipe)[0])


def _timed(run: RunDirectory, recipe: Recipe) -> Timed:
    run.claim(recipes.identity(recipe), {}, recipes.to_yaml(recipe))
    begun = time.time()
    with Lease(run).held() as lease:
        settings = LoopSettings(run.location, recipe, lease.owner)
        marks = _on_ray(settings) if recipe.cluster.workers else _bare(settings)
    return _read(run, recipe, {"begun": begun, **marks})


def _on_ray(settings: LoopSettings) -> dict[str, float]:
    cluster = settings.recipe.cluster
    with ray_session(None, cpus=cluster.cpus_per_worker):
        ready = time.time()
        marks = on_workers(_work, settings, cluster, initialize=_initialize)
        return {"ray": ready, **marks}


_JOINED: dict[str, float] = {}


def _initialize(**arguments: Any) -> None:
    """`jax.distributed.initialize` in a worker, timed."""
    import jax

    _JOINED["worker"] = time.time()
    jax.distributed.initialize(**arguments)
    _JOINED["join"] = time.time()


def _work(config: dict[str, LoopSettings]) -> dict[str, float]:
    ended = run_loop_in_worker(config)
    assert isinstance(ended, Outcome), ended
    return dict(_JOINED)


def _bare(settings: LoopSettings) -> dict[str, float]:
    """In a new process, with the variables that a Ray worker has."""
    variables = accelerators.environment(settings.recipe.cluster)
    context = multiprocessing.get_context("spawn")
    with ProcessPoolExecutor(1, mp_context=context) as pool:
        return pool.submit(_train, settings, variables).result()


def _train(settings: LoopSettings, variables: dict[str, str]) -> dict[str, float]:
    began = time.time()
    os.environ.update(variables)  # XLA reads them at its first use
    from jobs.training.loop import train

    train(settings)
    return {"worker": began}


def _read(run: RunDirectory, recipe: Recipe, marks: Mapping[str, float]) -> Timed:
    """From the points in the spool and the ledger's account."""
    points = [p for name in segments(run.metrics) for p in read_segment(run.metrics, name).points]
    updates = [p for p in points if "train/loss_nats_per_token" in p.values]
    figures = [p for p in points if "goodput/checkpoint_seconds" in p.values]
    ledger = Ledger(run.store)
    ledger.close()
    [account] = ledger.earlier
    first, last = updates[recipe.updates_per_batch - 1], updates[-1]
    n_updates = last.step - first.step
    held_up = [_value(p, "checkpoint") for p in figures]
    saves = [after - before for before, after in itertools.pairwise([0.0, *held_up])]
    whole = (last.time_ms - first.time_ms) / 1000
    ready = account["began"] + account["seconds"]["start"]
    ends = [*(marks[name] for name in ("begun", "ray", "worker", "join") if name in marks)]
    ends += [account["began"], ready, first.time_ms / 1000]
    names = _STARTS if "ray" in marks else ("a worker", "imports", "restore", "first step")
    parts = zip(names, itertools.pairwise(ends), strict=True)
    return Timed(
        update=whole / n_updates,
        coordination=_value(figures[-1], "coordination") / last.step,
        step=statistics.median(p.values["perf/step_seconds_p50"] for p in figures[:-1]),
        saving=sum(saves[:-1]) / whole,
        longest_save=max(saves[:-1]),
        last_save=saves[-1],
        starts={name: end - begin for name, (begin, end) in parts},
    )


def _value(point: MetricPoint, phase: str) -> float:
    return point.values[f"goodput/{phase}_seconds"]


def _summary(bare: list[Timed], rayed: list[Timed]) -> dict[str, Any]:
    """Differences within blocks of bare, Ray, Ray, bare; and both kinds' saves."""
    pairs = [slice(n, n + 2) for n in range(0, len(bare), 2)]
    added = [
        statistics.mean(r.update for r in rayed[pair])
        - statistics.mean(b.update for b in bare[pair])
        for pair in pairs
    ]
    both = [*bare, *rayed]
    return {
        "rounds": len(added),
        "update_seconds_bare": Spread.of([each.update for each in bare])._asdict(),
        "update_seconds_ray": Spread.of([each.update for each in rayed])._asdict(),
        "added_seconds": Spread.of(added)._asdict(),
        "coordination_seconds": Spread.of([each.coordination for each in rayed])._asdict(),
        "saving_share": Spread.of([each.saving for each in both])._asdict(),
        "longest_save_in_steps": Spread.of([e.longest_save / e.step for e in both])._asdict(),
        "longest_save_seconds": Spread.of([each.longest_save for each in both])._asdict(),
        "last_save_seconds": Spread.of([each.last_save for each in both])._asdict(),
        "step_seconds": Spread.of([each.step for each in both])._asdict(),
        "start_seconds_ray": _median_parts(rayed),
        "start_seconds_bare": _median_parts(bare),
    }


def _median_parts(runs: list[Timed]) -> dict[str, float]:
    return {name: statistics.median(each.starts[name] for each in runs) for name in runs[0].starts}


def _describe(console: Console, name: str, recipe: Recipe, rounds: int) -> None:
    training = recipe.training
    console.heading("bench train --ray")
    console.line(
        f"training  {name}: {training.steps} updates, {training.batch_size} rows of"
        f" {recipe.data.sequence_length:,} tokens, {recipe.updates_per_batch} updates a batch; a"
        f" save every {recipe.checkpoint.every}"
    )
    console.line(
        f"runs      {rounds} block{'s' * (rounds > 1)} of bare, Ray, Ray, bare; one worker on"
        f" {recipe.cluster.cpus_per_worker} core; medians, with the least and the most"
    )


def _show(console: Console, tree: dict[str, Any]) -> None:
    def spread(name: str, factor: float, digits: int) -> str:
        median, least, most = (factor * figure for figure in tree[name].values())
        return f"{median:,.{digits}f} ({least:,.{digits}f} to {most:,.{digits}f})"

    console.result(f"an update, bare          {spread('update_seconds_bare', 1e3, 2)} ms")
    console.result(f"an update, Ray           {spread('update_seconds_ray', 1e3, 2)} ms")
    console.result(
        f"added, block by block    {spread('added_seconds', 1e3, 2)} ms; with 6 blocks or more the"
        " median lies in that range 97 times of 100"
    )
    console.result(
        f"of it in the loop        {spread('coordination_seconds', 1e3, 3)} ms an update by the"
        f" goodput ledger; target at most {TARGET_SECONDS * 1e3:g} ms"
    )
    console.result(
        f"held up by saves         {spread('saving_share', 100, 2)} % of the time, but for the last"
        f" save; target at most {TARGET_SHARE:.0%}"
    )
    console.result(
        f"the longest save         {spread('longest_save_in_steps', 1, 2)} steps,"
        f" {spread('longest_save_seconds', 1e3, 1)} ms; target at most 1 step"
    )
    console.result(f"the last, waited for     {spread('last_save_seconds', 1, 2)} s")
    for kind in ("ray", "bare"):
        parts = tree[f"start_seconds_{kind}"]
        each = ", ".join(f"{name} {seconds:.1f}" for name, seconds in parts.items())
        what = "start with Ray " if kind == "ray" else "start bare     "
        console.result(f"{what}          {sum(parts.values()):.1f} s: {each}")
