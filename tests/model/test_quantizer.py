"""Candidates, revival and k-means against loops over numpy arrays."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from model.quantizer import (
    Candidates,
    dead_codes,
    draw_candidates,
    move_to_means,
    revive_codes,
    spread_centres,
)

pytestmark = pytest.mark.usefixtures("float64")

B, T, H, K = 4, 6, 2, 3


def keys_of(seed: int = 0) -> np.ndarray:
    return np.random.default_rng(seed).normal(size=(B, H, T, K))


def draw(keys: np.ndarray, mask: np.ndarray, n: int, rows: slice = slice(None)) -> Candidates:
    row_keys = jax.random.split(jax.random.key(5), B)[rows]
    return draw_candidates(jnp.asarray(keys[rows]), jnp.asarray(mask[rows]), row_keys, n)


def tokens_of(drawn: Candidates, keys: np.ndarray) -> list[tuple[int, int]]:
    """The row and position of each candidate, found by the keys of all heads at once."""
    found = []
    for key in np.moveaxis(np.asarray(drawn.keys), 1, 0):
        ((row, position),) = np.argwhere((np.moveaxis(keys, 1, 2) == key).all((2, 3)))
        found.append((int(row), int(position)))
    return found


def test_candidates_are_unmasked_tokens_each_once():
    keys = keys_of()
    mask = np.random.default_rng(1).random((B, T)) < 0.6
    drawn = draw(keys, mask, 9)
    tokens = tokens_of(drawn, keys)
    assert len(set(tokens)) == 9
    assert all(mask[token] for token in tokens)
    priorities = np.asarray(drawn.priorities).tolist()
    assert priorities == sorted(priorities, reverse=True)
    assert min(priorities) > 0
    # All there are, when more are asked for; the rest of the places say that they are empty.
    every = draw(keys, mask, 1000)
    n_unmasked = mask.sum()
    assert every.priorities.shape == (B * T,)
    assert (np.asarray(every.priorities) > 0).sum() == n_unmasked
    unmasked = {tuple(token) for token in np.argwhere(mask).tolist()}
    assert set(tokens_of(every, keys)[:n_unmasked]) == unmasked


def test_candidates_are_drawn_evenly():
    keys, mask = jnp.asarray(keys_of()), np.ones((B, T), bool)
    mask[1, 2:] = False
    rows = jax.vmap(lambda key: jax.random.split(key, B))(jax.random.split(jax.random.key(0), 4000))
    first = jax.vmap(lambda key: draw_candidates(keys, jnp.asarray(mask), key, 1).keys)(rows)
    which = (np.asarray(first)[:, 0, 0, 0, None, None] == np.asarray(keys)[:, 0, :, 0]).mean(0)
    np.testing.assert_allclose(which, mask / mask.sum(), atol=0.015)


def test_candidates_of_micro_batches_make_those_of_the_batch():
    keys, mask = keys_of(), np.random.default_rng(2).random((B, T)) < 0.7
    whole = draw(keys, mask, 5)
    parts = [draw(keys, mask, 5, slice(0, 1)), draw(keys, mask, 5, slice(1, 4))]
    priorities = np.concatenate([part.priorities for part in parts])
    best = np.argsort(-priorities.astype(np.int64))[:5]
    np.testing.assert_array_equal(priorities[best], whole.priorities)
    joined = np.concatenate([part.keys for part in parts], axis=1)
    np.testing.assert_array_equal(joined[:, best], whole.keys)


@pytest.mark.parametrize("n_drawn", [7, 2, 0])
@pytest.mark.parametrize("below", [1.0, 1e-3])
def test_dead_codes_start_again_from_candidates(n_drawn, below):
    layers, S, C = 3, 6, 7
    noise = np.random.default_rng(3)
    counts = 2 * below * noise.random((layers, H, S))
    sums = noise.normal(size=(layers, H, S, K))
    keys = noise.normal(size=(layers, H, C, K))
    priorities = np.tile(np.where(np.arange(C) < n_drawn, 9, 0), (layers, 1)).astype(np.uint32)
    codebooks = {"layers": {"codebook": {"sums": jnp.asarray(sums), "counts": jnp.asarray(counts)}}}
    drawn = Candidates(jnp.asarray(keys), jnp.asarray(priorities))
    new = revive_codes(codebooks, drawn, below)["layers"]["codebook"]
    revived = 0
    for layer in range(layers):
        for head in range(H):
            turn = 0
            for code in range(S):
                place = (layer, head, code)
                total, count = new["sums"][place], new["counts"][place]
                if counts[place] < below and turn < n_drawn:
                    codeword = total / max(count, 0.01)
                    np.testing.assert_allclose(codeword, keys[layer, head, turn], rtol=1e-14)
                    assert count == pytest.approx(max(2 * below, 0.01))
                    turn, revived = turn + 1, revived + 1
                else:
                    np.testing.assert_array_equal(total, sums[place])
                    assert count == counts[place]
    assert (revived > 0) == (n_drawn > 0)


def test_dead_codes_are_counted():
    counts = jnp.asarray([[[0.5, 1.0, 3.0, 0.99]], [[2.0, 2.0, 2.0, 0.0]]])
    codebooks = {"layers": {"codebook": {"sums": counts[..., None], "counts": counts}}}
    assert dead_codes(codebooks) == 1.5


def candidates_of(points: np.ndarray, n_drawn: int | None = None) -> Candidates:
    places = np.arange(points.shape[1])
    priorities = np.where(places < (len(places) if n_drawn is None else n_drawn), 7, 0)
    return Candidates(jnp.asarray(points), jnp.asarray(priorities, jnp.uint32))


def test_centres_are_drawn_by_squared_distance():
    points = np.array([0.0, 1.0, 2.0, 3.0, 50.0])[None, :, None]
    drawn = candidates_of(points, 4)
    keys = jax.random.split(jax.random.key(1), 4000)
    centres = np.asarray(jax.vmap(lambda key: spread_centres(drawn, 2, key))(keys))[:, 0, :, 0]
    assert (centres[:, 0] == 0).all()
    shares = [(centres[:, 1] == value).mean() for value in (0, 1, 2, 3, 50)]
    np.testing.assert_allclose(shares, np.array([0, 1, 4, 9, 0]) / 14, atol=0.03)


def test_centres_are_all_different_while_there_are_keys():
    noise = np.random.default_rng(4)
    values = noise.normal(size=(H, 5, K))
    which = np.array([0] * 40 + [1] * 20 + [2, 3, 4])
    drawn = candidates_of(values[:, which])
    centres = np.asarray(spread_centres(drawn, 7, jax.random.key(2)))
    for head in range(H):
        found = {tuple(centre) for centre in centres[head, :5]}
        assert found == {tuple(value) for value in values[head]}
        np.testing.assert_array_equal(centres[head, 5:], centres[head, [0, 0]])


def numpy_lloyd(centres: np.ndarray, points: np.ndarray, iterations: int) -> np.ndarray:
    centres = centres.copy()
    for _ in range(iterations):
        distances = ((points[:, None] - centres[None]) ** 2).sum(-1)
        nearest = distances.argmin(1)
        for code in range(len(centres)):
            if (nearest == code).any():
                centres[code] = points[nearest == code].mean(0)
    return centres


def test_kmeans_is_lloyds():
    S, C, n_drawn = 6, 60, 50
    noise = np.random.default_rng(6)
    points = noise.normal(size=(H, C, K))
    points[:, n_drawn:] += 100  # what was not drawn has no say
    begin = points[:, :S].copy()
    begin[:, 2] = 40.0  # near no key
    for iterations in (0, 1, 7):
        centres = move_to_means(jnp.asarray(begin), candidates_of(points, n_drawn), iterations)
        expected = [numpy_lloyd(begin[h], points[h, :n_drawn], iterations) for h in range(H)]
        np.testing.assert_allclose(centres, np.stack(expected), atol=1e-12)
        np.testing.assert_array_equal(centres[:, 2], begin[:, 2])
