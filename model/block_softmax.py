"""The softmax of one block's queries, and its gradient by hand.

A block of L queries meets a buffer of W = M + L columns, the M tokens before the block and its own,
and what is older through the codewords. A query whose window begins inside the buffer also attends
the columns before its window, exactly and without a position, so that the result does not depend
on L.

B batch, T tokens, N blocks, L block length, M window, W = M + L buffer columns, P = M + 1
distances, H key and value heads, R query heads to each of them, Q = R L rows, S codes,
K key width, V value width.
"""

from typing import NamedTuple

import jax.numpy as jnp
from jax import lax
from jaxtyping import Array, Float, Int

from model.summary import Summary


class Rows(NamedTuple):
    """Queries of a block."""

    content: Float[Array, "B H R L K"]
    """With the content bias added."""
    position: Float[Array, "B H R L K"]
    """With the position bias added."""
    documents: Int[Array, "B L"] | None


class Columns(NamedTuple):
    """Tokens that are met one by one."""

    keys: Float[Array, "B H W K"]
    values: Float[Array, "B H W V"]
    codes: Int[Array, "B H W"] | None
    documents: Int[Array, "B W"] | None


class Table(NamedTuple):
    """What queries are scored against besides tokens."""

    codewords: Float[Array, "H S K"] | None
    distances: Float[Array, "H P K"]
    """From M down to 0: in the order of the columns."""


class Mixture(NamedTuple):
    """The softmax of a block and what it gives."""

    to_columns: Float[Array, "B H Q W"]
    """exp of the scores less the row's largest."""
    to_codes: Float[Array, "B H Q S"] | None
    total: Float[Array, "B H Q 1"]
    """Their sum."""
    values: Float[Array, "B H Q V"]


def mix(
    rows: Rows, buffer: Columns, summary: Summary | None, table: Table, seen: Int[Array, "*B"]
) -> Mixture:
    """The softmax of a block's rows over the buffer and the codewords. `seen` tokens precede it."""
    values_dtype, wide = buffer.values.dtype, buffer.keys.dtype
    *_, R, L, _ = rows.content.shape
    W = buffer.keys.shape[2]
    content, position = flatten_rows(rows.content), flatten_rows(rows.position)
    row, column = jnp.arange(L)[:, None], jnp.arange(W)
    first = (W - L - seen)[..., None, None]  # the first column with a token
    attended = (column <= W - L + row) & (column >= first)
    if summary is None:  # columns before the row's window
        attended &= column >= row
    attended = attended if attended.ndim == 2 else attended[:, None, None]
    if rows.documents is not None and buffer.documents is not None:
        same = rows.documents[:, :, None] == buffer.documents[:, None, :]
        attended = attended & same[:, None, None]
    scores = jnp.einsum("bhqk,bhwk->bhqw", content, buffer.keys)
    by_distance = jnp.einsum("bhqk,hpk->bhqp", position, table.distances)
    scores = split_rows(scores, R) + skew(split_rows(by_distance, R))
    scores = flatten_rows(jnp.where(attended, scores, -jnp.inf))
    largest = row_max(scores)
    if summary is None or table.codewords is None:
        to_columns, to_codes = jnp.exp(scores - largest), None
        total = jnp.sum(to_columns, axis=-1, keepdims=True)
        to_columns = to_columns.astype(values_dtype)
        mixed = _weighted(to_columns, buffer.values, wide)
    else:
        known = summary.counts > 0
        bias = jnp.where(known, jnp.log(jnp.maximum(summary.counts, 1)), -jnp.inf)
        codes = jnp.einsum("bhqk,hsk->bhqs", content, table.codewords) + bias[:, :, None]
        if rows.documents is not None and summary.document is not None:
            same = rows.documents == summary.document[:, None]
            same = jnp.tile(same, (1, R))[:, None, :, None]
            codes = jnp.where(same, codes, -jnp.inf)
        largest = jnp.maximum(largest, jnp.max(codes, axis=-1, keepdims=True))
        to_columns, to_codes = jnp.exp(scores - largest), jnp.exp(codes - largest)
        total = jnp.sum(to_columns, -1, keepdims=True) + jnp.sum(to_codes, -1, keepdims=True)
        to_columns, to_codes = to_columns.astype(values_dtype), to_codes.astype(values_dtype)
        mixed = _weighted(to_columns, buffer.values, wide)
        mixed += _weighted(to_codes, summary.means.astype(values_dtype), wide)
    total = jnp.maximum(total, jnp.finfo(wide).tiny)  # of rows beyond the last token
    return Mixture(to_columns, to_codes, total, (mixed / total).astype(values_dtype))


