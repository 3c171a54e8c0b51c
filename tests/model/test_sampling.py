"""Decoding token by token is the forward pass; what is drawn is what was asked for."""

import functools
from dataclasses import replace

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from model.config import EOS_ID, PAD_ID, UNK_ID, ConfigError
from model.sampling import Filters, decode, filter_logits, prefill, take_prompts
from model.transformer import bind, initial_cache
from tests.model import toy


@pytest.fixture(scope="module")
def state():
    return toy.state()


@pytest.fixture(scope="module")
def logits_of(state):
    network = bind(toy.MODEL, state.params, state.codebooks)

    @jax.jit
    def run(tokens, cache):
        features, cache, _ = network(tokens, cache)
        return network.logits(features), cache

    return run


@pytest.fixture(scope="module")
def read(state):
    jitted = jax.jit(functools.partial(prefill, toy.MODEL))
    return functools.partial(jitted, state.params, state.codebooks)


@pytest.fixture(scope="module")
def decoder():
    return jax.jit(functools.partial(decode, toy.MODEL), static_argnames="n_tokens")


@pytest.fixture(scope="module")
def draw(state, read, decoder):
    """30 tokens that follow prompts of one length."""

    def run(prompt, seed=0, rows=None, **filters):
        decoded = decoder(
            state.params,
            state.codebooks,
            read(prompt),
            np.arange(len(prompt), dtype=np.int32) if rows is None else rows,
            n_tokens=30,
            key=jax.random.key(seed),
            filters=Filters(**filters),
        )
        assert decoded.tokens.dtype == jnp.int32
        return np.asarray(decoded.tokens)

    return run


PROMPT = toy.rows().inputs[:, :7]


def with_eos_bias(state, bias: float):
    """The parameters with eos likelier by `bias`."""
    output = state.params["output"]
    return {**state.params, "output": {**output, "bias": output["bias"].at[EOS_ID].add(bias)}}


def kept(filtered) -> list[set[int]]:
    return [set(np.flatnonzero(np.isfinite(row)).tolist()) for row in np.asarray(filtered)]


def test_token_by_token_is_the_forward_pass(logits_of):
    tokens = toy.rows().inputs
    expected, end = logits_of(tokens, initial_cache(toy.MODEL, 4))
    cache = initial_cache(toy.MODEL, 4)
    shapes = jax.tree.map(jnp.shape, cache)
    for position in range(tokens.shape[1]):
        logits, cache = logits_of(tokens[:, position : position + 1], cache)
        np.testing.assert_allclose(logits[:, 0], expected[:, position], atol=2e-5)
        assert jax.tree.map(jnp.shape, cache) == shapes
    for left, right in zip(jax.tree.leaves(cache), jax.tree.leaves(end), strict=True):
        np.testing.assert_allclose(left, right, atol=1e-5)


def test_a_prompt_is_read_at_once(read, logits_of):
    prefilled = read(PROMPT)
    expected, cache = logits_of(PROMPT, initial_cache(toy.MODEL, 4))
    np.testing.assert_allclose(prefilled.logits, expected[:, -1], atol=1e-5)
    assert prefilled.cache.length == cache.length == 7


@pytest.mark.parametrize(
    "changes", [{}, {"isolate_documents": True}, {"quantized_keys": False}], ids=str
)
def test_prompts_read_once_are_gone_on_from_several_times(changes):
    """As many rows as there are layers, so that a mistaken axis has the right size."""
    model = replace(toy.MODEL, **changes)
    state = toy.state(model)
    run = jax.jit(functools.partial(prefill, model), static_argnames="capacity")
    read = functools.partial(run, state.params, state.codebooks, capacity=12)
    prompts = np.concatenate([PROMPT[:2, :5], [[EOS_ID, 9]] * 2], axis=1).astype(np.int32)
    which = np.array([1, 0, 1, 1, 0], np.int32)
    taken = jax.jit(take_prompts)(read(prompts), which)
    expected = read(prompts[which])
    assert jax.tree.map(jnp.shape, taken) == jax.tree.map(jnp.shape, expected)
    for left, right in zip(jax.tree.leaves(taken), jax.tree.leaves(expected), strict=True):
        np.testing.assert_allclose(left, right, atol=1e-6)


def test_temperature_zero_takes_the_likeliest(draw, logits_of):
    new = draw(PROMPT, temperature=0.0, ignore_eos=True)
    text = np.concatenate([PROMPT, new], axis=1)
    logits, _ = logits_of(text, initial_cache(toy.MODEL, 4))
    logits = np.array(logits[:, 6:-1])
    logits[..., [PAD_ID, EOS_ID, UNK_ID]] = -np.inf
    np.testing.assert_array_equal(new, logits.argmax(-1))


