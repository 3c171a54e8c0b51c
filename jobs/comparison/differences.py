"""What differs between runs, in their recipes and in their results, as MLflow holds them."""

import math
import statistics
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any, Literal, NamedTuple

from jobs.comparison.seed_groups import SEED, Group, finite, group_by_recipe, is_finite
from jobs.comparison.seed_spread import SeedVerdict, seed_verdicts
from jobs.errors import UserError
from jobs.metric_names import (
    EVAL_BITS,
    EVAL_LOSS,
    TOKENS_PER_SECOND,
    TRAIN_LOSS,
    TRAIN_TOKENS,
)
from jobs.tracking.reading import RunSummary, history, points, run

By = Literal["step", "tokens", "hours"]
"""What curves are drawn over."""


@dataclass(frozen=True)
class Candidate:
    """A run to compare."""

    name: str
    run_id: str
    """MLflow's."""
    uri: str
    """MLflow tracking URI."""


class CurvePoint(NamedTuple):
    """One value of a metric."""

    update: int
    value: float
    x: float
    """Where on the axis asked for: the update, the tokens trained on, or the hours since the run
    began, pauses included."""


class Best(NamedTuple):
    """The lowest value of a metric."""

    value: float
    update: int


class ComparedRun(NamedTuple):
    """One run's part of a comparison."""

    name: str
    run_id: str
    status: str
    parameters: dict[str, str]
    datasets: dict[str, list[str]]
    """Fingerprints of the corpus splits, by what they were used for."""
    updates: int
    """Updates made."""
    tokens: int
    """Tokens trained on."""
    train_loss: float
    """Mean over the last 5% of the updates, nats a token: a single update's loss is noise."""
    last: dict[str, float]
    """Last value of every `eval/`, `validation/` and `test/` metric."""
    best: dict[str, Best]
    """Lowest value of every `eval/` loss and bits per byte."""
    tokens_per_second: float
    """Median."""
    curves: dict[str, list[CurvePoint]]
    """By update; of TRAIN_LOSS, EVAL_LOSS and EVAL_BITS."""


class MetricVerdict(NamedTuple):
    """How the recipes compare in one metric."""

    metric: str
    update: int
    """The last one after which all runs were evaluated."""
    values: list[list[float]]
    """Of each group's seeds, in the groups' order."""
    against_first: list[SeedVerdict]
    """Of each group but the first."""


class Comparison(NamedTuple):
    """Runs side by side."""

    runs: list[ComparedRun]
    groups: list[Group]
    """Runs that differ in the seed alone are one."""
    differences: dict[str, list[str]]
    """Parameters that are not the same in all runs: by name, each run's value ("-": none)."""
    verdict: MetricVerdict | None
    """None for fewer than two recipes, or without an evaluation that all runs share."""
    cautions: list[str]
    """Why figures that stand side by side may not be comparable, a sentence each."""
    by: By

    @property
    def has_seeds(self) -> bool:
        """Whether a recipe was run with more than one seed."""
        return any(len(group.members) > 1 for group in self.groups)


def compare(candidates: list[Candidate], by: By = "step") -> Comparison:
    """Reads the runs from MLflow. Raises UserError if the store or a run cannot be read."""
    if not candidates:
        raise UserError("nothing to compare: name one run or more, or give a --query")
    runs = [_read(candidate, by) for candidate in candidates]
    groups = group_by_recipe(runs)
    names = sorted({name for one in runs for name in one.parameters})
    values = {name: [one.parameters.get(name, "-") for one in runs] for name in names}
    differences = {name: row for name, row in values.items() if len(set(row)) > 1}
    cautions = _cautions(runs, groups)
    return Comparison(runs, groups, differences, _verdict(runs, groups), cautions, by)


def last_common_evaluation(runs: Sequence[ComparedRun]) -> tuple[int, list[float]] | None:
    """The last update after which all runs were evaluated, and each one's bits per byte there."""
    curves = [{p.update: p.value for p in one.curves[EVAL_BITS]} for one in runs]
    common = set.intersection(*map(set, curves))
    return (max(common), [curve[max(common)] for curve in curves]) if common else None


def difference_table(comparison: Comparison) -> tuple[list[str], list[list[str]]]:
    """Columns and rows of the parameters that differ: by recipe if there are several seeds."""
    if not comparison.has_seeds:
        rows = [[name, *values] for name, values in comparison.differences.items()]
        return ["parameter", *(one.name for one in comparison.runs)], rows
    rows = []
    for name, values in comparison.differences.items():
        cells = [_joined([values[i] for i in group.members]) for group in comparison.groups]
        if name == SEED or len(set(cells)) > 1:
            rows.append([name, *cells])
    return ["parameter", *(group.name for group in comparison.groups)], rows


