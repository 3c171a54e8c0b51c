"""Runs the training loop on a Ray Train worker group, or in this process."""

import contextlib
import logging
import os
import shutil
import tempfile
import uuid
from collections.abc import Callable, Iterator
from typing import Any

from jobs.checkpoints.manifest import complete_checkpoints, newest_update
from jobs.cluster import accelerators
from jobs.cluster.ray_session import ray_session
from jobs.cluster.ray_worker import run_loop_in_worker
from jobs.errors import ExitCode, UserError
from jobs.recipe import ClusterConfig, Recipe
from jobs.runs.run_directory import RunDirectory
from jobs.training.loop_contract import LoopSettings, Outcome
from jobs.training.stopping import StopReason

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


@contextlib.contextmanager
def worker_session(cluster: ClusterConfig, warn: Callable[[str], None]) -> Iterator[None]:
    """The Ray session of a training; none where it runs in this process.

    `warn` is told if a running cluster has no room for the workers now: they wait, for minutes.

    To be entered before `StopRequests.heard`: Ray's own handler of SIGTERM, which ends the process
    (ray 2.60), takes the place of any other when the session begins, in whatever thread that is.

    Raises:
        UserError: no cluster answers at the address.
    """
    if cluster.most_workers == 0:
        yield
        return
    with ray_session(cluster.address, cpus=cluster.most_workers * cluster.cpus_per_worker):
        if cluster.address or "RAY_ADDRESS" in os.environ:
            from jobs.cluster.worker_placement import waits_for_place

            if waiting := waits_for_place(cluster):
                warn(waiting)
        yield


def run_loop(run: RunDirectory, recipe: Recipe, lease_owner: str) -> Outcome:
    """Trains, in a `worker_session`, and returns when the training ended or was stopped.

    A lost worker ends the whole group; Ray Train starts it anew, up to
    `cluster.max_restarts` times, and the loop goes on from the newest checkpoint. If one was added
    meanwhile, the failures are forgotten and it all begins again.

    When a worker's node is about to be taken away, the group saves. One of [least, most] workers
    then goes on without that node; any other training ends, to be started again when there is
    another one.

    Raises:
        UserError: the group failed more often without a new checkpoint, saying what failed first;
            the cluster has no place for it; the run was taken over; or a mistake in the recipe that
            shows only on the devices.
    """
    settings = LoopSettings(run.location, recipe, lease_owner)
    cluster = recipe.cluster
    if cluster.most_workers == 0:
        from jobs.training.loop import train

        return train(settings)
    elastic = not isinstance(cluster.workers, int)
    failed_starts = 0
    while True:
        before = newest_update(run)
        try:
            ended = on_workers(run_loop_in_worker, settings, cluster)
        except WorkersLostError as error:
            if newest_update(run) > before:
                failed_starts = 0
            elif not error.starting or failed_starts == cluster.max_restarts:
                raise UserError(
                    f"run {run.name}: training failed in batch {_next_batch(run)} or behind:"
                    f" {error}; details in {run.logs}; the same command resumes from the last"
                    " checkpoint",
                    ExitCode.FAILED,
                ) from None
            failed_starts += error.starting
            log.warning("%s", error)
            continue
        if isinstance(ended, UserError):
            raise ended
        assert isinstance(ended, Outcome), ended
        if elastic and ended.stopped in (StopReason.PREEMPTED, StopReason.RESIZED):
            log.warning("saved at update %d; a new group goes on from there", ended.update)
            continue
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
        UserError: the cluster has no place for it, its nodes are not set up for it, or a worker
            raised one.
    """
    from ray.exceptions import RayError
    from ray.train import FailureConfig, RunConfig, ScalingConfig
    from ray.train.v2._internal.exceptions import (
        InsufficientClusterResourcesError,
        WorkerGroupStartupFailedError,
        WorkerGroupStartupTimeoutError,
    )
    from ray.train.v2.api.exceptions import TrainingFailedError
    from ray.train.v2.jax import JaxTrainer

    from jobs.cluster.jax_backend import MeshConfig
    from jobs.cluster.worker_placement import TRY_SECONDS, PlacementLimit, no_place

    # Ray wants a folder for its own records; they are of no use once the group has ended, and the
    # workers, who report nothing to Ray, need not see it.
    records = tempfile.mkdtemp(prefix="tvq-ray-")
    elastic = not isinstance(cluster.workers, int)
    seconds = min(TRY_SECONDS, cluster.start_timeout_seconds)
    # Ray Train reads it when the group starts, from the environment alone.
    os.environ["RAY_TRAIN_WORKER_GROUP_START_TIMEOUT_S"] = str(
        seconds if elastic else cluster.start_timeout_seconds
    )
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
            elastic_resize_monitor_interval_s=cluster.resize_seconds,
        ),
        run_config=RunConfig(
            name=uuid.uuid4().hex,
            storage_path=records,
            failure_config=FailureConfig(
                max_failures=cluster.max_restarts,
                # Of nodes that were taken away before the group had saved.
                max_preemption_failures=cluster.max_restarts,
                # Ray's own tries would each wait for as long again; those of an elastic group look
                # for another size.
                controller_failure_limit=-1 if elastic else 0,
            ),
            callbacks=[PlacementLimit(cluster)],  # pyright: ignore[reportArgumentType]
            worker_runtime_env={"env_vars": accelerators.environment(cluster)},
        ),
    )
    try:
        return trainer.fit().return_value
    except TrainingFailedError as error:
        log.error("the worker group failed", exc_info=error)
        cause = getattr(error, "controller_failure", None)
        for found in (cause, *getattr(error, "worker_failures", {}).values()):
            if isinstance(found, UserError):
                raise found from None
        if isinstance(cause, WorkerGroupStartupTimeoutError | InsufficientClusterResourcesError):
            raise no_place(cluster) from None
        starting = isinstance(cause, WorkerGroupStartupFailedError)
        raise WorkersLostError(_first_cause(error), starting) from None
    except RayError as error:  # of the controller itself: killed, or its node is gone
        log.error("Ray Train's controller failed", exc_info=error)
        raise WorkersLostError(_first_cause(error), starting=True) from None
    finally:
        shutil.rmtree(records, ignore_errors=True)


def _next_batch(run: RunDirectory) -> int:
    """The batch that a group begins with."""
    return max((manifest.next_batch for manifest in complete_checkpoints(run)), default=0)


def _first_cause(error: BaseException) -> str:
    failures = getattr(error, "worker_failures", None)
    if failures:
        rank = min(failures)
        text = str(failures[rank]).strip().splitlines()
        return f"worker {rank}: {text[-1] if text else failures[rank]!r}"
    return str(error).strip().splitlines()[-1]
