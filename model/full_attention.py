"""Attention over all earlier keys, not quantised: the quadratic baseline, in chunks.

The definition is that of `attend_dense` with keys in the place of codewords. A block of queries
meets the window before it and its own tokens with their positions, and what is older chunk by
chunk, with the softmax's largest score and sum carried along (Milakov and Gimelshein 2018, Rabe and
Staats 2021). Chunks that lie ahead of the queries are never computed, so that half of the square
is skipped; the backward pass computes the weights again.

B batch, T tokens, C capacity, L block length, M window, W = M + L buffer columns,
P = M + 1 distances, H key and value heads, R query heads to each, Q = R L rows, K key width,
V value width.
"""

import functools
from typing import cast

import jax
import jax.numpy as jnp
from jax import lax
from jaxtyping import Array, Float, Int

from model.attention import LayerCache, Projections, Scoring
from model.block_attention import join_blocks, row_blocks, rows_of, table_of
from model.block_softmax import (
    Columns,
    Rows,
    Table,
    column_scores,
    flatten_rows,
    mix,
    mix_transposed,
    same_document,
    split_rows,
    unskew,
    weighted_sum,
)
from model.products import table_moves, times_table
from model.reductions import row_max


def attend_full(
    tokens: Projections,
    scoring: Scoring,
    cache: LayerCache,
    length: Int[Array, ""],
    block_length: int,
) -> tuple[Float[Array, "B H R T V"], LayerCache]:
    """Attention of T tokens that follow the `length` ones in the cache, which has room for them.

    Memory is O(T); gradients do not reach the cache.
    """
    cache = _remember(tokens, cache, length)
    M, L = scoring.window, min(block_length, tokens.keys.shape[2])

    def pad(array: Array, axis: int) -> Array:
        return jnp.pad(array, [(M, L) if n == axis else (0, 0) for n in range(array.ndim)])

    documents = None if cache.documents is None else pad(cache.documents, 1)
    # M empty columns before all tokens and L after: every window and every chunk is whole.
    columns = Columns(pad(cache.keys, 2), pad(cache.values, 2), None, documents)
    rows, table = rows_of(tokens, scoring), table_of(scoring)
    values = cast(Array, _full(L, rows, columns, table, length))
    return values, jax.tree.map(lax.stop_gradient, cache)


def attend_full_dense(
    tokens: Projections, scoring: Scoring, cache: LayerCache, length: Int[Array, ""]
) -> tuple[Float[Array, "B H R T V"], LayerCache]:
    """The same with all T x C scores at once: the plain way, the softmax of a whole matrix, whose
    masked half is computed as well.

    Its gradient is written by hand, so that three such matrices are alive in float32, not six.
    """
    cache = _remember(tokens, cache, length)
    M, T, C = scoring.window, tokens.keys.shape[2], cache.keys.shape[2]
    padding = max(C, M + T)

    def ending_here(array: Array | None, axis: int) -> Array | None:
        """The columns to the last token, after as many empty ones as are needed."""
        if array is None:
            return None
        widths = [(padding if n == axis else 0, 0) for n in range(array.ndim)]
        padded = jnp.pad(array, widths)
        return lax.dynamic_slice_in_dim(padded, length + T, padding, axis)

    buffer = Columns(
        ending_here(cache.keys, 2),  # pyright: ignore[reportArgumentType]
        ending_here(cache.values, 2),  # pyright: ignore[reportArgumentType]
        None,
        ending_here(cache.documents, 1),
    )
    rows, table = rows_of(tokens, scoring), table_of(scoring)
    values = cast(Array, _dense(rows, buffer, table, length))
    return values, jax.tree.map(lax.stop_gradient, cache)


@jax.custom_vjp
def _dense(
    rows: Rows, buffer: Columns, table: Table, length: Int[Array, ""]
) -> Float[Array, "B H R T V"]:
    return _dense_forward(rows, buffer, table, length)[0]


