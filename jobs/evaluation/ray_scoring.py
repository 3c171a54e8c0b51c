"""Scores on workers of a Ray cluster: a model each, batches dealt to whoever is free."""

import contextlib
import threading
from collections import deque
from collections.abc import Iterable, Iterator
from typing import Any

from jobs.checkpoints.manifest import manifest_of
from jobs.cluster import accelerators
from jobs.cluster.ray_session import ray_session
from jobs.errors import ExitCode, UserError
from jobs.evaluation.scoring import Batch, Job, ScoringHere, SpanScores
from jobs.evaluation.trained_model import load_checkpoint
from jobs.recipe import ClusterConfig
from jobs.runs.run_directory import RunDirectory
from pipeline.errors import CorpusError

_AHEAD = 16
"""Batches a worker that may be scored before the one that is waited for: with carry the first are
the longest, and the other workers go on meanwhile. Ray spills what its memory cannot hold."""


class _Worker:
    """An actor. It loads its model at its first call, and again after it was lost."""

    def __init__(self, location: str, update: int, job: Job) -> None:
        self._location, self._update, self._job = location, update, job
        self._scoring: ScoringHere | None = None
        self._loading = threading.Lock()

    def load(self) -> UserError | None:
        """Loads and compiles; returns what is wrong with the checkpoint."""
        try:
            self._loaded()
        except (UserError, CorpusError) as error:
            return UserError(str(error))
        return None

    def score(self, batch: Batch) -> list[SpanScores] | UserError:
        """The scores of each of its spans, or what is wrong with the corpus."""
        try:
            return self._loaded().score(batch)
        except (UserError, CorpusError) as error:
            return UserError(str(error))

    def _loaded(self) -> ScoringHere:
        with self._loading:
            if self._scoring is None:
                run = RunDirectory(self._location)
                trained = load_checkpoint(run, manifest_of(run, self._update))
                self._scoring = ScoringHere(trained, self._job)
        return self._scoring


class ScoringOnRay:
    """Scores on a number of workers; results in order."""

    def __init__(
        self,
        run: RunDirectory,
        update: int,
        job: Job,
        cluster: ClusterConfig,
        stack: contextlib.ExitStack,
    ) -> None:
        """Starts `cluster.most_workers` workers, which live until the stack is closed.

        A worker that is lost starts again, up to `cluster.max_restarts` times, and its batch is
        scored anew.

        Raises:
            UserError: there is no place for them, or the checkpoint is damaged.
        """
        stack.enter_context(
            ray_session(cluster.address, cpus=cluster.most_workers * cluster.cpus_per_worker)
        )
        import ray

        self._ray = ray
        devices = accelerators.devices_per_worker(cluster)
        asked = accelerators.resources(cluster)
        options: dict[str, Any] = {
            "num_cpus": asked.pop("CPU"),
            "num_gpus": asked.pop("GPU", 0),
            "resources": asked,
            "max_concurrency": devices,
            "max_restarts": cluster.max_restarts,
            "max_task_retries": cluster.max_restarts,
            "runtime_env": {"env_vars": accelerators.environment(cluster)},
        }
        actor: Any = ray.remote(_Worker).options(**options)
        self._workers: list[Any] = [
            actor.remote(run.location, update, job) for _ in range(cluster.most_workers)
        ]
        self._devices = devices
        for worker in self._workers:
            stack.callback(ray.kill, worker)
        ready = [worker.load.remote() for worker in self._workers]
        _, missing = ray.wait(ready, num_returns=len(ready), timeout=cluster.start_timeout_seconds)
        if missing:
            there = ray.cluster_resources()
            shown = ", ".join(f"{name} {amount:g}" for name, amount in asked.items())
            raise UserError(
                f"{len(missing)} of {len(ready)} workers did not start within"
                f" {cluster.start_timeout_seconds} s; each asks for"
                f" {options['num_cpus']:g} CPU, {options['num_gpus']:g} GPU {shown}, and the"
                f" cluster has {there.get('CPU', 0):g} CPU, {there.get('GPU', 0):g} GPU in all:"
                " ask for fewer with --workers",
                ExitCode.FAILED,
            )
        for error in self._results(ready):
            if error:
                raise error

    def scores(self, batches: Iterable[Batch]) -> Iterator[list[SpanScores]]:
        """Of each batch, in their order.

        Raises:
            UserError: a shard of the corpus is damaged, or a worker was lost too often.
        """
        idle, busy, ahead = self._workers * self._devices, {}, deque()
        batches = iter(batches)
        batch = next(batches, None)
        while batch is not None or ahead:
            while batch is not None and idle and len(ahead) < _AHEAD * len(self._workers):
                worker = idle.pop()
                ahead.append(worker.score.remote(batch))
                busy[ahead[-1]] = worker
                batch = next(batches, None)
            [done], _ = self._ray.wait(list(busy), num_returns=1)
            idle.append(busy.pop(done))
            while ahead and ahead[0] not in busy:
                [scores] = self._results([ahead.popleft()])
                if isinstance(scores, UserError):
                    raise scores
                yield scores

    def _results(self, references: list[Any]) -> list[Any]:
        from ray.exceptions import RayActorError

        try:
            return self._ray.get(references)
        except RayActorError as error:
            raise UserError(
                "a worker of the evaluation was lost more often than cluster.max_restarts:"
                f" {str(error).splitlines()[0]}; the same command begins anew",
                ExitCode.FAILED,
            ) from None
