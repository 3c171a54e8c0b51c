"""Which checkpoints a run keeps: the one place that decides."""

import math
from collections.abc import Callable, Collection, Sequence

from jobs.checkpoints.manifest import (
    CheckpointManifest,
    abandoned_updates,
    complete_checkpoints,
    pinned_updates,
    remove,
)
from jobs.recipe import CheckpointConfig
from jobs.runs.run_directory import RunDirectory


def retained(
    checkpoints: Sequence[CheckpointManifest], pinned: Collection[int], policy: CheckpointConfig
) -> set[int]:
    """The updates of the checkpoints to keep.

    The newest `keep`, those at multiples of `keep_every` updates, the `keep_best` with the lowest
    `best_metric` (of equal ones the newer; one without the metric, or with NaN, is never among the
    best), and the pinned.
    """
    updates = sorted(manifest.update for manifest in checkpoints)
    kept = {*updates[-policy.keep :], *(update for update in updates if update in pinned)}
    if policy.keep_every is not None:
        kept.update(update for update in updates if update % policy.keep_every == 0)
    scored = [
        (manifest.metrics[policy.best_metric], -manifest.update)
        for manifest in checkpoints
        if not math.isnan(manifest.metrics.get(policy.best_metric, math.nan))
    ]
    kept.update(-update for _, update in sorted(scored)[: policy.keep_best])
    return kept


def retire(
    run: RunDirectory, policy: CheckpointConfig, may: Callable[[], None] = lambda: None
) -> list[int]:
    """Removes the checkpoints that the policy does not keep; returns their updates.

    And what killed saves before the newest one left: a folder of arrays each, that nothing else
    would ever remove.

    Args:
        may: asked before each; raises if this process may not write to the run any more.
    """
    checkpoints = complete_checkpoints(run)
    kept = retained(checkpoints, pinned_updates(run), policy)
    retired = [manifest.update for manifest in checkpoints if manifest.update not in kept]
    for update in (*retired, *abandoned_updates(run)):
        may()
        remove(run, update)
    return retired
