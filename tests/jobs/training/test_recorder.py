"""The recorder: points one batch late, without waiting for a step, every token counted."""

import threading
from pathlib import Path

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from jobs.runs.ledger import Ledger
from jobs.runs.metric_spool import MetricPoint, MetricSpool, read_segment, segments
from jobs.training.codebook_watch import PATIENCE, CodebookWatch
from jobs.training.recorder import Recorder
from model.training import UpdateMetrics
from pipeline.storage import open_store
from tests.jobs.training.skipped_batches import skipped_batches

NAMES = {
    "train/loss_nats_per_token": "loss",
    "train/commitment_loss": "commitment",
    "train/gradient_norm": "gradient_norm",
    "train/learning_rate": "learning_rate",
    "train/loss_spike_sigmas": "loss_spike_sigmas",
    "train/skipped_updates": "skipped_updates",
    "codebook/perplexity_codes": "codebook_perplexity",
    "codebook/usage_fraction": "codebook_usage",
    "codebook/relative_error": "relative_error",
    "codebook/dead_codes": "dead_codes",
    "codebook/collapsed_layers": "collapsed_layers",
}
COUNTS = ("tokens", "skipped_updates", "skipped_in_a_row", "collapsed_layers")


class Clock:
    def __init__(self) -> None:
        self.now = 1000.0

    def __call__(self) -> float:
        return self.now


def metrics_of(batch: int, updates: int = 2) -> UpdateMetrics:
    """Distinct figures for each field, batch and update."""
    return UpdateMetrics(
        **{
            name: jnp.asarray(100 * batch + 10 * np.arange(updates) + number, jnp.int32)
            if name in COUNTS
            else jnp.asarray(100 * batch + 10 * np.arange(updates) + number / 8, jnp.float32)
            for number, name in enumerate(UpdateMetrics._fields)
        }
    )


def points_in(folder: Path) -> list[MetricPoint]:
    found = [read_segment(folder, name) for name in segments(folder)]
    assert all(segment.damage is None for segment in found)
    return [point for segment in found for point in segment.points]


@pytest.fixture
def clock() -> Clock:
    return Clock()


@pytest.fixture
def recorder(tmp_path: Path, clock: Clock) -> Recorder:
    # Two bits a byte for every nat: an oracle that needs no corpus.
    spool = MetricSpool(tmp_path)
    return Recorder(
        spool, run="a", batch_size=4, tokens=5000, bits_per_byte=lambda nats: 2 * nats,
        codebooks=CodebookWatch(8), clock=clock,
    )  # fmt: skip


def test_every_figure_of_every_update_becomes_a_value(recorder: Recorder, tmp_path: Path):
    metrics = metrics_of(1, updates=3)
    recorder.updates(6, metrics)
    recorder.flush()
    points = points_in(tmp_path)
    assert [point.step for point in points] == [4, 5, 6]
    for i, point in enumerate(points):
        expected = {name: float(getattr(metrics, field)[i]) for name, field in NAMES.items()}
        expected["train/bits_per_byte"] = 2 * float(metrics.loss[i])
        assert point.values == expected
        assert point.time_ms == 1_000_000


def test_tokens_are_counted_from_where_the_checkpoint_stood(recorder: Recorder, tmp_path: Path):
    first, second = metrics_of(1), metrics_of(2)
    counts = [int(n) for metrics in (first, second) for n in metrics.tokens]
    recorder.updates(2, first)
    recorder.updates(4, second)
    recorder.flush()
    assert [point.tokens for point in points_in(tmp_path)] == [
        5000 + sum(counts[: n + 1]) for n in range(4)
    ]
    assert recorder.tokens == 5000 + sum(counts)


