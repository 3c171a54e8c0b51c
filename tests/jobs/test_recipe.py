"""The recipe: strict typing, errors that name the field and the fix, and an identity that holds."""

import ast
import dataclasses
import inspect
import math
import os
import re
import subprocess
import sys
import typing
from pathlib import Path

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from jobs import recipe as recipes
from jobs.errors import ExitCode, UserError
from jobs.recipe import Recipe, field_reference, from_yaml, load, to_yaml
from jobs.recipe_yaml import named_recipes, parse_yaml, stated
from model.config import PRESETS

CORE_SCHEMA = [
    # YAML 1.2.2, chapter 10.3: the only plain scalars that are not strings.
    ("1e-4", 1e-4),
    ("1E+3", 1000.0),
    (".5", 0.5),
    ("-3.", -3.0),
    (".inf", math.inf),
    ("-7", -7),
    ("+12", 12),
    ("010", 10),
    ("0o10", 8),
    ("0xFF", 255),
    ("null", None),
    ("~", None),
    ("", None),
    ("true", True),
    ("False", False),
    ("off", "off"),
    ("on", "on"),
    ("no", "no"),
    ("Yes", "Yes"),
    ("12:30:00", "12:30:00"),
    ("190:20:30", "190:20:30"),
    ("2026-01-01", "2026-01-01"),
    ("2026-01-01T10:00:00Z", "2026-01-01T10:00:00Z"),
    ("'200'", "200"),
    ("1.2.3", "1.2.3"),
]

BASE = (
    # On top of a named recipe, whose own figures change: T/U = 512/256 = 2 updates a batch.
    "data.sequence_length=512",
    "training.update_length=256",
    "training.steps=400",
    "training.evaluate_every=100",
    "checkpoint.every=100",
    "optimizer.warmup_steps=40",
)

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


def refusal(*overrides: str, name: str = "tiny") -> str:
    """The one line with which the overrides are refused."""
    with pytest.raises(UserError) as caught:
        load(name, overrides)
    assert caught.value.code == ExitCode.USER
    message = str(caught.value)
    assert "\n" not in message
    return message


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


@pytest.mark.parametrize(("text", "value"), CORE_SCHEMA)
def test_scalars_have_the_types_of_yaml_1_2(text: str, value: object):
    parsed = parse_yaml(f"key: {text}\n", "here")["key"]
    assert type(parsed) is type(value)
    assert parsed == value


@given(st.text(st.sampled_from("aA1.-_:!&*%#[]{},'\"~|>?@` \n0xoe+in<="), max_size=12))
@settings(max_examples=150, deadline=None)
def test_any_text_is_a_value_or_a_user_error(text: str):
    for overrides in ((f"data.corpus={text}",), (f"training.steps={text}",), (text,)):
        try:
            load("tiny", overrides)
        except UserError as error:
            assert str(error)  # noqa: PT017 - either outcome is right, another exception is not
    try:
        from_yaml(text, "here")
    except UserError as error:
        assert str(error).startswith("here")  # noqa: PT017


@pytest.mark.parametrize("value", ["!!int abc", "&a [*a]", "!!binary aGk=", "{[1]: 2}", "[1, 2]"])
def test_exotic_yaml_is_refused(value: str):
    assert re.match("recipe tiny: |override 'training.steps=", refusal(f"training.steps={value}"))
    refusal(f"model.preset={value}")


@pytest.mark.parametrize("text", ["demo #2/corpus", "my: dir", "[a]/x", "12", "off", "~/a", "'b'"])
def test_a_text_is_taken_as_it_stands(text: str):
    assert load("tiny", (f"data.corpus={text}",)).data.corpus == text
    assert load("tiny", ("data.corpus=null",)).data.corpus is None


def test_what_the_user_states_is_told_from_what_comes_with_tvq(tmp_path: Path):
    assert stated("tiny", ("training.seed=1",)) == {"training.seed"}
    own = tmp_path / "own.yaml"
    own.write_text("training:\n  batch_size: 4\ndata:\n")
    assert stated(str(own), ("model.window=8",)) == {"training.batch_size", "model.window"}
    assert "model.d_model" in stated("tiny", ("model.preset=small",))


