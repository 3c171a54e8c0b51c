"""The curves of a comparison as a figure for a paper: PNG for files, SVG for the report."""

import io
import logging
from pathlib import Path
from typing import TYPE_CHECKING, NamedTuple

import numpy as np
import numpy.typing as npt

from jobs.comparison.differences import Comparison, CurvePoint
from jobs.comparison.seed_groups import SEED, is_finite
from jobs.figure_style import STYLE, running_mean
from jobs.metric_names import EVAL_BITS, EVAL_LOSS, TRAIN_LOSS
from jobs.palette import PALETTE
from pipeline.storage import LocalStore

if TYPE_CHECKING:
    from matplotlib.axes import Axes
    from matplotlib.figure import Figure

_LINES = ("-", "--", ":")
"""The line style changes when the colours are used up."""
_MARKERS = ("o", "s", "^", "D", "v", "P", "X")
"""Told apart in print without colours."""
_AXES = {"step": "update", "tokens": "tokens trained on", "hours": "hours since the run began"}
_GRID = 400
"""Points of a curve at which the runs of a group, whose x differ, are averaged."""


class _Band(NamedTuple):
    """The runs of a group along x; NaN where fewer than all of them are."""

    x: npt.NDArray[np.float64]
    mean: npt.NDArray[np.float64]
    least: npt.NDArray[np.float64]
    most: npt.NDArray[np.float64]


def plot(comparison: Comparison, path: Path) -> None:
    """Draws the comparison into a PNG of 300 dots an inch, 7 inches wide, whole or not at all."""
    LocalStore(path.absolute().parent).write(path.name, _rendered(comparison, "png"))


def svg(comparison: Comparison) -> str:
    """The same figure as an `<svg>` element."""
    text = _rendered(comparison, "svg").decode()
    return text[text.index("<svg") :]


def caption(comparison: Comparison) -> str:
    """What the figure shows, as one says under it."""
    window = _smoothing(comparison)
    mean = f"running mean over {window} updates" if window > 1 else "every update"
    seeds = (
        "Lines are means over the seeds, bands reach from the least to the most of them, and each"
        " mark on the right is one seed."
        if comparison.has_seeds
        else ""
    )
    return (
        f"Training loss ({mean}) and bits per byte of the validation split. {seeds} Lower is"
        " better."
    )


def _rendered(comparison: Comparison, form: str) -> bytes:
    # The first import on a machine builds a font cache and says so.
    logging.getLogger("matplotlib").setLevel(logging.ERROR)
    from matplotlib import rc_context

    with rc_context(STYLE):
        figure = _figure(comparison)
        file = io.BytesIO()
        metadata = {"Date": None} if form == "svg" else {}
        figure.savefig(file, format=form, dpi=300, metadata=metadata)
    return file.getvalue()


