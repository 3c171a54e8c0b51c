"""Sampling: the prompt in blocks, then token after token with a state of constant size.

B batch, P prompt tokens, N new tokens.
"""

import jax
import jax.numpy as jnp
from jax import lax
from jaxtyping import Array, Float, Int

from model.config import PAD_ID, UNK_ID, ConfigError, ModelConfig
from model.transformer import Cache, bind, initial_cache


def sample(
    model: ModelConfig,
    params: dict,
    codebooks: dict,
    prompt: Int[Array, "B P"],
    n_tokens: int,
    key: Array,
    temperature: float | Float[Array, ""] = 1.0,
    top_p: float | Float[Array, ""] = 1.0,
) -> Int[Array, "B N"]:
    """Continues each prompt by n_tokens (int32).

    A prompt begins with eos, as every window that the model was trained on. `pad` and `unk` are
    never drawn; `eos` may be, and where to stop at it is the caller's to decide. Row b draws from
    (key, b, position). `temperature` 0 takes the likeliest token. `top_p` draws from the smallest
    set of tokens with that probability. Meant for jit with `model` and `n_tokens` bound.
    Raises ConfigError for an empty prompt or no tokens.
    """
    B, P = prompt.shape
    if P < 1 or n_tokens < 1:
        raise ConfigError(
            f"sample: needs a prompt and a token to draw, got {P} prompt and {n_tokens} new tokens"
        )
    network = bind(model, params, codebooks)
    rows = jax.vmap(lambda row: jax.random.fold_in(key, row))(jnp.arange(B))

    def draw(features: Float[Array, "B 1 D"], position: Int[Array, ""]) -> Int[Array, " B"]:
        logits = filter_logits(network.logits(features)[:, 0], temperature, top_p)
        keys = jax.vmap(lambda row: jax.random.fold_in(row, position))(rows)
        return jax.vmap(jax.random.categorical)(keys, logits).astype(jnp.int32)

    def step(
        carry: tuple[Int[Array, " B"], Cache], _: None
    ) -> tuple[tuple[Int[Array, " B"], Cache], Int[Array, " B"]]:
        token, cache = carry
        features, cache, _statistics = network(token[:, None], cache)
        token = draw(features, cache.length)
        return (token, cache), token

    features, cache, _ = network(prompt, initial_cache(model, B))
    first = draw(features[:, -1:], cache.length)
    _, rest = lax.scan(step, (first, cache), length=n_tokens - 1)
    return jnp.concatenate([first[:, None], rest.T], axis=1)


def filter_logits(
    logits: Float[Array, "B vocab"],
    temperature: float | Float[Array, ""],
    top_p: float | Float[Array, ""],
) -> Float[Array, "B vocab"]:
    """Logits to draw from: -inf for special tokens other than eos, and for what top-p leaves out.

    top-p keeps a token if those likelier than it have less than top_p together, so the likeliest
    one always.
    """
    logits = logits.at[:, jnp.array([PAD_ID, UNK_ID])].set(-jnp.inf)
    likeliest = jnp.max(logits, axis=-1, keepdims=True)
    scaled = (logits - likeliest) / jnp.maximum(temperature, 1e-6)
    descending = -jnp.sort(-scaled, axis=-1)
    probabilities = jax.nn.softmax(descending, axis=-1)
    before = jnp.cumsum(probabilities, axis=-1) - probabilities
    kept = (before < top_p) | (jnp.arange(logits.shape[-1]) == 0)
    smallest = jnp.min(jnp.where(kept, descending, jnp.inf), axis=-1, keepdims=True)
    return jnp.where(scaled >= smallest, scaled, -jnp.inf)
