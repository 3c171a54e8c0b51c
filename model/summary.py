"""The summary of tokens older than the window: their number and mean value by code.

All keys of one code have one score, so this is all that exact attention needs of them (MODEL.md
section 1.5). Tokens that leave the window are merged into it; merging is associative.

B batch, N blocks, L block length, H key and value heads, S codes, V value width.
"""

from typing import NamedTuple

import jax
import jax.numpy as jnp
from jax import lax
from jaxtyping import Array, Float, Int

from model.attention import NO_DOCUMENT


class Summary(NamedTuple):
    """Tokens that are met through the codewords."""

    counts: Float[Array, "B H S"]
    means: Float[Array, "B H S V"]
    document: Int[Array, " B"] | None


class Leaving(NamedTuple):
    """Tokens that leave the window after a block."""

    codes: Int[Array, "B H L"]
    """int32, S for columns that hold no token."""
    values: Float[Array, "B H L V"]
    documents: Int[Array, "B L"] | None


class _Merging(NamedTuple):
    """The coefficients of a merge, which is linear in means and values."""

    drawn: Float[Array, "B H L S"]
    """One-hot codes of the tokens that are counted."""
    counts: Float[Array, "B H S"]
    divisor: Float[Array, "B H S 1"]
    share: Float[Array, "B H S 1"]
    """What the old means count for."""
    document: Int[Array, " B"] | None


def _merging(summary: Summary, leaving: Leaving) -> _Merging:
    S, dtype = summary.counts.shape[-1], summary.counts.dtype
    drawn = jax.nn.one_hot(leaving.codes, S, dtype=leaving.values.dtype)
    counts, document = summary.counts, summary.document
    if leaving.documents is not None and document is not None:
        # Only the newest document that reaches out of the window is counted.
        newest = jnp.maximum(document, jnp.max(leaving.documents, axis=-1))
        counts = counts * (document == newest)[:, None, None]
        drawn *= (leaving.documents == newest[:, None])[:, None, :, None]
        document = newest
    together = counts + jnp.sum(drawn, axis=2, dtype=dtype)
    divisor = jnp.maximum(together, 1)[..., None]
    return _Merging(drawn, together, divisor, counts[..., None] / divisor, document)


def merge(summary: Summary, leaving: Leaving) -> Summary:
    """Counts and means with the leaving tokens among them."""
    merging = _merging(summary, leaving)
    dtype = summary.means.dtype
    summed = jnp.einsum(
        "bhls,bhlv->bhsv", merging.drawn, leaving.values, preferred_element_type=dtype
    )
    means = merging.share * summary.means + summed / merging.divisor
    return Summary(merging.counts, means, merging.document)


def merge_transposed(
    summary: Summary, leaving: Leaving, means: Float[Array, "B H S V"]
) -> tuple[Float[Array, "B H S V"], Float[Array, "B H L V"]]:
    """Pulls the gradient of the merged means back to the old means and the leaving values."""
    merging = _merging(summary, leaving)
    by_token = (means / merging.divisor).astype(leaving.values.dtype)
    return merging.share * means, jnp.einsum("bhls,bhsv->bhlv", merging.drawn, by_token)


def prefixes(summary: Summary, leaving: Leaving, n_blocks: int) -> Summary:
    """[N + 1, B, ...]: the summary before each of N blocks and after the last."""

    def empty(a: Array) -> Array:
        fill = NO_DOCUMENT if jnp.issubdtype(a.dtype, jnp.integer) else 0
        return jnp.full((a.shape[0] * n_blocks, *a.shape[1:]), fill, a.dtype)

    parts = merge(jax.tree.map(empty, summary), leaving)
    parts = jax.tree.map(lambda a: a.reshape(-1, n_blocks, *a.shape[1:]).swapaxes(0, 1), parts)
    elements = jax.tree.map(lambda a, b: jnp.concatenate([a[None], b]), summary, parts)
    return lax.associative_scan(_together, elements)


def _together(earlier: Summary, later: Summary) -> Summary:
    """Both summaries' tokens; with isolated documents, those of the newest document."""
    counts, others, document = earlier.counts, later.counts, None
    if earlier.document is not None and later.document is not None:
        document = jnp.maximum(earlier.document, later.document)
        counts *= (earlier.document == document)[..., None, None]
        others *= (later.document == document)[..., None, None]
    together = counts + others
    divisor = jnp.maximum(together, 1)
    means = (counts / divisor)[..., None] * earlier.means
    means += (others / divisor)[..., None] * later.means
    return Summary(together, means, document)