def _figure(comparison: Comparison) -> "Figure":
    from matplotlib.figure import Figure

    has_bits = any(one.curves[EVAL_BITS] for one in comparison.runs)
    has_spread = comparison.has_seeds and comparison.verdict is not None
    widths = [
        1.25,
        *([1] if has_bits else []),
        *([0.33 * _shown_columns(comparison)] if has_spread else []),
    ]
    labels = _labels(comparison)
    legend_rows = -(-len(labels) // 2)
    figure = Figure(figsize=(7.0, 2.55 + 0.17 * legend_rows), layout="constrained")
    panels = figure.subplots(1, len(widths), width_ratios=widths, squeeze=False)[0]
    _draw_losses(panels[0], comparison)
    if has_bits:
        _draw_bits(panels[1], comparison)
    if has_spread:
        _draw_seeds(panels[-1], comparison)
    for panel, letter in zip(panels, "abc", strict=False):
        panel.set_title(f"({letter}) {panel.get_title(loc='left')}", loc="left")
    handles = panels[1 if has_bits else 0].get_legend_handles_labels()[0]  # (b) has marks
    columns = 2 if max(map(len, labels)) < 60 and len(labels) > 1 else 1
    figure.legend(handles, labels, loc="outside lower center", ncols=columns, frameon=False)
    return figure


def _shown_columns(comparison: Comparison) -> int:
    return max(2, min(len(comparison.groups), 5))


def _draw_losses(axes: "Axes", comparison: Comparison) -> None:
    window = _smoothing(comparison)
    bands = []
    for index, group in enumerate(comparison.groups):
        colour, line = _style(index)
        curves = [comparison.runs[i].curves[TRAIN_LOSS] for i in group.members]
        band = _band([_smoothed(curve, window) for curve in curves])
        axes.plot(band.x, band.mean, color=colour, linestyle=line, label=group.name)
        axes.fill_between(band.x, band.least, band.most, color=colour, alpha=0.2, linewidth=0)
        bands.append(band)
        for i in group.members:
            losses = comparison.runs[i].curves[EVAL_LOSS]
            if not comparison.has_seeds:
                x, y = _split(losses)
                axes.plot(
                    x, y, color=colour, linestyle="none", marker=_marker(index), markersize=3.5
                )
    _cut_the_beginning(axes, bands)
    marks = "" if comparison.has_seeds else "; marks: validation"
    axes.set_title(f"Training loss{marks}", loc="left")
    axes.set_ylabel("loss (nats per token)")
    _finish(axes, comparison)


def _draw_bits(axes: "Axes", comparison: Comparison) -> None:
    bands = []
    for index, group in enumerate(comparison.groups):
        colour, line = _style(index)
        curves = [_split(comparison.runs[i].curves[EVAL_BITS]) for i in group.members]
        band = _band(curves, at=curves[0][0])
        axes.plot(
            band.x, band.mean, color=colour, linestyle=line, marker=_marker(index), markersize=3.5,
            label=group.name,
        )  # fmt: skip
        axes.fill_between(band.x, band.least, band.most, color=colour, alpha=0.2, linewidth=0)
        bands.append(band)
    _cut_the_beginning(axes, bands)
    axes.set_title("Validation", loc="left")
    axes.set_ylabel("bits per byte")
    _finish(axes, comparison)


def _cut_the_beginning(axes: "Axes", bands: list[_Band]) -> None:
    """Lets y end where the curves are after an eighth of x: the beginning falls so steeply that it
    would flatten all that is of interest."""
    end = max((float(band.x[-1]) for band in bands if len(band.x)), default=0.0)
    shown = [band.most[(band.x >= end / 8) & np.isfinite(band.most)] for band in bands]
    lows = [band.least[np.isfinite(band.least)] for band in bands]
    values, low = np.concatenate(shown), np.concatenate(lows)
    if len(values):
        high, low = float(values.max()), float(low.min())
        axes.set_ylim(low - 0.05 * (high - low or 1.0), high + 0.08 * (high - low or 1.0))


def _draw_seeds(axes: "Axes", comparison: Comparison) -> None:
    """Each seed's figure after the last evaluation that all runs share, and the means."""
    verdict = comparison.verdict
    assert verdict is not None
    for index, values in enumerate(verdict.values):
        colour = _style(index)[0]
        spots = index + 0.12 * (np.arange(len(values)) - (len(values) - 1) / 2)
        axes.plot(
            spots, values, linestyle="none", marker=_marker(index), markersize=4.5, color=colour,
            markeredgecolor="white", markeredgewidth=0.4,
        )  # fmt: skip
        axes.hlines(np.mean(values), index - 0.3, index + 0.3, color=colour, linewidth=1.6)
    axes.set_xlim(-0.6, len(verdict.values) - 0.4)
    names = [group.name for group in comparison.groups]
    slanted = sum(map(len, names)) > 14 * len(names) or len(names) > 3
    axes.set_xticks(
        range(len(names)), names, rotation=30 if slanted else 0, ha="right" if slanted else "center"
    )
    axes.grid(axis="x", visible=False)
    axes.margins(y=0.12)
    axes.set_title("Each seed", loc="left")
    axes.set_ylabel("bits per byte")
    axes.set_xlabel(f"after update {verdict.update:,}")


def _finish(axes: "Axes", comparison: Comparison) -> None:
    from matplotlib.ticker import EngFormatter, MaxNLocator

    axes.set_xlabel(_AXES[comparison.by])
    axes.set_xlim(left=0)
    axes.xaxis.set_major_locator(MaxNLocator(5, steps=[1, 2, 2.5, 5, 10]))
    if comparison.by == "tokens":
        axes.xaxis.set_major_formatter(EngFormatter(sep=" "))
    elif comparison.by == "step":
        axes.xaxis.set_major_formatter(lambda value, _: f"{value:,.0f}")


def _labels(comparison: Comparison) -> list[str]:
    """Each group's name and what differs in it, at most three parameters, and its seeds."""
    labels = []
    for group in comparison.groups:
        first = group.members[0]
        what = [
            f"{name.rpartition('.')[2]}={values[first]}"
            for name, values in comparison.differences.items()
            if name != SEED and len({values[g.members[0]] for g in comparison.groups}) > 1
        ]
        more = f" and {len(what) - 3} more" if len(what) > 3 else ""
        said = [", ".join(what[:3]) + more] if what else []
        if comparison.has_seeds:
            count = len(group.members)
            said.append(f"{count} seed{'s' if count > 1 else ''}")
        labels.append(group.name + (f" ({'; '.join(said)})" if said else ""))
    return labels


def _style(index: int) -> tuple[str, str]:
    return PALETTE[index % len(PALETTE)], _LINES[index // len(PALETTE) % len(_LINES)]


def _marker(index: int) -> str:
    return _MARKERS[index % len(_MARKERS)]


def _smoothing(comparison: Comparison) -> int:
    """Updates over which the training loss is averaged: a fiftieth of the longest run."""
    longest = max((len(one.curves[TRAIN_LOSS]) for one in comparison.runs), default=0)
    return max(1, longest // 50)


def _split(curve: list[CurvePoint]) -> tuple[npt.NDArray, npt.NDArray]:
    """x and values; what is not finite becomes a gap in the line."""
    x = np.array([point.x for point in curve], float)
    return x, np.array([p.value if is_finite(p.value) else np.nan for p in curve], float)


def _smoothed(curve: list[CurvePoint], window: int) -> tuple[npt.NDArray, npt.NDArray]:
    x, values = _split(curve)
    return x, np.array(running_mean(values.tolist(), window))


def _band(curves: list[tuple[npt.NDArray, npt.NDArray]], at: npt.NDArray | None = None) -> _Band:
    """The runs' values at common x: at `at`, or at _GRID points of the stretch all of them have.

    One curve alone stays as it is. Where the runs have the same x (updates, tokens), nothing is
    interpolated.
    """
    if len(curves) == 1:
        x, values = curves[0]
        return _Band(x, values, values, values)
    same = all(np.array_equal(x, curves[0][0]) for x, _ in curves)
    curves = [(x, y) for x, y in curves if len(x)]
    if not curves:
        return _Band(*(np.empty(0) for _ in range(4)))
    if same:
        x, rows = curves[0][0], np.stack([y for _, y in curves])
    else:
        end = min(float(x[-1]) for x, _ in curves)
        begin = max(float(x[0]) for x, _ in curves)
        x = np.linspace(begin, end, _GRID) if at is None else at[(at >= begin) & (at <= end)]
        rows = np.stack([np.interp(x, *curve) for curve in curves])
    return _Band(x, rows.mean(axis=0), rows.min(axis=0), rows.max(axis=0))
