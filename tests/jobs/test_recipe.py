"""The recipe: strict typing, errors that name the field and the fix, and an identity that holds."""

import ast
import dataclasses
import inspect
import os
import re
import subprocess
import sys
import typing
from pathlib import Path

import pytest

from jobs import recipe as recipes
from jobs.recipe import Recipe, field_reference, from_yaml, load, to_yaml
from tests.jobs.refused_recipe import BASE, refusal

ANOTHER = {
    "training.init_from": "tiny@400",
    # Another value for the fields whose default does not suggest one.
    "data.corpus": "a folder/off",
    "data.mixture": {"a folder": 3, "b": 0.5},
    "data.shuffle_span": 3,
    "data.cache_bytes": 2**30,
    "training.sample_every": 400,
    "training.accumulate": 2,
    "training.profile": (3, 5),
    "cluster.compile_cache": "a folder",
    "training.spike_deviations": 6.0,
    "cluster.peak_flops": 1e12,
    "model.d_feed_forward": 64,
    "model.n_kv_heads": 2,
    "model.gradient_block": 32,
    "model.block_length": 32,
    "optimizer.schedule_steps": 2000,
    "optimizer.gradient_clip": 0.5,
    "optimizer.b1": 0.8,
    "optimizer.b2": 0.9,
    "optimizer.eps": 1e-8,
    "checkpoint.keep_every": 400,
    "checkpoint.best_metric": "eval/loss_nats_per_token",
    "tracking.uri": "sqlite:///other.db",
    "tracking.experiment": "12:30",
    "cluster.devices_per_worker": 4,
    "cluster.accelerator_version": "v6e",
    "cluster.topology": "2x2x2",
    "cluster.coordinator_port": 8476,
    "cluster.address": "auto",
    "cluster.data": 2,
}

OPERATIONAL = {
    # Written down a second time: what may change between one start of a run and the next.
    "model.attention_form",
    "model.block_length",
    "model.parallel_blocks",
    "model.remat",
    "model.remat_keeps",
    "model.unrolled_layers",
    "data.corpus",
    "data.mixture",
    "data.cache_bytes",
    "training.steps",
    "training.evaluate_every",
    "training.evaluate_windows",
    "training.samples",
    "training.sample_every",
    "training.accumulate",
    "training.profile",
    "checkpoint.every",
    "checkpoint.keep",
    "checkpoint.keep_every",
    "checkpoint.keep_best",
    "checkpoint.best_metric",
    "tracking.uri",
    "tracking.experiment",
    "tracking.log_diff",
    "cluster.workers",
    "cluster.cpus_per_worker",
    "cluster.accelerator",
    "cluster.devices_per_worker",
    "cluster.accelerator_version",
    "cluster.topology",
    "cluster.address",
    "cluster.data",
    "cluster.fsdp",
    "cluster.tensor",
    "cluster.max_restarts",
    "cluster.memory_gib",
    "cluster.peak_flops",
    "cluster.heartbeat_seconds",
    "cluster.start_timeout_seconds",
    "cluster.join_timeout_seconds",
    "cluster.coordinator_port",
    "cluster.compile_cache",
    "cluster.stall_seconds",
    "cluster.resize_seconds",
    "cluster.grace_seconds",
}


def all_fields() -> list[str]:
    return [
        f"{section.name}.{field.name}"
        for section in dataclasses.fields(Recipe)
        for field in dataclasses.fields(getattr(Recipe(), section.name))
    ]


def another(name: str) -> object:
    """A value of the field that is not its default and leaves the recipe possible."""
    section, field = name.split(".")
    part = getattr(Recipe(), section)
    default = getattr(part, field)
    if name in ANOTHER:
        return ANOTHER[name]
    if isinstance(default, bool):
        return not default
    if isinstance(default, int):
        return 2 * default or 10
    if isinstance(default, float):
        return default / 2 or 0.25
    choices = typing.get_args(typing.get_type_hints(type(part))[field])
    assert len(choices) > 1, f"{name}: add another value to ANOTHER"
    return next(choice for choice in choices if choice != default)


NEEDED = {
    # What else must change with a field, for the recipe to be possible.
    "model.gradient_through_cache": {"gradient_block": 32},
    "model.n_kv_heads": {"n_heads": 4},
    "model.remat_keeps": {"remat": True},
    "cluster.accelerator_version": {"accelerator": "tpu", "topology": "2x4"},
    "cluster.topology": {"accelerator": "tpu", "accelerator_version": "v4"},
}


def changed(name: str) -> Recipe:
    """The default recipe with another value in one field."""
    section, field = name.split(".")
    part = dataclasses.replace(getattr(unchanged(name), section), **{field: another(name)})
    return dataclasses.replace(Recipe(), **{section: part})


def unchanged(name: str) -> Recipe:
    """The default recipe with what a change of that field needs besides."""
    section = name.partition(".")[0]
    part = dataclasses.replace(getattr(Recipe(), section), **NEEDED.get(name, {}))
    return dataclasses.replace(Recipe(), **{section: part})


def test_stored_mathematics_and_asked_for_operations():
    stored = load("tiny", ("training.seed=3", "checkpoint.keep=5"))
    asked = load("tiny", ("training.seed=4", "checkpoint.keep=7"))
    both = recipes.with_mathematics_of(stored, asked)
    assert (both.training.seed, both.checkpoint.keep) == (3, 7)
    assert recipes.identity(both) == recipes.identity(stored)
    assert recipes.difference(asked, stored, only=frozenset({"checkpoint.keep"})) == [
        "checkpoint.keep: 7 (5)"
    ]


