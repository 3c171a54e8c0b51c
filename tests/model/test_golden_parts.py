"""Single parts against the official code's: sinusoids, norm, schedules, top-p."""

import jax.numpy as jnp
import numpy as np
import pytest

from model.config import OptimizerConfig
from model.layers import Norm, sinusoids
from model.optimizer import schedule_multiplier
from model.sampling import Filters, filter_logits
from tests.model.golden import arrays_of

OFFICIAL = arrays_of("misc")


@pytest.mark.parametrize(
    ("name", "positions"),
    [("flip0", range(12)), ("flip1", range(11, -1, -1)), ("flip0_start5", range(5, 17))],
)
def test_sinusoids(name, positions):
    table = sinusoids(jnp.array(positions), 8, 1e5, jnp.dtype("float32"))
    np.testing.assert_allclose(table, OFFICIAL[f"sinusoid/len12_w8_lam100000_{name}"], atol=1e-6)


def test_norm():
    norm = Norm(8, dtype=jnp.dtype("float32"))
    norm.gain[...] = jnp.asarray(OFFICIAL["rmsnorm/g"])
    norm.bias[...] = jnp.asarray(OFFICIAL["rmsnorm/b"])
    normed = norm(jnp.asarray(OFFICIAL["rmsnorm/in"])[None])[0]
    np.testing.assert_allclose(normed, OFFICIAL["rmsnorm/out"], atol=2e-6)


@pytest.mark.parametrize("schedule", ["cosine", "linear"])
def test_schedules(schedule):
    config = OptimizerConfig(schedule=schedule, warmup_steps=10, schedule_steps=50)
    expected = OFFICIAL[f"schedule/{schedule}_warm10_max50"]
    actual = [schedule_multiplier(config, jnp.int32(update)) for update in range(len(expected))]
    np.testing.assert_allclose(actual, expected, atol=1e-6)


@pytest.mark.parametrize("p", ["0.1", "0.8", "0.9", "0.999", "1.0"])
def test_top_p(p):
    """The official filter takes 1e-4 off p, and leaves the special tokens to the model."""
    logits = jnp.asarray(OFFICIAL["nucleus/logits"])[:, 0]
    specials = jnp.full((len(logits), 3), -jnp.inf)
    filters = Filters(top_p=float(p) - 1e-4)
    filtered = filter_logits(jnp.concatenate([specials, logits], axis=1), filters)
    expected = OFFICIAL[f"nucleus/p{p}"][:, 0]
    np.testing.assert_array_equal(jnp.isfinite(filtered[:, 3:]), expected > -1e9)