def _dense_forward(rows, buffer, table, length):
    mixture = mix(rows, buffer, None, table, length, whole_buffer=True)
    values = split_rows(mixture.values, rows.content.shape[2])
    return values, (rows, buffer, table, mixture)


def _dense_backward(residuals, cotangent):
    rows, buffer, table, mixture = residuals
    moves = mix_transposed(rows, buffer, None, table, mixture, cotangent, False)
    return (
        Rows(moves.content, moves.position, None),
        Columns(moves.keys, moves.values, None, None),
        Table(None, moves.distances),
        None,
    )


_dense.defvjp(_dense_forward, _dense_backward)


def _remember(tokens: Projections, cache: LayerCache, length: Int[Array, ""]) -> LayerCache:
    """The cache with the tokens in their places."""

    def put(old: Array, new: Array, axis: int) -> Array:
        return lax.dynamic_update_slice_in_dim(
            lax.stop_gradient(old), new.astype(old.dtype), length, axis
        )

    documents = cache.documents
    if documents is not None and tokens.documents is not None:
        documents = put(documents, tokens.documents, 1)
    return cache._replace(
        keys=put(cache.keys, tokens.keys, 2),
        values=put(cache.values, tokens.values, 2),
        documents=documents,
    )


@functools.partial(jax.custom_vjp, nondiff_argnums=(0,))
def _full(
    block_length: int,
    rows: Rows,
    columns: Columns,
    table: Table,
    length: Int[Array, ""],
) -> Float[Array, "B H R T V"]:
    return _full_forward(block_length, rows, columns, table, length)[0]