def result_table(comparison: Comparison) -> tuple[list[str], list[list[str]]]:
    """Columns and rows of the results.

    A column a run; of runs that differ in the seed alone, a column a recipe: the mean, and the
    least and the most. Two columns get a third with the second less the first.
    """
    runs = comparison.runs
    names, members = [one.name for one in runs], [[index] for index in range(len(runs))]
    if comparison.has_seeds:
        names = [group.name for group in comparison.groups]
        members = [group.members for group in comparison.groups]
    columns = ["result", *names, *(["difference"] if len(names) == 2 else [])]
    cells = []
    for label, values, form in _results(comparison):
        columned = [[values[index] for index in column] for column in members]
        row = [label, *(_cell(column, form) for column in columned)]
        if len(names) == 2:
            row.append(_cell([_mean(columned[1]) - _mean(columned[0])], "+" + form))
        cells.append(row)
    return columns, cells


def verdict_lines(comparison: Comparison) -> list[str]:
    """What the seeds say of the recipes' difference, and what to be careful about; a line each."""
    lines = []
    if verdict := comparison.verdict:
        first, *others = [group.name for group in comparison.groups]
        for name, seeds in zip(others, verdict.against_first, strict=True):
            lines.append(
                f"{verdict.metric} at update {verdict.update:,}, {name} less {first}:"
                f" {seeds.difference:+.4f} {seeds.conclusion} ({seeds.why})"
            )
    return lines + [f"careful: {caution}" for caution in comparison.cautions]


def as_json(comparison: Comparison) -> dict[str, Any]:
    """The comparison for a script; curves are left out, MLflow has them."""
    names = [one.name for one in comparison.runs]
    common = last_common_evaluation(comparison.runs)
    verdict = comparison.verdict
    return {
        "last_common_evaluation": {
            "update": common[0],
            EVAL_BITS: dict(zip(names, common[1], strict=True)),
        }
        if common
        else None,
        "differences": {
            name: dict(zip(names, values, strict=True))
            for name, values in comparison.differences.items()
        },
        "groups": [
            {
                "name": group.name,
                "runs": [names[index] for index in group.members],
                "repeated_seeds": [names[index] for index in group.repeats],
            }
            for group in comparison.groups
        ],
        "verdicts": [
            {
                "metric": verdict.metric,
                "update": verdict.update,
                "first": comparison.groups[0].name,
                "other": group.name,
                "difference": seeds.difference,
                "ranges_apart": seeds.ranges_apart,
                "welch": seeds.welch._asdict() if seeds.welch else None,
                "p_adjusted": seeds.p_adjusted,
                "conclusion": str(seeds.conclusion),
                "why": seeds.why,
            }
            for group, seeds in zip(comparison.groups[1:], verdict.against_first, strict=True)
        ]
        if verdict
        else [],
        "cautions": comparison.cautions,
        "runs": [
            {
                "name": one.name,
                "mlflow_run_id": one.run_id,
                "status": one.status,
                "updates": one.updates,
                "tokens": one.tokens,
                "train_loss_nats_per_token": one.train_loss,
                "tokens_per_second": one.tokens_per_second,
                "last": one.last,
                "best": {name: best._asdict() for name, best in one.best.items()},
            }
            for one in comparison.runs
        ],
    }


