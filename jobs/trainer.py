"""Runs the training loop on a Ray Train worker group, or in this process."""

import logging
import os
import shutil
import tempfile
import uuid
from collections import Counter
from collections.abc import Callable, Mapping
from typing import Any

from jobs import accelerators
from jobs.checkpoint_manifest import newest_update
from jobs.errors import ExitCode, UserError
from jobs.loop_contract import LoopSettings, Outcome
from jobs.ray_session import ray_session
from jobs.recipe import ClusterConfig, Recipe
from jobs.run_directory import RunDirectory
from model.config import ConfigError

log = logging.getLogger("tvq.trainer")


class WorkersLostError(Exception):
    """A worker group ended before its work did.

    Args:
        cause: what failed first, one line.
        starting: whether it had not begun to work.
    """

    def __init__(self, cause: str, starting: bool):
        super().__init__(cause)
        self.starting = starting


def run_loop(run: RunDirectory, recipe: Recipe, lease_owner: str) -> Outcome:
    """Trains and returns when the training ended or was stopped.

    A lost worker ends the whole group; Ray Train starts it anew, up to
    `cluster.max_restarts` times, and the loop goes on from the newest checkpoint. If one was added
    meanwhile, the failures are forgotten and it all begins again.

    Raises:
        UserError: the group failed more often without a new checkpoint, saying what failed first;
            the cluster has no place for it; the run was taken over; or a mistake in the recipe that
            shows only on the devices.
    """
    settings = LoopSettings(run.location, recipe, lease_owner)
    cluster = recipe.cluster
    if cluster.workers == 0:
        from jobs.loop import train

        return train(settings)
    failed_starts = 0
    with ray_session(cluster.address, cpus=cluster.workers * cluster.cpus_per_worker):
        while True:
            before = newest_update(run)
            try:
                ended = on_workers(_worker, settings, cluster)
            except WorkersLostError as error:
                if newest_update(run) > before:
                    failed_starts = 0
                elif not error.starting or failed_starts == cluster.max_restarts:
                    raise UserError(
                        f"run {run.name}: training failed: {error}; details in {run.logs};"
                        " the same command resumes from the last checkpoint",
                        ExitCode.FAILED,
                    ) from None
                failed_starts += error.starting
                log.warning("%s", error)
                continue
            if isinstance(ended, UserError):
                raise ended
            assert isinstance(ended, Outcome), ended
            return ended


def on_workers(
    work: Callable[[dict[str, Any]], Any],
    settings: Any,
    cluster: ClusterConfig,
    **mesh: Any,
) -> Any:
    """Calls work({"settings": settings}) in each worker of a new group, joined to one mesh.

    Needs a Ray session. Returns what the worker of rank 0 returned.

    Args:
        mesh: further fields of MeshConfig.

    Raises:
        WorkersLostError: the group failed `cluster.max_restarts` times, or once in starting.
        UserError: the cluster has no place for it, or its nodes are not set up for it.
    """
    from ray.train import FailureConfig, RunConfig, ScalingConfig
    from ray.train.v2._internal.exceptions import (
        InsufficientClusterResourcesError,
        WorkerGroupStartupFailedError,
        WorkerGroupStartupTimeoutError,
    )
    from ray.train.v2.api.exceptions import TrainingFailedError
    from ray.train.v2.jax import JaxTrainer

    from jobs.jax_backend import MeshConfig

    # Ray wants a folder for its own records; they are of no use once the group has ended, and the
    # workers, who report nothing to Ray, need not see it.
    records = tempfile.mkdtemp(prefix="tvq-ray-")
    # Ray Train reads it when the group starts, from the environment alone.
    os.environ["RAY_TRAIN_WORKER_GROUP_START_TIMEOUT_S"] = str(cluster.start_timeout_seconds)
    trainer = JaxTrainer(
        work,
        train_loop_config={"settings": settings},
        jax_config=MeshConfig(cluster=cluster, **mesh),
        scaling_config=ScalingConfig(
            num_workers=cluster.workers,
            use_gpu=cluster.accelerator == "gpu",
            use_tpu=cluster.accelerator == "tpu",
            topology=cluster.topology,
            accelerator_type=accelerators.ray_accelerator_type(cluster),
            resources_per_worker=accelerators.resources(cluster),
        ),
        run_config=RunConfig(
            name=uuid.uuid4().hex,
            storage_path=records,
            failure_config=FailureConfig(
                max_failures=cluster.max_restarts,
                # Ray's own tries would each wait for as long again.
                controller_failure_limit=0,
            ),
            worker_runtime_env={"env_vars": accelerators.environment(cluster)},
        ),
    )
    try:
        return trainer.fit().return_value
    except TrainingFailedError as error:
        log.error("the worker group failed", exc_info=error)
        cause = getattr(error, "controller_failure", None)
        if isinstance(cause, UserError):
            raise cause from None
        if isinstance(cause, WorkerGroupStartupTimeoutError | InsufficientClusterResourcesError):
            raise UserError(_no_place(cluster), ExitCode.FAILED) from None
        starting = isinstance(cause, WorkerGroupStartupFailedError)
        raise WorkersLostError(_first_cause(error), starting) from None
    finally:
        shutil.rmtree(records, ignore_errors=True)


def _worker(config: dict[str, LoopSettings]) -> Outcome | UserError:
    # JAX belongs to the worker: the driver and Ray's controller import this module, not the loop.
    from jobs.loop import train

    try:
        return train(config["settings"])
    except (UserError, ConfigError) as error:
        # Every worker finds it, and again after a restart: it ends the training, not the group.
        return error if isinstance(error, UserError) else UserError(str(error))


def _no_place(cluster: ClusterConfig) -> str:
    """What was asked for and what is there, on one line."""
    import ray

    asked = accelerators.resources(cluster)

    def shown(resources: Mapping[str, float]) -> str:
        return ", ".join(f"{name} {resources.get(name, 0):g}" for name in asked)

    nodes = Counter(shown(node["Resources"]) for node in ray.nodes() if node["Alive"])
    has = "; ".join(f"{count} x ({node})" for node, count in nodes.most_common())
    slices = ""
    if cluster.topology:
        each = accelerators.slice_of(cluster).hosts
        slices = (
            f", {cluster.workers // each} whole slices of {cluster.accelerator_version}"
            f" {cluster.topology}"
        )
    return (
        f"no place for {cluster.workers} workers of {shown(asked)} each{slices} after"
        f" {cluster.start_timeout_seconds} s; the cluster's nodes: {has}, of which"
        f" {shown(ray.available_resources())} is free; add nodes, ask for less (cluster.workers and"
        " what each takes), or wait longer (cluster.start_timeout_seconds)"
    )


def _first_cause(error: BaseException) -> str:
    failures = getattr(error, "worker_failures", None)
    if failures:
        rank = min(failures)
        text = str(failures[rank]).strip().splitlines()
        return f"worker {rank}: {text[-1] if text else failures[rank]!r}"
    return str(error).strip().splitlines()[-1]
