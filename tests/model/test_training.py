"""The train step: carried cache, counters, what is skipped, what dropout draws."""

import functools
from dataclasses import replace

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from model import scoring
from model.config import ConfigError
from model.layers import Purpose, Randomness, keep, keep_by_row
from model.objective import objective
from model.sharding import batch_sharding, make_mesh, replicated
from model.training import evaluation_step, initial_state, kmeans_codebooks, train_step
from model.transformer import bind, initial_cache
from tests.model import toy
from tests.model.golden import Rows

pytestmark = pytest.mark.compiles

UPDATE_LENGTH = 8


@pytest.fixture(scope="module")
def step():
    return jax.jit(functools.partial(train_step, toy.MODEL, toy.OPTIMIZER, UPDATE_LENGTH))


@pytest.fixture(scope="module")
def read():
    """The network's logits and cache, as a plain function of its arrays."""

    @jax.jit
    def run(params, codebooks, tokens, cache):
        network = bind(toy.MODEL, params, codebooks)
        features, cache, _ = network(tokens, cache)
        return network.logits(features), cache

    return run


def nats_of(logits, targets):
    logprobs = np.asarray(jax.nn.log_softmax(logits))
    return -np.take_along_axis(logprobs, targets[..., None], -1)[..., 0]


def equal(actual, expected):
    for left, right in zip(jax.tree.leaves(actual), jax.tree.leaves(expected), strict=True):
        np.testing.assert_array_equal(left, right)


def first_updates(batch: Rows, n_updates: int) -> Rows:
    """The batch's tokens of its first updates."""
    return Rows(*(a[:, : n_updates * UPDATE_LENGTH] if a.ndim == 2 else a for a in batch))


def test_a_batch_is_its_updates_one_by_one(step, read):
    """Each loss is that of an update's tokens, after the cache that the parameters of then made of
    those before, under the parameters that the update before left."""
    batch, state = toy.rows(), toy.state()
    after, metrics = step(state, batch)
    assert (after.updates, after.batches) == (3, 1)
    assert metrics.tokens.tolist() == [32, 32, 24]
    assert metrics.learning_rate.tolist() == pytest.approx([1e-2] * 3)
    assert metrics.applied.all()
    assert metrics.skipped_updates.tolist() == [0, 0, 0]

    cache = initial_cache(toy.MODEL, 4)
    for update in range(2):
        begun = state if update == 0 else step(state, first_updates(batch, update))[0]
        part = slice(update * UPDATE_LENGTH, (update + 1) * UPDATE_LENGTH)
        logits, cache = read(begun.params, begun.codebooks, batch.inputs[:, part], cache)
        nats = nats_of(logits, batch.targets[:, part])
        assert metrics.loss[update].item() == pytest.approx(nats.mean(), rel=1e-5)


def test_evaluation_is_the_forward_pass_over_the_window(read):
    batch, state = toy.rows(), toy.state()
    nats = jax.jit(functools.partial(evaluation_step, toy.MODEL))(
        state.params, state.codebooks, batch
    )
    cache = initial_cache(toy.MODEL, 4)
    logits, _ = read(state.params, state.codebooks, batch.inputs, cache)
    expected = nats_of(logits, batch.targets)
    np.testing.assert_allclose(nats, np.where(batch.loss_mask, expected, 0), atol=1e-5)
    assert nats.dtype == jnp.float32


def test_evaluation_never_holds_all_logits(monkeypatch):
    """In pieces of 5 of the 24 positions, the last not full, the figures are the same."""
    model = replace(toy.MODEL, vocab_size=29)  # no other axis is as long
    batch, state = toy.rows(), toy.state(model)
    arguments = (state.params, state.codebooks, batch)
    whole, pieces = (jax.jit(functools.partial(evaluation_step, model)) for _ in range(2))
    expected = whole(*arguments)
    limit = 4 * 5 * model.vocab_size
    monkeypatch.setattr(scoring, "LOGITS_AT_ONCE", limit)
    np.testing.assert_allclose(pieces(*arguments), expected, atol=1e-6)
    logits = [
        variable.aval.size
        for equation in toy.equations(jax.make_jaxpr(pieces)(*arguments).jaxpr)
        for variable in equation.outvars
        if variable.aval.shape[-1:] == (model.vocab_size,)
    ]
    assert max(logits) == limit


