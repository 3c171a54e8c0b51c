"""How figures look, and how noisy curves are smoothed in them."""

from collections import deque
from typing import Any

import numpy as np

STYLE: dict[Any, Any] = {
    "font.size": 8,
    "axes.titlesize": 8.5,
    "axes.labelsize": 8,
    "axes.linewidth": 0.7,
    "axes.spines.top": False,
    "axes.spines.right": False,
    "axes.grid": True,
    "grid.color": "#dddddd",
    "grid.linewidth": 0.5,
    "xtick.labelsize": 7.5,
    "ytick.labelsize": 7.5,
    "legend.fontsize": 8,
    "lines.linewidth": 1.3,
    "svg.hashsalt": "tvq",  # else the names in an SVG are random
}


def running_mean(values: list[float], window: int) -> list[float]:
    """Mean over the last `window` values up to each, those that are NaN left out."""
    recent: deque[float] = deque()
    total, count, means = 0.0, 0, []
    for value in values:
        recent.append(value)
        if not np.isnan(value):
            total, count = total + value, count + 1
        if len(recent) > window and not np.isnan(oldest := recent.popleft()):
            total, count = total - oldest, count - 1
        means.append(total / count if count else float("nan"))
    return means