def _full_forward(block_length, rows, columns, table, length):
    T, R, M = rows.content.shape[3], rows.content.shape[2], table.window

    def step(_, block: tuple[Int[Array, ""], Rows]):
        index, rows = block
        begin = length + index * block_length
        buffer = columns.part(begin, M + block_length)
        content = flatten_rows(rows.content)
        scores = column_scores(rows, buffer, table, begin, whole_buffer=True)
        largest = row_max(scores)
        weights = jnp.exp(scores - largest)
        total = jnp.sum(weights, axis=-1, keepdims=True)

        def far(chunk: Int[Array, ""], state: tuple[Array, Array, Array]):
            largest, total, mixed = state
            part = columns.part(M + chunk * block_length, block_length)
            scores = _far_scores(rows, content, part, chunk, begin - M)
            higher = jnp.maximum(largest, row_max(scores))
            shrink, weights = jnp.exp(largest - higher), jnp.exp(scores - higher)
            total = total * shrink + jnp.sum(weights, axis=-1, keepdims=True)
            return higher, total, mixed * shrink + _mixed(weights, part.values)

        state = (largest, total, _mixed(weights, buffer.values))
        n_far = _far_chunks(begin - M, block_length)
        largest, total, mixed = lax.fori_loop(0, n_far, far, state)
        total = jnp.maximum(total, jnp.finfo(total.dtype).tiny)
        values = (mixed / total).astype(columns.values.dtype)
        return None, (split_rows(values, R), largest + jnp.log(total))

    blocks = (jnp.arange(-(-T // block_length)), row_blocks(rows, block_length))
    _, (values, normalizers) = lax.scan(step, None, blocks)
    return join_blocks(values, T), (rows, columns, table, length, values, normalizers)


def _full_backward(block_length, residuals, cotangent):
    rows, columns, table, length, values, normalizers = residuals
    T, R, M = rows.content.shape[3], rows.content.shape[2], table.window
    blocks = (
        jnp.arange(-(-T // block_length)),
        row_blocks(rows, block_length),
        values,
        normalizers,
        row_blocks(Rows(cotangent, cotangent, None), block_length).content,
    )

    def step(carry, block):
        index, rows, values, normalizer, cotangent = block
        key_moves, value_moves, distance_moves = carry
        begin = length + index * block_length
        content, cotangent = flatten_rows(rows.content), flatten_rows(cotangent)
        common = jnp.sum(cotangent * flatten_rows(values), axis=-1, keepdims=True)

        def pull(scores, part, start, key_moves, value_moves):
            """Gradients of the scores, with those of the part's keys and values added."""
            weights = jnp.exp(scores - normalizer)
            by_weight = jnp.einsum("bhqv,bhwv->bhqw", cotangent, part.values)
            moves = weights * (by_weight - common)
            dtype = part.values.dtype
            of_values = jnp.einsum("bhqw,bhqv->bhwv", weights.astype(dtype), cotangent)
            of_keys = jnp.einsum("bhqw,bhqk->bhwk", moves, content)
            return moves, _add_at(key_moves, of_keys, start), _add_at(value_moves, of_values, start)

        buffer = columns.part(begin, M + block_length)
        scores = column_scores(rows, buffer, table, begin, whole_buffer=True)
        moves, key_moves, value_moves = pull(scores, buffer, begin, key_moves, value_moves)
        content_moves = jnp.einsum("bhqw,bhwk->bhqk", moves, buffer.keys)
        by_distance = flatten_rows(unskew(split_rows(moves, R), M + 1))

        def far(chunk, state):
            content_moves, key_moves, value_moves = state
            start = M + chunk * block_length
            part = columns.part(start, block_length)
            scores = _far_scores(rows, content, part, chunk, begin - M)
            moves, key_moves, value_moves = pull(scores, part, start, key_moves, value_moves)
            content_moves += jnp.einsum("bhqw,bhwk->bhqk", moves, part.keys)
            return content_moves, key_moves, value_moves

        n_far = _far_chunks(begin - M, block_length)
        content_moves, key_moves, value_moves = lax.fori_loop(
            0, n_far, far, (content_moves, key_moves, value_moves)
        )
        position_moves = times_table(by_distance, table.distances)
        distance_moves += table_moves(by_distance, flatten_rows(rows.position))
        out = (split_rows(content_moves, R), split_rows(position_moves, R))
        return (key_moves, value_moves, distance_moves), out

    zeros = jax.tree.map(jnp.zeros_like, (columns.keys, columns.values, table.distances))
    (key_moves, value_moves, distance_moves), (content, position) = lax.scan(step, zeros, blocks)
    return (
        Rows(join_blocks(content, T), join_blocks(position, T), None),
        Columns(key_moves, value_moves, None, None),
        Table(None, distance_moves),
        None,
    )


_full.defvjp(_full_forward, _full_backward)


def _far_scores(
    rows: Rows,
    content: Float[Array, "B H Q K"],
    part: Columns,
    chunk: Int[Array, ""],
    n_far: Int[Array, ""],
) -> Float[Array, "B H Q L"]:
    """Against a chunk of older tokens; -inf from position `n_far` on, where near ones begin."""
    *_, R, L, _ = rows.content.shape
    scores = jnp.einsum("bhqk,bhwk->bhqw", content, part.keys)
    attended = chunk * L + jnp.arange(L) < n_far
    attended = attended & same_document(rows, part)
    return flatten_rows(jnp.where(attended, split_rows(scores, R), -jnp.inf))


def _far_chunks(n_far: Int[Array, ""], block_length: int) -> Int[Array, ""]:
    return -(-jnp.maximum(n_far, 0) // block_length)


def _mixed(weights: Float[Array, "B H Q W"], values: Float[Array, "B H W V"]) -> Array:
    return weighted_sum(weights.astype(values.dtype), values, weights.dtype)


def _add_at(array: Array, part: Array, start: Int[Array, ""]) -> Array:
    old = lax.dynamic_slice_in_dim(array, start, part.shape[2], 2)
    return lax.dynamic_update_slice_in_dim(array, old + part.astype(array.dtype), start, 2)
