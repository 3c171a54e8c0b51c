"""The optimizers, on stacked layers, against optax's own on unstacked ones."""

import functools
from dataclasses import replace

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest

from model.config import ConfigError, ModelConfig, OptimizerConfig, validate
from model.optimizer import apply_gradients, decay_mask, make_optimizer, schedule_multiplier
from tests.model import toy

pytestmark = pytest.mark.compiles

CONFIG = OptimizerConfig(
    learning_rate=1e-2,
    schedule="cosine",
    warmup_steps=3,
    schedule_steps=9,
    gradient_clip=0.5,
    weight_decay=0.1,
)
SCHEDULE = optax.join_schedules(
    [optax.linear_schedule(0.0, 1e-2, 3), optax.cosine_decay_schedule(1e-2, 6, alpha=0.1)], [3]
)
OPTIMIZERS = ("adamw", "lion", "adafactor")
N_LAYERS = 3


def parameters():
    """Leaves that Adafactor factors (both axes at least 128), some that it does not."""
    random = np.random.default_rng(0)
    layers = {
        "query": (128, 160),
        "key": (128, 128),
        "output": (192, 128),
        "small": (24, 200),
        "content_bias": (160,),
        "norm": {"gain": (128,), "bias": (128,)},
    }
    shapes = {
        "layers": jax.tree.map(lambda shape: (N_LAYERS, *shape), layers, is_leaf=_is_shape),
        "embedding": {"table": (130, 128), "bias": (130,)},
        "position": {"scale": ()},
    }
    # Layers of unlike sizes, else a root of mean squares over all of them is that of each.
    size = 10.0 ** -np.arange(N_LAYERS)

    def draw(shape):
        leaf = random.normal(size=shape)
        stacked = len(shape) > 1 and shape[0] == N_LAYERS
        leaf *= size.reshape(-1, *[1] * (len(shape) - 1)) if stacked else 1
        return jnp.asarray(leaf, jnp.float32)

    return jax.tree.map(draw, shapes, is_leaf=_is_shape)


def _is_shape(node):
    return isinstance(node, tuple)


def unstack(tree):
    """Layers apart, each under a name of its own."""
    layers = tree["layers"]
    apart = {f"layer_{n}": jax.tree.map(lambda leaf, n=n: leaf[n], layers) for n in range(N_LAYERS)}
    return {**{name: leaf for name, leaf in tree.items() if name != "layers"}, **apart}


def gradients(params, update):
    """Normal numbers of unlike sizes in the layers."""
    random = np.random.default_rng(update)
    return jax.tree.map(lambda leaf: leaf * random.normal(size=leaf.shape).astype("f4"), params)


def by_rank(flat):
    """The published rule of what decays: what has more than one axis, or none."""
    return jax.tree.map(lambda leaf: leaf.ndim != 1, flat)


def reference(name, form):
    """The published constants, as optax's own optimizers take them."""
    adamw = functools.partial(optax.adamw, SCHEDULE, b1=0.9, b2=0.98, eps=1e-9)
    lion = functools.partial(optax.lion, SCHEDULE, b1=0.95, b2=0.98, mu_dtype=jnp.bfloat16)
    unscaled = optax.add_decayed_weights(-0.1, mask=by_rank)
    chain = {
        ("adamw", "scaled"): [adamw(weight_decay=0.1, mask=by_rank)],
        ("adamw", "unscaled"): [adamw(weight_decay=0), unscaled],
        ("lion", "scaled"): [lion(weight_decay=0.1, mask=by_rank)],
        ("lion", "unscaled"): [lion(weight_decay=0), unscaled],
        ("adafactor", "scaled"): [
            optax.adafactor(1.0),
            unscaled,
            optax.scale_by_schedule(SCHEDULE),
        ],
        ("adafactor", "unscaled"): [
            optax.adafactor(SCHEDULE, weight_decay_rate=0.1, weight_decay_mask=by_rank)
        ],
    }[name, form]
    return optax.chain(optax.clip_by_global_norm(0.5), *chain)


