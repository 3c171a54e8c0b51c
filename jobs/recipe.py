"""The recipe: one frozen, typed tree that says everything about a training.

A recipe file is YAML 1.2 and states only what differs from the defaults. Any field can be
overridden on the command line as `section.field=value`, the value being YAML too.

Each field either affects the mathematics or is *operational* (where and how it runs, cadences,
names). The identity of a run is the hash of the mathematical fields: operational ones may change
between one start of a run and the next, mathematical ones may not.
"""

import dataclasses
import difflib
import hashlib
import io
import json
import math
import re
from dataclasses import dataclass, field
from functools import cache
from importlib import resources
from pathlib import Path
from typing import Any, Literal, get_args, get_type_hints

from pydantic import ConfigDict, TypeAdapter, ValidationError
from ruamel.yaml import YAML
from ruamel.yaml.constructor import SafeConstructor
from ruamel.yaml.error import YAMLError

from jobs.errors import UserError
from model.config import (
    PRESETS,
    ConfigError,
    ModelConfig,
    OptimizerConfig,
    validate,
    validate_update_length,
)


def operational(default: Any) -> Any:
    """A field that does not affect the mathematics."""
    return field(default=default, metadata={"operational": True})


@dataclass(frozen=True)
class DataConfig:
    """Which tokens, and how they are cut."""

    corpus: str | None = operational(None)
    """Folder that `tvq prepare` wrote. Its splits' fingerprints, not this path, identify the data.
    """
    sequence_length: int = 512
    """T: tokens of a window. The cache is carried through a window and starts empty in the next."""
    window: Literal["stream", "document"] = "stream"
    """stream: documents joined by eos and cut every T tokens. document: one document a window."""
    shuffle_span: int | None = None
    """Shards permuted together, so that a bounded cache suffices; null: the whole split."""


@dataclass(frozen=True)
class TrainingConfig:
    """How long, in what batches."""

    steps: int = operational(1000)
    """Optimizer updates to make. A batch takes sequence_length / update_length of them."""
    batch_size: int = 16
    """B: windows of the global batch, whatever the number of workers."""
    update_length: int = 256
    """U: tokens of each window that one update sees; the cache is carried between updates."""
    seed: int = 0
    """Of the initial parameters, the order of the data and every random draw."""
    evaluate_every: int = operational(200)
    """Updates between evaluations on the validation split."""
    evaluate_windows: int = operational(64)
    """Windows of the validation split that such an evaluation covers (the first ones, exactly)."""


@dataclass(frozen=True)
class CheckpointConfig:
    """When to save and what to keep."""

    every: int = operational(200)
    """Updates between checkpoints; the last update is always saved."""
    keep: int = operational(2)
    """Complete checkpoints to keep, the newest ones."""


@dataclass(frozen=True)
class TrackingConfig:
    """Where MLflow is."""

    uri: str | None = operational(None)
    """An MLflow tracking URI; null: MLFLOW_TRACKING_URI, else a SQLite file beside the runs."""
    experiment: str = operational("tvq")
    """The MLflow experiment that the run is filed under."""


@dataclass(frozen=True)
class ClusterConfig:
    """The Ray workers and the device mesh that they form."""

    workers: int = operational(2)
    """Worker processes; 0 runs the loop in this process, without Ray."""
    cpus_per_worker: int = operational(1)
    """CPU cores that Ray reserves for a worker; XLA is given as many threads."""
    address: str | None = operational(None)
    """A running Ray cluster; null: RAY_ADDRESS, else a cluster on this machine for this command."""
    data: int = operational(-1)
    """Devices along the mesh's data axis; -1: all that the other axes leave."""
    fsdp: int = operational(1)
    """Devices that parameters and optimizer state are split over."""
    tensor: int = operational(1)
    """Devices that value columns, gate and output projection are split over."""
    max_restarts: int = operational(3)
    """Failures of the worker group after which the training ends."""
    heartbeat_seconds: int = operational(20)
    """Silence after which a worker counts as lost."""


@dataclass(frozen=True)
class Recipe:
    """The whole tree."""

    data: DataConfig = field(default_factory=DataConfig)
    model: ModelConfig = field(default_factory=ModelConfig)
    optimizer: OptimizerConfig = field(default_factory=OptimizerConfig)
    training: TrainingConfig = field(default_factory=TrainingConfig)
    checkpoint: CheckpointConfig = field(default_factory=CheckpointConfig)
    tracking: TrackingConfig = field(default_factory=TrackingConfig)
    cluster: ClusterConfig = field(default_factory=ClusterConfig)

    @property
    def updates_per_batch(self) -> int:
        """T/U: optimizer updates that one batch takes."""
        return self.data.sequence_length // self.training.update_length


