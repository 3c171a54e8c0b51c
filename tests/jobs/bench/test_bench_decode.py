"""`tvq bench decode`: one executable, the cache that it is given, what it prints. No time is
asserted."""

import json
import re
from dataclasses import replace

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax.core import Tracer

from jobs.bench.decode import cache_after
from jobs.cli.main import run_cli
from jobs.errors import ExitCode
from model import sampling
from model.config import EOS_ID
from model.transformer import bind, initial_cache
from tests.model import toy

SIZES = {"n_layers": 1, "d_model": 16, "d_key": 8, "d_value": 16, "n_codes": 8, "window": 16}
TOY = tuple(f"model.{name}={value}" for name, value in SIZES.items())
COMMAND = ("bench", "decode", "small", *TOY, "--tokens", "3", "--rounds", "2", "--seconds", "0")


@pytest.mark.compiles
def test_every_position_is_timed_with_one_executable(capsys, monkeypatch):
    traced, decode = [], sampling.decode

    def spy(model, *arguments):
        traced.append(arguments[2].cache.length)
        return decode(model, *arguments)

    monkeypatch.setattr(sampling, "decode", spy)
    positions = ("--positions", "5,100,1000000", "--batch-size", "2")
    assert run_cli([*COMMAND, *positions, "--json"]) == ExitCode.OK
    [length] = traced
    assert isinstance(length, Tracer)  # the position is an argument, no constant
    tree = json.loads(capsys.readouterr().out)
    assert (tree["bench"], tree["name"], tree["clock"]) == ("decode", "small", "wall")
    assert (tree["tokens"], tree["batch_size"], tree["rounds"]) == (3, 2, 2)
    assert (tree["executables"], tree["model"]["window"]) == (1, 16)
    # keys [16, 8], values [16, 16], codes [16], counts [8], means [8, 16], of 4 bytes each
    assert tree["cache_bytes"] == 4 * (16 * 8 + 16 * 16 + 16 + 8 + 8 * 16)
    assert [each["position"] for each in tree["results"]] == [5, 100, 1_000_000]
    for each in tree["results"]:
        times = each["seconds_per_token"]
        assert 0 < times["least"] <= times["median"] <= times["greatest"]
        assert each["calls"] == 1
    assert tree["results"][0]["ratio"] == {"median": 1, "least": 1, "greatest": 1}


@pytest.mark.compiles
def test_table_says_what_was_measured(capsys):
    assert run_cli([*COMMAND, "--positions", "10,1000"]) == ExitCode.OK
    text = capsys.readouterr().out
    assert "== bench decode" in text
    assert "model     small: 1 layers, d_model 16," in text
    assert "measured  a decoded token (network, filters, draw), 3 of them a call" in text
    assert "median of 2 rounds" in text
    assert re.search(r"^position  ms/token +least +most  x at 10 +least +most", text, re.MULTILINE)
    assert re.search(r"^ +10 .* 1\.000 +1\.000 +1\.000 ", text, re.MULTILINE)
    assert re.search(r"^ +1,000 ", text, re.MULTILINE)
    assert "one executable for all positions, compiled once in " in text


@pytest.mark.compiles
@pytest.mark.parametrize("position", [4, 6, 20])
@pytest.mark.parametrize(
    "changes",
    [
        {},
        {"isolate_documents": True},
        {"compressive_cache": False, "isolate_documents": True},
        {"quantized_keys": False},
    ],
    ids=str,
)
def test_the_cache_is_as_a_prompt_of_that_length_leaves_it(changes, position):
    model = replace(toy.MODEL, **changes)
    state = toy.state(model)
    tokens = np.random.default_rng(0).integers(3, 24, (2, position)).astype(np.int32)
    tokens[:, 0] = EOS_ID
    network = bind(model, state.params, state.codebooks)
    real = network(jnp.array(tokens), initial_cache(model, 2, 24)).cache
    made = cache_after(model, 2, position, 24)

    def form(cache) -> list:
        return jax.tree.leaves(jax.tree.map(lambda leaf: (leaf.shape, leaf.dtype), cache))

    assert form(made) == form(real)
    assert made.length == real.length == position
    ours, theirs = made.layers, real.layers
    for left, right in ((ours.keys, theirs.keys), (ours.values, theirs.values)):
        np.testing.assert_array_equal(jnp.any(left != 0, -1), jnp.any(right != 0, -1))
    same = (made.document, real.document), (made.document_start, real.document_start)
    for left, right in (
        *same,
        (ours.documents, theirs.documents),
        (ours.counted_document, theirs.counted_document),
    ):
        assert (left is None) == (right is None)
        if left is not None and right is not None:
            np.testing.assert_array_equal(left, right)
    assert (ours.codes is None) == (theirs.codes is None)
    if ours.codes is not None and theirs.codes is not None:
        empty = model.n_codes
        np.testing.assert_array_equal(ours.codes == empty, theirs.codes == empty)
        assert int(ours.codes.min()) >= 0
    assert (ours.counts is None) == (theirs.counts is None)
    if ours.counts is not None and theirs.counts is not None:
        np.testing.assert_allclose(ours.counts.sum(-1), theirs.counts.sum(-1))


@pytest.mark.parametrize(
    ("options", "expected"),
    [
        (("--positions", "1k"), "--positions: expected numbers of tokens"),
        (("--positions", "5,5"), "--positions: expected each once"),
        (("--positions", "2147483640", "--tokens", "8"), "must end, with --tokens 8 after it, by"),
        (("model.d_kye=8",), "did you mean d_key?"),
        (("model.window=0",), "model.window: must be at least 1"),
    ],
)
def test_mistake_is_one_line(capsys, options, expected):
    assert run_cli([*COMMAND, *options]) == ExitCode.USER
    output = capsys.readouterr()
    assert output.out == ""
    [line] = output.err.splitlines()
    assert expected in line
