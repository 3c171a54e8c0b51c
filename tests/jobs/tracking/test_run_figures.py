"""Figures of a run: pictures of the size they say, whatever the curves hold."""

import io
import math
from pathlib import Path

import numpy as np
import pytest

from jobs.evaluation.record import PositionBucket
from jobs.runs.run_figures import CURVES, curves_png, positions_png
from jobs.tracking.store import embedded_store
from jobs.tracking.tracker import Tracker

RISING = [(step, 5.0 / step) for step in range(1, 200)]
BROKEN = [(1, math.nan), (2, 1.7e308), (3, 2.0)]


def pixels(png: bytes) -> np.ndarray:
    from matplotlib.image import imread

    return imread(io.BytesIO(png), format="png")[..., :3]


@pytest.mark.parametrize("curve", [RISING, BROKEN, []])
def test_curves_of_any_kind_are_drawn(curve):
    picture = pixels(curves_png(dict.fromkeys(CURVES, curve)))
    assert picture.shape == (420, 1050, 3)
    coloured = np.ptp(picture, axis=-1) > 0.3
    assert coloured[:, :525].any()  # the legend at least
    assert coloured[:, 525:].any() == bool(curve)


def test_loss_by_position_steps_down_as_the_figures_do():
    buckets = (PositionBucket(0, 64, 64, 256.0), PositionBucket(64, 128, 64, 64.0))
    blue = np.ptp(pixels(positions_png(buckets, "x")), axis=-1) > 0.3
    rows, columns = np.nonzero(blue)
    assert rows[columns < columns.min() + 20].mean() < rows[columns > columns.max() - 20].mean()


@pytest.mark.tracking
def test_the_curves_are_drawn_from_what_the_store_holds_and_a_failure_ends_nothing(tmp_path: Path):
    from mlflow import MlflowClient

    store, said = embedded_store(tmp_path), []
    tracker = Tracker.start(
        store.uri, "e", "r", "k", artifact_location=store.artifact_location, say=said.append
    )
    tracker.log_curves("plots/curves.png", CURVES, curves_png)
    tracker.log_curves("plots/none.png", CURVES, lambda curves: bytes(1 // 0))
    run_id = tracker.wait_for_run()
    assert run_id
    assert tracker.finish("FINISHED")
    [complaint] = said
    assert "plots/none.png is left out: ZeroDivisionError" in complaint
    stored = MlflowClient(store.uri).download_artifacts(run_id, "plots/curves.png")
    assert pixels(Path(stored).read_bytes()).shape == (420, 1050, 3)