def test_seeds_and_special_tokens(draw):
    prompt = np.repeat(PROMPT[:1], 4, axis=0)
    first = draw(prompt, ignore_eos=True)
    np.testing.assert_array_equal(draw(prompt, ignore_eos=True), first)
    assert not np.array_equal(draw(prompt, seed=1, ignore_eos=True), first)
    assert not np.array_equal(first[0], first[1])
    assert not np.isin(first, [PAD_ID, EOS_ID, UNK_ID]).any()


def test_a_row_draws_by_its_own_number_alone(draw):
    all_rows = draw(PROMPT)
    rows = np.array([3, 1], np.int32)
    np.testing.assert_array_equal(draw(PROMPT[rows], rows=rows), all_rows[rows])


def test_draws_follow_the_position(draw):
    """The same row in the same place draws the same, wherever the prompt ended."""
    new = draw(PROMPT, ignore_eos=True)
    longer = np.concatenate([PROMPT, new[:, :5]], axis=1)
    np.testing.assert_array_equal(draw(longer, ignore_eos=True)[:, :25], new[:, 5:])


def test_draws_are_distributed_as_the_filtered_logits(state, read, decoder):
    filters = Filters(temperature=0.8, top_k=12, top_p=0.9)
    prefilled = read(np.repeat(PROMPT[:1], 4000, axis=0))
    decoded = decoder(
        state.params,
        state.codebooks,
        prefilled,
        np.arange(4000, dtype=np.int32),
        n_tokens=1,
        key=jax.random.key(0),
        filters=filters,
    )
    expected = np.asarray(jax.nn.softmax(filter_logits(prefilled.logits[:1], filters))[0])
    drawn = np.bincount(np.asarray(decoded.tokens)[:, 0], minlength=toy.MODEL.vocab_size) / 4000
    assert 2 < (expected > 0).sum() <= 12
    assert drawn[expected == 0].sum() == 0
    # By chance at most sqrt(12 / 4000) / 2 = 0.027 on average.
    assert np.abs(drawn - expected).sum() / 2 < 0.05


def test_a_row_that_ended_goes_on_with_pad(state, read, decoder):
    draw = functools.partial(
        decoder,
        with_eos_bias(state, 2.0),
        state.codebooks,
        read(np.repeat(PROMPT[:1], 4, axis=0)),
        n_tokens=30,
        key=jax.random.key(1),
        filters=Filters(),
    )
    rows = np.asarray(draw(np.arange(4, dtype=np.int32)).tokens)
    ends = [row.tolist().index(EOS_ID) if EOS_ID in row else 30 for row in rows]
    assert len(set(ends)) > 2
    for number, (row, end) in enumerate(zip(rows, ends, strict=True)):
        assert not np.isin(row[:end], [PAD_ID, UNK_ID, EOS_ID]).any()
        assert (row[end + 1 :] == PAD_ID).all()
        # That others ended before it or after makes no difference.
        same = draw(np.full(4, number, np.int32))
        np.testing.assert_array_equal(same.tokens, np.repeat(row[None], 4, axis=0))
        assert same.cache.length == 7 + min(end, 29)


def test_decoding_ends_when_all_rows_have(state, read, decoder):
    """A million tokens would take longer than a test may."""
    decoded = decoder(
        with_eos_bias(state, 3.0),
        state.codebooks,
        read(PROMPT),
        np.arange(4, dtype=np.int32),
        n_tokens=1_000_000,
        key=jax.random.key(0),
        filters=Filters(),
    )
    tokens = np.asarray(decoded.tokens)
    last = np.argmax(tokens == EOS_ID, axis=1).max()
    assert last > 0
    assert decoded.cache.length == 7 + last
    assert (tokens[:, last + 1 :] == PAD_ID).all()


def test_one_executable_for_every_position_and_filter(state, read):
    traced = []

    @functools.partial(jax.jit, static_argnames="n_tokens")
    def go_on(*arguments, **options):
        traced.append(1)
        return decode(toy.MODEL, state.params, state.codebooks, *arguments, **options)

    prefilled = read(PROMPT)
    drawn = []
    for position, filters in (
        (1_000, Filters(0.8, 0, 0.95, 0.0, True)),
        (100_000, Filters(0.8, 0, 0.95, 0.0, True)),
        (100_000, Filters(1.3, 5, 0.5, 0.1, True)),
    ):
        cache = prefilled.cache._replace(length=jnp.array(position, jnp.int32))
        decoded = go_on(
            prefilled._replace(cache=cache),
            np.arange(4, dtype=np.int32),
            n_tokens=20,
            key=jax.random.key(0),
            filters=filters,
        )
        assert decoded.cache.length == position + 19
        drawn.append(decoded.tokens.tolist())
    assert len(traced) == 1
    assert drawn[0] != drawn[1] != drawn[2]


