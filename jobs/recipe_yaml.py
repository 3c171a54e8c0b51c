"""What a user writes of a recipe, as a plain tree: YAML files, the named recipes, overrides.

Which fields there are is for `jobs/recipe.py` to say, and what they may be together for
`jobs/recipe_check.py`.
"""

import dataclasses
import difflib
import io
import re
from collections.abc import Set
from importlib import resources
from pathlib import Path
from typing import Any

from ruamel.yaml import YAML
from ruamel.yaml.constructor import SafeConstructor
from ruamel.yaml.error import YAMLError

from jobs.errors import UserError
from model.config import PRESETS, ModelConfig


class _Yaml12Constructor(SafeConstructor):
    """YAML 1.2's core schema has no timestamps: `2026-01-01` stays the string it was written as."""


_Yaml12Constructor.add_constructor(
    "tag:yaml.org,2002:timestamp", lambda loader, node: loader.construct_scalar(node)
)

_CREDENTIALS = re.compile(r"://[^/\s]*@")


def parse_yaml(text: str, where: str) -> Any:
    """Parses YAML 1.2: `1e-4` is a number, `off` and `12:30:00` are strings."""
    yaml = YAML(typ="safe", pure=True)
    yaml.Constructor = _Yaml12Constructor
    try:
        return yaml.load(text)
    except YAMLError as error:
        mark = getattr(error, "problem_mark", None)
        line = f", line {mark.line + 1}" if mark else ""
        problem = getattr(error, "problem", None) or str(error).splitlines()[0]
        raise UserError(f"{where}{line}: not valid YAML: {problem}") from None
    except ValueError as error:  # `!!int abc`, or a lone sign
        raise UserError(f"{where}: not valid YAML: {error}") from None


def dump_yaml(tree: dict[str, Any]) -> str:
    """Plain values as YAML, in the tree's order."""
    yaml = YAML(typ="safe", pure=True)
    yaml.default_flow_style = False
    yaml.sort_base_mapping_type_on_output = False  # pyright: ignore[reportAttributeAccessIssue]
    stream = io.StringIO()
    yaml.dump(tree, stream)
    return stream.getvalue()


def parse_sections(text: str, where: str) -> dict[str, Any]:
    """The sections of a recipe's text, what is in them unread.

    Raises:
        UserError: not YAML, or no mapping.
    """
    tree = parse_yaml(text, where)
    if tree is None:
        return {}
    if not isinstance(tree, dict):
        raise UserError(f"{where}: expected sections such as `training:`, got {tree!r}")
    return tree


def named_recipes() -> dict[str, str]:
    """The recipes that come with tvq: name to what its first comment line says."""
    folder = resources.files("jobs") / "recipes"
    found = {}
    for entry in sorted(folder.iterdir(), key=lambda entry: entry.name):
        if entry.name.endswith(".yaml"):
            first = entry.read_text(encoding="utf-8").splitlines()[0]
            found[entry.name.removesuffix(".yaml")] = first.removeprefix("#").strip()
    return found


def read_sections(
    name: str, overrides: tuple[str, ...], where: str, text_fields: Set[str]
) -> dict[str, Any]:
    """The sections of the recipe called `name` (or in the file `name`), with the overrides.

    The value of an override is YAML, but for those of `text_fields`, which are taken as they stand.

    Raises:
        UserError: unknown recipe, not YAML, or no `section.field=value`.
    """
    tree = parse_sections(_text_of(name), where)
    for override in overrides:
        apply_override(tree, override, text_fields)
    return tree


def stated(name: str, overrides: tuple[str, ...] = ()) -> frozenset[str]:
    """The fields that a user states with this recipe: overrides, and what a file of theirs says.

    A named recipe comes with tvq; what it says may change with the version.
    """
    fields = {override.partition("=")[0] for override in overrides}
    if name not in named_recipes():
        tree = parse_sections(_text_of(name), name)
        fields |= {f"{section}.{item}" for section, items in tree.items() for item in items or ()}
    if "model.preset" in fields:
        fields |= {f"model.{item.name}" for item in dataclasses.fields(ModelConfig)}
    return frozenset(fields)


def expand_preset(tree: dict[str, Any], where: str) -> dict[str, Any]:
    """The tree with the fields of `model.preset` in its place, under those that are written."""
    model = tree.get("model")
    if not isinstance(model, dict) or "preset" not in model:
        return tree
    overrides = dict(model)
    preset = overrides.pop("preset")
    if not isinstance(preset, str) or preset not in PRESETS:
        raise UserError(
            f"{where}: model.preset: unknown preset {preset!r}"
            f"{nearest(str(preset), list(PRESETS))}; expected one of {', '.join(PRESETS)}"
        )
    return {**tree, "model": {**dataclasses.asdict(PRESETS[preset]), **overrides}}


def refuse_credentials(node: Any, where: str, name: str = "") -> None:
    """Raises UserError for a password in a URL: a recipe is stored and logged."""
    if isinstance(node, dict):
        for key, value in node.items():
            refuse_credentials(value, where, f"{name}.{key}".lstrip("."))
    elif isinstance(node, str) and _CREDENTIALS.search(node):
        raise UserError(
            f"{where}: {name}: holds a user name or password in a URL, which would be stored and"
            " logged; give it in the environment (MLFLOW_TRACKING_USERNAME and _PASSWORD)"
        )


def nearest(name: str, known: list[str]) -> str:
    """The known name that is meant, for the end of a message that refuses another."""
    close = difflib.get_close_matches(name, known, n=1)
    return f" (did you mean {close[0]}?)" if close else ""


def _text_of(name: str) -> str:
    path = Path(name)
    if path.suffix in {".yaml", ".yml"} or "/" in name:
        if not path.is_file():
            raise UserError(f"recipe {name}: no such file; `tvq recipes` lists the named ones")
        try:
            return path.read_text(encoding="utf-8")
        except UnicodeDecodeError as error:
            raise UserError(f"recipe {name}: not a text file in UTF-8: {error}") from None
    names = list(named_recipes())
    if name not in names:
        raise UserError(
            f"recipe {name}: unknown{nearest(name, names)}; expected one of {', '.join(names)}"
            " or a path to a .yaml file"
        )
    return (resources.files("jobs") / "recipes" / f"{name}.yaml").read_text(encoding="utf-8")


def apply_override(tree: dict[str, Any], override: str, text_fields: Set[str]) -> None:
    """Sets the field of a `section.field=value` in the sections; raises UserError if it is none."""
    name, equals, value = override.partition("=")
    parts = name.split(".")
    if not equals or len(parts) != 2 or not all(parts):
        raise UserError(
            f"override {override!r}: expected section.field=value, as training.steps=200"
        )
    section = tree.setdefault(parts[0], {})
    if not isinstance(section, dict):
        raise UserError(f"override {override!r}: {parts[0]} is not a section in this recipe")
    # A text is taken as it stands: a path may hold what YAML would read as a comment or a list.
    is_text = name in text_fields and value != "null"
    section[parts[1]] = value if is_text else parse_yaml(value, f"override {override!r}")
