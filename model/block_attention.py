"""Attention in time linear in the length, block after block: the serial form.

After each block the tokens that leave the window are merged into the summary of older ones. The
gradient is written by hand, for speed: kept of a block are the weights of its softmax and the
summary before it, never a copy of its buffer, and XLA is given no matrix to transpose.

B batch, T tokens, N blocks, L block length, M window, W = M + L buffer columns, P = M + 1
distances, H key and value heads, R query heads to each of them, Q = R L rows, S codes,
K key width, V value width.
"""

import functools
from typing import Any, NamedTuple, cast

import jax
import jax.numpy as jnp
from jax import lax
from jaxtyping import Array, Float, Int

from model.attention import NO_DOCUMENT, LayerCache, Projections, Scoring
from model.block_softmax import (
    Columns,
    Rows,
    Table,
    mix,
    mix_transposed,
    split_rows,
)
from model.summary import Leaving, Summary, merge, merge_transposed


class Options(NamedTuple):
    """What is fixed when the program is compiled."""

    block_length: int
    """L."""
    window_gradient: bool
    """Keys pass gradients on within a query's window only, not in its whole buffer."""
    gradient_through_cache: bool
    """Gradients reach earlier blocks."""


def attend_serial(
    tokens: Projections,
    scoring: Scoring,
    cache: LayerCache,
    length: Int[Array, ""],
    options: Options,
) -> tuple[Float[Array, "B H R T V"], LayerCache]:
    """Attention of T tokens that follow the `length` ones in the cache, block after block.

    The last block may be shorter. One token alone is a block of one, which is how decoding runs.
    Gradients do not reach the cache.
    """
    options = options._replace(block_length=min(options.block_length, tokens.keys.shape[2]))
    rows, old, new, summary = arrange(tokens, scoring, cache)
    table = table_of(scoring)
    values, after = cast(
        tuple[Array, Summary | None], _serial(options, rows, old, new, summary, table, length)
    )
    return values, next_cache(old, new, after)


@functools.partial(jax.custom_vjp, nondiff_argnums=(0,))
def _serial(
    options: Options,
    rows: Rows,
    old: Columns,
    new: Columns,
    summary: Summary | None,
    table: Table,
    length: Int[Array, ""],
) -> tuple[Float[Array, "B H R T V"], Summary | None]:
    values, summary, _ = _serial_scan(options, rows, old, new, summary, table, length, keep=False)
    return values, summary


