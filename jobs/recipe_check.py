"""Which fields of a recipe can go together.

Each is of its type already; what a value may be beside the others is told here, with one that can.
"""

import math
from collections.abc import Mapping
from typing import TYPE_CHECKING, Any

from jobs.cluster import accelerators
from model.config import (
    ConfigError,
    OptimizerConfig,
    validate,
    validate_accumulation,
    validate_update_length,
)

if TYPE_CHECKING:
    from jobs.recipe import Recipe

_LARGEST_SEED = 2**32 - 1


def check(recipe: "Recipe", optimizer: OptimizerConfig, fields: Mapping[str, Any]) -> None:
    """Raises ConfigError, naming the field, where the recipe's fields cannot go together.

    Args:
        optimizer: the recipe's, its schedule's horizon filled in.
        fields: each field of the recipe, `section.field` to value.
    """
    data, training, cluster = recipe.data, recipe.training, recipe.cluster
    if recipe.optimizer.schedule_steps is None and training.steps <= recipe.optimizer.warmup_steps:
        raise ConfigError(
            f"training.steps: must be more than optimizer.warmup_steps"
            f" ({recipe.optimizer.warmup_steps}), got {training.steps}"
        )
    validate(recipe.model, optimizer)
    for name, value in fields.items():
        if isinstance(value, float) and not math.isfinite(value):  # JSON and YAML 1.2 part ways
            raise ConfigError(f"{name}: must be finite, got {value}")
    if data.corpus and data.mixture:
        raise ConfigError(
            "data.mixture: takes the place of data.corpus; give one of them, and null for the other"
        )
    if training.seed > _LARGEST_SEED:  # its upper bits would be dropped: other seeds, same draws
        raise ConfigError(f"training.seed: must be at most {_LARGEST_SEED}, got {training.seed}")
    for name, value, least in (
        ("data.sequence_length", data.sequence_length, 1),
        ("data.shuffle_span", data.shuffle_span, 1),
        ("training.batch_size", training.batch_size, 1),
        ("training.steps", training.steps, 1),
        ("training.seed", training.seed, 0),
        ("training.evaluate_every", training.evaluate_every, 1),
        ("training.evaluate_windows", training.evaluate_windows, 1),
        ("training.samples", training.samples, 0),
        ("training.sample_every", training.sample_every, 1),
        ("training.spike_deviations", training.spike_deviations, 1),
        ("training.max_skipped", training.max_skipped, 1),
        ("training.max_fallbacks", training.max_fallbacks, 0),
        ("checkpoint.every", recipe.checkpoint.every, 1),
        ("checkpoint.keep", recipe.checkpoint.keep, 1),
        ("checkpoint.keep_every", recipe.checkpoint.keep_every, 1),
        ("checkpoint.keep_best", recipe.checkpoint.keep_best, 0),
        ("cluster.workers", cluster.least_workers, 0 if isinstance(cluster.workers, int) else 1),
        ("cluster.cpus_per_worker", cluster.cpus_per_worker, 1),
        ("cluster.memory_gib", cluster.memory_gib, 1),
        ("cluster.fsdp", None if cluster.fsdp == -1 else cluster.fsdp, 1),
        ("cluster.tensor", cluster.tensor, 1),
        ("cluster.max_restarts", cluster.max_restarts, 0),
        ("cluster.peak_flops", cluster.peak_flops, 1),
        ("cluster.heartbeat_seconds", cluster.heartbeat_seconds, 1),
        ("cluster.devices_per_worker", cluster.devices_per_worker, 1),
        ("cluster.start_timeout_seconds", cluster.start_timeout_seconds, 1),
        ("cluster.join_timeout_seconds", cluster.join_timeout_seconds, 1),
        ("cluster.coordinator_port", cluster.coordinator_port, 1),
        ("cluster.stall_seconds", cluster.stall_seconds, 1),
        ("cluster.resize_seconds", cluster.resize_seconds, 1),
        ("cluster.grace_seconds", cluster.grace_seconds, 0),
    ):
        if value is not None and value < least:
            raise ConfigError(f"{name}: must be at least {least}, got {value}")
    accelerators.check(cluster)
    validate_update_length(data.sequence_length, training.update_length)
    validate_accumulation(training.batch_size, training.accumulate, "the batch")
    if training.profile and not 1 <= training.profile[0] <= training.profile[1]:
        raise ConfigError(
            "training.profile: expected the first and the last update, counted from 1, as [10,12];"
            f" got {list(training.profile)}"
        )
    if cluster.compile_cache and "://" in cluster.compile_cache:
        raise ConfigError(
            "cluster.compile_cache: must be a folder of each worker's machine, got"
            f" {cluster.compile_cache}"
        )
    # A checkpoint and an evaluation lie on a batch border, so that no cache is ever saved.
    for name, value in (
        ("training.steps", training.steps),
        ("training.evaluate_every", training.evaluate_every),
        ("training.sample_every", training.sample_every),
        ("checkpoint.every", recipe.checkpoint.every),
    ):
        step = recipe.updates_per_batch
        if value is not None and value % step:
            nearest = max(step, round(value / step) * step)
            raise ConfigError(
                f"{name}: a batch takes sequence_length / update_length = {step} updates, so it"
                f" must be a multiple of {step}, got {value}; the nearest is {nearest}"
            )
