"""Runs the training loop on a Ray Train worker group, or in this process."""

import logging
import os
import shutil
import uuid

from jobs.checkpoint_manifest import newest_update
from jobs.errors import ExitCode, UserError
from jobs.loop_contract import LoopSettings, Outcome
from jobs.ray_session import ray_session
from jobs.recipe import Recipe
from jobs.run_directory import LeaseLostError, RunDirectory
from model.config import ConfigError

log = logging.getLogger("tvq.trainer")


def run_loop(run: RunDirectory, recipe: Recipe, lease_owner: str) -> Outcome:
    """Trains and returns when the training ended or was stopped.

    A lost worker ends the whole group; Ray Train starts it anew, up to
    `cluster.max_restarts` times, and the loop goes on from the newest checkpoint. If one was added
    meanwhile, the failures are forgotten and it all begins again.

    Raises:
        UserError: the group failed more often without a new checkpoint, saying what failed first;
            the run was taken over; or a mistake in the recipe that shows only on the devices.
    """
    settings = LoopSettings(run.path.absolute(), recipe, lease_owner)
    if recipe.cluster.workers == 0:
        from jobs.loop import train

        try:
            return train(settings)
        except LeaseLostError as error:
            raise UserError(str(error), ExitCode.BUSY) from None
    cpus = recipe.cluster.workers * recipe.cluster.cpus_per_worker
    with ray_session(recipe.cluster.address, cpus=cpus):
        while True:
            before = newest_update(run)
            try:
                return _fit(run, settings)
            except UserError as error:
                if error.code is not ExitCode.FAILED or newest_update(run) <= before:
                    raise
                log.warning("%s", error)


def _fit(run: RunDirectory, settings: LoopSettings) -> Outcome:
    from ray.train import FailureConfig, RunConfig, ScalingConfig
    from ray.train.v2.api.exceptions import TrainingFailedError
    from ray.train.v2.jax import JaxTrainer

    from jobs.jax_backend import CpuMeshConfig

    cluster = settings.recipe.cluster
    # Ray wants a folder for its own records; they are of no use once the group has ended.
    records = run.logs.absolute() / "ray"
    trainer = JaxTrainer(
        _worker,
        train_loop_config={"settings": settings},
        jax_config=CpuMeshConfig(heartbeat_seconds=cluster.heartbeat_seconds),
        scaling_config=ScalingConfig(
            num_workers=cluster.workers, resources_per_worker={"CPU": cluster.cpus_per_worker}
        ),
        run_config=RunConfig(
            name=uuid.uuid4().hex,
            storage_path=str(records),
            failure_config=FailureConfig(
                max_failures=cluster.max_restarts, controller_failure_limit=3
            ),
            worker_runtime_env={"env_vars": _worker_environment(cluster.cpus_per_worker)},
        ),
    )
    try:
        ended = trainer.fit().return_value
        if isinstance(ended, UserError):
            raise ended
        assert isinstance(ended, Outcome), ended
        return ended
    except TrainingFailedError as error:
        log.error("training failed", exc_info=error)
        raise UserError(
            f"run {run.name}: training failed: {_first_cause(error)}; details in {run.logs};"
            " the same command resumes from the last checkpoint",
            ExitCode.FAILED,
        ) from None
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
