"""The gradients of an update from micro-batches, one after the other: those of all rows at once, in
the memory that a micro-batch takes.

A micro-batches of b rows, B = A b rows of the batch, U tokens of an update, C candidates.
"""

import functools
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
from jax import lax
from jaxtyping import Array, Bool, Float, Int, Shaped

from model.config import ModelConfig
from model.layers import Randomness
from model.objective import Objective, objective
from model.quantizer import Candidates
from model.transformer import Cache, initial_cache


class MicroBatches(NamedTuple):
    """An update's tokens, a micro-batch a row of the first axis."""

    inputs: Int[Array, "A b U"]
    targets: Int[Array, "A b U"]
    loss_mask: Bool[Array, "A b U"]


def split_rows(array: Shaped[Array, "B ..."], n_parts: int) -> Shaped[Array, "A b ..."]:
    """Rows a, a + A, a + 2A and so on to part a: a device, which holds neighbouring rows, has its
    share of every part, so that none is moved."""
    parts = array.reshape(len(array) // n_parts, n_parts, *array.shape[1:])
    return jnp.moveaxis(parts, 1, 0)


def initial_caches(model: ModelConfig, rows: int, n_tokens: int, n_parts: int) -> Cache:
    """The empty cache of each micro-batch, stacked on the first axis."""
    cache = initial_cache(model, rows // n_parts, n_tokens)
    return jax.tree.map(lambda leaf: jnp.broadcast_to(leaf, (n_parts, *leaf.shape)), cache)


def accumulated_gradients(
    model: ModelConfig,
    params: dict,
    codebooks: dict,
    caches: Cache,
    batch: MicroBatches,
    divisor: Float[Array, ""],
    randomness: Randomness,
) -> tuple[dict, Objective]:
    """Gradients of the objective over all rows, and its parts: sums over the micro-batches, but for
    the caches, stacked as they came.

    Args:
        model, params, codebooks: the network.
        caches: of each micro-batch, on the first axis.
        batch: its tokens.
        divisor: of the losses of the whole batch.
        randomness: of the update, with `rows` [A, b].
    """
    n_parts = len(batch.inputs)
    differentiate = jax.value_and_grad(functools.partial(objective, config=model), has_aux=True)

    def one(part: tuple[Cache, MicroBatches, Array]) -> tuple[tuple, Cache]:
        """What adds up over micro-batches, and this one's cache."""
        cache, tokens, rows = part
        (_, parts), gradients = differentiate(
            params, codebooks, cache, *tokens, divisor, randomness._replace(rows=rows)
        )
        return (gradients, parts.nats, parts.commitment, parts.statistics), parts.cache

    def add(total: tuple, part: tuple[Cache, MicroBatches, Array]) -> tuple[tuple, Cache]:
        summands, cache = one(part)
        return jax.tree.map(_add, total, summands, is_leaf=_are_candidates), cache

    parts = (caches, batch, randomness.rows)
    first = jax.tree.map(lambda leaf: leaf[0], parts)
    if n_parts == 1:  # no loop around a single pass, whose sums would be copied once more
        (gradients, nats, commitment, statistics), cache = one(first)
        caches = jax.tree.map(lambda leaf: leaf[None], cache)
        return gradients, Objective(nats, commitment, caches, statistics)
    shapes, _ = jax.eval_shape(one, first)
    room = min(model.n_codes, batch.inputs.size)
    nothing = jax.tree.map(
        lambda leaf: (
            no_candidates(leaf, room)
            if _are_candidates(leaf)
            else jnp.zeros(leaf.shape, leaf.dtype)
        ),
        shapes,
        is_leaf=_are_candidates,
    )
    (gradients, nats, commitment, statistics), caches = lax.scan(add, nothing, parts)
    return gradients, Objective(nats, commitment, caches, statistics)


def _are_candidates(node: Any) -> bool:
    return isinstance(node, Candidates)


def _add(total: Any, summand: Any) -> Any:
    return merge_candidates(total, summand) if _are_candidates(total) else total + summand


def no_candidates(like: Candidates, room: int) -> Candidates:
    """None yet, with room for that many; other axes as in `like`, arrays or their shapes."""
    *before, _, width = like.keys.shape
    *outer, _ = like.priorities.shape
    return Candidates(
        jnp.zeros((*before, room, width), like.keys.dtype),
        jnp.zeros((*outer, room), like.priorities.dtype),
    )


def merge_candidates(ours: Candidates, theirs: Candidates) -> Candidates:
    """Those of highest priority among both, as many as `ours` has room for."""
    room = ours.priorities.shape[-1]
    priorities = jnp.concatenate([ours.priorities, theirs.priorities], axis=-1)
    keys = jnp.concatenate([ours.keys, theirs.keys], axis=-2)
    priorities, index = lax.top_k(priorities, room)
    # The same tokens for all heads of a layer.
    return Candidates(jnp.take_along_axis(keys, index[..., None, :, None], axis=-2), priorities)
