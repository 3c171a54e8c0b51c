"""What a user writes of a recipe: YAML 1.2, overrides, names and presets, each mistake a line."""

import dataclasses
import inspect
import math
import re
from pathlib import Path

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from jobs import recipe as recipes
from jobs.errors import UserError
from jobs.recipe import from_yaml, load, to_yaml
from jobs.recipe_yaml import named_recipes, parse_yaml, stated
from model.config import PRESETS
from tests.jobs.refused_recipe import refusal

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


def test_numbers_with_an_exponent_and_words_like_off_arrive_as_written():
    recipe = load("tiny", ("optimizer.learning_rate=1e-4", "data.corpus=off"))
    assert recipe.optimizer.learning_rate == 0.0001
    assert recipe.data.corpus == "off"
    assert load("tiny", ("data.corpus=2026-01-01",)).data.corpus == "2026-01-01"
    assert load("tiny", ("tracking.experiment=12:30:00",)).tracking.experiment == "12:30:00"
    assert load("tiny", ("optimizer.gradient_clip=null",)).optimizer.gradient_clip is None
    one = load("tiny", ("optimizer.learning_rate=1",)).optimizer.learning_rate
    assert type(one) is float


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
