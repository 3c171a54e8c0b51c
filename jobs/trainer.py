"""Runs the training loop on a Ray Train worker group, or in this process."""

import logging
import os
import shutil
from pathlib import Path
from typing import TYPE_CHECKING

from jobs.errors import ExitCode, UserError
from jobs.ray_session import ray_session
from jobs.recipe import Recipe
from jobs.run_directory import RunDirectory

if TYPE_CHECKING:
    from jobs.loop import Outcome

log = logging.getLogger("tvq.trainer")


def run_loop(run: RunDirectory, recipe: Recipe, lease_owner: str) -> "Outcome":
    """Trains and returns when the training ended or was stopped.

    A lost worker ends the whole group; Ray Train starts it anew, up to
    `cluster.max_restarts` times, and the loop goes on from the newest checkpoint.

    Raises:
        UserError: the group failed more often than that; says what failed first.
    """
    if recipe.cluster.workers == 0:
        from jobs.loop import LoopSettings, train

        return train(LoopSettings(run.path.absolute(), recipe, lease_owner))
    workers, cpus = recipe.cluster.workers, recipe.cluster.cpus_per_worker
    with ray_session(recipe.cluster.address, cpus=workers * cpus):
        return _fit(run, recipe, lease_owner)


def _fit(run: RunDirectory, recipe: Recipe, lease_owner: str) -> "Outcome":
    from ray.train import FailureConfig, RunConfig, ScalingConfig
    from ray.train.v2.api.exceptions import TrainingFailedError
    from ray.train.v2.jax import JaxTrainer

    from jobs.jax_backend import CpuMeshConfig

    cluster = recipe.cluster
    # Ray wants a folder for its own records; they are of no use once the group has ended.
    records = run.logs.absolute() / "ray"
    trainer = JaxTrainer(
        _worker,
        train_loop_config={
            "run": str(run.path.absolute()),
            "recipe": recipe,
            "lease_owner": lease_owner,
        },
        jax_config=CpuMeshConfig(heartbeat_seconds=cluster.heartbeat_seconds),
        scaling_config=ScalingConfig(
            num_workers=cluster.workers, resources_per_worker={"CPU": cluster.cpus_per_worker}
        ),
        run_config=RunConfig(
            name=lease_owner,
            storage_path=str(records),
            failure_config=FailureConfig(
                max_failures=cluster.max_restarts, controller_failure_limit=3
            ),
            worker_runtime_env={"env_vars": _worker_environment(cluster.cpus_per_worker)},
        ),
    )
    try:
        outcome = trainer.fit().return_value
        assert outcome is not None, "the loop returns its outcome"
        return outcome
    except TrainingFailedError as error:
        log.error("training failed", exc_info=error)
        raise UserError(
            f"run {run.name}: training failed: {_first_cause(error)}; details in {run.logs};"
            " the same command resumes from the last checkpoint",
            ExitCode.FAILED,
        ) from None
    finally:
        shutil.rmtree(records, ignore_errors=True)


def _worker(config: dict) -> "Outcome":
    # JAX belongs to the worker: the driver and Ray's controller import this module, not the loop.
    from jobs.loop import LoopSettings, train

    settings = LoopSettings(Path(config["run"]), config["recipe"], config["lease_owner"])
    return train(settings)


def _worker_environment(cpus: int) -> dict[str, str]:
    # XLA sizes its thread pools by NPROC: as many threads as cores reserved, so that workers that
    # share a machine do not fight for cores and sums are cut the same way every time.
    environment = {"NPROC": str(cpus), "OMP_NUM_THREADS": str(cpus), "JAX_PLATFORMS": "cpu"}
    if flags := os.environ.get("XLA_FLAGS"):
        environment["XLA_FLAGS"] = flags
    return environment


def _first_cause(error: BaseException) -> str:
    failures = getattr(error, "worker_failures", None)
    if failures:
        rank = min(failures)
        text = str(failures[rank]).strip().splitlines()
        return f"worker {rank}: {text[-1] if text else failures[rank]!r}"
    return str(error).strip().splitlines()[-1]
