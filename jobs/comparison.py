"""`tvq compare`: what differs between runs, in their recipes and in their results."""

import logging
import math
import os
import statistics
from collections import deque
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any, NamedTuple

from jobs.errors import UserError
from jobs.palette import PALETTE
from jobs.tracking.delivery import TOKENS_METRIC
from jobs.tracking.reading import history, run

if TYPE_CHECKING:
    from matplotlib.axes import Axes

TRAIN_LOSS = "train/loss_nats_per_token"
EVAL_LOSS = "eval/loss_nats_per_token"
EVAL_BITS = "eval/bits_per_byte"
RATE = "perf/tokens_per_second"

_LARGEST = 1e300
"""MLflow stores infinities as the largest floats: no value above this is one."""
_LINES = ("-", "--", ":")
"""The line style changes when the colours are used up."""

Curve = list[tuple[int, float]]
"""(update, value) by update."""


@dataclass(frozen=True)
class Candidate:
    """A run to compare."""

    name: str
    run_id: str
    """MLflow's."""
    uri: str
    """MLflow tracking URI."""


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
    curves: dict[str, Curve]
    """Of TRAIN_LOSS, EVAL_LOSS and EVAL_BITS."""


class Comparison(NamedTuple):
    """Runs side by side."""

    runs: list[ComparedRun]
    differences: dict[str, list[str]]
    """Parameters that are not the same in all runs: by name, each run's value ("-": none)."""


def compare(candidates: list[Candidate]) -> Comparison:
    """Reads the runs from MLflow. Raises UserError if the store or a run cannot be read."""
    if not candidates:
        raise UserError("nothing to compare: name one run or more")
    runs = [_read(candidate) for candidate in candidates]
    names = sorted({name for one in runs for name in one.parameters})
    values = {name: [one.parameters.get(name, "-") for one in runs] for name in names}
    return Comparison(runs, {name: row for name, row in values.items() if len(set(row)) > 1})


def difference_table(comparison: Comparison) -> tuple[list[str], list[list[str]]]:
    """Columns and rows of the parameters that differ."""
    rows = [[name, *values] for name, values in comparison.differences.items()]
    return ["parameter", *(one.name for one in comparison.runs)], rows


def result_table(comparison: Comparison) -> tuple[list[str], list[list[str]]]:
    """Columns and rows of the results; two runs get a column with the second less the first."""
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
    common = last_common_evaluation(comparison)
    if common and any(one.curves[EVAL_BITS][-1][0] != common[0] for one in runs):
        rows.append((f"{EVAL_BITS} at update {common[0]:,}", common[1], ".4f"))
    rows.append(("tokens/s (median)", [one.tokens_per_second for one in runs], ",.0f"))
    columns = ["result", *(one.name for one in runs)]
    if len(runs) == 2:
        columns.append("difference")
    cells = []
    for label, values, form in rows:
        row = [label, *(_cell(value, form) for value in values)]
        if len(runs) == 2:
            row.append(_cell(values[1] - values[0], "+" + form))
        cells.append(row)
    return columns, cells


def last_common_evaluation(comparison: Comparison) -> tuple[int, list[float]] | None:
    """The last update after which all runs were evaluated, and each one's bits per byte there."""
    curves = [dict(one.curves[EVAL_BITS]) for one in comparison.runs]
    common = set.intersection(*map(set, curves))
    return (max(common), [curve[max(common)] for curve in curves]) if common else None


def as_json(comparison: Comparison) -> dict[str, Any]:
    """The comparison for a script; curves are left out, MLflow has them."""
    names = [one.name for one in comparison.runs]
    common = last_common_evaluation(comparison)
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


def plot(comparison: Comparison, path: Path) -> None:
    """Draws the loss curves into a PNG: training and validation loss; validation bits per byte."""
    # The first import on a machine builds a font cache and says so.
    logging.getLogger("matplotlib").setLevel(logging.ERROR)
    from matplotlib.figure import Figure

    with_bits = any(one.curves[EVAL_BITS] for one in comparison.runs)
    figure = Figure(figsize=(11, 4.8) if with_bits else (8, 4.8), dpi=150, layout="constrained")
    grid = figure.add_gridspec(1, 2 if with_bits else 1, width_ratios=[5, 3] if with_bits else [1])
    losses = figure.add_subplot(grid[0, 0])
    _draw_losses(losses, comparison)
    if with_bits:
        _draw_bits(figure.add_subplot(grid[0, 1]), comparison)
    handles, labels = losses.get_legend_handles_labels()
    figure.legend(handles, labels, loc="outside lower center", ncols=1, frameon=False, fontsize=9)
    path.parent.mkdir(parents=True, exist_ok=True)
    temporary = path.with_name(f".{path.name}.{os.getpid()}")
    figure.savefig(temporary, format="png")
    temporary.replace(path)