class Moves(NamedTuple):
    """Gradients of a block's softmax."""

    content: Float[Array, "B H R L K"]
    position: Float[Array, "B H R L K"]
    keys: Float[Array, "B H W K"]
    values: Float[Array, "B H W V"]
    means: Float[Array, "B H S V"] | float
    distances: Float[Array, "H P K"]


def mix_transposed(
    rows: Rows,
    buffer: Columns,
    summary: Summary | None,
    table: Table,
    mixture: Mixture,
    cotangent: Float[Array, "B H R L V"],
    window_gradient: bool,
) -> Moves:
    """Pulls the gradient of a block's values back to all that `mix` read."""
    values_dtype, wide = buffer.values.dtype, buffer.keys.dtype
    *_, R, L, _ = rows.content.shape
    W = buffer.keys.shape[2]
    cotangent = flatten_rows(cotangent) / mixture.total
    common = jnp.sum(cotangent * mixture.values, axis=-1, keepdims=True)
    cotangent = cotangent.astype(values_dtype)

    def scores(weights: Array, values: Array) -> Array:
        by_weight = jnp.einsum("bhqv,bhwv->bhqw", cotangent, values, preferred_element_type=wide)
        return weights * (by_weight - common)

    columns = scores(mixture.to_columns, buffer.values)
    values = jnp.einsum("bhqw,bhqv->bhwv", mixture.to_columns, cotangent)
    content = jnp.einsum("bhqw,bhwk->bhqk", columns, buffer.keys)
    means: Array | float = 0.0
    if summary is not None and mixture.to_codes is not None:
        codes = scores(mixture.to_codes, summary.means.astype(values_dtype))
        means = jnp.einsum(
            "bhqs,bhqv->bhsv", mixture.to_codes, cotangent, preferred_element_type=wide
        )
        content += jnp.einsum("bhqs,hsk->bhqk", codes, table.codewords)
    columns = split_rows(columns, R)
    by_distance = flatten_rows(unskew(columns, W - L + 1))
    if window_gradient:
        columns = jnp.where(jnp.arange(W) >= jnp.arange(L)[:, None], columns, 0)
    return Moves(
        content=split_rows(content, R),
        position=split_rows(jnp.einsum("bhqp,hpk->bhqk", by_distance, table.distances), R),
        keys=jnp.einsum("bhqw,bhqk->bhwk", flatten_rows(columns), flatten_rows(rows.content)),
        values=values,
        means=means,
        distances=jnp.einsum("bhqp,bhqk->hpk", by_distance, flatten_rows(rows.position)),
    )


def row_max(scores: Float[Array, "B H Q W"]) -> Float[Array, "B H Q 1"]:
    """Each row's largest score; finite for a row that attends nothing, so that it makes no NaN."""
    return jnp.max(scores, axis=-1, keepdims=True, initial=jnp.finfo(scores.dtype).min)


def flatten_rows(rows: Float[Array, "B H R L X"]) -> Float[Array, "B H Q X"]:
    """All rows on one axis, Q = R L: products of plain matrices, which XLA does not rearrange."""
    B, H, R, L, width = rows.shape
    return rows.reshape(B, H, R * L, width)


def split_rows(rows: Float[Array, "B H Q X"], n_heads: int) -> Float[Array, "B H R L X"]:
    """The rows by query head again."""
    B, H, Q, width = rows.shape
    return rows.reshape(B, H, n_heads, Q // n_heads, width)


def _weighted(weights: Array, values: Array, dtype: jnp.dtype) -> Array:
    return jnp.einsum("bhqw,bhwv->bhqv", weights, values, preferred_element_type=dtype)


def skew(scores: Float[Array, "B H R L P"]) -> Float[Array, "B H R L W"]:
    """Moves row i right by i, zeros around it: from distance M - c in column c to the buffer's
    columns, W = M + L of them (Dai et al. 2019, appendix B, the other way round)."""
    *lead, L, P = scores.shape
    W = P - 1 + L
    padded = jnp.pad(scores, [(0, 0)] * (len(lead) + 1) + [(0, W + 1 - P)])
    # Else the rows' wrap is computed element by element, by integer division.
    flat = lax.optimization_barrier(padded.reshape(*lead, L * (W + 1)))
    return flat[..., : L * W].reshape(*lead, L, W)


def unskew(scores: Float[Array, "B H R L W"], n_distances: int) -> Float[Array, "B H R L P"]:
    """Moves row i left by i and keeps P columns."""
    *lead, L, W = scores.shape
    padded = jnp.pad(scores.reshape(*lead, L * W), [(0, 0)] * len(lead) + [(0, L)])
    flat = lax.optimization_barrier(padded)
    return flat.reshape(*lead, L, W + 1)[..., :n_distances]