def _read(candidate: Candidate, by: By) -> ComparedRun:
    summary = run(candidate.uri, candidate.run_id)
    curves = _curves(candidate, summary, by)
    losses = [point.value for point in curves[TRAIN_LOSS]]
    rates = (
        history(candidate.uri, candidate.run_id, TOKENS_PER_SECOND)
        if TOKENS_PER_SECOND in summary.metrics
        else []
    )
    last = {
        name: value
        for name, value in sorted(summary.metrics.items())
        if name.startswith(("eval/", "validation/", "test/"))
    }
    best = {}
    for name in (EVAL_LOSS, EVAL_BITS):
        sound = [(p.value, p.update) for p in curves[name] if is_finite(p.value)]
        if sound:
            best[name] = Best(*min(sound))
    return ComparedRun(
        name=candidate.name,
        run_id=candidate.run_id,
        status=summary.status,
        parameters=summary.parameters,
        datasets=summary.datasets,
        updates=curves[TRAIN_LOSS][-1].update if losses else 0,
        tokens=int(summary.metrics.get(TRAIN_TOKENS, 0)),
        train_loss=statistics.fmean(losses[-max(1, len(losses) // 20) :]) if losses else math.nan,
        last=last,
        best=best,
        tokens_per_second=statistics.median(rate for _, rate in rates) if rates else math.nan,
        curves=curves,
    )


def _curves(candidate: Candidate, summary: RunSummary, by: By) -> dict[str, list[CurvePoint]]:
    tokens: dict[int, float] = {}
    if by == "tokens" and TRAIN_TOKENS in summary.metrics:
        tokens = dict(history(candidate.uri, candidate.run_id, TRAIN_TOKENS))
    curves = {}
    for name in (TRAIN_LOSS, EVAL_LOSS, EVAL_BITS):
        found = []
        if name in summary.metrics:
            found = points(candidate.uri, candidate.run_id, name)
        curves[name] = [
            CurvePoint(
                point.step,
                point.value,
                {
                    "step": float(point.step),
                    "tokens": tokens.get(point.step, math.nan),
                    "hours": (point.time_ms - summary.start_ms) / 3.6e6,
                }[by],
            )
            for point in found
        ]
    return curves


def _verdict(runs: list[ComparedRun], groups: list[Group]) -> MetricVerdict | None:
    counted = [index for group in groups for index in group.members]
    common = last_common_evaluation([runs[index] for index in counted])
    if len(groups) < 2 or common is None:
        return None
    update, values = common
    by_run = dict(zip(counted, values, strict=True))
    figures = [finite([by_run[index] for index in group.members]) for group in groups]
    if not all(figures):
        return None
    return MetricVerdict(EVAL_BITS, update, figures, seed_verdicts(figures[0], figures[1:]))


def _cautions(runs: list[ComparedRun], groups: list[Group]) -> list[str]:
    cautions = []
    if len({tuple(sorted(one.datasets.get("evaluation", []))) for one in runs}) > 1:
        cautions.append(
            "the runs were validated on different splits (their fingerprints differ), so their"
            " figures are of different texts"
        )
    windows = {one.parameters.get("training.evaluate_windows", "") for one in runs}
    if len(windows) > 1:
        cautions.append(
            "training.evaluate_windows differs, so the evaluations cover different parts of"
            " the validation split"
        )
    for group in groups:
        for index in group.repeats:
            cautions.append(f"{runs[index].name} repeats a seed of {group.name} and is not counted")
    unfinished = [f"{one.name} ({one.status})" for one in runs if one.status != "FINISHED"]
    if unfinished:
        cautions.append(f"not finished: {', '.join(unfinished)}")
    return cautions


def _results(comparison: Comparison) -> list[tuple[str, list[float], str]]:
    """Label, each run's value, and the format of it."""
    runs = comparison.runs
    rows: list[tuple[str, list[float], str]] = [
        ("updates", [one.updates for one in runs], ",.0f"),
        ("tokens trained on", [one.tokens for one in runs], ",.0f"),
        ("train loss, nats/token (last 5%)", [one.train_loss for one in runs], ".4f"),
    ]
    for name in sorted({name for one in runs for name in one.last}):
        rows.append((f"{name}, last", [one.last.get(name, math.nan) for one in runs], ".4f"))
        if any(name in one.best for one in runs):
            best = [one.best[name].value if name in one.best else math.nan for one in runs]
            rows.append((f"{name}, best", best, ".4f"))
    common = last_common_evaluation(runs)
    if common and any(one.curves[EVAL_BITS][-1].update != common[0] for one in runs):
        rows.append((f"{EVAL_BITS} at update {common[0]:,}", common[1], ".4f"))
    rows.append(("tokens/s (median)", [one.tokens_per_second for one in runs], ",.0f"))
    return rows


def _joined(values: Sequence[str]) -> str:
    return ", ".join(dict.fromkeys(values))


def _mean(values: Sequence[float]) -> float:
    sound = finite(values)
    return statistics.fmean(sound) if sound else math.nan


def _cell(values: Sequence[float], form: str) -> str:
    sound = finite(values)
    if not sound:
        return "-"
    mean = format(statistics.fmean(sound), form)
    least, most = format(min(sound), form), format(max(sound), form)
    return mean if least == most else f"{mean} ({least} to {most})"
