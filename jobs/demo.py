"""`tvq demo`: every stage once, on real text, with a worker killed half-way."""

import dataclasses
import hashlib
import json
import os
import signal
import time
from pathlib import Path

from jobs import recipe as recipes
from jobs.checkpoints.manifest import newest_update
from jobs.cluster.ray_session import ray_session
from jobs.console import Console
from jobs.corpora.prepare import prepare_corpus
from jobs.errors import UserError
from jobs.recipe import Recipe
from jobs.runs import run_log
from jobs.runs.metric_spool import MetricPoint
from jobs.runs.run_directory import RunDirectory
from jobs.training.train import train
from pipeline.sources import SourceSettings, list_files, standard_library
from pipeline.storage import LocalStore

FULL, WINDOW = "vq-cache", "window-only"
"""The two runs: with the compressive cache, and with the local window alone."""


def demo(source: str | None, output: Path, console: Console) -> None:
    """Runs all stages; what an earlier demo in `output` finished is reused."""
    from jobs.comparison.compare import compare_command
    from jobs.evaluation.evaluate import evaluate_command
    from jobs.evaluation.sample import sample_command
    from pipeline.plan import PrepareSettings

    began = time.monotonic()
    corpus, runs = output / "corpus", output / "runs"
    source_settings = SourceSettings((source,)) if source else standard_library()
    with_cache = recipes.load("tiny", (f"data.corpus={corpus}",))
    _refuse_another_demo(output, source_settings, with_cache)
    without = dataclasses.replace(
        with_cache, model=dataclasses.replace(with_cache.model, compressive_cache=False)
    )

    # One Ray cluster for all stages: starting it takes longer than preparing the corpus.
    with ray_session(None, cpus=with_cache.cluster.most_workers):
        what = source or "the sources of this Python's standard library"
        console.heading(f"prepare: {what}, as bytes, into Arrow shards (Ray Data)")
        settings = PrepareSettings(
            source=source_settings,
            shard_bytes=2 * 2**20,
        )
        prepare_corpus(settings, corpus, console)

        console.heading(
            f"train {FULL}: window and compressive cache, one worker is killed half-way"
        )
        _train_through_a_kill(with_cache, runs, console)

        console.heading(f"train {WINDOW}: the same without the compressive cache")
        train(without, root=runs, name=WINDOW, console=console)

    for name in (FULL, WINDOW):
        console.heading(f"evaluate {name}: the test split, which neither run has seen")
        evaluate_command(runs, name, "test", console=console)

    console.heading(f"sample {FULL}")
    prompt = "" if source else "class "
    sample_command(
        runs,
        FULL,
        prompts=(prompt,),
        tokens=300,
        temperature=0.7,
        top_p=0.95,
        seed=1,
        console=console,
    )

    console.heading(f"compare {FULL} {WINDOW}")
    compare_command(runs, (FULL, WINDOW), output / "loss.png", console=console)

    console.heading(f"done in {_minutes(time.monotonic() - began)}")
    console.line(f"everything is in {output.absolute()}")
    console.line(f"open MLflow with: tvq ui --root {_quoted(runs)}")


def _refuse_another_demo(output: Path, source: SourceSettings, recipe: Recipe) -> None:
    """Raises UserError where `output` holds a demo of other texts or another recipe.

    Preparing would replace the corpus that its runs were begun on.
    """
    found = [[file.id, file.size] for file in list_files(source)]
    identity = [recipes.identity(recipes.resolve(recipe)), found]
    mine = hashlib.sha256(json.dumps(identity).encode()).hexdigest()
    note = output / "demo.json"
    if note.exists() and json.loads(note.read_text(encoding="utf-8"))["demo"] != mine:
        raise UserError(
            f"{output}: holds a demo of other texts, or of another version of tvq; give"
            " --output ANOTHER, or remove it"
        )
    if not note.exists():
        if output.exists() and any(output.iterdir()):
            raise UserError(f"{output}: is there and is not a demo; give --output ANOTHER")
        output.mkdir(parents=True, exist_ok=True)
        LocalStore(output).write("demo.json", (json.dumps({"demo": mine}) + "\n").encode())


def _train_through_a_kill(recipe: Recipe, root: Path, console: Console) -> None:
    """Trains; once half the updates are made, kills the last worker with SIGKILL."""
    run = RunDirectory.at(root.absolute(), FULL)
    half = recipe.training.steps // 2
    victim = f"rank-{recipe.cluster.most_workers - 1}"
    earlier = len(run_log.events(run.logs, victim, "group start"))
    killed = newest_update(run) >= half

    def kill_at_half(points: list[MetricPoint]) -> None:
        nonlocal killed
        if killed or not points or points[-1].step < half or newest_update(run) == 0:
            return
        starts = run_log.events(run.logs, victim, "group start")[earlier:]
        if not starts:  # points that an earlier demo left: nobody to kill yet
            return
        killed, started = True, starts[-1]
        os.kill(started["worker_pid"], signal.SIGKILL)
        console.line(
            f"killed {victim} (process {started['worker_pid']}) with SIGKILL at update"
            f" {points[-1].step}; Ray starts the workers again"
        )

    train(recipe, root=root, name=FULL, console=console, on_points=kill_at_half)


def _minutes(seconds: float) -> str:
    return f"{int(seconds) // 60} min {int(seconds) % 60} s"


def _quoted(path: Path) -> str:
    import shlex

    return shlex.quote(str(path))
