"""Attention in time linear in the length, groups of blocks at once: the parallel form.

B batch, T tokens, N blocks of a group, L block length, M window, W = M + L buffer columns,
P = M + 1 distances, H key and value heads, R query heads to each, Q = R L rows, S codes,
K key width, V value width.
"""

import functools
from typing import Any, cast

import jax
import jax.numpy as jnp
from jax import lax
from jaxtyping import Array, Float, Int

from model.attention import LayerCache, Projections, Scoring
from model.block_attention import (
    Options,
    arrange,
    join_blocks,
    joined,
    leaving,
    next_cache,
    row_blocks,
    slice_rows,
    table_of,
)
from model.block_softmax import Columns, Rows, Table, mix, mix_transposed, split_rows
from model.summary import Summary, prefixes


def attend_parallel(
    tokens: Projections,
    scoring: Scoring,
    cache: LayerCache,
    length: Int[Array, ""],
    options: Options,
    blocks_per_group: int,
) -> tuple[Float[Array, "B H R T V"], LayerCache]:
    """The same as `attend_serial`, with the G blocks of a group as rows of one larger batch.

    The summaries before each block are a prefix reduction over the group, as merging two of them
    is associative. Groups follow each other, so that the prefixes of a long sequence are not in
    memory all at once. The last group is filled up with rows that nothing sees.
    """
    T, L = tokens.keys.shape[2], min(options.block_length, tokens.keys.shape[2])
    options = options._replace(block_length=L)
    size = min(blocks_per_group, -(-T // L)) * L
    rows, old, new, summary = arrange(tokens, scoring, cache)
    table = table_of(scoring)
    columns = joined(old, new, -T % size)

    def step(
        summary: Summary | None, group: tuple[Int[Array, ""], Rows]
    ) -> tuple[Summary | None, Float[Array, "B H R G V"]]:
        index, rows = group
        begin = index * size
        values, summary = _group(
            options,
            rows,
            columns.part(begin, table.window + size),
            summary,
            table,
            length + begin,
            T - begin,
        )
        return summary, values

    summary, values = lax.scan(step, summary, (jnp.arange(-(-T // size)), row_blocks(rows, size)))
    return join_blocks(values, T), next_cache(old, new, summary)


def _group(
    options: Options,
    rows: Rows,
    columns: Columns,
    summary: Summary | None,
    table: Table,
    seen: Int[Array, ""],
    n_tokens: Int[Array, ""],
) -> tuple[Float[Array, "B H R G V"], Summary | None]:
    """A group's values and the summary after it.

    `columns` are the window before it and its own; `seen` tokens precede it and `n_tokens`, if
    fewer than it has rows, are real.
    """
    L, n_blocks = options.block_length, rows.content.shape[3] // options.block_length
    M = table.window
    starts = range(0, n_blocks * L, L)
    buffers = _rows_of_batch([columns.part(start, M + L) for start in starts])
    own = _rows_of_batch([slice_rows(rows, start, L) for start in starts])
    before = None
    if summary is not None:
        gone = _rows_of_batch(
            [leaving(columns.part(start, L), L, n_tokens - start) for start in starts]
        )
        summaries = prefixes(summary, gone, n_blocks)
        # Prefix n is what block n meets; the one after the last block is carried on.
        before = jax.tree.map(lambda a: a[:-1].swapaxes(0, 1).reshape(-1, *a.shape[2:]), summaries)
        summary = jax.tree.map(lambda a: a[-1], summaries)
    if not options.gradient_through_cache:
        before = jax.tree.map(lax.stop_gradient, before)
        buffers = buffers._replace(
            keys=_constant_before(buffers.keys, M), values=_constant_before(buffers.values, M)
        )
    B = rows.content.shape[0]
    block_seen = jnp.tile(seen + jnp.arange(n_blocks) * L, B)
    values = cast(Array, _block(options.window_gradient, own, buffers, before, table, block_seen))
    values = values.reshape(B, n_blocks, *values.shape[1:])
    return jnp.moveaxis(values, 1, 3).reshape(*rows.content.shape[:4], -1), summary


@functools.partial(jax.custom_vjp, nondiff_argnums=(0,))
def _block(
    window_gradient: bool,
    rows: Rows,
    buffer: Columns,
    summary: Summary | None,
    table: Table,
    seen: Int[Array, " B"],
) -> Float[Array, "B H R L V"]:
    return split_rows(mix(rows, buffer, summary, table, seen).values, rows.content.shape[2])


def _block_forward(window_gradient, rows, buffer, summary, table, seen):
    mixture = mix(rows, buffer, summary, table, seen)
    values = split_rows(mixture.values, rows.content.shape[2])
    return values, (rows, buffer, summary, table, mixture)


def _block_backward(window_gradient, residuals, cotangent):
    rows, buffer, summary, table, mixture = residuals
    moves = mix_transposed(rows, buffer, summary, table, mixture, cotangent, window_gradient)
    return (
        Rows(moves.content, moves.position, None),
        Columns(moves.keys, moves.values, None, None),
        None if summary is None else Summary(None, moves.means, None),  # pyright: ignore[reportArgumentType]
        Table(None, moves.distances),
        None,
    )


_block.defvjp(_block_forward, _block_backward)


def _rows_of_batch(blocks: list) -> Any:
    """N blocks' arrays [B, ...] as one array [B N, ...]."""

    def stack(*arrays: Array) -> Array:
        stacked = jnp.stack(arrays, axis=1)
        return stacked.reshape(-1, *stacked.shape[2:])

    return jax.tree.map(stack, *blocks)


def _constant_before(columns: Float[Array, "B H W X"], n: int) -> Float[Array, "B H W X"]:
    return columns.at[:, :, :n].set(lax.stop_gradient(columns[:, :, :n]))