@pytest.mark.parametrize(
    ("override", "expected"),
    [
        ("training.steps='200'", "training.steps: input should be a valid integer"),
        ("training.steps=200.0", "training.steps: input should be a valid integer"),
        ("training.steps=true", "training.steps: input should be a valid integer"),
        ("training.steps=", "training.steps: input should be a valid integer"),
        ("optimizer.learning_rate=fast", "optimizer.learning_rate: input should be a valid number"),
        ("optimizer.learning_rate='1e-4'", "optimizer.learning_rate: input should be a valid num"),
        ("model.compressive_cache=off", "model.compressive_cache: input should be a valid boolean"),
        ("model.compressive_cache=0", "model.compressive_cache: input should be a valid boolean"),
        ("data.window=strem", "data.window: input should be 'stream' or 'document'"),
        ("training=3", "expected section.field=value"),
        ("training.steps", "expected section.field=value"),
        ("model.window.x=3", "expected section.field=value"),
    ],
)
def test_types_are_strict_and_the_field_is_named(override: str, expected: str):
    assert expected in refusal(override)


@pytest.mark.parametrize(
    ("override", "nearest"),
    [
        ("training.sed=3", "training.sed: no such field (did you mean seed?)"),
        ("model.n_layer=3", "model.n_layer: no such field (did you mean n_layers?)"),
        ("trainin.seed=3", "trainin: no such section (did you mean training?)"),
        ("model.preset=tinny", "unknown preset 'tinny' (did you mean tiny?)"),
        ("checkpoint.zzz=1", "checkpoint.zzz: no such field; "),
    ],
)
def test_an_unknown_name_gets_its_nearest(override: str, nearest: str):
    assert nearest in refusal(override)


def test_a_recipe_file_states_only_what_differs(tmp_path: Path):
    path = tmp_path / "mine.yaml"
    path.write_text("# words\ntraining:\n  steps: 2000\n")
    assert load(str(path)) == changed("training.steps")
    path.write_text("")
    assert load(str(path)) == Recipe()


def test_the_tables_of_this_test_name_fields_that_exist():
    assert {*all_fields()} >= OPERATIONAL | ANOTHER.keys()


@pytest.mark.parametrize("name", all_fields())
def test_each_field_survives_yaml_and_can_be_overridden(name: str):
    recipe = changed(name)
    assert from_yaml(to_yaml(recipe), "here") == recipe
    section = name.partition(".")[0]
    needed = [f"{section}.{field}={value}" for field, value in NEEDED.get(name, {}).items()]
    value = another(name)
    text = list(value) if isinstance(value, tuple) else value  # YAML has no tuples
    overridden = load("tiny", (*BASE, *needed, f"{name}={text}"))
    assert recipes.flatten(overridden)[name] == another(name)


@pytest.mark.parametrize("name", all_fields())
def test_the_identity_changes_with_mathematical_fields_only(name: str):
    changes = recipes.identity(changed(name)) != recipes.identity(unchanged(name))
    assert changes == (name not in OPERATIONAL)
    difference = recipes.difference(changed(name), unchanged(name), mathematical_only=True)
    assert [line.partition(":")[0] for line in difference] == ([name] if changes else [])


def test_the_identity_is_the_same_in_every_process():
    command = "from jobs import recipe as r; print(r.identity(r.load('tiny')))"
    printed = {
        subprocess.run(
            [sys.executable, "-c", command],
            env={**os.environ, "PYTHONHASHSEED": seed},
            cwd=Path(__file__).parents[2],
            capture_output=True,
            text=True,
            check=True,
        ).stdout.strip()
        for seed in ("1", "2")
    }
    assert printed == {recipes.identity(load("tiny"))}
    assert re.fullmatch("[0-9a-f]{16}", printed.pop())


def test_the_schedule_ends_with_the_run_and_keeps_its_end_on_resume():
    first = recipes.resolve(load("tiny", BASE))
    assert first.optimizer.schedule_steps == 400
    longer = recipes.resolve(load("tiny", (*BASE, "training.steps=800")), stored=first)
    assert longer.training.steps == 800
    assert longer.optimizer.schedule_steps == 400
    assert recipes.identity(longer) == recipes.identity(first)
    assert recipes.difference(longer, first) == ["training.steps: 800 (400)"]
    # Stated, it is mathematics: another horizon is another run.
    stated = load("tiny", (*BASE, "training.steps=800", "optimizer.schedule_steps=800"))
    assert recipes.resolve(stated, stored=first) == stated
    assert recipes.identity(stated) != recipes.identity(first)
    assert recipes.resolve(first) == first


def test_the_field_reference_tells_what_the_sources_say():
    # The oracle reads the docstrings under the fields from the source text.
    described = {}
    for section, kind in typing.get_type_hints(Recipe).items():
        [definition] = ast.parse(inspect.getsource(kind)).body
        assert isinstance(definition, ast.ClassDef)
        for field, words in zip(definition.body, definition.body[1:], strict=False):
            if isinstance(field, ast.AnnAssign) and isinstance(words, ast.Expr):
                described[f"{section}.{ast.unparse(field.target)}"] = ast.literal_eval(words.value)
    rows = {name: (default, operational, text) for name, default, operational, text in
            field_reference()}  # fmt: skip
    assert list(rows) == all_fields()
    for name, (default, operational, text) in rows.items():
        assert text == " ".join(described[name].split()), name
        assert len(text) > 15, name
        assert operational == (name in OPERATIONAL), name
        assert default == recipes.flatten(Recipe())[name], name


def test_a_range_of_workers_is_kept_and_operational():
    recipe = recipes.load("tiny", ("cluster.workers=[1,3]",))
    assert (recipe.cluster.least_workers, recipe.cluster.most_workers) == (1, 3)
    assert recipes.from_yaml(recipes.to_yaml(recipe), "test") == recipe
    assert recipes.identity(recipe) == recipes.identity(recipes.load("tiny"))
