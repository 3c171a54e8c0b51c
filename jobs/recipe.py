"""The recipe: one frozen, typed tree that says everything about a training.

A recipe file is YAML 1.2 and states only what differs from the defaults. Any field can be
overridden on the command line as `section.field=value`, the value being YAML too.

Each field either affects the mathematics or is *operational* (where and how it runs, cadences,
names). The identity of a run is the hash of the mathematical fields: operational ones may change
between one start of a run and the next, mathematical ones may not.
"""

import dataclasses
import hashlib
import json
from collections.abc import Mapping
from dataclasses import dataclass, field
from functools import cache
from typing import Any, Literal, get_args, get_type_hints

from pydantic import ConfigDict, TypeAdapter, ValidationError

from jobs.errors import UserError
from jobs.recipe_check import check
from jobs.recipe_yaml import (
    apply_override,
    dump_yaml,
    expand_preset,
    nearest,
    parse_sections,
    read_sections,
    refuse_credentials,
)
from model.config import ConfigError, ModelConfig, OptimizerConfig


def operational(default: Any) -> Any:
    """A field that does not affect the mathematics."""
    return field(default=default, metadata={"operational": True})


@dataclass(frozen=True)
class DataConfig:
    """Which tokens, and how they are cut."""

    corpus: str | None = operational(None)
    """Folder that `tvq prepare` wrote. Its splits' fingerprints, not this path, identify the data.
    """
    mixture: Mapping[str, int | float] | None = operational(None)
    """Instead of corpus: {FOLDER: WEIGHT, ...}. Of every W = sum of weights windows, exactly a
    corpus's weight come from it; one that runs out begins its next epoch. The splits' fingerprints
    and the weights, not the paths, identify the data. Each is evaluated on its own."""
    sequence_length: int = 512
    """T: tokens of a window. The cache is carried through a window and starts empty in the next."""
    window: Literal["stream", "document"] = "stream"
    """stream: documents joined by eos and cut every T tokens. document: one document a window."""
    shuffle_span: int | None = None
    """Shards permuted together, so that a bounded cache suffices; null: the whole split."""
    cache_bytes: int | None = operational(None)
    """Disk space for shards that are fetched from an object store (in TVQ_CACHE or
    ~/.cache/tvq/shards); it must hold two spans and a shard. null: no limit."""

    @property
    def corpora(self) -> Mapping[str, int | float]:
        """Folder to weight: of the mixture or of the one corpus; none if neither is given."""
        return self.mixture or ({self.corpus: 1} if self.corpus else {})


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
    init_from: str | None = None
    """Begin with another run's parameters and codebooks instead of random ones: its name, path or
    URL, with @UPDATE if not from its newest checkpoint, or a .safetensors file that
    `tvq checkpoints export` wrote. Schedule, counters and optimizer state are new."""
    evaluate_every: int = operational(200)
    """Updates between evaluations on the validation split."""
    evaluate_windows: int = operational(64)
    """Windows of the validation split that such an evaluation covers (the first ones, exactly)."""
    samples: int = operational(4)
    """Texts that the model goes on writing, behind as many fixed passages of the validation split,
    for `<run>/samples` and MLflow; of a model of pictures, pictures. 0: none. On two CPU cores four
    take `tiny` 0.3 s and `small` 5 s each time, and 5 s once to compile."""
    sample_every: int | None = operational(None)
    """Updates between such samples; null: training.evaluate_every. The last update has them too."""
    accumulate: int = operational(1)
    """Micro-batches that an update's rows are taken in, one after the other, for want of memory;
    the batch, its losses and its random draws stay the same."""
    spike_deviations: float | None = None
    """An update whose loss is so many standard deviations above its moving mean is skipped, as one
    that is not finite always is. null: no finite one is."""
    max_skipped: int = 10
    """Batches in a row without an update that could be applied after which the state of the newest
    checkpoint is restored; the training goes on with the next batch."""
    max_fallbacks: int = 3
    """Times that this is done without a new checkpoint in between; then the training ends."""
    profile: tuple[int, int] | None = operational(None)
    """[a, b]: trace updates a to b, and the rest of their batches, into the run's `profile` folder,
    for XProf or TensorBoard. null: trace none."""


@dataclass(frozen=True)
class CheckpointConfig:
    """When to save and what to keep."""

    every: int = operational(200)
    """Updates between checkpoints; the last update is always saved."""
    keep: int = operational(2)
    """Complete checkpoints to keep, the newest ones."""
    keep_every: int | None = operational(None)
    """Updates: the checkpoints at its multiples are kept as well. null: none."""
    keep_best: int = operational(0)
    """So many checkpoints are kept as well: those with the lowest best_metric."""
    best_metric: str = operational("eval/bits_per_byte")
    """A figure of the evaluations, lower is better; a checkpoint at an evaluation's update has it.
    """


@dataclass(frozen=True)
class TrackingConfig:
    """Where MLflow is."""

    uri: str | None = operational(None)
    """An MLflow tracking URI; null: MLFLOW_TRACKING_URI, else a SQLite file beside the runs."""
    experiment: str = operational("tvq")
    """The MLflow experiment that the run is filed under."""
    log_diff: bool = operational(True)
    """Whether the changes of tracked files since the commit are stored with the run, as a patch.
    One that is long or looks as if it held a secret never is."""