def test_a_batch_is_fetched_when_the_next_one_is_handed_in(recorder: Recorder, tmp_path: Path):
    # The tokens that it has counted tell what it has fetched.
    recorder.updates(2, metrics_of(1))
    assert recorder.tokens == 5000
    recorder.updates(4, metrics_of(2))
    assert recorder.tokens == 5000 + int(metrics_of(1).tokens.sum())
    recorder.flush()
    assert recorder.tokens == 5000 + sum(int(metrics_of(n).tokens.sum()) for n in (1, 2))
    assert [point.step for point in points_in(tmp_path)] == [1, 2, 3, 4]
    recorder.flush()  # nothing is pending: nothing is recorded twice
    assert [point.step for point in points_in(tmp_path)] == [1, 2, 3, 4]


class Computing:
    """Stands for a device array whose computation goes on: reading it would wait."""

    def __init__(self, array: jax.Array, done: threading.Event) -> None:
        self.array = array
        self.done = done

    def __array__(self, dtype: object = None, copy: object = None) -> np.ndarray:
        assert self.done.is_set(), "waited for a step that was still being computed"
        return np.asarray(self.array)


def test_handing_in_a_batch_does_not_wait_for_its_computation(recorder: Recorder, tmp_path: Path):
    for n in (1, 2):
        done = threading.Event()
        running = [Computing(array, done) for array in metrics_of(n)]
        recorder.updates(2 * n, UpdateMetrics._make(running))
        done.set()
    recorder.flush()
    assert [point.step for point in points_in(tmp_path)] == [1, 2, 3, 4]


def test_handing_in_moves_nothing_that_the_transfer_guard_forbids(recorder: Recorder):
    on_device = [metrics_of(n) for n in (1, 2, 3)]
    with jax.transfer_guard("disallow"):
        for n, metrics in enumerate(on_device, start=1):
            recorder.updates(2 * n, metrics)
        recorder.flush()
    assert recorder.tokens > 5000


def test_an_evaluation_comes_after_the_updates_before_it(
    recorder: Recorder, tmp_path: Path, clock: Clock
):
    recorder.updates(2, metrics_of(1))
    recorder.evaluation(2, lambda: {"eval/bits_per_byte": 1.5})
    recorder.updates(4, metrics_of(2))
    recorder.flush()
    points = points_in(tmp_path)
    assert [point.step for point in points] == [1, 2, 2, 3, 4]
    assert points[2].values == {"eval/bits_per_byte": 1.5}
    assert points[2].tokens == points[1].tokens
    steps = [point.step for point in points if "train/loss_nats_per_token" in point.values]
    assert steps == sorted(set(steps))


def test_speed_is_that_of_whole_batches_without_the_evaluation(
    recorder: Recorder, tmp_path: Path, clock: Clock
):
    tokens = [int(metrics_of(n).tokens.sum()) for n in range(6)]

    def evaluate() -> dict[str, float]:
        clock.now += 1000
        return {"eval/bits_per_byte": 1.0}

    recorder.updates(2, metrics_of(1))
    clock.now += 3  # the first batch compiles: no speed is given for it
    recorder.updates(4, metrics_of(2))
    clock.now += 4
    recorder.updates(6, metrics_of(3))  # fetches the second
    clock.now += 5
    recorder.evaluation(6, evaluate)  # fetches the third first
    recorder.updates(8, metrics_of(4))
    clock.now += 8
    recorder.updates(10, metrics_of(5))  # fetches the fourth
    recorder.flush()
    speeds = {
        point.step: point.values["perf/tokens_per_second"]
        for point in points_in(tmp_path)
        if "perf/tokens_per_second" in point.values
    }
    assert 2 not in speeds
    assert speeds[4] == pytest.approx(tokens[2] / 4)
    assert speeds[6] == pytest.approx(tokens[3] / 5)
    assert speeds[8] == pytest.approx(tokens[4] / 8)
    assert all(step % 2 == 0 for step in speeds)


def test_a_process_without_the_spool_counts_the_same(tmp_path: Path, clock: Clock):
    other = Recorder(
        None, run="a", batch_size=4, tokens=5000, bits_per_byte=lambda nats: nats, clock=clock
    )
    for n in (1, 2):
        other.updates(2 * n, metrics_of(n))
    other.evaluation(4, lambda: {"eval/bits_per_byte": 1.0})
    other.flush()
    assert other.tokens == 5000 + sum(int(metrics_of(n).tokens.sum()) for n in (1, 2))
    assert not list(tmp_path.iterdir())


