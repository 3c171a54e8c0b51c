"""A run that begins with another's parameters: they are the same bits, all else is new."""

import dataclasses
import shutil
from pathlib import Path
from typing import Any

import jax
import numpy as np
import pytest

from jobs import recipe as recipes
from jobs.checkpoints import init_from
from jobs.checkpoints.manifest import complete_checkpoints, newest_update
from jobs.checkpoints.restore import restore_by_recipe
from jobs.cli.main import run_cli
from jobs.errors import UserError
from jobs.runs.metric_spool import read_segment, segments
from jobs.runs.run_directory import RunDirectory
from model.config import ModelConfig, OptimizerConfig
from model.sharding import abstract_state, make_mesh
from model.training import initial_state
from tests.jobs.trained_micro import micro_recipe, train_micro
from tests.micro import write_micro

pytestmark = pytest.mark.compiles

SHORT = ("training.steps=8", "training.evaluate_every=8")


@pytest.fixture(scope="module")
def workplace(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder with run `source`, of which `source.safetensors` is exported."""
    folder = tmp_path_factory.mktemp("init from")
    write_micro(folder)
    train_micro(folder, "source", *SHORT)
    file = str(folder / "source.safetensors")
    root = ["--root", str(folder / "runs")]
    assert run_cli(["checkpoints", "export", "source", "--output", file, *root]) == 0
    return folder


def source_state(workplace: Path, update: int) -> Any:
    run = RunDirectory.at(workplace / "runs", "source")
    [manifest] = [found for found in complete_checkpoints(run) if found.update == update]
    return jax.device_get(restore_by_recipe(run, manifest))


def same_bits(found: Any, expected: Any) -> None:
    pairs = zip(jax.tree.leaves(found), jax.tree.leaves(expected), strict=True)
    assert [np.asarray(a).tobytes() == np.asarray(b).tobytes() for a, b in pairs].count(False) == 0


@pytest.mark.parametrize(
    ("place", "update"),
    [("source", 8), ("source@4", 4), ("{}/runs/source@4", 4), ("{}/source.safetensors", 8)],
)
def test_parameters_and_codebooks_are_the_sources_and_the_rest_is_new(
    workplace: Path, place: str, update: int, tmp_path: Path
):
    overrides = (f"training.init_from={place.format(workplace)}", "optimizer.name=lion")
    asked = micro_recipe(workplace, *overrides)
    recipe, origin = init_from.look_up(
        init_from.settle(asked, None, workplace / "runs"), workplace / "runs"
    )
    source = RunDirectory.at(workplace / "runs", "source").record()
    assert origin is not None
    assert source is not None
    assert (origin.run_key, origin.update) == (source.run_key, update)
    run = RunDirectory.at(tmp_path, "second")
    run.claim(recipes.identity(recipe), {}, recipes.to_yaml(recipe), origin)
    record = run.record()
    assert record is not None
    assert record.origin == origin

    def create() -> Any:
        return initial_state(recipe.model, recipe.optimizer, recipe.training.seed)

    mesh = make_mesh(jax.devices(), fsdp=2)
    state, taken = init_from.first_state(run, recipe, abstract_state(mesh, recipe.model, create))
    assert taken
    expected = source_state(workplace, update)
    same_bits((state.params, state.codebooks), (expected.params, expected.codebooks))
    fresh = jax.jit(create)()
    same_bits(state.optimizer, fresh.optimizer)
    assert (int(state.updates), int(state.batches)) == (0, 0)
    same_bits(state.key, fresh.key)


@pytest.mark.parametrize("place", ["source@4", "{}/source.safetensors"])
@pytest.mark.parametrize("difference", ["model.n_codes=16", "model.quantized_keys=false"])
def test_codebooks_of_other_shapes_begin_anew(
    workplace: Path, place: str, difference: str, tmp_path: Path
):
    asked = micro_recipe(workplace, f"training.init_from={place.format(workplace)}", difference)
    root = workplace / "runs"
    recipe, origin = init_from.look_up(init_from.settle(asked, None, root), root)
    run = RunDirectory.at(tmp_path, "second")
    run.claim(recipes.identity(recipe), {}, recipes.to_yaml(recipe), origin)

    def create() -> Any:
        return initial_state(recipe.model, recipe.optimizer, recipe.training.seed)

    mesh = make_mesh(jax.devices()[:1])
    state, taken = init_from.first_state(run, recipe, abstract_state(mesh, recipe.model, create))
    assert not taken
    update = 4 if "@" in place else 8
    same_bits(state.params, source_state(workplace, update).params)
    same_bits(state.codebooks, jax.jit(create)().codebooks)


def test_an_unquantised_model_is_quantised_from_its_own_keys(workplace: Path, tmp_path: Path):
    """k-means over the keys of the first batch, at once as near to them as the moving averages of
    random codebooks come after many updates."""
    train_micro(workplace, "dense", *SHORT, "model.quantized_keys=false")
    start = ("training.init_from=dense", *SHORT)
    random = train_micro(workplace, "random", *start)
    clustered = train_micro(workplace, "clustered", *start, "model.kmeans_iterations=5")

    def first_error(run: RunDirectory) -> float:
        first = read_segment(run.metrics, segments(run.metrics)[0]).points[0]
        return first.values["codebook/relative_error"]

    assert first_error(clustered) < first_error(random) / 2


@pytest.mark.tracking
def test_the_source_is_recorded_and_needed_only_to_begin(
    workplace: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
):
    shutil.copytree(workplace / "runs", tmp_path / "runs")
    train = [
        "train", str(workplace / "micro.yaml"), f"data.corpus={workplace / 'corpus'}",
        *SHORT, "--root", str(tmp_path / "runs"), "--run", "second",
    ]  # fmt: skip
    wrong = run_cli([*train, "training.init_from=source", "model.d_model=32"])
    said = capsys.readouterr().err
    assert (wrong, "model.d_model: 16 there, 32 here" in said) == (2, True), said
    assert run_cli([*train, "training.init_from=none"]) == 2
    assert "there is no run" in capsys.readouterr().err
    assert run_cli([*train, "training.init_from=source@5"]) == 2
    assert "no checkpoint at update 5; there are 4, 8" in capsys.readouterr().err
    run = RunDirectory.at(tmp_path / "runs", "second")
    assert run.record() is None  # nothing was claimed

    assert run_cli([*train, "training.init_from=source@4"]) == 0
    record = run.record()
    assert record is not None
    assert record.origin is not None
    assert record.origin.place == str(tmp_path / "runs" / "source")
    stored = recipes.from_yaml(run.recipe_text(), "stored")
    assert stored.training.init_from == f"{tmp_path / 'runs' / 'source'}@4"
    assert stored.optimizer.schedule_steps == 8

    shutil.rmtree(tmp_path / "runs" / "source")
    assert run_cli([*train, "training.init_from=source", "training.steps=12"]) == 0
    assert newest_update(run) == 12
    capsys.readouterr()
    assert run_cli([*train, "training.init_from=source@8", "training.steps=16"]) == 2
    assert "training.init_from" in capsys.readouterr().err


def test_a_source_that_changed_since_is_refused(workplace: Path, tmp_path: Path):
    file = tmp_path / "copy.safetensors"
    shutil.copy(workplace / "source.safetensors", file)
    recipe = micro_recipe(workplace, f"training.init_from={file}")
    recipe, origin = init_from.look_up(recipe, tmp_path)
    run = RunDirectory.at(tmp_path, "second")
    run.claim("identity", {}, recipes.to_yaml(recipe), origin)
    data = bytearray(file.read_bytes())
    data[-100] ^= 1
    file.write_bytes(data)
    abstract = abstract_state(
        make_mesh(jax.devices()[:1]),
        recipe.model,
        lambda: initial_state(recipe.model, recipe.optimizer, 0),
    )
    with pytest.raises(
        UserError, match=r"copy\.safetensors has changed since run second.*\.params"
    ):
        init_from.first_state(run, recipe, abstract)
    imported = ["checkpoints", "import", str(file), "--run", "third", "--root", str(tmp_path)]
    assert run_cli(imported) == 2
    assert not (tmp_path / "third").exists()


def test_a_resumed_run_keeps_its_source_however_it_is_named(tmp_path: Path):
    def recipe(place: str | None) -> recipes.Recipe:
        loaded = recipes.load("tiny")
        training = dataclasses.replace(loaded.training, init_from=place)
        return dataclasses.replace(loaded, training=training)

    stored = recipe(f"{tmp_path}/a@4")
    for asked, settled in (
        ("a", f"{tmp_path}/a@4"),
        ("a@4", f"{tmp_path}/a@4"),
        (f"{tmp_path}/a", f"{tmp_path}/a@4"),
        ("a@5", f"{tmp_path}/a@5"),
        ("b", f"{tmp_path}/b"),
        ("gs://bucket/runs/a@4", "gs://bucket/runs/a@4"),
        (f"{tmp_path}/x.safetensors", f"{tmp_path}/x.safetensors"),
        (None, None),
    ):
        found = init_from.settle(recipe(asked), stored, tmp_path).training.init_from
        assert found == settled, asked


def test_the_fields_that_shape_the_arrays_are_all_of_them():
    """Against the shapes themselves: each field of the model is changed on its own."""

    def shapes(model: ModelConfig) -> dict[str, str]:
        state = jax.eval_shape(lambda: initial_state(model, OptimizerConfig(schedule_steps=10), 0))
        leaves = jax.tree_util.tree_leaves_with_path(state.params)
        return {jax.tree_util.keystr(path): f"{leaf.dtype}{leaf.shape}" for path, leaf in leaves}

    base = ModelConfig(n_heads=2)
    others = {
        "d_feed_forward": 64, "n_kv_heads": 1, "gradient_block": 64, "block_length": 64,
        "attention_form": "parallel", "dtype": "bfloat16", "remat_keeps": "products",
    }  # fmt: skip
    for field in dataclasses.fields(ModelConfig):
        value = getattr(base, field.name)
        other = others.get(field.name)
        if other is None and isinstance(value, bool):
            other = not value
        elif other is None:
            other = 0.5 if isinstance(value, float) else 2 * value or 1
        needs = {
            "gradient_through_cache": {"gradient_block": 128}, "remat_keeps": {"remat": True},
        }.get(field.name, {})  # fmt: skip
        changed = dataclasses.replace(base, **{field.name: other}, **needs)
        told = init_from.shaping(changed) != init_from.shaping(base)
        assert told == (shapes(changed) != shapes(base)), field.name