def test_the_same_again_is_bitwise_the_same(step):
    equal(step(toy.state(), toy.rows()), step(toy.state(), toy.rows()))


def test_cutting_a_sequence_does_not_change_the_forward_pass(read):
    state, tokens = toy.state(), toy.rows().inputs
    forward = functools.partial(read, state.params, state.codebooks)
    whole, end = forward(tokens, initial_cache(toy.MODEL, 4))
    cache, parts = initial_cache(toy.MODEL, 4), []
    for begin in range(0, 24, 8):
        logits, cache = forward(tokens[:, begin : begin + 8], cache)
        parts.append(logits)
    np.testing.assert_allclose(jnp.concatenate(parts, axis=1), whole, atol=1e-5)
    for left, right in zip(jax.tree.leaves(cache), jax.tree.leaves(end), strict=True):
        np.testing.assert_allclose(left, right, atol=1e-5)


def test_padding_has_no_say(step):
    """Masked targets move no loss, gradient or codebook: other tokens there change nothing."""
    state, batch = toy.state(), toy.rows()
    targets = np.where(batch.loss_mask, batch.targets, 7)
    # Inputs after the last target of a row as well: the input at the first pad is still read.
    unread = np.cumsum(~batch.loss_mask, axis=1) > 1
    inputs = np.where(unread, 5, batch.inputs)
    expected, expected_metrics = step(state, batch)
    actual, metrics = step(state, batch._replace(inputs=inputs, targets=targets))
    equal(metrics.loss, expected_metrics.loss)
    for left, right in zip(
        jax.tree.leaves((actual.params, actual.codebooks)),
        jax.tree.leaves((expected.params, expected.codebooks)),
        strict=True,
    ):
        np.testing.assert_allclose(left, right, atol=1e-6)


def test_an_update_that_is_not_finite_ends_its_batch(step):
    batch, state = toy.rows(), toy.state()
    clean, _ = step(state, batch)
    table = state.params["embedding"]["table"]
    bad = state._replace(
        params={
            **state.params,
            "embedding": {**state.params["embedding"], "table": table.at[3].set(jnp.nan)},
        }
    )
    # Token 3 comes in the second update only.
    inputs = np.where(batch.inputs == 3, 4, batch.inputs)
    inputs[0, 10] = 3
    after, metrics = step(bad, batch._replace(inputs=inputs))
    assert metrics.applied.tolist() == [True, False, False]
    assert metrics.skipped_updates.tolist() == [0, 1, 2]
    # The third would have been sound, but its cache would lack the second's tokens.
    assert np.isfinite(metrics.loss).tolist() == [True, False, True]
    assert (after.updates, after.batches) == (3, 1)
    assert (after.spikes.skipped, after.spikes.seen) == (2, 1)
    # What one update leaves is what all three leave.
    once, _ = step(bad, first_updates(batch._replace(inputs=inputs), 1))
    equal(
        (after.params, after.codebooks, after.optimizer),
        (once.params, once.codebooks, once.optimizer),
    )
    assert not np.array_equal(clean.params["layers"]["query"], after.params["layers"]["query"])


def test_loss_spikes_are_measured_against_the_losses_before(step):
    state, losses, sigmas = toy.state(), [], []
    for seed in range(3):
        state, metrics = step(state, toy.rows(seed=seed))
        losses += metrics.loss.tolist()
        sigmas += metrics.loss_spike_sigmas.tolist()
    assert sigmas[:2] == [0, 0]
    for n in range(2, 9):
        past = np.array(losses[:n])
        assert sigmas[n] == pytest.approx((losses[n] - past.mean()) / past.std(), rel=1e-3)