def _read(candidate: Candidate) -> ComparedRun:
    summary = run(candidate.uri, candidate.run_id)
    curves = {
        name: history(candidate.uri, candidate.run_id, name) if name in summary.metrics else []
        for name in (TRAIN_LOSS, EVAL_LOSS, EVAL_BITS)
    }
    losses = [value for _, value in curves[TRAIN_LOSS]]
    rates = history(candidate.uri, candidate.run_id, RATE) if RATE in summary.metrics else []
    last = {
        name: value
        for name, value in sorted(summary.metrics.items())
        if name.startswith(("eval/", "validation/", "test/"))
    }
    best = {}
    for name in (EVAL_LOSS, EVAL_BITS):
        finite = [(value, update) for update, value in curves[name] if _is_finite(value)]
        if finite:
            best[name] = Best(*min(finite))
    return ComparedRun(
        name=candidate.name,
        run_id=candidate.run_id,
        status=summary.status,
        parameters=summary.parameters,
        updates=curves[TRAIN_LOSS][-1][0] if losses else 0,
        tokens=int(summary.metrics.get(TOKENS_METRIC, 0)),
        train_loss=statistics.fmean(losses[-max(1, len(losses) // 20) :]) if losses else math.nan,
        last=last,
        best=best,
        tokens_per_second=statistics.median(rate for _, rate in rates) if rates else math.nan,
        curves=curves,
    )


def _cell(value: float, form: str) -> str:
    return format(value, form) if _is_finite(value) else "-"


def _is_finite(value: float) -> bool:
    return math.isfinite(value) and abs(value) < _LARGEST


def _labels(comparison: Comparison) -> list[str]:
    """Each run's name and what differs in it, at most three parameters."""
    labels = []
    for index, one in enumerate(comparison.runs):
        what = [f"{name}={values[index]}" for name, values in comparison.differences.items()]
        more = f" and {len(what) - 3} more" if len(what) > 3 else ""
        labels.append(one.name + (f"   ({', '.join(what[:3])}{more})" if what else ""))
    return labels


def _style(index: int) -> tuple[str, str]:
    return PALETTE[index % len(PALETTE)], _LINES[index // len(PALETTE) % len(_LINES)]


def _draw_losses(axes: "Axes", comparison: Comparison) -> None:
    longest = max((len(one.curves[TRAIN_LOSS]) for one in comparison.runs), default=0)
    window = max(1, longest // 50)
    top = []
    for index, (one, label) in enumerate(zip(comparison.runs, _labels(comparison), strict=True)):
        colour, line = _style(index)
        updates, values = _split(one.curves[TRAIN_LOSS])
        smooth = _running_mean(values, window)
        axes.plot(updates, values, color=colour, alpha=0.22, linewidth=0.8)
        axes.plot(updates, smooth, color=colour, linestyle=line, linewidth=1.7, label=label)
        axes.plot(
            *_split(one.curves[EVAL_LOSS]),
            color=colour,
            linestyle="none",
            marker="o",
            markersize=5.5,
            markeredgecolor="white",
            markeredgewidth=0.8,
        )
        # The first few per cent fall so steeply that they would flatten all that is of interest.
        top += [value for value in smooth[len(smooth) // 25 :] if math.isfinite(value)]
    if top:
        low, high = min(top), max(top)
        axes.set_ylim(top=high + 0.1 * (high - low or 1.0))
    mean = f"line: mean of {window} updates" if window > 1 else "line: each update"
    axes.set_title(f"Training ({mean}) and validation (dots)", fontsize=10, loc="left")
    axes.set_ylabel("loss (nats per token)")
    _finish(axes)


def _draw_bits(axes: "Axes", comparison: Comparison) -> None:
    for index, one in enumerate(comparison.runs):
        colour, line = _style(index)
        updates, values = _split(one.curves[EVAL_BITS])
        axes.plot(updates, values, color=colour, linestyle=line, marker="o", markersize=4)
    axes.set_title("Validation", fontsize=10, loc="left")
    axes.set_ylabel("bits per byte")
    _finish(axes)


def _finish(axes: "Axes") -> None:
    axes.set_xlabel("update")
    axes.set_xlim(left=0)
    axes.xaxis.set_major_formatter(lambda value, _: f"{value:,.0f}")
    axes.grid(alpha=0.25, linewidth=0.6)
    axes.spines[["top", "right"]].set_visible(False)


def _split(curve: Curve) -> tuple[list[int], list[float]]:
    """Updates and values; what is not finite becomes a gap in the line."""
    updates = [update for update, _ in curve]
    return updates, [value if _is_finite(value) else math.nan for _, value in curve]


def _running_mean(values: list[float], window: int) -> list[float]:
    """Mean over the last `window` values up to each, those that are NaN left out."""
    recent: deque[float] = deque()
    total, count, means = 0.0, 0, []
    for value in values:
        recent.append(value)
        if not math.isnan(value):
            total, count = total + value, count + 1
        if len(recent) > window and not math.isnan(oldest := recent.popleft()):
            total, count = total - oldest, count - 1
        means.append(total / count if count else math.nan)
    return means
