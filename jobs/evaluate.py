"""`tvq evaluate`: a run's newest checkpoint on a held-out split, every token exactly once."""

import contextlib
import functools
import time
from typing import NamedTuple

import numpy as np

from jobs.console import Console
from jobs.errors import UserError
from jobs.host_memory import keep_freed_memory
from jobs.run_directory import RunDirectory
from jobs.trained_model import TrainedModel, load_trained_model, refuse_other_text
from jobs.units import bits_per_byte, targets_of
from jobs.yardsticks import Yardsticks, yardsticks
from pipeline.mixture import Mixture
from pipeline.storage import Location

BATCH_SIZE = 16
"""Windows scored at a time: fixed, so that the figures do not depend on the machine."""


class Evaluation(NamedTuple):
    """The figures of one checkpoint on one split."""

    update: int
    windows: int
    targets: int
    """Tokens predicted: every token of the split and, in a stream, each document's eos, once."""
    documents: int
    n_bytes: int
    nats_per_token: float
    bits_per_byte: float
    tokens_per_second: float
    """Compilation left out."""
    corpora: dict[str, float]
    """Bits per byte of each corpus that the split is of, by name."""


def evaluate_command(
    root: Location, name: str, split: str, *, console: Console, as_json: bool = False
) -> Evaluation:
    """Evaluates, prints, and adds the figures to the run in MLflow."""
    run = RunDirectory.existing(root, name)
    keep_freed_memory()
    trained = load_trained_model(run)
    mixture = trained.mixture()
    refuse_other_text(run, mixture, split, trained.fingerprints[split])
    figures = evaluate(trained, mixture, split, console)
    yardstick = yardsticks(list(mixture.weights), split)
    _track(run, trained, split, figures, yardstick, console)
    if as_json:
        console.json(
            {
                "run": run.name,
                "split": split,
                **figures._asdict(),
                "gzip_bits_per_byte": yardstick.gzip,
                "xz_bits_per_byte": yardstick.xz,
            }
        )
        return figures
    console.line(
        f"{run.name} at update {figures.update} on the {split} split: {figures.documents}"
        f" documents, {figures.n_bytes:,} bytes, {figures.targets:,} targets in"
        f" {figures.windows:,} windows, each target once, at"
        f" {figures.tokens_per_second:,.0f} tokens/s"
    )
    console.table(
        ["", "bits per byte"],
        [
            (f"{run.name}", f"{figures.bits_per_byte:.3f}"),
            *(
                (f"  on {name}", f"{bits:.3f}")
                for name, bits in figures.corpora.items()
                if len(figures.corpora) > 1
            ),
            ("xz -9e", f"{yardstick.xz:.3f}"),
            ("gzip -9", f"{yardstick.gzip:.3f}"),
        ],
    )
    return figures


def evaluate(trained: TrainedModel, mixture: Mixture, split: str, console: Console) -> Evaluation:
    """Scores every window of a split, from an empty cache each, summed in their order.

    Of a mixture: the split of the one corpus after that of the other, whatever their weights.
    """
    import jax

    from model.training import evaluation_step
    from pipeline.loader import evaluation_batches

    recipe = trained.recipe
    step = jax.jit(functools.partial(evaluation_step, recipe.model))
    held_out = mixture.splits(split)
    expected = [targets_of(part, recipe.data.window) for part in held_out]
    nats, targets, windows = [0.0] * len(held_out), [0] * len(held_out), 0
    began, scored = None, 0
    with console.progress("token", sum(expected)) as progress:
        for index, corpus in enumerate(mixture.corpora):
            batches = evaluation_batches(
                corpus.path,
                split,
                sequence_length=recipe.data.sequence_length,
                batch_size=BATCH_SIZE,
                window=recipe.data.window,
                cache_bytes=recipe.data.cache_bytes,
            )
            with contextlib.closing(batches):
                for batch in batches:
                    scores = jax.device_get(step(trained.params, trained.codebooks, batch))
                    now, count = time.monotonic(), int(batch.loss_mask.sum())
                    began, scored = (now, 0) if began is None else (began, scored + count)
                    nats[index] += float(np.sum(scores, dtype=np.float64))
                    targets[index] += count
                    windows += int((batch.rows >= 0).sum())
                    rate = scored / max(now - began, 1e-9) or None
                    progress.update(sum(targets), tokens_per_second=rate)
        elapsed = time.monotonic() - (began or 0)
    if targets != expected:
        raise RuntimeError(f"covered {targets} targets of the {split} split's {expected}")
    bits = [
        bits_per_byte(total / count, part, recipe.data.window)
        for total, count, part in zip(nats, targets, held_out, strict=True)
    ]
    n_bytes = [part.n_bytes for part in held_out]
    return Evaluation(
        update=trained.update,
        windows=windows,
        targets=sum(targets),
        documents=sum(part.documents for part in held_out),
        n_bytes=sum(n_bytes),
        nats_per_token=sum(nats) / sum(targets),
        bits_per_byte=float(np.average(bits, weights=n_bytes)),
        tokens_per_second=scored / max(elapsed, 1e-9),
        corpora={c.name: value for c, value in zip(mixture.corpora, bits, strict=True)},
    )


def _track(
    run: RunDirectory,
    trained: TrainedModel,
    split: str,
    figures: Evaluation,
    yardstick: Yardsticks,
    console: Console,
) -> None:
    from jobs.tracking.reading import add_to_run
    from jobs.train import store_of_run

    record = run.record()
    if record is None or record.mlflow_run_id is None:
        console.warning(f"run {run.name} has no MLflow run; the figures are printed only")
        return
    values = {
        f"{split}/loss_nats_per_token": figures.nats_per_token,
        f"{split}/bits_per_byte": figures.bits_per_byte,
        f"yardstick/{split}_xz_bits_per_byte": yardstick.xz,
        f"yardstick/{split}_gzip_bits_per_byte": yardstick.gzip,
    }
    if len(figures.corpora) > 1:
        values |= {f"{split}/{name}/bits_per_byte": b for name, b in figures.corpora.items()}
    try:
        add_to_run(store_of_run(run).uri, record.mlflow_run_id, values, figures.update)
    except UserError as error:  # the figures stand, whatever the tracking server does
        console.warning(f"the figures are not in MLflow: {error}")
