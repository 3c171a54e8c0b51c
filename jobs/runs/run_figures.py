"""Figures of one run for its page in MLflow: its curves, and its loss by position."""

import io
import logging
from collections.abc import Mapping, Sequence
from contextlib import AbstractContextManager
from typing import TYPE_CHECKING

import numpy as np

from jobs.evaluation.record import PositionBucket
from jobs.figure_style import STYLE, running_mean
from jobs.metric_names import EVAL_BITS, EVAL_LOSS, TRAIN_LOSS
from jobs.palette import PALETTE

if TYPE_CHECKING:
    from matplotlib.figure import Figure

CURVES = (TRAIN_LOSS, EVAL_LOSS, EVAL_BITS)

Curve = Sequence[tuple[int, float]]
"""(update, value), by update."""


def curves_png(curves: Mapping[str, Curve]) -> bytes:
    """The training's loss with the validation's, and the validation's bits per byte.

    Args:
        curves: by the names in CURVES; those that are empty are not drawn.
    """
    with _styled():  # axes take their looks when they are made
        figure = _figure(7.0, 2.8)
        losses, bits = figure.subplots(1, 2)
        window = max(1, len(curves[TRAIN_LOSS]) // 50)
        updates, values = _split(curves[TRAIN_LOSS])
        mean = f", running mean over {window}" if window > 1 else ""
        losses.plot(
            updates, running_mean(values.tolist(), window), color=PALETTE[0], label="training"
        )
        losses.plot(
            *_split(curves[EVAL_LOSS]),
            "o-",
            markersize=3.5,
            color=PALETTE[1],
            label="validation",
        )
        losses.set(ylabel="nats per token", title=f"Loss{mean}")
        losses.legend(frameon=False)
        bits.plot(*_split(curves[EVAL_BITS]), "o-", markersize=3.5, color=PALETTE[1])
        bits.set(ylabel="bits per byte", title="Validation")
        for axes in (losses, bits):
            axes.set(xlabel="update", xlim=(0, None))
        return _png(figure)


def positions_png(positions: Sequence[PositionBucket], title: str) -> bytes:
    """Nats per token by how many tokens came before, a step for each bucket."""
    with _styled():  # axes take their looks when they are made
        figure = _figure(4.6, 2.8)
        axes = figure.subplots()
        # The first bucket begins at no token, which has no logarithm.
        edges = [*(bucket.begin + 1 for bucket in positions), positions[-1].end + 1]
        axes.stairs(
            [bucket.nats / bucket.targets for bucket in positions],
            edges,
            baseline=None,
            zorder=3,  # above the grid
            color=PALETTE[0],
            linewidth=1.3,
        )
        axes.set_xscale("log", base=2)
        axes.xaxis.set_major_formatter(lambda value, _: f"{value:,.0f}")
        axes.set(xlabel="position in the context", ylabel="nats per token", title=title)
        return _png(figure)


def _split(curve: Curve) -> tuple[np.ndarray, np.ndarray]:
    """Updates and values; what is not finite becomes a gap in the line.

    MLflow holds infinity as the largest float, which would flatten everything else.
    """
    values = np.array([value for _, value in curve], float)
    values[~(np.abs(values) < 1e300)] = np.nan
    return np.array([update for update, _ in curve], float), values


def _figure(width: float, height: float) -> "Figure":
    from matplotlib.figure import Figure

    return Figure(figsize=(width, height), layout="constrained")


def _png(figure: "Figure") -> bytes:
    file = io.BytesIO()
    figure.savefig(file, format="png", dpi=150)
    return file.getvalue()


def _styled() -> AbstractContextManager[None]:
    # The first import on a machine builds a font cache and says so.
    logging.getLogger("matplotlib").setLevel(logging.ERROR)
    from matplotlib import rc_context

    return rc_context(STYLE)
