"""Where the time goes, on a clock that the test turns: every second is counted once."""

from pathlib import Path

import pytest

from jobs.runs.lease import LeaseLostError
from jobs.runs.ledger import Ledger, SkippedBatch, SkippedUpdate, skipped_batch
from jobs.training.goodput import PHASES, Goodput
from pipeline.storage import open_store
from tests.jobs.training.skipped_batches import skipped_batches


class Clock:
    def __init__(self) -> None:
        self.now = 5000.0

    def __call__(self) -> float:
        return self.now


def spend(goodput: Goodput, clock: Clock, **seconds: float) -> None:
    """Time in phases, one after the other; `step` is none."""
    for name, length in seconds.items():
        if name == "step":
            clock.now += length
        else:
            with goodput.phase(name):  # pyright: ignore[reportArgumentType]
                clock.now += length


def test_the_phases_make_up_the_whole(tmp_path: Path):
    clock = Clock()
    goodput = Goodput(None, "a driver", clock=clock)
    clock.now += 2  # the start
    goodput.begin_at(0)
    spend(goodput, clock, compile=10, data_wait=1, step=30, evaluation=4, checkpoint=3)
    spend(goodput, clock, step=20, data_wait=2)
    goodput.close()
    clock.now += 1000  # after its end nothing counts
    expected = dict.fromkeys(PHASES, 0.0) | {
        "start": 2, "compile": 10, "data_wait": 3, "step": 50, "evaluation": 4, "checkpoint": 3,
    }  # fmt: skip
    assert goodput.totals() == expected
    assert goodput.summary() == (
        "goodput 69% of 72.0 s: step 50.0 s, compile 10.0 s, evaluation 4.0 s, data wait 3.0 s,"
        " checkpoint 3.0 s, start 2.0 s"
    )
    values = goodput.values()
    assert values["goodput/fraction"] == pytest.approx(50 / 72)
    assert values["goodput/step_seconds"] == 50


def group(folder: Path, clock: Clock, owner: str, update: int) -> tuple[Ledger, Goodput]:
    ledger = Ledger(open_store(folder))
    goodput = Goodput(ledger, owner, clock=clock)
    clock.now += 3
    goodput.begin_at(update)
    return ledger, goodput


@pytest.mark.parametrize(("owner", "gap"), [("a driver", 7), ("another driver", 0)])
def test_what_a_killed_group_did_behind_its_checkpoint_is_lost(
    tmp_path: Path, owner: str, gap: float
):
    clock = Clock()
    ledger, first = group(tmp_path, clock, "a driver", 0)
    spend(first, clock, compile=5, step=20)
    first.saved(10)
    spend(first, clock, step=12, checkpoint=1)
    first.updates_done(2)  # more than ten seconds after the last account
    ledger.close()  # and is killed

    clock.now += 7
    ledger, second = group(tmp_path, clock, owner, update=10)
    spend(second, clock, compile=4, step=30)
    second.saved(20)
    second.close()
    ledger.close()
    assert second.totals() == {
        "start": 3, "restart": 3 + gap, "compile": 9, "data_wait": 0, "coordination": 0,
        "evaluation": 0, "step": 20 + 30, "checkpoint": 1, "lost": 12,
    }  # fmt: skip

    # A third begins behind its end: nothing more is lost.
    ledger, third = group(tmp_path, clock, "a third", update=20)
    third.close()
    ledger.close()
    assert third.totals()["lost"] == 12
    assert third.totals()["step"] == 50


def test_percentiles_are_of_the_updates_since_the_last_call():
    clock = Clock()
    goodput = Goodput(None, "a driver", clock=clock)
    goodput.begin_at(0)
    spend(goodput, clock, compile=100)
    goodput.updates_done(2)  # the batch that compiled is not measured
    for n in range(1, 21):
        spend(goodput, clock, data_wait=n / 10, step=2 * n, evaluation=50)
        goodput.updates_done(2)
    values = goodput.values()
    # Nearest rank: of the updates' seconds 1, 1, 2, 2, ... 20, 20 the 20th and the 38th.
    assert values["perf/step_seconds_p50"] == pytest.approx(10)
    assert values["perf/step_seconds_p95"] == pytest.approx(19)
    assert values["perf/data_wait_seconds_p95"] == pytest.approx(1.9)
    assert "perf/step_seconds_p50" not in goodput.values()


def test_the_ledger_tells_what_was_skipped_once(tmp_path: Path, caplog: pytest.LogCaptureFixture):
    def of(batch: int, *updates: int, documents: tuple[str, ...] = ()) -> SkippedBatch:
        skipped = [SkippedUpdate(update, float("inf"), 2.5, -1.0) for update in updates]
        return SkippedBatch(batch, 4 * batch, 4 * batch + 3, skipped, list(documents))

    store = open_store(tmp_path)
    for _ in range(2):  # a resumed training skips the second batch again
        ledger = Ledger(store)
        ledger.skipped(of(12, 25, 26), lambda: ["a.txt", "b.txt"])
        ledger.close()
    ledger = Ledger(store)
    ledger.skipped(of(7, 16), lambda: 1 // 0)  # pyright: ignore[reportArgumentType]
    ledger.close()
    assert "the ledger lacks the documents of batch 7: integer division" in caplog.text
    second = of(12, 25, 26, documents=("a.txt", "b.txt"))
    assert skipped_batches(store) == [of(7, 16), second]
    assert skipped_batch(store, 12) == second
    assert skipped_batch(store, 8) is None


def test_a_ledger_that_cannot_be_written_ends_no_training(
    tmp_path: Path, caplog: pytest.LogCaptureFixture
):
    (tmp_path / "ledger").write_text("in the way")
    ledger = Ledger(open_store(tmp_path / "missing"))
    ledger = Ledger(open_store(tmp_path))
    ledger.account({})
    ledger.close()
    assert "the ledger lacks goodput-00000001.json" in caplog.text


def test_a_group_that_lost_the_run_leaves_the_account_of_the_next_alone(tmp_path: Path):
    """Both began when there was none, so both would write the first."""

    def lost() -> None:
        raise LeaseLostError("run first: another driver has taken it over")

    store = open_store(tmp_path)
    sleeper, taker = Ledger(store, lost), Ledger(store)
    taker.account({"seconds": 1})
    taker.close()
    sleeper.account({"seconds": 2})
    sleeper.close()
    assert Ledger(store).earlier == [{"seconds": 1}]