def test_operational_fields_that_cannot_work_are_refused():
    assert load("tiny", ("training.profile=[3,5]",)).training.profile == (3, 5)
    for value in ("[5,3]", "[0,1]"):
        assert "training.profile: expected the first" in refusal(f"training.profile={value}")
    for value in ("[1]", "7", "[1,2,3]"):
        assert "training.profile" in refusal(f"training.profile={value}")
    assert "cluster.compile_cache: must be a fold" in refusal("cluster.compile_cache=gs://b/c")
    assert "model.remat_keeps: products is" in refusal("model.remat_keeps=products")


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


def test_numbers_with_an_exponent_and_words_like_off_arrive_as_written():
    recipe = load("tiny", ("optimizer.learning_rate=1e-4", "data.corpus=off"))
    assert recipe.optimizer.learning_rate == 0.0001
    assert recipe.data.corpus == "off"
    assert load("tiny", ("data.corpus=2026-01-01",)).data.corpus == "2026-01-01"
    assert load("tiny", ("tracking.experiment=12:30:00",)).tracking.experiment == "12:30:00"
    assert load("tiny", ("optimizer.gradient_clip=null",)).optimizer.gradient_clip is None
    one = load("tiny", ("optimizer.learning_rate=1",)).optimizer.learning_rate
    assert type(one) is float


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


def test_an_unknown_recipe_gets_its_nearest_and_the_list(tmp_path: Path):
    assert "unknown (did you mean tiny?)" in refusal(name="tinny")
    assert "tiny" in refusal(name="nothing-like-it")
    assert "no such file" in refusal(name=str(tmp_path / "absent.yaml"))
    (tmp_path / "binary.yaml").write_bytes(b"\xff\xfe\x00")
    assert "UTF-8" in refusal(name=str(tmp_path / "binary.yaml"))
    (tmp_path / "list.yaml").write_text("- training\n")
    assert "expected sections" in refusal(name=str(tmp_path / "list.yaml"))
    (tmp_path / "broken.yaml").write_text("training:\n  steps: [\n")
    assert "line 3: not valid YAML" in refusal(name=str(tmp_path / "broken.yaml"))
    (tmp_path / "twice.yaml").write_text("training: {steps: 5, steps: 6}\n")
    assert "duplicate key" in refusal(name=str(tmp_path / "twice.yaml"))


def test_a_recipe_file_states_only_what_differs(tmp_path: Path):
    path = tmp_path / "mine.yaml"
    path.write_text("# words\ntraining:\n  steps: 2000\n")
    assert load(str(path)) == changed("training.steps")
    path.write_text("")
    assert load(str(path)) == Recipe()


@pytest.mark.parametrize(
    ("overrides", "expected"),
    [
        (["training.steps=401"], "training.steps: .* multiple of 2, got 401; the nearest is 400"),
        (["checkpoint.every=1"], "checkpoint.every: .* got 1; the nearest is 2"),
        (
            ["training.update_length=64", "training.evaluate_every=101"],
            "training.evaluate_every: .* multiple of 8, got 101; the nearest is 104",
        ),
        (["training.update_length=300"], "training.update_length: .* got 300; the nearest is 256"),
        (["training.update_length=9999"], "training.update_length: .* the nearest is 512"),
        (["training.update_length=0"], "training.update_length: must be at least 1, got 0"),
        (["training.steps=40"], r"training.steps: must be more than optimizer.warmup_steps \(40\)"),
        (["training.steps=0"], "training.steps: must be more than"),
        (["optimizer.schedule_steps=40"], "optimizer.schedule_steps: must be more than"),
        (["training.batch_size=0"], "training.batch_size: must be at least 1, got 0"),
        (["training.seed=-1"], "training.seed: must be at least 0, got -1"),
        (["training.seed=4294967296"], "training.seed: must be at most 4294967295"),
        (["data.sequence_length=0"], "data.sequence_length: must be at least 1"),
        (["data.shuffle_span=0"], "data.shuffle_span: must be at least 1, got 0"),
        (["cluster.workers=-1"], "cluster.workers: must be at least 0"),
        (["cluster.workers=[0,2]"], "cluster.workers: must be at least 1"),
        (["cluster.workers=[2,1]"], r"cluster.workers: \[least, most\]"),
        (["cluster.data=0"], "cluster.data: must be at least 1, or -1"),
        (["cluster.fsdp=3"], "cluster.workers: each brings one device"),
        (["cluster.data=1"], "cluster.workers: each brings one device"),
        (["checkpoint.keep=0"], "checkpoint.keep: must be at least 1"),
        (["model.d_model=31"], "model.d_model: must be even"),
        (["model.window=0"], "model.window: must be at least 1"),
        (["model.codebook_decay=1"], r"model.codebook_decay: must be in \[0, 1\)"),
        (["optimizer.learning_rate=.nan"], "optimizer.learning_rate: must be"),
        (["optimizer.weight_decay=.inf"], "optimizer.weight_decay: must be finite"),
        (["model.commitment_weight=.inf"], "model.commitment_weight: must be finite"),
    ],
)
def test_an_impossible_combination_names_the_field_and_a_valid_value(
    overrides: list[str], expected: str
):
    message = refusal(*BASE, *overrides)
    assert message.startswith("recipe tiny: ")
    assert re.search(expected, message), message


