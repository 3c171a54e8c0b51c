"""The bootstrap against numpy's own, and against what it is to cover."""

import numpy as np
import pytest

from jobs.evaluation.bootstrap import LEAST, interval


def sample(n: int, seed: int = 0) -> tuple[np.ndarray, np.ndarray]:
    draws = np.random.default_rng(seed)
    sizes = draws.integers(100, 1000, n)
    return sizes * draws.normal(1.3, 0.2, n), sizes


def test_the_draws_never_change():
    found = interval(*sample(30))
    assert found is not None
    assert found == pytest.approx((1.240871103015234, 1.3550314880052707), rel=1e-12)
    assert interval(*sample(30)) == found
    assert interval(*sample(30), seed=1) != found


def test_it_is_the_percentile_bootstrap():
    nats, sizes = sample(200)
    draws = np.random.default_rng(5).integers(0, 200, (100_000, 200))
    ratios = nats[draws].sum(axis=1) / sizes[draws].sum(axis=1)
    for level in (0.5, 0.9, 0.95):
        expected = np.quantile(ratios, [(1 - level) / 2, (1 + level) / 2])
        found = interval(nats, sizes, level=level, resamples=100_000)
        assert found is not None
        np.testing.assert_allclose(found, expected, atol=0.05 * ratios.std())


def test_it_covers_the_truth_about_as_often_as_it_says():
    covered = 0
    for seed in range(200):
        found = interval(*sample(60, seed), resamples=400)
        assert found is not None
        covered += found[0] <= 1.3 <= found[1]
    assert 0.88 <= covered / 200 <= 0.99


def test_batches_of_draws_change_nothing(monkeypatch):
    expected = interval(*sample(50))
    monkeypatch.setattr("jobs.evaluation.bootstrap._DRAWS_AT_ONCE", 170)
    assert interval(*sample(50)) == expected


def test_a_handful_has_no_interval():
    assert interval(*sample(LEAST - 1)) is None
    assert interval(*sample(LEAST)) is not None