def _serial_scan(
    options: Options,
    rows: Rows,
    old: Columns,
    new: Columns,
    summary: Summary | None,
    table: Table,
    length: Int[Array, ""],
    *,
    keep: bool,
) -> tuple[Float[Array, "B H R T V"], Summary | None, Any]:
    """The blocks' values as one array, the last summary and, to `keep`, each block's residuals."""
    T, L = rows.content.shape[3], options.block_length
    columns = joined(old, new, -T % L)

    def step(
        summary: Summary | None, block: tuple[Int[Array, ""], Rows]
    ) -> tuple[Summary | None, Any]:
        index, rows = block
        buffer = columns.part(index * L, table.window + L)
        mixture = mix(rows, buffer, summary, table, length + index * L)
        after = None if summary is None else merge(summary, leaving(buffer, L, T - index * L))
        return after, (mixture, summary) if keep else mixture.values

    blocks = (jnp.arange(-(-T // L)), row_blocks(rows, L))
    summary, out = lax.scan(step, summary, blocks)
    values = out[0].values if keep else out
    values = jax.vmap(lambda block: split_rows(block, rows.content.shape[2]))(values)
    return join_blocks(values, T), summary, out


def _serial_forward(options, rows, old, new, summary, table, length):
    values, after, kept = _serial_scan(options, rows, old, new, summary, table, length, keep=True)
    return (values, after), (rows, old, new, table, kept)


def _serial_backward(options, residuals, cotangents):
    rows, old, new, table, (mixtures, summaries) = residuals
    T, L, M = rows.content.shape[3], options.block_length, table.window
    columns = joined(old, new, -T % L)

    def step(carry, block):
        later_columns, later_means, distances = carry
        index, rows, mixture, summary, cotangent = block
        buffer = columns.part(index * L, table.window + L)
        moves = mix_transposed(
            rows, buffer, summary, table, mixture, cotangent, options.window_gradient
        )
        keys, values = moves.keys, moves.values
        if options.gradient_through_cache:
            if summary is not None:
                earlier, gone = merge_transposed(
                    summary, leaving(buffer, L, T - index * L), later_means
                )
                values = values.at[:, :, :L].add(gone.astype(values.dtype))
                later_means = earlier + moves.means
            keys = keys.at[:, :, L:].add(later_columns[0])
            values = values.at[:, :, L:].add(later_columns[1])
            later_columns = (keys[:, :, :M], values[:, :, :M])
        out = (moves.content, moves.position, keys[:, :, M:], values[:, :, M:])
        return (later_columns, later_means, distances + moves.distances), out

    zeros = (
        (jnp.zeros_like(old.keys), jnp.zeros_like(old.values)),
        None if summaries is None else jnp.zeros_like(summaries.means[0]),
        jnp.zeros_like(table.distances),
    )
    blocks = (
        jnp.arange(-(-T // L)),
        row_blocks(rows, L),
        mixtures,
        summaries,
        blocks_of(cotangents[0], L, axis=3),
    )
    (_, _, distances), (content, position, keys, values) = lax.scan(
        step, zeros, blocks, reverse=True
    )
    return (
        Rows(join_blocks(content, T), join_blocks(position, T), None),
        None,
        Columns(join_blocks(keys, T), join_blocks(values, T), None, None),
        None,
        Table(None, distances),
        None,
    )


_serial.defvjp(_serial_forward, _serial_backward)


# ---- Arranging, cutting and joining -----------------------------------------------------------


def arrange(
    tokens: Projections, scoring: Scoring, cache: LayerCache
) -> tuple[Rows, Columns, Columns, Summary | None]:
    """Queries with their biases, the cache's columns, the tokens' columns, and the summary."""
    codes = tokens.codes if cache.counts is not None else None
    old = Columns(cache.keys, cache.values, cache.codes, cache.documents)
    new = Columns(tokens.keys, tokens.values, codes, tokens.documents)
    rows, summary = rows_of(tokens, scoring), None
    if cache.counts is not None and cache.means is not None:
        summary = Summary(cache.counts, cache.means, cache.counted_document)
    return rows, old, new, summary


def rows_of(tokens: Projections, scoring: Scoring) -> Rows:
    """The queries with their biases."""
    return Rows(
        tokens.queries + scoring.content_bias[:, :, None],
        tokens.queries + scoring.position_bias[:, :, None],
        tokens.documents,
    )


def table_of(scoring: Scoring) -> Table:
    """The codewords, and the distances in the order of the columns."""
    return Table(scoring.codewords, scoring.distances[:, ::-1])


def joined(old: Columns, new: Columns, padding: int = 0) -> Columns:
    """The tokens' columns after the cache's, and as many empty ones after them, so that the last
    block is whole: its rows that are tokens never see them."""

    def join(old: Array | None, new: Array | None, axis: int) -> Array | None:
        if old is None or new is None:
            return None
        shape = list(new.shape)
        shape[axis] = padding
        return jnp.concatenate([old, new, jnp.zeros(shape, new.dtype)], axis=axis)

    parts = [join(a, b, axis) for a, b, axis in zip(old, new, (2, 2, 2, 1), strict=True)]
    return Columns(*parts)  # pyright: ignore[reportArgumentType]


def next_cache(old: Columns, new: Columns, summary: Summary | None) -> LayerCache:
    """The last M of the old and new columns, and the summary of what is before them."""
    window, T = old.keys.shape[2], new.keys.shape[2]
    kept = old.part(min(T, window), max(window - T, 0))
    keys, values, codes, documents = joined(kept, new.part(max(T - window, 0), min(T, window)))
    cache = LayerCache(
        keys,
        values,
        codes=codes,
        counts=None if summary is None else summary.counts,
        means=None if summary is None else summary.means,
        documents=documents,
        counted_document=None if summary is None else summary.document,
    )
    return jax.tree.map(lax.stop_gradient, cache)


def leaving(buffer: Columns, block_length: int, n_tokens: Int[Array, ""]) -> Leaving:
    """The buffer's first L columns; of a last block of fewer tokens, as many as it has."""
    assert buffer.codes is not None
    real = jnp.arange(block_length) < n_tokens
    # A code beyond the last one, whose one-hot vector is zero.
    codes = jnp.where(real, buffer.codes[:, :, :block_length], jnp.iinfo(jnp.int32).max)
    values, documents = buffer.values[:, :, :block_length], buffer.documents
    if documents is not None:
        documents = jnp.where(real, documents[:, :block_length], NO_DOCUMENT)
    return Leaving(codes, values, documents)


def blocks_of(array: Array, block_length: int, axis: int) -> Array:
    """An array's T tokens on that axis as N blocks on the first axis, the last padded to L."""
    T = array.shape[axis]
    if T % block_length:
        padding = [(0, 0)] * array.ndim
        padding[axis] = (0, -T % block_length)
        array = jnp.pad(array, padding)
    shape = list(array.shape)
    shape[axis : axis + 1] = [-(-T // block_length), block_length]
    return jnp.moveaxis(array.reshape(shape), axis, 0)


def slice_rows(rows: Rows, start: int, length: int) -> Rows:
    """The rows of the positions from `start` on."""
    part, documents = slice(start, start + length), rows.documents
    return Rows(
        rows.content[:, :, :, part],
        rows.position[:, :, :, part],
        None if documents is None else documents[:, part],
    )


def row_blocks(rows: Rows, block_length: int) -> Rows:
    """Rows as blocks on a first axis."""
    documents = rows.documents
    return Rows(
        blocks_of(rows.content, block_length, axis=3),
        blocks_of(rows.position, block_length, axis=3),
        None if documents is None else blocks_of(documents, block_length, axis=1),
    )


def join_blocks(blocks: Array, n_tokens: int) -> Array:
    """[N, ..., L, X] as [..., T, X]."""
    moved = jnp.moveaxis(blocks, 0, -3)
    *lead, N, L, width = moved.shape
    return moved.reshape(*lead, N * L, width)[..., :n_tokens, :]
