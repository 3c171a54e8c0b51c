"""Products of rows with a matrix that the whole batch shares.

B batch, H heads, N rows, X and Y columns.
"""

import jax.numpy as jnp
from jax import lax
from jaxtyping import Array, Float


def times_table(
    rows: Float[Array, "B H N X"],
    table: Float[Array, "H X Y"],
    *,
    precision: lax.Precision | None = None,
) -> Float[Array, "B H N Y"]:
    """Rows times the matrix of their head.

    With one head a product of two plain matrices: XLA's CPU compiler makes the transpose of the
    result otherwise, and copies it back (of a layer of `small` 5% where scores are made, of a step
    2% where codewords are looked for).
    """
    B, H, N, X = rows.shape
    if H == 1:
        product = jnp.matmul(rows.reshape(B * N, X), table[0], precision=precision)
        return product.reshape(B, 1, N, -1)
    return jnp.einsum("bhnx,hxy->bhny", rows, table, precision=precision)


def table_moves(
    moves: Float[Array, "B H N Y"], rows: Float[Array, "B H N X"]
) -> Float[Array, "H Y X"]:
    """The gradient of that matrix, transposed, from that of the products."""
    B, H, N, X = rows.shape
    if H == 1:
        return (moves.reshape(B * N, -1).T @ rows.reshape(B * N, X))[None]
    return jnp.einsum("bhny,bhnx->hyx", moves, rows)
