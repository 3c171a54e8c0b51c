"""`tvq bench data`: how fast a corpus is made and read here, against what it could be at best."""

import os
import tempfile
from collections.abc import Sequence
from pathlib import Path
from typing import NamedTuple

from jobs import recipe as recipes
from jobs.bench import data_measurement as measured
from jobs.bench.measurement import Spread
from jobs.bench.memory_measurement import measure_memory, measure_near_duplicates
from jobs.console import Console
from jobs.errors import UserError
from pipeline.sources import SourceFile, SourceSettings, list_files

_MEMORY_SHARE = 0.5
"""Of the text, prepared once more for the measure of memory and read by the loader."""


class Figure(NamedTuple):
    """A line of the table."""

    name: str
    clock: str
    """cpu, wall, or none."""
    value: Spread
    unit: str
    against: str
    baseline: float | None
    ratio: Spread | None
    target: str
    """Empty for what is only told."""
    met: bool | None


def data_command(
    *,
    megabytes: float,
    corpus: str | None,
    rounds: int,
    train_tokens_per_second: float,
    console: Console,
    as_json: bool = False,
) -> None:
    """Measures text made of the standard library's sources, or the files of the folder `corpus`.

    Works in a temporary folder (TMPDIR), which takes about three times the text.

    Raises:
        UserError, CorpusError: too little text for the measure, a folder that cannot be read.
    """
    console.heading("bench data")
    recipe = recipes.resolve(recipes.load("small"))
    rows, length = recipe.training.batch_size, recipe.data.sequence_length
    with tempfile.TemporaryDirectory(prefix="tvq-bench-") as name:
        folder = Path(name)
        what = "own text"
        source = SourceSettings((corpus,)) if corpus is not None else None
        if source is None:
            console.line(f"writing {megabytes:,.0f} MB of text")
            source = measured.write_text(folder / "text", megabytes)
            what = "the standard library's sources, repeated"
        files = list_files(source)
        if corpus is not None:
            files = measured.part_of(files, megabytes * 1e6)
        n_bytes = sum(file.size for file in files)
        if n_bytes < 10 * rows * length:
            raise UserError(f"bench data: {n_bytes:,} bytes of text are too few; give more")
        console.line(
            f"text      {n_bytes / 1e6:,.0f} MB in {len(files):,} files ({what}), each a document"
        )
        console.line(f"clock     median of {rounds} rounds in which what is compared takes turns")
        console.line(f"machine   {os.cpu_count()} cores, load {os.getloadavg()[0]:.1f}")
        figures, notes = _measure(folder, files, rounds, (rows, length), console)
        figures.append(_share(figures[-1], train_tokens_per_second))
    if as_json:
        console.json(
            {
                "bench": "data",
                "megabytes": n_bytes / 1e6,
                "documents": len(files),
                "rounds": rounds,
                "train_tokens_per_second": train_tokens_per_second,
                "figures": [
                    each._asdict()
                    | {"value": each.value._asdict()}
                    | {"ratio": each.ratio and each.ratio._asdict()}
                    for each in figures
                ],
                "notes": notes,
            }
        )
        return
    console.table(
        ["figure", "clock", "median", "least", "most", "unit", "of", "ratio", "target", "met"],
        [_row(each) for each in figures],
    )
    for note in notes:
        console.result(note)


def _measure(
    folder: Path,
    files: Sequence[SourceFile],
    rounds: int,
    batch: tuple[int, int],
    console: Console,
) -> tuple[list[Figure], list[str]]:
    """All figures, that of the loader last, and what else there is to say."""
    of_bytes = measured.measure_bytes(folder / "bytes", files, rounds, console)
    figures = []
    for clock in ("cpu", "wall"):
        for name, compared, target in (
            ("bytes: pass 1, find", of_bytes.scan, 0.0),
            ("bytes: pass 2, tokenise and write", of_bytes.write, 0.5),
            ("bytes: both passes", of_bytes.both, 0.0),
        ):
            figures.append(_compared(name, clock, compared, "read + SHA-256", target))
    pieces = measured.measure_pieces(folder / "pieces", files, rounds, console)
    for clock in ("cpu", "wall"):
        name = "SentencePiece: a Ray worker"
        figures.append(_compared(name, clock, pieces.compared, "bare encode", 0.85))
    part = measured.part_of(files, _MEMORY_SHARE * sum(file.size for file in files))
    memories = measure_memory(folder, part, console)
    for memory in memories:
        growth = memory.growth_percent
        figures.append(
            Figure(
                f"memory: {memory.megabytes[1]:,.0f} MB of {memory.form}", "",
                Spread.of([growth]), "% more", f"{memory.megabytes[0]:,.0f} MB",
                None, None, "under 10", growth < 10,
            )
        )  # fmt: skip
    rates = measured.measure_loader(folder / "whole", batch[1], batch[0], rounds)
    for clock in ("wall", "cpu"):
        rate = Spread.of([getattr(each, clock) for each in rates])
        met = rate.median >= 20 if clock == "cpu" else None
        target = "at least 20" if clock == "cpu" else ""
        against = f"batch {batch[0]} x {batch[1]:,}"
        figures.append(Figure("loader", clock, rate, "Mtok/s", against, None, None, target, met))
    peaks = "; ".join(
        f"{memory.form} {memory.peaks[0] / 2**20:,.0f} and {memory.peaks[1] / 2**20:,.0f} MiB"
        for memory in memories
    )
    notes = [
        f"start-up: the first range of a process {of_bytes.start_seconds:.1f} s; Ray, its"
        f" {pieces.workers} workers and their tokenizer {pieces.start_seconds:.1f} s; training the"
        f" tokenizer {pieces.train_seconds:.1f} s",
        f"bytes: {of_bytes.n_bytes / 1e6:,.0f} MB in {of_bytes.shards} shards, each synced to disk;"
        f" SentencePiece: {pieces.n_bytes / 1e6:,.0f} MB a round, all {pieces.workers} workers with"
        f" Ray's own work {pieces.together.median:,.1f} MB/s of wall-clock time",
        f"pass 2 takes {sum(of_bytes.parts.values()):.2f} ns of CPU time a byte: "
        + ", ".join(f"{name} {part:.2f}" for name, part in of_bytes.parts.items()),
        f"memory: peaks of {peaks}, driver and worker in one process; near-duplicates keep"
        f" {measure_near_duplicates():,.0f} bytes a document more",
    ]
    return figures, notes


def _compared(
    name: str, clock: str, compared: measured.Compared, against: str, target: float
) -> Figure:
    rate, baseline, ratio = compared.spreads(clock)
    met = ratio.median >= target if target else None
    wanted = f"at least {target}" if target else ""
    return Figure(name, clock, rate, "MB/s", against, baseline.median, ratio, wanted, met)


def _share(loader: Figure, tokens_per_second: float) -> Figure:
    """How long the loader's CPU time for a batch is, in percent of the training's time for it."""
    percent = Spread.of([100 * tokens_per_second / 1e6 / loader.value.median])
    against = f"{tokens_per_second:,.0f} tokens/s"
    return Figure(
        "loader: of an update", "cpu", percent, "%", against, None, None, "under 1",
        percent.median < 1,
    )  # fmt: skip


def _row(each: Figure) -> list[str]:
    baseline = each.against
    if each.baseline is not None:
        baseline += f", {each.baseline:,.1f}"
    return [
        each.name,
        each.clock,
        *(f"{figure:,.2f}" for figure in each.value),
        each.unit,
        baseline,
        f"{each.ratio.median:.2f}" if each.ratio else "",
        each.target,
        {True: "yes", False: "NO", None: ""}[each.met],
    ]