@dataclass(frozen=True)
class ClusterConfig:
    """The Ray workers and the device mesh that they form."""

    workers: int | tuple[int, int] = operational(2)
    """Worker processes; 0 runs the loop in this process, without Ray. [least, most]: as many as the
    cluster has room for; the group starts anew, from a checkpoint, with fewer when a node is lost
    and with more when there is room. The batch and its losses stay the same."""
    cpus_per_worker: int = operational(1)
    """CPU cores that Ray reserves for a worker; XLA is given as many threads."""
    memory_gib: int = operational(8)
    """Memory of a worker's container, GiB, where `tvq render` puts it in one."""
    accelerator: Literal["cpu", "gpu", "tpu"] = operational("cpu")
    """What the workers compute on. With workers=0, JAX takes what it finds in this process."""
    devices_per_worker: int | None = operational(None)
    """GPUs of a worker: 1, or all of a node; on CPU, virtual devices. null: 1; on TPU, the chips of
    a host, each of which is a worker."""
    accelerator_version: Literal["v4", "v5e", "v5p", "v6e"] | None = operational(None)
    """Of TPUs: their generation."""
    topology: str | None = operational(None)
    """Of TPUs: that of a slice, such as 4x4 or 2x2x2. The workers fill as many whole slices as they
    need."""
    address: str | None = operational(None)
    """A running Ray cluster; null: RAY_ADDRESS, else a cluster on this machine for this command."""
    data: int = operational(-1)
    """Devices along the mesh's data axis; -1: all that the other axes leave."""
    fsdp: int = operational(1)
    """Devices that parameters and optimizer state are split over; -1, with another data: all that
    the other axes leave."""
    tensor: int = operational(1)
    """Devices that value columns, gate and output projection are split over."""
    max_restarts: int = operational(3)
    """Failures of the worker group after which the training ends."""
    peak_flops: float | None = operational(None)
    """Operations a second that a device is made for, such as 989e12; perf/mfu is measured against
    it. null: it is not."""
    heartbeat_seconds: int = operational(20)
    """Silence after which a worker counts as lost."""
    start_timeout_seconds: int = operational(600)
    """How long the workers may wait for a place in the cluster (an autoscaler takes minutes)."""
    join_timeout_seconds: int = operational(120)
    """How long the workers, once they run, may take to find each other."""
    coordinator_port: int | None = operational(None)
    """Port at which the first worker's host is found by the others; null: any free one."""
    compile_cache: str | None = operational(None)
    """Folder on the workers' machines for compiled programs: a second start of the same recipe on
    the same devices compiles nothing. null: none."""
    stall_seconds: int = operational(1800)
    """A worker that began no batch for so long ends itself, and with it the group, which starts
    anew; more than the compilation, an evaluation or the last save takes."""
    resize_seconds: int = operational(60)
    """How often a group of [least, most] workers looks for room for more."""
    grace_seconds: int = operational(25)
    """How long a save may take after SIGTERM, or before a group is started anew with another number
    of workers. Kubernetes kills 30 s after SIGTERM unless told otherwise."""

    @property
    def least_workers(self) -> int:
        """The fewest that the training runs on."""
        return self.workers if isinstance(self.workers, int) else self.workers[0]

    @property
    def most_workers(self) -> int:
        """The most that it runs on."""
        return self.workers if isinstance(self.workers, int) else self.workers[1]


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


def to_yaml(recipe: Recipe) -> str:
    """The whole tree as YAML; `from_yaml` gives the same recipe back."""
    return dump_yaml(json.loads(_adapter().dump_json(recipe)))


def from_yaml(text: str, where: str) -> Recipe:
    """The recipe of a YAML text.

    Raises:
        UserError: not YAML, an unknown field, a wrong type or an impossible combination.
    """
    return _validated(parse_sections(text, where), where)


def load(name: str, overrides: tuple[str, ...] = ()) -> Recipe:
    """The recipe called `name` (or in the file `name`) with `section.field=value` overrides.

    Raises:
        UserError: unknown recipe or field, wrong type, impossible combination; names the fix.
    """
    where = f"recipe {name}"
    return _validated(read_sections(name, overrides, where, _text_fields()), where)


def with_overrides(recipe: Recipe, overrides: tuple[str, ...]) -> Recipe:
    """The recipe with `section.field=value` overrides; raises UserError as `load` does."""
    where = "override"
    tree = parse_sections(to_yaml(recipe), where)
    for override in overrides:
        apply_override(tree, override, _text_fields())
    return _validated(tree, where)


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


@cache
def _text_fields() -> set[str]:
    return {
        f"{section.name}.{name}"
        for section in dataclasses.fields(Recipe)
        for name, kind in get_type_hints(section.type).items()
        if str in (kind, *get_args(kind))
    }


def _validated(tree: dict[str, Any], where: str) -> Recipe:
    try:
        json.dumps(tree)
    except (TypeError, ValueError) as error:  # `!!binary`, a mapping as a key, a loop of aliases
        raise UserError(f"{where}: expected plain sections and values: {error}") from None
    refuse_credentials(tree, where)
    tree = expand_preset(tree, where)
    try:
        recipe = _adapter().validate_json(json.dumps(tree))
    except ValidationError as error:
        raise UserError(f"{where}: {_explained(error, tree)}") from None
    try:
        check(recipe, resolve(recipe).optimizer, flatten(recipe))
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
            f"{name}: no such {kind}{nearest(last, names)}; `tvq recipes --fields` lists them all"
        )
    return f"{name}: {first['msg'][0].lower()}{first['msg'][1:]}, got {_shown(first['input'])}"


def _shown(value: Any) -> str:
    return json.dumps(value, default=str)
