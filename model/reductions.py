"""The largest and the smallest of each row.

XLA's CPU compiler reduces a row element by element. So on CPUs its halves are first compared with
each other, again and again, which is vectorised: 256 rows of 768 take 0.03 ms instead of 0.16, a
step of `small` at 8,192 tokens on two cores 3% less.
"""

from collections.abc import Callable

import jax.numpy as jnp
from jax import lax
from jaxtyping import Array, Float, Shaped

_NARROW = 16
"""Columns that are reduced as they are."""


def row_max(scores: Float[Array, "*axes X"]) -> Float[Array, "*axes 1"]:
    """Each row's largest score; finite for a row of -inf alone, so that its softmax is no NaN."""
    least = jnp.finfo(scores.dtype).min
    return _reduced(
        scores, jnp.maximum, lambda x: jnp.max(x, axis=-1, keepdims=True, initial=least)
    )


def row_min(x: Shaped[Array, "*axes X"]) -> Shaped[Array, "*axes 1"]:
    """Each row's smallest element."""
    return _reduced(x, jnp.minimum, lambda x: jnp.min(x, axis=-1, keepdims=True))


def _reduced(
    x: Array, better: Callable[[Array, Array], Array], reduce: Callable[[Array], Array]
) -> Array:
    def by_halves(x: Array) -> Array:
        while x.shape[-1] > _NARROW and x.shape[-1] % 2 == 0:
            half = x.shape[-1] // 2
            x = better(x[..., :half], x[..., half:])
        return reduce(x)

    return lax.platform_dependent(x, cpu=by_halves, default=reduce)