def brute_force(logits, filters: Filters, slack: float) -> list[set[int]]:
    """The tokens kept, by the definitions, in float64; `slack` > 0 keeps more, < 0 fewer."""
    result = []
    for row in np.asarray(logits, np.float64):
        never = {PAD_ID, UNK_ID} | ({EOS_ID} if filters.ignore_eos else set())
        left = {i: x for i, x in enumerate(row) if i not in never}
        if filters.temperature == 0:
            result.append({max(left, key=lambda i: left[i])})
            continue
        top = max(left.values())
        weight = {i: np.exp((x - top) / filters.temperature) for i, x in left.items()}
        if filters.top_k:
            left = {i: x for i, x in left.items()
                    if sum(y > x for y in left.values()) < filters.top_k}  # fmt: skip
        total = sum(weight[i] for i in left)
        if filters.top_p < 1:
            mass = {i: sum(weight[j] for j in left if left[j] > left[i]) / total for i in left}
            left = {i: x for i, x in left.items() if mass[i] < filters.top_p + slack or x == top}
        share = filters.min_p * (1 - slack)
        result.append({i for i in left if weight[i] >= share})
    return result


@functools.cache
def _filter():
    return jax.jit(filter_logits)


@settings(max_examples=150, derandomize=True, deadline=None, database=None)
@given(
    shape=st.sampled_from([(1, 4), (3, 9), (2, 60)]),
    spread=st.sampled_from([0.3, 2.0, 20.0]),
    ties=st.booleans(),
    seed=st.integers(0, 1000),
    filters=st.builds(
        Filters,
        temperature=st.sampled_from([0.0, 0.01, 0.7, 1.0, 3.0]),
        top_k=st.integers(0, 70),
        top_p=st.floats(0, 1),
        min_p=st.one_of(st.just(0.0), st.floats(0, 1)),
        ignore_eos=st.booleans(),
    ),
)
def test_filters_are_their_definitions(shape, spread, ties, seed, filters):
    """Float32 may part from float64 only where a sum lies within 1e-5 of the limit."""
    logits = spread * np.random.default_rng(seed).normal(size=shape)
    logits = (np.round(logits) if ties else logits).astype(np.float32)
    filtered = _filter()(logits, filters)
    fewest, most = (brute_force(logits, filters, slack) for slack in (-1e-5, 1e-5))
    for few, found, many in zip(fewest, kept(filtered), most, strict=True):
        assert few <= found <= many
    temperature = filters.temperature or 1.0
    for row, new, found in zip(logits, np.asarray(filtered), kept(filtered), strict=True):
        # What is kept keeps its odds.
        tokens = sorted(found)
        odds = (row[tokens].astype(np.float64) - row[tokens[0]]) / temperature
        np.testing.assert_allclose(new[tokens] - new[tokens[0]], odds, rtol=1e-5, atol=1e-4)


def test_the_order_of_the_filters():
    """top-p is of what top-k left: 0.4 / 0.7 = 0.57 is enough for 0.55, 0.4 is not."""
    logits = jnp.log(jnp.array([[0.0, 0.1, 0.0, 0.4, 0.3, 0.2]]))
    assert kept(filter_logits(logits, Filters(top_p=0.55))) == [{3, 4}]
    assert kept(filter_logits(logits, Filters(top_k=2, top_p=0.55))) == [{3}]
    # top-p is of probabilities that have a temperature; so is min-p.
    assert kept(filter_logits(logits, Filters(temperature=0.2, top_p=0.55))) == [{3}]
    assert kept(filter_logits(logits, Filters(min_p=0.3))) == [{3, 4, 5}]
    assert kept(filter_logits(logits, Filters(temperature=4.0, min_p=0.3))) == [{1, 3, 4, 5}]


def test_top_p_of_one_leaves_nothing_out():
    """In float32 the sum of the others is 1 before the last of these."""
    logits = jnp.array([[0.0, -20.0, 0.0, 5.0, 0.0, -20.0, -25.0]])
    assert kept(filter_logits(logits, Filters())) == [{1, 3, 4, 5, 6}]


def test_a_prompt_and_a_token_are_needed(state, read):
    with pytest.raises(ConfigError, match="prompt of at least one token"):
        read(np.ones((1, 0), np.int32))
    rows, key = jnp.arange(4), jax.random.key(0)
    with pytest.raises(ConfigError, match="n_tokens to be at least 1, got 0"):
        decode(toy.MODEL, state.params, state.codebooks, read(PROMPT), rows, 0, key, Filters())