@pytest.mark.parametrize("form", ["scaled", "unscaled"])
@pytest.mark.parametrize("name", OPTIMIZERS)
def test_stacked_layers_are_optimized_as_optax_does_unstacked_ones(name, form):
    config = replace(CONFIG, name=name, weight_decay_form=form)
    params = parameters()
    flat = unstack(params)
    assert unstack_mask(decay_mask(params)) == by_rank(flat)
    oracle = reference(name, form)
    state, flat_state = make_optimizer(config).init(params), oracle.init(flat)

    @jax.jit
    def both(params, state, flat, flat_state, moves, update):
        applied = apply_gradients(config, params, state, moves, update)
        flat_moves, flat_state = oracle.update(unstack(moves), flat_state, flat)
        flat = optax.apply_updates(flat, flat_moves)
        return applied.params, applied.optimizer, flat, flat_state

    for update in range(5):
        moves = gradients(params, update)
        params, state, flat, flat_state = both(
            params, state, flat, flat_state, moves, jnp.int32(update)
        )
    for (path, actual), expected in zip(
        jax.tree_util.tree_leaves_with_path(unstack(params)), jax.tree.leaves(flat), strict=True
    ):
        np.testing.assert_allclose(actual, expected, atol=1e-6, err_msg=str(path))


def unstack_mask(mask):
    layers = {f"layer_{n}": mask["layers"] for n in range(N_LAYERS)}
    return {**{name: leaf for name, leaf in mask.items() if name != "layers"}, **layers}


@pytest.mark.parametrize("name", OPTIMIZERS)
def test_the_state_is_arrays_with_readable_names(name):
    state = jax.eval_shape(make_optimizer(replace(CONFIG, name=name)).init, parameters())
    leaves = {
        jax.tree_util.keystr(path, simple=True, separator="/"): (leaf.shape, leaf.dtype.name)
        for path, leaf in jax.tree_util.tree_leaves_with_path(state)
    }
    expected = {
        "adamw": {
            "adam/count": ((), "int32"),
            "adam/mu/layers/query": ((3, 128, 160), "float32"),
            "adam/nu/layers/query": ((3, 128, 160), "float32"),
        },
        "lion": {
            "lion/count": ((), "int32"),
            "lion/mu/layers/query": ((3, 128, 160), "bfloat16"),
        },
        "adafactor": {
            "factored/count": ((), "int32"),
            "factored/v_row/layers/query": ((3, 128), "float32"),
            "factored/v_col/layers/query": ((3, 160), "float32"),
            "factored/v/layers/query": ((3, 1), "float32"),
            # A stack of 24 x 200 has no two axes of 128, nor has a stack of vectors.
            "factored/v/layers/small": ((3, 24, 200), "float32"),
            "factored/v/layers/content_bias": ((3, 160), "float32"),
            "factored/v_row/layers/content_bias": ((3, 1), "float32"),
        },
    }[name]
    assert expected.items() <= leaves.items()
    # Adam's two moments, Lion's one, Adafactor's three, and a counter.
    trees = {"adamw": 2, "lion": 1, "adafactor": 3}[name]
    assert len(leaves) == trees * len(jax.tree.leaves(parameters())) + 1


def test_codebooks_are_outside_of_it():
    state = toy.state()
    assert "codebook" not in jax.tree_util.keystr(
        tuple(
            key for path, _ in jax.tree_util.tree_leaves_with_path(state.optimizer) for key in path
        )
    )


@pytest.mark.parametrize("schedule", ["cosine", "linear", "constant"])
def test_schedules(schedule):
    config = replace(CONFIG, schedule=schedule)
    after = {
        "cosine": optax.cosine_decay_schedule(1.0, 6, alpha=0.1),
        "linear": optax.linear_schedule(1.0, 0.1, 6),
        "constant": optax.constant_schedule(1.0),
    }[schedule]
    expected = optax.join_schedules([optax.linear_schedule(0.0, 1.0, 3), after], [3])
    for update in range(14):
        actual = schedule_multiplier(config, jnp.int32(update))
        assert actual == pytest.approx(np.asarray(expected(update)).item(), abs=1e-6)
    assert schedule_multiplier(replace(config, warmup_steps=0), jnp.int32(0)) == 1


def test_constants_are_as_published_or_as_stated():
    adamw, lion, adafactor = (replace(CONFIG, name=name).constants for name in OPTIMIZERS)
    assert adamw == {"b1": 0.9, "b2": 0.98, "eps": 1e-9}
    assert lion == {"b1": 0.95, "b2": 0.98}
    assert adafactor == {}
    assert replace(CONFIG, name="lion", b1=0.0).constants == {"b1": 0.0, "b2": 0.98}


@pytest.mark.parametrize(
    ("name", "field", "stated"),
    [("lion", "eps", 1e-9), ("adafactor", "eps", 1e-9), ("adafactor", "b1", 0.0)],
)
def test_a_constant_that_an_optimizer_does_not_have_is_refused(name, field, stated):
    config = replace(CONFIG, name=name, **{field: stated})
    need = rf"^optimizer\.{field}: must be null with optimizer\.name={name}, .* got {stated}$"
    with pytest.raises(ConfigError, match=need):
        validate(ModelConfig(), config)
