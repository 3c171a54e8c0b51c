"""Which values of a sweep were best, and how sure that is."""

import math
import statistics
from pathlib import Path
from typing import Any, NamedTuple

from jobs.comparison.seed_spread import LEAST_SEEDS
from jobs.units import NATS_PER_BIT


class Trial(NamedTuple):
    """One training of a sweep."""

    run: str
    """Its name."""
    values: dict[str, Any]
    """Of the fields that are varied."""
    seed: int
    bits_per_byte: float | None
    """On the whole validation split; None if it was stopped early, infinite if it became
    unstable."""


class Configuration(NamedTuple):
    """The trainings with the same values."""

    values: dict[str, Any]
    trials: list[Trial]
    mean: float | None
    """Bits per byte over the seeds that were trained to the end; None if there are none, infinite
    if one of them became unstable."""
    low: float | None = None
    """Ends of the 95% interval of the mean over seeds; None for fewer than two."""
    high: float | None = None

    def as_json(self) -> dict[str, Any]:
        """For a script."""
        trials = [trial._asdict() for trial in self.trials]
        return self._asdict() | {"trials": trials, "unstable": self.mean == math.inf}


def ranked(trials: list[Trial]) -> list[Configuration]:
    """The configurations, the best first; those that became unstable or were stopped last."""
    groups: dict[str, list[Trial]] = {}
    for trial in trials:
        groups.setdefault(repr(sorted(trial.values.items())), []).append(trial)
    found = []
    for members in groups.values():
        figures = [t.bits_per_byte for t in members if t.bits_per_byte is not None]
        mean = statistics.fmean(figures) if figures else None
        low, high = _interval(figures)
        members = sorted(members, key=lambda trial: trial.seed)
        found.append(Configuration(members[0].values, members, mean, low, high))
    return sorted(found, key=lambda one: (one.mean is None, one.mean or 0.0))


def table(configurations: list[Configuration]) -> tuple[list[str], list[list[str]]]:
    """Columns and rows of the ranking."""
    fields = list(configurations[0].values) if configurations else []
    rows = [
        [
            *(_shown(one.values[field]) for field in fields),
            _figure(one.mean),
            f"{one.low:.4f} to {one.high:.4f}" if one.low is not None else "-",
            str(len(_finished(one))),
            one.trials[0].run,
        ]
        for one in configurations
    ]
    return [*fields, "bits per byte", "95% over seeds", "seeds", "first run"], rows


def ranking_lines(configurations: list[Configuration], root: Path) -> list[str]:
    """The best, and by how much it beats the second, with the 95% interval of that."""
    finished = [one for one in configurations if one.mean is not None and one.mean < math.inf]
    if not finished:
        return ["no training was done to its end"]
    best = finished[0]
    values = " ".join(f"{field}={_shown(value)}" for field, value in best.values.items())
    lines = [f"best      {values}: {best.mean:.4f} bits per byte on the whole validation split"]
    if len(finished) > 1:
        lines.append(f"second    {_difference(best, finished[1], root)}")
    if unstable := sum(one.mean == math.inf for one in configurations):
        lines.append(f"unstable  {unstable} of {len(configurations)}: no update could be applied")
    names = [trial.run for one in finished[:2] for trial in _finished(one)]
    lines.append(f"more      tvq compare {' '.join(names)} --root {root}")
    return lines


def _difference(best: Configuration, second: Configuration, root: Path) -> str:
    """Paired by seed where there are two or more, else over the documents of the split."""
    theirs = {trial.seed: trial for trial in _finished(second)}
    pairs = [(trial, theirs[trial.seed]) for trial in _finished(best) if trial.seed in theirs]
    assert best.mean is not None
    assert second.mean is not None
    mean = second.mean - best.mean
    if not pairs:
        return f"{mean:+.4f}; no seed was trained to its end with both"
    low, high = _interval([_worse_by(*pair) for pair in pairs])
    if low is not None and high is not None:
        sure = "more than chance" if low > 0 else "not more than the seeds differ"
        if low > 0 and len(pairs) < LEAST_SEEDS:  # as `tvq compare` says of the same runs
            sure = f"a verdict takes {LEAST_SEEDS} seeds"
        return f"{mean:+.4f} (95% of {low:+.4f} to {high:+.4f} over {len(pairs)} seeds): {sure}"
    [(ours, other)] = pairs
    bounds, pieces = _over_blocks(ours, other, root)
    bits = _worse_by(ours, other)
    if bounds is None:
        return f"{bits:+.4f}; one seed and {pieces} are too few to tell chance from more"
    sure = "more than the choice of text" if bounds[0] > 0 else "not more than the choice of text"
    return (
        f"{bits:+.4f} (95% of {bounds[0]:+.4f} to {bounds[1]:+.4f} over {pieces}; one seed): {sure}"
    )


def _finished(one: Configuration) -> list[Trial]:
    """Its trainings that have a figure."""
    return [t for t in one.trials if t.bits_per_byte is not None and t.bits_per_byte < math.inf]


def _figure(mean: float | None) -> str:
    if mean is None:
        return "stopped early"
    return f"{mean:.4f}" if mean < math.inf else "unstable"


def _worse_by(best: Trial, second: Trial) -> float:
    """By how many bits per byte the second is worse."""
    assert best.bits_per_byte is not None
    assert second.bits_per_byte is not None
    return second.bits_per_byte - best.bits_per_byte


def _over_blocks(best: Trial, second: Trial, root: Path) -> tuple[tuple[float, float] | None, str]:
    """The interval of the difference over the split's documents or blocks, and how many of what."""
    from jobs.console import Console
    from jobs.evaluation.bootstrap import interval
    from jobs.evaluation.evaluate import evaluate_run
    from jobs.runs.run_directory import RunDirectory

    ours, theirs = (
        evaluate_run(
            RunDirectory.existing(root, trial.run),
            "validation",
            reuse=True,
            console=Console(quiet=True),
        ).blocks
        for trial in (best, second)
    )
    numerators = (theirs.nats - ours.nats) / NATS_PER_BIT
    return interval(numerators, ours.n_bytes), f"{len(ours.nats)} {ours.kind}"


def _interval(values: list[float]) -> tuple[float | None, float | None]:
    """95%, by Student's t."""
    if len(values) < 2 or math.inf in values:
        return None, None
    from scipy import stats

    half = stats.sem(values) * stats.t.ppf(0.975, len(values) - 1)
    mean = statistics.fmean(values)
    return float(mean - half), float(mean + half)


def _shown(value: Any) -> str:
    return f"{value:.4g}" if isinstance(value, float) else str(value)
