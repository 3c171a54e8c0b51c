"""What decides a promotion: paired differences, against numpy's own resampling and by hand."""

import math

import numpy as np
import pytest

from jobs.registry.promotion import Decision, Scored, decide

BITS, LOSS = "eval/bits_per_byte", "eval/loss_nats_per_token"
RANDOM = np.random.default_rng(0)
N_BYTES = RANDOM.integers(100, 10_000, 60)
NATS = N_BYTES * RANDOM.normal(1.4, 0.3, 60)  # documents differ far more than models do


def scored(nats: np.ndarray, **fields) -> Scored:
    columns = {"fingerprint": "f" * 64, "n_tokens": N_BYTES + 1, "n_bytes": N_BYTES}
    return Scored(nats=nats, **(columns | fields))


def against(candidate: np.ndarray, metric: str = BITS, min_delta: float = 0.0) -> Decision:
    return decide(scored(candidate), scored(NATS), metric, min_delta)


def test_the_difference_is_that_of_the_whole_split():
    better = NATS - 0.01 * N_BYTES * RANDOM.uniform(0.5, 1.5, 60)
    found = against(better)
    assert found.difference == pytest.approx((better - NATS).sum() / math.log(2) / N_BYTES.sum())
    loss = against(better, LOSS)
    assert loss.difference == pytest.approx((better - NATS).sum() / (N_BYTES + 1).sum())


def test_the_interval_is_that_of_drawing_documents_in_pairs():
    better = NATS - 0.01 * N_BYTES * RANDOM.uniform(-1, 3, 60)
    draws = np.random.default_rng(1).integers(0, 60, (20_000, 60))
    bits = (better - NATS) / math.log(2)
    expected = np.quantile(bits[draws].sum(1) / N_BYTES[draws].sum(1), [0.025, 0.975])
    found = against(better)
    width = expected[1] - expected[0]
    assert (found.low, found.high) == pytest.approx(tuple(expected), abs=0.06 * width)


def test_a_small_gain_on_every_document_is_seen_through_their_differences():
    # A thousandth of a bit: unpaired, the documents' own spread would hide it.
    found = against(NATS - 0.001 * N_BYTES * RANDOM.uniform(0.5, 1.5, 60))
    assert found.outcome == "promoted"
    assert found.high is not None
    assert found.high < 0


def test_what_is_better_by_chance_or_not_enough_is_inconclusive():
    noise = RANDOM.normal(0, 1, 60)
    noise -= (noise * N_BYTES).sum() / N_BYTES.sum() + 0.01
    assert against(NATS + 0.05 * noise * N_BYTES).outcome == "inconclusive"
    gain = NATS - 0.01 * math.log(2) * N_BYTES
    assert against(gain, min_delta=0.009).outcome == "promoted"
    assert against(gain, min_delta=0.011).outcome == "inconclusive"
    assert against(NATS).outcome == "inconclusive"


def test_what_is_worse_for_certain_is_called_so():
    found = against(NATS + 0.01 * N_BYTES * RANDOM.uniform(0.5, 1.5, 60))
    assert found.outcome == "worse"
    assert found.low is not None
    assert found.low > 0


def test_an_interval_errs_about_as_often_as_it_says():
    """Of models that are equal, one in forty is promoted by chance."""
    promoted = 0
    for _ in range(300):
        promoted += against(NATS + N_BYTES * RANDOM.normal(0, 0.02, 60)).outcome == "promoted"
    assert promoted <= 18  # 7.5 expected; percentiles of 60 documents are a little narrow


def test_too_few_documents_decide_nothing():
    few = [scored(nats[:9], n_tokens=N_BYTES[:9], n_bytes=N_BYTES[:9]) for nats in (NATS / 2, NATS)]
    found = decide(few[0], few[1], BITS)
    assert found.outcome == "inconclusive"
    assert "9 documents" in found.why
    assert found.low is None


def test_other_text_or_other_targets_are_refused():
    other = decide(scored(NATS / 2, fingerprint="0" * 64), scored(NATS), BITS)
    assert other.outcome == "refused"
    assert "different splits" in other.why
    assert other.difference is None
    counted = decide(scored(NATS / 2, n_tokens=N_BYTES), scored(NATS), BITS)
    assert counted.outcome == "refused"
    assert "data.window" in counted.why
