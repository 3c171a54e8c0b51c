"""Tests for a process of four devices; `test_several_devices.py` runs them in one.

What the compiled training step and evaluation do where `fsdp` splits the parameters: each device
computes its own rows, and only parameters and gradients travel.
"""

import re
from pathlib import Path
from typing import Any, NamedTuple

import jax
import pytest

from jobs import recipe as recipes
from jobs.bench.programs import RandomBatch
from jobs.planning.compiled_costs import Cost, read_costs
from jobs.recipe import Recipe
from jobs.training.programs import Programs
from model.counts import flops_per_token, flops_per_update, parameter_count
from model.sampling import Filters
from model.sharding import batch_sharding, make_mesh
from tests.micro import RECIPE

# Layers enough that their loop stays one, and so wide that no activation has a weight's shape.
MODEL = {"n_layers": 6, "d_model": 64, "d_value": 128, "unrolled_layers": 1}
ROWS, LENGTH, UPDATES = 4, 64, 2


class Compiled(NamedTuple):
    """The text of programs, and what they do."""

    texts: dict[str, str]
    costs: dict[str, Cost]


@pytest.fixture(scope="module")
def path(tmp_path_factory: pytest.TempPathFactory) -> Path:
    path = tmp_path_factory.mktemp("recipe") / "micro.yaml"
    path.write_text(RECIPE, encoding="utf-8")
    return path


def resolved(path: Path, **changes: object) -> Recipe:
    fields = {**MODEL, **changes}
    overrides = tuple(f"model.{name}={value}" for name, value in fields.items())
    return recipes.resolve(recipes.load(str(path), overrides))


def compiled(recipe: Recipe, *names: str, **axes: int) -> Compiled:
    mesh = make_mesh(jax.devices(), **axes)
    programs, rows = Programs(recipe, mesh), batch_sharding(mesh)
    window = (ROWS, recipe.data.sequence_length)
    batch = RandomBatch(
        inputs=jax.ShapeDtypeStruct(window, "int32", sharding=rows),
        targets=jax.ShapeDtypeStruct(window, "int32", sharding=rows),
        loss_mask=jax.ShapeDtypeStruct(window, "bool", sharding=rows),
        rows=jax.ShapeDtypeStruct((ROWS,), "uint32", sharding=rows),
    )
    arguments = {
        "step": (programs.abstract, batch, jax.ShapeDtypeStruct((4,), "int32")),
        "evaluate": (programs.abstract, batch),
    }
    texts = {}
    for name in names:
        program: Any = getattr(programs, name)
        texts[name] = program.lower(*arguments[name]).compile().as_text()
    return Compiled(texts, {name: read_costs(text) for name, text in texts.items()})


@pytest.fixture(scope="module")
def split(path: Path) -> Compiled:
    return compiled(resolved(path), "step", "evaluate", data=1, fsdp=4)


def test_each_device_computes_its_own_rows(split: Compiled, path: Path):
    model = resolved(path).model
    for name, passes in (("step", UPDATES), ("evaluate", 1)):
        training = name == "step"
        rows = ROWS * LENGTH * flops_per_token(model, LENGTH, training=training)
        tables = 4 * passes * flops_per_update(model, training=training)  # each device its own
        assert 4 * split.costs[name].flops == rows + tables


def test_only_parameters_and_gradients_travel(split: Compiled, path: Path):
    """A ring sends three quarters of what it gathers, and one and a half of what it reduces."""
    parameters = 4 * parameter_count(resolved(path).model).trained
    sent = split.costs["evaluate"].collectives
    assert sent.keys() <= {"all-gather", "all-reduce"}
    assert 0.7 * parameters < sent["all-gather"] <= 0.75 * parameters
    assert sent.get("all-reduce", 0) < 100  # two sums
    sent = split.costs["step"].collectives
    assert sent.keys() <= {"all-gather", "all-reduce"}
    # For the forward and for the backward pass.
    assert sent["all-gather"] <= 2 * 0.75 * parameters * UPDATES
    assert sent["all-reduce"] <= 1.1 * 1.5 * parameters * UPDATES


def test_texts_are_written_without_the_weights_being_gathered(path: Path):
    """Else they would be for every token; only activations of the few rows travel."""
    recipe = resolved(path)
    programs = Programs(recipe, make_mesh(jax.devices(), data=1, fsdp=4))
    prompts = jax.ShapeDtypeStruct((2, 16), "int32")
    write: Any = programs.write
    lowered = write.lower(programs.abstract, prompts, filters=Filters(), n_tokens=8)
    sent = read_costs(lowered.compile().as_text()).collectives
    assert 0 < sent["all-gather"] < 0.05 * 4 * parameter_count(recipe.model).trained


def test_no_device_keeps_the_weights_of_all_layers(split: Compiled):
    """Gathered for the forward pass, they are gathered again for the backward pass."""
    layers, width, value_width = MODEL["n_layers"], MODEL["d_model"], MODEL["d_value"]
    whole = re.compile(rf"\w+\[{layers},({width},{value_width}|{value_width},{width})\]")
    assert whole.search(split.texts["step"]) is None
    # The search finds what it looks for: a quarter of each is what the state holds.
    quarter = re.compile(rf"f32\[{layers},{width // 4},{value_width}\]")
    assert quarter.search(split.texts["step"]) is not None


def test_beside_tensor_it_computes_what_data_does(path: Path):
    recipe = resolved(path, remat="true")
    parameters = 4 * parameter_count(recipe.model).trained
    both = compiled(recipe, "step", data=1, fsdp=2, tensor=2).costs["step"]
    plain = compiled(recipe, "step", data=2, tensor=2).costs["step"]
    assert both.flops == plain.flops
    more = both.collectives["all-gather"] - plain.collectives.get("all-gather", 0)
    assert 0 < more <= 2 * UPDATES * parameters / 2
