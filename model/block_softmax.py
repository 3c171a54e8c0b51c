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
from jaxtyping import Array, Bool, Float, Int

from model.products import table_moves, times_table
from model.reductions import row_max
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

    def part(self, start: int | Int[Array, ""], width: int) -> "Columns":
        """So many columns from the one at `start` on."""

        def cut(array: Array | None, axis: int) -> Array | None:
            if array is None:
                return None
            return lax.dynamic_slice_in_dim(array, start, width, axis)

        keys, values, codes, documents = self
        parts = (cut(keys, 2), cut(values, 2), cut(codes, 2), cut(documents, 1))
        return Columns(*parts)  # pyright: ignore[reportArgumentType]


class Table(NamedTuple):
    """What queries are scored against besides tokens."""

    codewords: Float[Array, "H S K"] | None
    distances: Float[Array, "H P K"]
    """From M down to 0: in the order of the columns."""

    @property
    def window(self) -> int:
        """M."""
        return self.distances.shape[1] - 1


class Mixture(NamedTuple):
    """The softmax of a block and what it gives."""

    to_columns: Float[Array, "B H Q W"]
    """exp of the scores less the row's largest."""
    to_codes: Float[Array, "B H Q S"] | None
    total: Float[Array, "B H Q 1"]
    """Their sum."""
    values: Float[Array, "B H Q V"]


def mix(
    rows: Rows,
    buffer: Columns,
    summary: Summary | None,
    table: Table,
    seen: Int[Array, "*B"],
    *,
    whole_buffer: bool = False,
) -> Mixture:
    """The softmax of a block's rows over the buffer and the codewords. `seen` tokens precede it.

    Without codewords the rows attend their windows alone, or the `whole_buffer`.
    """
    dtype, wide = buffer.values.dtype, buffer.keys.dtype
    scores = column_scores(
        rows, buffer, table, seen, whole_buffer=whole_buffer or summary is not None
    )
    largest, codes = row_max(scores), None
    if summary is not None:
        codes = _code_scores(rows, summary, table)
        largest = jnp.maximum(largest, row_max(codes))
    to_columns = jnp.exp(scores - largest)
    total = jnp.sum(to_columns, axis=-1, keepdims=True)
    to_columns = to_columns.astype(dtype)
    mixed, to_codes = weighted_sum(to_columns, buffer.values, wide), None
    if summary is not None and codes is not None:
        to_codes = jnp.exp(codes - largest)
        total += jnp.sum(to_codes, axis=-1, keepdims=True)
        to_codes = to_codes.astype(dtype)
        mixed += weighted_sum(to_codes, summary.means.astype(dtype), wide)
    total = jnp.maximum(total, jnp.finfo(wide).tiny)  # of rows beyond the last token
    return Mixture(to_columns, to_codes, total, (mixed / total).astype(dtype))


def column_scores(
    rows: Rows, buffer: Columns, table: Table, seen: Int[Array, "*B"], *, whole_buffer: bool
) -> Float[Array, "B H Q W"]:
    """Scores against the window and the block itself; -inf where not attended.

    With `whole_buffer` the columns before a row's window are attended too, without a position.
    """
    *_, R, L, _ = rows.content.shape
    W = buffer.keys.shape[2]
    row, column = jnp.arange(L)[:, None], jnp.arange(W)
    first = (W - L - seen)[..., None, None]  # the first column with a token
    attended = (column <= W - L + row) & (column >= first)
    if not whole_buffer:
        attended &= column >= row
    attended = attended if attended.ndim == 2 else attended[:, None, None]
    attended = attended & same_document(rows, buffer)
    scores = jnp.einsum("bhqk,bhwk->bhqw", flatten_rows(rows.content), buffer.keys)
    by_distance = times_table(flatten_rows(rows.position), table.distances.mT)
    scores = split_rows(scores, R) + skew(split_rows(by_distance, R), W)
    return flatten_rows(jnp.where(attended, scores, -jnp.inf))


def _code_scores(rows: Rows, summary: Summary, table: Table) -> Float[Array, "B H Q S"]:
    """Scores against the codewords, each for as many tokens as it has; -inf for none."""
    known = summary.counts > 0
    bias = jnp.where(known, jnp.log(jnp.maximum(summary.counts, 1)), -jnp.inf)
    assert table.codewords is not None
    content = flatten_rows(rows.content)
    codes = times_table(content, table.codewords.mT) + bias[:, :, None]
    if rows.documents is None or summary.document is None:
        return codes
    same = rows.documents == summary.document[:, None]
    same = jnp.tile(same, (1, rows.content.shape[2]))
    return jnp.where(same[:, None, :, None], codes, -jnp.inf)


def same_document(rows: Rows, columns: Columns) -> Bool[Array, "B 1 1 L W"] | bool:
    """Where row and column are of one document; everywhere if documents are not isolated."""
    if rows.documents is None or columns.documents is None:
        return True
    return (rows.documents[:, :, None] == columns.documents[:, None, :])[:, None, None]


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
        assert table.codewords is not None
        content += times_table(codes, table.codewords)
    columns = split_rows(columns, R)
    by_distance = flatten_rows(unskew(columns, table.window + 1))
    if window_gradient:
        columns = jnp.where(jnp.arange(W) >= jnp.arange(L)[:, None], columns, 0)
    return Moves(
        content=split_rows(content, R),
        position=split_rows(times_table(by_distance, table.distances), R),
        keys=jnp.einsum("bhqw,bhqk->bhwk", flatten_rows(columns), flatten_rows(rows.content)),
        values=values,
        means=means,
        distances=table_moves(by_distance, flatten_rows(rows.position)),
    )


def flatten_rows(rows: Float[Array, "B H R L X"]) -> Float[Array, "B H Q X"]:
    """All rows on one axis, Q = R L: products of plain matrices, which XLA does not rearrange."""
    B, H, R, L, width = rows.shape
    return rows.reshape(B, H, R * L, width)


def split_rows(rows: Float[Array, "B H Q X"], n_heads: int) -> Float[Array, "B H R L X"]:
    """The rows by query head again."""
    B, H, Q, width = rows.shape
    return rows.reshape(B, H, n_heads, Q // n_heads, width)


def weighted_sum(
    weights: Float[Array, "B H Q W"], values: Float[Array, "B H W V"], dtype: jnp.dtype
) -> Float[Array, "B H Q V"]:
    """Sums of values, in `dtype`."""
    return jnp.einsum("bhqw,bhwv->bhqv", weights, values, preferred_element_type=dtype)


def skew(scores: Float[Array, "B H R L P"], n_columns: int) -> Float[Array, "B H R L W"]:
    """Moves row i right by W - M - L + i, zeros around it: from distance M - c in column c to the
    columns of a buffer, the last L of which are the rows' own tokens (Dai et al. 2019, appendix B,
    the other way round)."""
    *lead, L, P = scores.shape
    W = n_columns
    before = W - (P - 1) - L
    padded = jnp.pad(scores, [(0, 0)] * (len(lead) + 1) + [(before, W + 1 - P - before)])
    return padded.reshape(*lead, L * (W + 1))[..., : L * W].reshape(*lead, L, W)


def unskew(scores: Float[Array, "B H R L W"], n_distances: int) -> Float[Array, "B H R L P"]:
    """Moves row i left by W - M - L + i and keeps P columns."""
    *lead, L, W = scores.shape
    before = W - (n_distances - 1) - L
    padded = jnp.pad(scores.reshape(*lead, L * W), [(0, 0)] * len(lead) + [(0, L)])
    return padded.reshape(*lead, L, W + 1)[..., before : before + n_distances]