class _Yaml12Constructor(SafeConstructor):
    """YAML 1.2's core schema has no timestamps: `2026-01-01` stays the string it was written as."""


_Yaml12Constructor.add_constructor(
    "tag:yaml.org,2002:timestamp", lambda loader, node: loader.construct_scalar(node)
)

_LARGEST_SEED = 2**32 - 1
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


def to_yaml(recipe: Recipe) -> str:
    """The whole tree as YAML; `from_yaml` gives the same recipe back."""
    yaml = YAML(typ="safe", pure=True)
    yaml.default_flow_style = False
    yaml.sort_base_mapping_type_on_output = False  # pyright: ignore[reportAttributeAccessIssue]
    stream = io.StringIO()
    yaml.dump(json.loads(_adapter().dump_json(recipe)), stream)
    return stream.getvalue()


def from_yaml(text: str, where: str) -> Recipe:
    """The recipe of a YAML text.

    Raises:
        UserError: not YAML, an unknown field, a wrong type or an impossible combination.
    """
    return _validated(_sections(parse_yaml(text, where), where), where)


def named_recipes() -> dict[str, str]:
    """The recipes that come with tvq: name to what its first comment line says."""
    folder = resources.files("jobs") / "recipes"
    found = {}
    for entry in sorted(folder.iterdir(), key=lambda entry: entry.name):
        if entry.name.endswith(".yaml"):
            first = entry.read_text(encoding="utf-8").splitlines()[0]
            found[entry.name.removesuffix(".yaml")] = first.removeprefix("#").strip()
    return found


def load(name: str, overrides: tuple[str, ...] = ()) -> Recipe:
    """The recipe called `name` (or in the file `name`) with `section.field=value` overrides.

    Raises:
        UserError: unknown recipe or field, wrong type, impossible combination; names the fix.
    """
    where = f"recipe {name}"
    tree = _sections(parse_yaml(_text_of(name), where), where)
    for override in overrides:
        _apply(tree, override)
    return _validated(tree, where)


def stated(name: str, overrides: tuple[str, ...] = ()) -> frozenset[str]:
    """The fields that a user states with this recipe: overrides, and what a file of theirs says.

    A named recipe comes with tvq; what it says may change with the version.
    """
    fields = {override.partition("=")[0] for override in overrides}
    if name not in named_recipes():
        tree = _sections(parse_yaml(_text_of(name), name), name)
        fields |= {f"{section}.{item}" for section, items in tree.items() for item in items or ()}
    if "model.preset" in fields:
        fields |= {f"model.{item.name}" for item in dataclasses.fields(ModelConfig)}
    return frozenset(fields)


def resolve(recipe: Recipe, stored: Recipe | None = None) -> Recipe:
    """Fills what the recipe leaves open: the schedule's horizon is the run's length at its start.

    With the `stored` recipe of a run that is resumed, the horizon stays what it was, so that a
    longer run continues under the schedule it began with.
    """
    if recipe.optimizer.schedule_steps is not None:
        return recipe
    horizon = stored.optimizer.schedule_steps if stored else recipe.training.steps
    optimizer = dataclasses.replace(recipe.optimizer, schedule_steps=horizon)
    return dataclasses.replace(recipe, optimizer=optimizer)


def flatten(recipe: Recipe, *, mathematical_only: bool = False) -> dict[str, Any]:
    """`section.field` to value, in the tree's order."""
    return {
        f"{section.name}.{item.name}": getattr(getattr(recipe, section.name), item.name)
        for section in dataclasses.fields(recipe)
        for item in dataclasses.fields(getattr(recipe, section.name))
        if not (mathematical_only and item.metadata.get("operational"))
    }


def difference(
    recipe: Recipe,
    other: Recipe,
    *,
    mathematical_only: bool = False,
    only: frozenset[str] | None = None,
) -> list[str]:
    """The fields (of `only`) in which two recipes differ: `section.field: ours (theirs)`."""
    ours = flatten(recipe, mathematical_only=mathematical_only)
    theirs = flatten(other, mathematical_only=mathematical_only)
    return [
        f"{name}: {_shown(value)} ({_shown(theirs[name])})"
        for name, value in ours.items()
        if value != theirs[name] and (only is None or name in only)
    ]


