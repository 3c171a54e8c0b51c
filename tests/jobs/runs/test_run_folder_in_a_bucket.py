"""A run's folder that is a prefix of a bucket, on the emulator: the same as on disk."""

import time
from concurrent.futures import ThreadPoolExecutor

import pytest

from jobs.errors import UserError
from jobs.runs.background_spool import BackgroundSpool
from jobs.runs.lease import Fence, Lease, LeaseLostError
from jobs.runs.metric_spool import MetricPoint
from jobs.runs.run_directory import RunDirectory, list_runs
from jobs.runs.run_log import LogTail, close_log, event, events, open_log
from pipeline.errors import CorpusError
from tests.services import ObjectStoreServer


def test_of_many_that_claim_at_once_one_wins(bucket: str):
    def claim(number: int) -> tuple[str, str]:
        run = RunDirectory.at(f"{bucket}/runs", "first")
        record = run.claim(f"identity {number}", {}, f"# {number}\n")
        return record.identity, run.recipe_text()

    with ThreadPoolExecutor(6) as pool:
        seen = set(pool.map(claim, range(6)))
    [(identity, text)] = seen
    assert text == f"# {identity.removeprefix('identity ')}\n"
    assert [run.name for run in list_runs(f"{bucket}/runs")] == ["first"]
    run = RunDirectory.existing(f"{bucket}/runs", "first")
    assert run.location == f"{bucket}/runs/first"
    assert RunDirectory.existing("elsewhere", run.location).location == run.location
    with pytest.raises(UserError, match=r"'third': not found under gs://.*there are first"):
        RunDirectory.existing(f"{bucket}/runs", "third")


def test_a_prefix_of_somebody_else_is_refused(bucket: str):
    run = RunDirectory.at(bucket, "first")
    run.store.write("notes.txt", b"mine")
    with pytest.raises(UserError, match=r"gs://.*first: is there and is not a tvq run"):
        run.claim("identity", {}, "")
    assert [entry.name for entry in run.store.list()] == ["notes.txt"]


def test_a_second_driver_is_refused_and_a_superseded_one_never_holds_again(bucket: str):
    run = RunDirectory.at(bucket, "first")
    run.claim("identity", {}, "")
    now = 1_000_000.0
    with Lease(run, clock=lambda: now, renew_seconds=600).held() as old:
        with (
            pytest.raises(UserError, match="is being trained"),
            Lease(run, clock=lambda: now).held(),
        ):
            pass
        before = run.store.read("lease.json")
        now += 61
        with Lease(run, clock=lambda: now, renew_seconds=600).held() as new:
            run.store.write("lease.json", before)  # the old one, asleep in the midst of a renewal
            with pytest.raises(LeaseLostError, match="another driver"):
                Fence(run, old.owner).raise_over_others()
            Fence(run, new.owner).raise_over_others()


def test_a_stop_is_seen_without_waiting(bucket: str):
    run = RunDirectory.at(bucket, "first")
    run.claim("identity", {}, "")
    for wanted in (True, False):
        RunDirectory(run.location).request_stop(wanted)
        deadline = time.monotonic() + 60
        while run.stop_requested() != wanted:
            assert time.monotonic() < deadline
            time.sleep(0.05)


def test_logs_of_two_starts_are_one_file(bucket: str):
    for number in (1, 2):
        open_log(f"{bucket}/logs", "rank-0")
        tail = LogTail(f"{bucket}/logs", "rank-0")
        event("start", number=number)
        close_log()
        assert [line["number"] for line in tail.read()] == [number]
    numbers = [line["number"] for line in events(f"{bucket}/logs", "rank-0", "start")]
    assert numbers == [1, 2]


@pytest.mark.timeout(60)
def test_metrics_for_a_bucket_that_is_gone_are_not_waited_for(
    bucket: str, object_store: ObjectStoreServer
):
    spool = BackgroundSpool(f"{bucket}/runs/first/metrics")
    object_store.fault("404")
    spool.append(MetricPoint(1, 1, 1, {"loss": 1.0}))
    with pytest.raises(CorpusError, match="there is no bucket"):
        spool.close()