def test_update_length_must_divide(step):
    batch = toy.rows(length=20)
    with pytest.raises(ConfigError, match=r"^training\.update_length: must divide .* 20, got 8"):
        step(toy.state(), batch)


def test_float64_without_its_environment_variable_is_refused():
    with pytest.raises(ConfigError, match=r"^model\.dtype: float64 needs .* JAX_ENABLE_X64=1"):
        initial_state(toy.MODEL64, toy.OPTIMIZER, 0)
    with jax.enable_x64(True):
        assert jax.eval_shape(lambda: initial_state(toy.MODEL64, toy.OPTIMIZER, 0))


def test_remat_and_unrolling_change_nothing(step):
    expected, _ = step(toy.state(), toy.rows())
    model = replace(toy.MODEL, remat=True, unrolled_layers=2)
    other = jax.jit(functools.partial(train_step, model, toy.OPTIMIZER, UPDATE_LENGTH))
    actual, _ = other(toy.state(), toy.rows())
    for left, right in zip(
        jax.tree.leaves(actual.params), jax.tree.leaves(expected.params), strict=True
    ):
        np.testing.assert_allclose(left, right, atol=1e-4)


@pytest.mark.slow
def test_remat_trades_memory_for_computing_and_changes_nothing():
    """The compiled gradient's temporary memory, of a model wide enough for activations to count."""
    model = replace(toy.MODEL, n_layers=4, d_model=64, d_key=16, d_value=128)
    batch, start = toy.rows(length=48), toy.state(model)
    arguments = (batch.inputs, batch.targets, batch.loss_mask, jnp.float32(batch.loss_mask.sum()))
    kinds = (model, *(replace(model, remat=True, remat_keeps=k) for k in ("products", "nothing")))
    memory, gradients = [], []
    for kind in kinds:
        read = functools.partial(objective, config=kind)
        compiled = (
            jax.jit(jax.grad(read, has_aux=True))
            .lower(start.params, start.codebooks, initial_cache(kind, 4), *arguments)
            .compile()
        )
        analysis = compiled.memory_analysis()
        assert analysis is not None
        memory.append(analysis.temp_size_in_bytes)
        cache = initial_cache(kind, 4)
        gradients.append(compiled(start.params, start.codebooks, cache, *arguments)[0])
    assert memory[0] > 1.2 * memory[1] > 1.2 * memory[2], memory
    for other in gradients[1:]:
        for left, right in zip(jax.tree.leaves(other), jax.tree.leaves(gradients[0]), strict=True):
            np.testing.assert_allclose(left, right, rtol=1e-4, atol=1e-5)


def program(model):
    """The equations of a train step, traced with abstract values."""
    # Not `toy.state`, which remembers what it returned.
    abstract = jax.eval_shape(lambda: initial_state(model, toy.OPTIMIZER, 0))
    step = functools.partial(train_step, model, toy.OPTIMIZER, UPDATE_LENGTH)
    return list(toy.equations(jax.make_jaxpr(step)(abstract, toy.rows()).jaxpr))


def test_depth_does_not_lengthen_the_program():
    two, nine = (len(program(replace(toy.MODEL, n_layers=n))) for n in (2, 9))
    assert two == nine


def test_dropout_masks():
    key, rows = jax.random.key(0), jnp.arange(300, dtype=jnp.uint32)
    float32 = jnp.dtype("float32")
    masks = keep_by_row(key, Purpose.RESIDUAL, rows, (40,), 0.25, float32)
    values = np.unique(masks)
    np.testing.assert_allclose(values, [0, 4 / 3])
    assert masks.mean() == pytest.approx(1, abs=0.02)
    # Row by row the same in any company; other rows and purposes differ.
    alone = keep_by_row(key, Purpose.RESIDUAL, rows[7:8], (40,), 0.25, float32)
    np.testing.assert_array_equal(alone[0], masks[7])
    assert not np.array_equal(masks[7], masks[8])
    other = keep(jax.random.fold_in(key, rows[7]), Purpose.EMBEDDING, (40,), 0.25, float32)
    assert not np.array_equal(other, masks[7])