def test_what_is_not_finite_is_recorded_as_it_is(recorder: Recorder, tmp_path: Path):
    broken = metrics_of(1)._replace(loss=jnp.asarray([jnp.nan, jnp.inf]))
    recorder.updates(2, broken)
    recorder.flush()
    losses = [point.values["train/loss_nats_per_token"] for point in points_in(tmp_path)]
    assert np.isnan(losses[0])
    assert losses[1] == np.inf


def test_skipped_updates_are_told_once_with_what_shows_them(
    tmp_path: Path, clock: Clock, caplog: pytest.LogCaptureFixture
):
    store = open_store(tmp_path)
    ledger = Ledger(store)
    recorder = Recorder(
        None, run="a", batch_size=4, tokens=0, ledger=ledger,
        documents=lambda batch: [f"of batch {batch}"],
        bits_per_byte=lambda nats: nats, mfu=None, clock=clock,
    )  # fmt: skip
    nothing_wrong = metrics_of(1, updates=3)
    broken = metrics_of(1, updates=3)._replace(
        loss=jnp.asarray([1.0, jnp.nan, 2.0]),
        applied=jnp.asarray([True, False, False]),
        skipped_in_a_row=jnp.asarray([0, 1, 2]),
    )
    spike = metrics_of(1, updates=3)._replace(
        loss=jnp.asarray([1.0, 70.0, 2.0]),
        applied=jnp.asarray([True, False, True]),
        skipped_in_a_row=jnp.asarray([0, 1, 0]),
    )
    for n, metrics in enumerate((nothing_wrong, broken, spike), start=1):
        recorder.updates(3 * n, metrics)
    assert recorder.skipped_in_a_row == 2
    recorder.flush()
    assert recorder.skipped_in_a_row == 0
    ledger.close()
    # Batch 1 is updates 4 to 6 and rows 4 to 7, batch 2 updates 7 to 9 and rows 8 to 11.
    one, two = skipped_batches(store)
    assert (one.batch, one.first_row, one.last_row) == (1, 4, 7)
    assert (two.batch, two.first_row, two.last_row) == (2, 8, 11)
    assert (one.documents, two.documents) == (["of batch 1"], ["of batch 2"])
    assert [update.update for update in one.updates + two.updates] == [5, 6, 8]
    assert [update.loss for update in one.updates + two.updates][1:] == [2, 70]
    first, second = caplog.messages
    assert first.startswith("batch 1: 2 of its 3 updates skipped, update 5 first: loss nan and")
    assert "`tvq inspect --run a --step 1`" in first
    assert second.startswith("batch 2: 1 of its 3 updates skipped, update 8 first: its loss 70 is")


def test_utilisation_is_of_the_speed(tmp_path: Path, clock: Clock):
    recorder = Recorder(
        MetricSpool(tmp_path), run="a", batch_size=4, tokens=0, bits_per_byte=lambda nats: nats,
        mfu=lambda rate: rate / 1000, clock=clock,
    )  # fmt: skip
    for n in (1, 2):
        recorder.updates(2 * n, metrics_of(n))
        clock.now += 2
    recorder.flush()
    values = points_in(tmp_path)[-1].values
    assert values["perf/mfu"] == pytest.approx(values["perf/tokens_per_second"] / 1000)


def test_wasted_codebooks_are_told_once_when_it_lasts(caplog: pytest.LogCaptureFixture):
    watch = CodebookWatch(n_codes=10)
    for update in range(1, 5 * PATIENCE):
        if update == PATIENCE:  # not in a row
            watch.see(update, dead_codes=5, collapsed_layers=0)
        else:
            watch.see(update, dead_codes=5.5, collapsed_layers=2)
    collapsed, dead = caplog.messages
    assert collapsed.startswith(f"update {2 * PATIENCE}: collapsed codebooks in 2 layers")
    assert dead.startswith(f"update {2 * PATIENCE}: 6 of the 10 codes of a codebook are dead")
