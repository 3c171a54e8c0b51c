"""The paper's optimizers and schedules, on layers that lie stacked (MODEL.md section 1.11).

The schedule is a function of the train state's update counter, handed in at each update: optax
keeps no counter of its own for it, so that counters survive a rollback of the state. The counters
in the optimizer's state count the updates that were applied, which is what the decays of its
moments are about: an update that is skipped as not finite leaves them alone.
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
    """The chain of gradient transformations; its update takes `learning_rate=` by name.

    Its state is a dict of arrays by the name of the transformation: `adam`, `lion` or `factored`
    (the others keep none). A leaf of it for a parameter under `layers` has the layers on its first
    axis, as the parameter has.
    """
    steps = [(name, _layer_by_layer(step)) for name, step in _direction(config)]
    if config.gradient_clip is not None:
        # Over all parameters at once, so not layer by layer.
        steps.insert(0, ("clip", optax.clip_by_global_norm(config.gradient_clip)))
    rate = ("learning_rate", _scale_by_learning_rate())
    if config.weight_decay == 0:
        steps += [rate]
    elif config.weight_decay_form == "unscaled":
        # After the schedule, so that it acts in full at learning rate 0 too.
        decay = optax.add_decayed_weights(-config.weight_decay, mask=decay_mask)
        steps += [rate, ("decay", decay)]
    else:
        decay = optax.add_decayed_weights(config.weight_decay, mask=decay_mask)
        steps += [("decay", decay), rate]
    return optax.named_chain(*steps)


def _direction(config: OptimizerConfig) -> list[tuple[str, optax.GradientTransformation]]:
    """What makes gradients into a step of learning rate 1, leaf by leaf."""
    constants = config.constants
    if config.name == "adamw":
        b1, b2, eps = constants["b1"], constants["b2"], constants["eps"]
        return [("adam", optax.scale_by_adam(b1=b1, b2=b2, eps=eps))]
    if config.name == "lion":
        b1, b2 = constants["b1"], constants["b2"]
        return [("lion", optax.scale_by_lion(b1=b1, b2=b2, mu_dtype=jnp.bfloat16))]
    return [
        ("factored", optax.scale_by_factored_rms()),
        ("clip_by_leaf", optax.clip_by_block_rms(1.0)),
        ("parameter_scale", optax.scale_by_param_block_rms()),
    ]


def _layer_by_layer(step: optax.GradientTransformation) -> optax.GradientTransformation:
    """The same, for layers that lie stacked on the first axis of the leaves under `layers`.

    Adafactor would otherwise factor over the layers, and take roots of mean squares over all of
    them (measured: updates up to 158 times off). Leaves elsewhere, and counters, are not mapped;
    vmap refuses a transformation that would mix them with layers.
    """

    def init(params: optax.Params) -> optax.OptState:
        state_axes = _layer_axes(jax.eval_shape(step.init, params))
        return jax.vmap(step.init, (_layer_axes(params),), state_axes)(params)

    def update(
        updates: optax.Updates, state: optax.OptState, params: optax.Params | None = None
    ) -> tuple[optax.Updates, optax.OptState]:
        axes, state_axes = _layer_axes(updates), _layer_axes(state)
        mapped = jax.vmap(step.update, (axes, state_axes, axes), (axes, state_axes))
        return mapped(updates, state, params)

    return optax.GradientTransformation(init, update)


def _layer_axes(tree: Any) -> Any:
    """The axis of the layers: 0 in every leaf under `layers`, none in others."""

    def axis(path: tuple[Any, ...], _: Any) -> int | None:
        return 0 if jax.tree_util.DictKey("layers") in path else None

    return jax.tree_util.tree_map_with_path(axis, tree)


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