def with_mathematics_of(stored: Recipe, recipe: Recipe) -> Recipe:
    """The mathematical fields of `stored` and the operational ones of `recipe`."""
    kept = flatten(stored, mathematical_only=True)
    sections = {}
    for section in dataclasses.fields(recipe):
        ours = getattr(recipe, section.name)
        names = {item.name: f"{section.name}.{item.name}" for item in dataclasses.fields(ours)}
        stands = {field: kept[name] for field, name in names.items() if name in kept}
        sections[section.name] = dataclasses.replace(ours, **stands)
    return Recipe(**sections)


def identity(recipe: Recipe) -> str:
    """The hash of the mathematical fields, 16 hexadecimal digits: equal runs have equal ones."""
    fields = json.dumps(flatten(recipe, mathematical_only=True), sort_keys=True)
    return hashlib.sha256(fields.encode()).hexdigest()[:16]


def field_reference() -> list[tuple[str, Any, bool, str]]:
    """Every field: name, default, whether it is operational, and what it means."""
    definitions = _adapter().json_schema()["$defs"]
    rows = []
    for section in dataclasses.fields(Recipe):
        kind = type(getattr(Recipe(), section.name))
        described = definitions[kind.__name__]["properties"]
        for item in dataclasses.fields(kind):
            text = " ".join(described[item.name].get("description", "").split())
            rows.append(
                (
                    f"{section.name}.{item.name}",
                    getattr(getattr(Recipe(), section.name), item.name),
                    bool(item.metadata.get("operational")),
                    text,
                )
            )
    return rows


@cache
def _adapter() -> TypeAdapter[Recipe]:
    # Strict: a string is never taken for a number. Nested stdlib dataclasses inherit the setting.
    settings = ConfigDict(extra="forbid", strict=True, use_attribute_docstrings=True)
    Recipe.__pydantic_config__ = settings  # pyright: ignore[reportAttributeAccessIssue]
    return TypeAdapter(Recipe)


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
            f"recipe {name}: unknown{_nearest(name, names)}; expected one of {', '.join(names)}"
            " or a path to a .yaml file"
        )
    return (resources.files("jobs") / "recipes" / f"{name}.yaml").read_text(encoding="utf-8")


def _apply(tree: dict[str, Any], override: str) -> None:
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
    is_text = name in _text_fields() and value != "null"
    section[parts[1]] = value if is_text else parse_yaml(value, f"override {override!r}")


@cache
def _text_fields() -> set[str]:
    return {
        f"{section.name}.{name}"
        for section in dataclasses.fields(Recipe)
        for name, kind in get_type_hints(section.type).items()
        if str in (kind, *get_args(kind))
    }


def _sections(tree: Any, where: str) -> dict[str, Any]:
    if tree is None:
        return {}
    if not isinstance(tree, dict):
        raise UserError(f"{where}: expected sections such as `training:`, got {tree!r}")
    return tree


def _validated(tree: dict[str, Any], where: str) -> Recipe:
    try:
        text = json.dumps(tree)
    except (TypeError, ValueError) as error:  # `!!binary`, a mapping as a key, a loop of aliases
        raise UserError(f"{where}: expected plain sections and values: {error}") from None
    _refuse_credentials(tree, where)
    model = tree.get("model")
    if isinstance(model, dict) and "preset" in model:
        overrides = dict(model)
        preset = overrides.pop("preset")
        if not isinstance(preset, str) or preset not in PRESETS:
            raise UserError(
                f"{where}: model.preset: unknown preset {preset!r}"
                f"{_nearest(str(preset), list(PRESETS))}; expected one of {', '.join(PRESETS)}"
            )
        tree = {**tree, "model": {**dataclasses.asdict(PRESETS[preset]), **overrides}}
        text = json.dumps(tree)
    try:
        recipe = _adapter().validate_json(text)
    except ValidationError as error:
        raise UserError(f"{where}: {_explained(error, tree)}") from None
    try:
        _check(recipe)
    except ConfigError as error:
        raise UserError(f"{where}: {error}") from None
    return recipe