@given(st.integers(1, 64), st.integers(1, 64), st.integers(1, 300))
@settings(max_examples=60, deadline=None)
def test_the_value_that_a_refusal_names_is_the_nearest_that_is_accepted(
    per_batch: int, update_length: int, every: int
):
    cut = (
        *BASE,
        f"data.sequence_length={per_batch * update_length}",
        f"training.update_length={update_length}",
        f"training.steps={per_batch * 100}",
        f"training.evaluate_every={per_batch}",
        "optimizer.warmup_steps=0",
    )
    try:
        load("tiny", (*cut, f"checkpoint.every={every}"))
        assert every % per_batch == 0
    except UserError as error:
        named = int(str(error).rpartition(" ")[2])
        assert load("tiny", (*cut, f"checkpoint.every={named}")).checkpoint.every == named
        valid = (n * per_batch for n in range(1, 302))
        assert abs(named - every) == min(abs(value - every) for value in valid)


@pytest.mark.parametrize(
    "uri",
    [
        "http://me:secret@host:5000",
        "postgresql://u:pa55@db/mlflow",
        "https://:token@host",
        "http://me:p@ss@host",
    ],
)
def test_credentials_in_a_url_are_refused_and_not_repeated(uri: str):
    message = refusal(f"tracking.uri={uri}")
    assert "tracking.uri: holds a user name or password" in message
    assert "MLFLOW_TRACKING_USERNAME" in message
    assert "secret" not in message
    assert "pa55" not in message
    with pytest.raises(UserError, match=r"data\.corpus: holds a user name or password"):
        from_yaml(f"data:\n  corpus: {uri}\n", "here")


@pytest.mark.parametrize("uri", ["http://host:5000/a@b", "sqlite:///a/b.db", "http://host:80"])
def test_urls_without_credentials_are_taken(uri: str):
    assert load("tiny", (f"tracking.uri={uri}",)).tracking.uri == uri


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


def test_every_recipe_that_comes_with_tvq_loads_and_says_what_it_is():
    folder = Path(inspect.getfile(recipes)).parent / "recipes"
    assert {*named_recipes()} == {path.stem for path in folder.glob("*.yaml")}
    for name, description in named_recipes().items():
        assert len(description.split()) > 3, name
        assert from_yaml(to_yaml(load(name)), name) == load(name)


@pytest.mark.parametrize("name", list(PRESETS))
def test_a_preset_is_its_model_with_overrides_on_top(name: str):
    recipe = load("tiny", (f"model.preset={name}", "model.n_layers=3"))
    assert recipe.model == dataclasses.replace(PRESETS[name], n_layers=3)


def test_a_value_in_the_file_is_kept_when_the_preset_is_overridden(tmp_path: Path):
    path = tmp_path / "mine.yaml"
    path.write_text("model:\n  preset: tiny\n  window: 32\n")
    recipe = load(str(path), ("model.preset=small",))
    assert recipe.model == dataclasses.replace(PRESETS["small"], window=32)


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