@pytest.mark.parametrize(
    ("rate", "anew_each_update"),
    [
        ("embedding_dropout", True),
        ("residual_dropout", True),
        ("sinusoid_dropout", False),
        ("layer_dropout", False),
    ],
)
def test_each_dropout_follows_its_key_and_row(rate, anew_each_update):
    model = replace(toy.MODEL, **{rate: 0.5})
    state, batch = toy.state(model), toy.rows()
    network = bind(model, state.params, state.codebooks)

    @jax.jit
    def read(inputs, rows, update, batch):
        randomness = Randomness(jax.random.key(update), jax.random.key(batch), rows)
        return network(inputs, initial_cache(model, len(inputs)), randomness=randomness).features

    first = read(batch.inputs, batch.rows, 0, 1)
    order = [2, 0, 3, 1]
    shuffled = read(batch.inputs[order], batch.rows[order], 0, 1)
    np.testing.assert_allclose(shuffled, first[jnp.array(order)], atol=1e-5)
    assert np.allclose(read(batch.inputs, batch.rows, 5, 1), first) != anew_each_update
    assert np.allclose(read(batch.inputs, batch.rows, 0, 5), first) == anew_each_update


def test_dropout_in_training_is_of_the_update_and_the_batch(step):
    model = replace(toy.MODEL, residual_dropout=0.5)
    dropped = jax.jit(functools.partial(train_step, model, toy.OPTIMIZER, UPDATE_LENGTH))
    state, batch = toy.state(), toy.rows()
    _, plain = step(state, batch)
    _, first = dropped(state, batch)
    _, later = dropped(state._replace(updates=jnp.int32(3)), batch)
    _, other_rows = dropped(state, batch._replace(rows=batch.rows + np.uint32(4)))
    losses = [metrics.loss[0].item() for metrics in (plain, first, later, other_rows)]
    assert len(set(losses)) == 4


def test_bfloat16_activations(step):
    """Nearly the same losses; parameters, codebooks and cache statistics stay float32."""
    model = replace(toy.MODEL, dtype="bfloat16")
    half = jax.jit(functools.partial(train_step, model, toy.OPTIMIZER, UPDATE_LENGTH))
    state, metrics = half(toy.state(), toy.rows())
    _, expected = step(toy.state(), toy.rows())
    np.testing.assert_allclose(metrics.loss, expected.loss, rtol=0.03)
    assert not np.array_equal(metrics.loss, expected.loss)
    assert {leaf.dtype for leaf in jax.tree.leaves((state.params, state.codebooks))} == {
        jnp.dtype("float32")
    }
    cache = initial_cache(model, 1).layers._asdict()
    assert {name: leaf.dtype.name for name, leaf in cache.items() if leaf is not None} == {
        "keys": "float32",
        "values": "bfloat16",
        "codes": "int32",
        "counts": "float32",
        "means": "float32",
    }


def all_keys(model, state, batch):
    """Every unmasked key of a batch's first update: arrays [layers, H, n, K], and statistics."""
    network = bind(model, state.params, state.codebooks)

    @jax.jit
    def read(part):
        return network(
            part.inputs,
            initial_cache(model, 4),
            loss_mask=part.loss_mask,
            randomness=Randomness(jax.random.key(0), jax.random.key(0), part.rows),
            n_candidates=part.inputs.size,
        ).statistics

    part = first_updates(batch, 1)
    statistics = read(part)
    assert (statistics.candidates.priorities > 0).sum(-1).tolist() == [part.loss_mask.sum()] * 2
    return np.asarray(statistics.candidates.keys), statistics


