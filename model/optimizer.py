"""AdamW with the paper's schedules, and weight decay by parameter name.

The schedule is a function of the train state's update counter, handed in at each update: optax
keeps no counter of its own for it, so that counters survive a rollback of the state.
"""

from typing import Any, NamedTuple, cast

import jax
import jax.numpy as jnp
import optax
from jaxtyping import Array, Float, Int

from model.config import OptimizerConfig

UNDECAYED = ("gain", "bias", "content_bias", "position_bias")
"""Names of the parameters that weight decay leaves alone: those of rank 1 before stacking."""

SCHEDULE_FLOOR = 0.1
"""Cosine and linear schedules end at this fraction of the peak."""


class Applied(NamedTuple):
    """What an optimizer step gives."""

    params: dict
    optimizer: optax.OptState
    gradient_norm: Float[Array, ""]
    """Global norm before clipping."""
    learning_rate: Float[Array, ""]


def schedule_multiplier(config: OptimizerConfig, updates: Int[Array, ""]) -> Float[Array, ""]:
    """Fraction of the peak learning rate at the update of that number, counted from 0."""
    step = updates.astype(jnp.float32)
    warmup = jnp.minimum(step / config.warmup_steps, 1) if config.warmup_steps else 1.0
    if config.schedule == "constant" or config.schedule_steps is None:
        return jnp.asarray(warmup, jnp.float32)
    progress = (step - config.warmup_steps) / (config.schedule_steps - config.warmup_steps)
    progress = jnp.clip(progress, 0, 1)
    fall = progress if config.schedule == "linear" else (1 - jnp.cos(jnp.pi * progress)) / 2
    return warmup * (1 - (1 - SCHEDULE_FLOOR) * fall)


def make_optimizer(config: OptimizerConfig) -> optax.GradientTransformationExtraArgs:
    """The chain of gradient transformations; its update takes `learning_rate=` by name."""
    clip = [] if config.gradient_clip is None else [optax.clip_by_global_norm(config.gradient_clip)]
    adam = optax.scale_by_adam(b1=config.b1, b2=config.b2, eps=config.eps)
    if config.weight_decay == 0:
        return optax.chain(*clip, adam, _scale_by_learning_rate())
    if config.weight_decay_form == "unscaled":
        # After the schedule, so that it acts in full at learning rate 0 too.
        decay = optax.add_decayed_weights(-config.weight_decay, mask=decay_mask)
        return optax.chain(*clip, adam, _scale_by_learning_rate(), decay)
    decay = optax.add_decayed_weights(config.weight_decay, mask=decay_mask)
    return optax.chain(*clip, adam, decay, _scale_by_learning_rate())


def _scale_by_learning_rate() -> optax.GradientTransformationExtraArgs:
    def update(
        updates: optax.Updates,
        state: optax.OptState,
        params: optax.Params | None = None,
        **extra: Any,
    ) -> tuple[optax.Updates, optax.OptState]:
        rate = extra["learning_rate"]
        return jax.tree.map(lambda u: -rate.astype(u.dtype) * u, updates), state

    return optax.GradientTransformationExtraArgs(lambda params: optax.EmptyState(), update)


def decay_mask(params: dict) -> dict:
    """True where weight decay acts: by name, since layers are stacked and a gain has rank 2."""
    return jax.tree_util.tree_map_with_path(lambda path, _: path[-1].key not in UNDECAYED, params)


def apply_gradients(
    config: OptimizerConfig,
    params: dict,
    optimizer: optax.OptState,
    gradients: dict,
    updates: Int[Array, ""],
) -> Applied:
    """One optimizer step at the schedule's position `updates`."""
    learning_rate = config.learning_rate * schedule_multiplier(config, updates)
    moves, optimizer = make_optimizer(config).update(
        gradients, optimizer, params, learning_rate=learning_rate
    )
    return Applied(
        cast(dict, optax.apply_updates(params, moves)),
        optimizer,
        optax.tree.norm(gradients),
        learning_rate,
    )