def _explained(error: ValidationError, tree: dict[str, Any]) -> str:
    first = error.errors()[0]
    name = ".".join(str(part) for part in first["loc"])
    if first["type"] == "unexpected_keyword_argument":
        *parents, last = (str(part) for part in first["loc"])
        known: Any = Recipe()
        for parent in parents:
            known = getattr(known, parent)
        names = [item.name for item in dataclasses.fields(known)]
        kind = "field" if parents else "section"
        return (
            f"{name}: no such {kind}{_nearest(last, names)}; `tvq recipes --fields` lists them all"
        )
    return f"{name}: {first['msg'][0].lower()}{first['msg'][1:]}, got {_shown(first['input'])}"


def _check(recipe: Recipe) -> None:
    data, training, cluster = recipe.data, recipe.training, recipe.cluster
    if recipe.optimizer.schedule_steps is None and training.steps <= recipe.optimizer.warmup_steps:
        raise ConfigError(
            f"training.steps: must be more than optimizer.warmup_steps"
            f" ({recipe.optimizer.warmup_steps}), got {training.steps}"
        )
    validate(recipe.model, resolve(recipe).optimizer)
    for name, value in flatten(recipe).items():
        if isinstance(value, float) and not math.isfinite(value):  # JSON and YAML 1.2 part ways
            raise ConfigError(f"{name}: must be finite, got {value}")
    if cluster.data != -1 and cluster.data < 1:
        raise ConfigError(
            f"cluster.data: must be at least 1, or -1 for all that is left, got {cluster.data}"
        )
    if training.seed > _LARGEST_SEED:  # its upper bits would be dropped: other seeds, same draws
        raise ConfigError(f"training.seed: must be at most {_LARGEST_SEED}, got {training.seed}")
    for name, value, least in (
        ("data.sequence_length", data.sequence_length, 1),
        ("data.shuffle_span", 1 if data.shuffle_span is None else data.shuffle_span, 1),
        ("training.batch_size", training.batch_size, 1),
        ("training.steps", training.steps, 1),
        ("training.seed", training.seed, 0),
        ("training.evaluate_every", training.evaluate_every, 1),
        ("training.evaluate_windows", training.evaluate_windows, 1),
        ("checkpoint.every", recipe.checkpoint.every, 1),
        ("checkpoint.keep", recipe.checkpoint.keep, 1),
        ("cluster.workers", cluster.workers, 0),
        ("cluster.cpus_per_worker", cluster.cpus_per_worker, 1),
        ("cluster.fsdp", cluster.fsdp, 1),
        ("cluster.tensor", cluster.tensor, 1),
        ("cluster.max_restarts", cluster.max_restarts, 0),
        ("cluster.heartbeat_seconds", cluster.heartbeat_seconds, 1),
    ):
        if value < least:
            raise ConfigError(f"{name}: must be at least {least}, got {value}")
    axes = cluster.fsdp * cluster.tensor * max(cluster.data, 1)
    if cluster.workers and (
        cluster.workers % axes or (cluster.data > 0 and axes != cluster.workers)
    ):
        raise ConfigError(
            f"cluster.workers: each brings one device, and data x fsdp x tensor ="
            f" {cluster.data} x {cluster.fsdp} x {cluster.tensor} does not make {cluster.workers};"
            " set cluster.data=-1 for what is left, or other axes"
        )
    validate_update_length(data.sequence_length, training.update_length)
    # A checkpoint and an evaluation lie on a batch border, so that no cache is ever saved.
    for name, value in (
        ("training.steps", training.steps),
        ("training.evaluate_every", training.evaluate_every),
        ("checkpoint.every", recipe.checkpoint.every),
    ):
        step = recipe.updates_per_batch
        if value % step:
            nearest = max(step, round(value / step) * step)
            raise ConfigError(
                f"{name}: a batch takes sequence_length / update_length = {step} updates, so it"
                f" must be a multiple of {step}, got {value}; the nearest is {nearest}"
            )


def _refuse_credentials(node: Any, where: str, name: str = "") -> None:
    if isinstance(node, dict):
        for key, value in node.items():
            _refuse_credentials(value, where, f"{name}.{key}".lstrip("."))
    elif isinstance(node, str) and _CREDENTIALS.search(node):
        raise UserError(
            f"{where}: {name}: holds a user name or password in a URL, which would be stored and"
            " logged; give it in the environment (MLFLOW_TRACKING_USERNAME and _PASSWORD)"
        )


def _nearest(name: str, known: list[str]) -> str:
    close = difflib.get_close_matches(name, known, n=1)
    return f" (did you mean {close[0]}?)" if close else ""


def _shown(value: Any) -> str:
    return json.dumps(value, default=str)