def codewords(state):
    codebook = state.codebooks["layers"]["codebook"]
    return np.asarray(codebook["sums"] / jnp.maximum(codebook["counts"], 0.01)[..., None])


REVIVING = replace(toy.MODEL, revive_below=1.0)


def test_revival_gives_dead_codes_keys_of_the_update(step):
    """The codes that the published averages leave under 1, those and no others."""
    batch = first_updates(toy.rows(), 1)
    reviving = jax.jit(functools.partial(train_step, REVIVING, toy.OPTIMIZER, UPDATE_LENGTH))
    plain, plain_metrics = step(toy.state(), batch)
    after, metrics = reviving(toy.state(), batch)
    dead = np.asarray(plain.codebooks["layers"]["codebook"]["counts"]) < 1
    assert dead.any()
    assert not dead.all()
    assert metrics.dead_codes.tolist() == plain_metrics.dead_codes.tolist()
    assert metrics.dead_codes.tolist() == [dead.sum(-1).mean()]
    np.testing.assert_array_equal(codewords(after)[~dead], codewords(plain)[~dead])
    keys, _ = all_keys(toy.MODEL, toy.state(), batch)
    chosen = set()
    for layer, head, code in np.argwhere(dead):
        misses = np.abs(keys[layer, head] - codewords(after)[layer, head, code]).max(-1)
        assert misses.min() < 1e-5
        chosen.add((layer, head, misses.argmin()))
    assert len(chosen) == dead.sum()
    # Nothing else of the update knows of it; another update chooses others.
    equal((after.params, after.optimizer), (plain.params, plain.optimizer))
    later, _ = reviving(toy.state()._replace(updates=jnp.int32(1)), batch)
    assert not np.allclose(codewords(later)[dead], codewords(after)[dead])


def test_without_revival_nothing_is_drawn():
    drawing = {"top_k", "random_bits"}
    assert drawing.isdisjoint(str(equation.primitive) for equation in program(toy.MODEL))
    assert drawing <= {str(equation.primitive) for equation in program(REVIVING)}


def test_kmeans_starts_each_layer_from_the_keys_that_it_will_see(float64):
    """At convergence codewords are the means of their keys, under the codebooks below as well."""
    model = replace(toy.MODEL64, kmeans_iterations=30)
    state, batch = toy.state(model), toy.rows()
    after = jax.jit(functools.partial(kmeans_codebooks, model, UPDATE_LENGTH))(state, batch)
    equal(after._replace(codebooks=None), state._replace(codebooks=None))
    keys, statistics = all_keys(model, after, batch)
    counts = np.asarray(statistics.counts)[..., None]
    assert (counts > 0).all()
    np.testing.assert_allclose(codewords(after), statistics.sums / counts, atol=1e-12)
    assert (np.asarray(after.codebooks["layers"]["codebook"]["counts"]) == 1).all()
    # Better than as many of the keys themselves.
    distances = ((keys[..., None, :] - keys[..., None, :8, :]) ** 2).sum(-1).min(-1)
    assert statistics.squared_error.sum() < 0.8 * distances.sum()


@pytest.mark.slow
def test_codebooks_start_alike_on_any_devices(float64):
    """k-means, then updates with revival: on two devices as on one."""
    model = replace(toy.MODEL64, kmeans_iterations=3, revive_below=1.0)

    def begin(state, batch):
        state = kmeans_codebooks(model, UPDATE_LENGTH, state, batch)
        return train_step(model, toy.OPTIMIZER, UPDATE_LENGTH, state, batch)[0]

    state, batch = toy.state(model), toy.rows()
    mesh = make_mesh(jax.devices()[:2])
    expected = jax.jit(begin)(state, batch)
    actual = jax.jit(begin)(
        jax.device_put(state, replicated(mesh)), jax.device_put(batch, batch_sharding(mesh))
    )
    np.testing.assert_allclose(codewords(actual), codewords(expected), atol=1e-9)
