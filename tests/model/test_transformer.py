"""The whole network against a dense restatement of its definition in numpy, and its isolation."""

from dataclasses import replace

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from model.config import EOS_ID, ConfigError, ModelConfig
from model.transformer import bind, initial_cache
from tests.model import toy

pytestmark = [pytest.mark.usefixtures("float64"), pytest.mark.compiles]

GROUPED = {"n_heads": 4, "n_kv_heads": 2}
FEED_FORWARD = {"d_feed_forward": 20}


def norm(x, gain=1.0, bias=0.0):
    return x / np.sqrt(np.mean(x * x, axis=-1, keepdims=True) + 1e-6) * gain + bias


def silu(x):
    return x / (1 + np.exp(-x))


def sinusoids(position, width, base):
    angles = position * base ** (-2 * np.arange(width // 2) / width)
    return np.concatenate([np.sin(angles), np.cos(angles)])


def definition(config: ModelConfig, params: dict, codebooks: dict, tokens) -> np.ndarray:
    """Log-probabilities of one row of tokens, pair of positions by pair of positions."""
    K, V, G, H = config.d_key, config.d_value, config.n_heads, config.kv_heads
    scale, T = K**-0.25, len(tokens)
    begins = [max([0, *np.flatnonzero(tokens[: i + 1] == EOS_ID)]) for i in range(T)]
    if not config.isolate_documents:
        begins = [0] * T
    x = np.asarray(params["embedding"]["table"])[tokens]
    if config.absolute_positions:
        rows = [sinusoids(i - begins[i], config.d_model, config.position_base) for i in range(T)]
        x = x + params["position"]["scale"] * np.stack(rows)
    for n in range(config.n_layers):
        layer = jax.tree.map(lambda a, n=n: np.asarray(a[n]), params["layers"])
        normed = norm(x, **layer["norm"])

        def heads(name, count, x=normed, layer=layer):
            return (x @ layer[name]).reshape(len(x), count, -1)

        queries, keys = norm(heads("query", G)) * scale, norm(heads("key", H)) * scale
        values = heads("value", H)
        if config.gated:
            values = silu(values)
        if config.quantized_keys:
            book = jax.tree.map(lambda a, n=n: np.asarray(a[n]), codebooks["layers"]["codebook"])
            codewords = book["sums"] / np.maximum(book["counts"], 0.01)[..., None]
            for h in range(H):
                distances = ((keys[:, h, None] - codewords[h]) ** 2).sum(-1)
                keys[:, h] = codewords[h][distances.argmin(-1)]
        u, w = (layer[name].reshape(G, K) * scale for name in ("content_bias", "position_bias"))
        table = [sinusoids(d, config.d_model, config.position_base) for d in range(T)]
        by_distance = heads("distance", H, np.stack(table)) * scale
        attended = np.zeros((T, G, V))
        for g in range(G):
            h = g // (G // H)
            for i in range(T):
                first = begins[i] if config.compressive_cache else max(begins[i], i - config.window)
                js = np.arange(first, i + 1)
                scores = keys[js, h] @ (queries[i, g] + u[g])
                near = i - js <= config.window
                scores[near] += by_distance[i - js[near], h] @ (queries[i, g] + w[g])
                weights = np.exp(scores - scores.max())
                attended[i, g] = weights / weights.sum() @ values[js, h]
        merged = attended.reshape(T, -1)
        if config.gated:
            merged = merged * silu(normed @ layer["gate"])
        x = x + merged @ layer["output"]
        if not config.gated:
            unit = layer["feed_forward"]
            hidden = np.maximum(norm(x, **unit["norm"]) @ unit["expand"], 0) ** 2
            x = x + hidden @ unit["contract"]
    if config.output_norm:
        x = norm(x, **params["output_norm"])
    if config.tied_embeddings:
        logits = x @ params["embedding"]["table"].T + params["embedding"]["bias"]
    else:
        logits = x @ params["output"]["kernel"] + params["output"]["bias"]
    logits = logits * config.output_scale
    return logits - np.log(np.exp(logits).sum(-1, keepdims=True))


def log_probabilities(config: ModelConfig, state, tokens, pieces=(11, 1, 12)):
    network = bind(config, state.params, state.codebooks)

    @jax.jit
    def read(tokens, cache):
        features, cache, _ = network(tokens, cache)
        return jax.nn.log_softmax(network.logits(features)), cache

    cache, parts, begin = initial_cache(config, len(tokens), tokens.shape[1]), [], 0
    for n in pieces:
        part, cache = read(tokens[:, begin : begin + n], cache)
        parts.append(part)
        begin += n
    return np.concatenate(parts, axis=1)


def several_documents() -> np.ndarray:
    tokens = toy.rows(n_rows=2).inputs
    tokens[0, [5, 9, 17]] = EOS_ID
    tokens[1, [1, 2, 20]] = EOS_ID
    return tokens


@pytest.mark.parametrize(
    "changes",
    [
        {},
        {"isolate_documents": True, "absolute_positions": True, "tied_embeddings": True},
        {**GROUPED, "isolate_documents": True, "attention_form": "parallel", "parallel_blocks": 2},
        {**FEED_FORWARD, "n_heads": 2, "output_norm": False},
        {**FEED_FORWARD, **GROUPED, "n_kv_heads": 1, "compressive_cache": False},
        {"quantized_keys": False, "isolate_documents": True, "output_scale": 0.5},
        {"quantized_keys": False, **GROUPED, "attention_form": "dense"},
        {"quantized_keys": False, "compressive_cache": False},
    ],
)
def test_the_network_is_its_definition(changes):
    config = replace(toy.MODEL64, **changes)
    state = toy.state(config)
    tokens = several_documents()
    actual = log_probabilities(config, state, tokens)
    params, codebooks = jax.tree.map(np.asarray, (state.params, state.codebooks))
    for row, row_tokens in zip(actual, tokens, strict=True):
        expected = definition(config, params, codebooks, row_tokens)
        np.testing.assert_allclose(row, expected, atol=1e-9)


@pytest.mark.parametrize(
    "changes",
    [
        {"attention_form": "serial"},
        {"attention_form": "parallel", "parallel_blocks": 2},
        {"attention_form": "dense"},
        {"quantized_keys": False},
        {"compressive_cache": False},
    ],
)
def test_an_isolated_document_does_not_see_the_others(changes):
    config = replace(toy.MODEL64, isolate_documents=True, absolute_positions=True, **changes)
    state, tokens = toy.state(config), several_documents()
    other = tokens.copy()
    other[0, 10:17] = 7  # the third document of the first row; the fourth begins at 17
    first = log_probabilities(config, state, tokens, pieces=(24,))
    second = log_probabilities(config, state, other, pieces=(24,))
    np.testing.assert_array_equal(second[1], first[1])
    np.testing.assert_array_equal(second[0, :10], first[0, :10])
    np.testing.assert_allclose(second[0, 17:], first[0, 17:], atol=1e-12)
    assert np.abs(second[0, 11:17] - first[0, 11:17]).max() > 1e-3
    # Alone in its window it has the same probabilities.
    alone = log_probabilities(config, state, tokens[:1, 17:], pieces=(7,))
    np.testing.assert_allclose(alone[0], first[0, 17:], atol=1e-12)
    together = replace(config, isolate_documents=False)
    mixed = log_probabilities(together, state, other, pieces=(24,))
    assert np.abs(mixed - log_probabilities(together, state, tokens, pieces=(24,))).max() > 1e-3


def test_a_growing_cache_needs_its_capacity():
    with pytest.raises(ConfigError, match=r"^capacity: .*got none"):
        initial_cache(replace(toy.MODEL, quantized_keys=False), 1)
    assert jnp.size(initial_cache(toy.MODEL, 1, 99).layers.keys) == jnp.size(
        initial_cache(toy.MODEL, 1).layers.keys
    )
