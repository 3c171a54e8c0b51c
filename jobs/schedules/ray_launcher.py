"""Where a tick's flow is run: jobs of a Ray cluster."""

from collections.abc import Sequence

from jobs.lineage.provenance import COMMIT
from jobs.schedules.launchers import State
from jobs.submission.ray_jobs import RayJobs
from jobs.submission.submit import (
    ENTRYPOINT,
    Request,
    job_variables,
    root_mark,
    seen_root,
    seen_tracking,
)
from jobs.submission.wheel import Wheel, built_wheel
from pipeline.storage import Location

_GRACE_SECONDS = 120
"""A training that is asked to stop saves first."""


class RayLauncher:
    """Submits commands as jobs, which live on when their daemon ends.

    Policy: an id is started once, since Ray refuses a second job of an id, whoever submits it.
    The wheel of this tvq travels with a job; the flow lies under the root, which the cluster must
    see.
    """

    def __init__(self, request: Request, root: Location):
        """
        Args:
            request: the cluster, and what its jobs are given.
            root: of the runs and schedules.

        Raises:
            UserError: the cluster does not see the root, or nobody answers at its address.
        """
        self._request = request
        self._root = seen_root(request, root)
        self._variables = request.environment()
        self._resources = request.driver_resources()
        if uri := seen_tracking(request, None):
            self._variables["MLFLOW_TRACKING_URI"] = uri
        self._jobs = RayJobs(request.address)
        self._wheel: Wheel | None = None

    def launch(self, submission_id: str, command: Sequence[str]) -> None:
        self._wheel = self._wheel or built_wheel()
        variables = job_variables(command, None, self._request, self._variables, _GRACE_SECONDS)
        self._jobs.submit(
            self._job_id(submission_id),
            ENTRYPOINT,
            package=self._wheel.data,
            variables=variables,
            metadata={
                "tvq_run": submission_id,
                "tvq_root": self._root,
                "tvq_grace_seconds": str(_GRACE_SECONDS),
                "tvq_commit": variables[COMMIT],
            },
            cpus=self._request.cpus,
            resources=self._resources,
        )

    def state(self, submission_id: str) -> State | None:
        job = self._jobs.find(self._job_id(submission_id))
        if job is None:
            return None
        if job.is_running:
            return "running"
        if job.status == "SUCCEEDED":
            return "succeeded"
        # Without an exit code its process, or the machine that it ran on, was killed.
        return "lost" if job.status == "FAILED" and job.exit_code is None else "failed"

    def stop(self, submission_id: str) -> None:
        self._jobs.stop(self._job_id(submission_id))

    def where(self, submission_id: str) -> str:
        return f"tvq jobs logs {self._job_id(submission_id)} --address {self._jobs.address}"

    def _job_id(self, submission_id: str) -> str:
        return f"tvq-{submission_id}-{root_mark(self._root)}"
