"""Rows reduced by halves, against numpy, and for other devices as they are."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from model.reductions import row_max, row_min

WIDTHS = [1, 2, 15, 17, 32, 96, 259, 768]


@pytest.mark.parametrize("width", WIDTHS)
def test_every_column_counts(width: int):
    """The largest and the smallest of a row lie in each column once."""
    drawn = np.random.default_rng(width).permuted(
        np.tile(np.arange(width, dtype=np.float32), (width, 1)), axis=1
    )
    rows = np.stack([np.roll(drawn[0], shift) for shift in range(width)])
    for case in (drawn, rows, rows - width / 2):
        np.testing.assert_array_equal(jax.jit(row_max)(case), case.max(1, keepdims=True))
        np.testing.assert_array_equal(jax.jit(row_min)(case), case.min(1, keepdims=True))


@pytest.mark.parametrize("width", WIDTHS)
def test_of_what_is_no_number(width: int):
    nothing = jnp.full((2, 3, width), -jnp.inf)
    assert np.isfinite(row_max(nothing)).all()  # its softmax is no NaN
    one = nothing.at[1, 2, width // 2].set(jnp.nan)
    for found in (row_max(one), row_min(one)):
        assert np.argwhere(np.isnan(found)).tolist() == [[1, 2, 0]]


@pytest.mark.parametrize(("platform", "halved"), [("cpu", True), ("tpu", False), ("cuda", False)])
def test_halves_are_for_cpus(platform: str, halved: bool):
    rows = jax.ShapeDtypeStruct((4, 768), jnp.float32)
    program = jax.export.export(jax.jit(row_max), platforms=[platform])(rows).mlir_module()
    assert ("stablehlo.slice" in program) == halved
    assert "stablehlo.reduce" in program
