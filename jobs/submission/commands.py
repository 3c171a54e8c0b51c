"""`tvq jobs`: what was submitted to a cluster, and what became of it."""

import time

from jobs.console import Console, clock_time
from jobs.errors import ExitCode, UserError
from jobs.submission.ray_jobs import Job, RayJobs
from jobs.submission.submit import STOP_MARGIN_SECONDS, detached, ended, exit_code, follow

_POLL_SECONDS = 1.0


def list_command(address: str, *, every: bool, console: Console, as_json: bool) -> None:
    """Lists the jobs of `tvq`, the newest first; `every`: others too."""
    jobs = [job for job in RayJobs(address).list() if every or "tvq_run" in job.metadata]
    if as_json:
        console.json([_fields(job) for job in jobs])
        return
    if not jobs:
        console.line(f"no jobs at {address}; begin one with `tvq submit`")
        return
    rows = [
        (job.submission_id, job.status.lower(), job.metadata.get("tvq_run", ""), _since(job))
        for job in jobs
    ]
    console.table(["job", "status", "run", "began"], rows)


def status_command(address: str, job_id: str, *, console: Console, as_json: bool) -> int:
    """Prints a job's status. The exit code is 0 while it runs, then that of `wait`."""
    job = RayJobs(address).get(job_id)
    if as_json:
        console.json(_fields(job))
    else:
        console.result(job.status.lower())
    return ExitCode.OK if job.is_running else exit_code(job)


def logs_command(address: str, job_id: str, *, following: bool, console: Console) -> int:
    """Prints what a job has printed; `following`: until it ends, with its exit code."""
    jobs = RayJobs(address)
    jobs.get(job_id)
    if following:
        return follow(jobs, job_id, console)
    console.write(jobs.log(job_id))
    return ExitCode.OK


def stop_command(address: str, job_id: str, *, console: Console) -> int:
    """Asks a job to save and end, and waits until it has.

    Raises:
        UserError: it has not ended within its grace period.
    """
    jobs = RayJobs(address)
    job = jobs.get(job_id)
    if not job.is_running:
        console.line(f"{job_id}: {job.status.lower()} already")
        return ExitCode.OK
    jobs.stop(job_id)
    grace = float(job.metadata.get("tvq_grace_seconds", 0)) + 2 * STOP_MARGIN_SECONDS
    console.line(
        f"{job_id}: asked to save and stop; Ray kills it after {grace:.0f} s at the latest"
    )
    job = _awaited(jobs, job_id, grace)
    if job.is_running:
        raise UserError(
            f"job {job_id}: is {job.status.lower()} {grace:.0f} s after it was asked to stop; look"
            f" at the cluster's dashboard, {address}",
            ExitCode.FAILED,
        )
    console.line(f"{job_id}: {job.status.lower()}")
    return ExitCode.OK


def wait_command(
    address: str, job_id: str, *, limit_seconds: float | None, console: Console
) -> int:
    """Waits until a job has ended; the exit code is that of `tvq` in it. Ctrl-C leaves it alone.

    Raises:
        UserError: it has not ended within the limit; it goes on.
    """
    jobs = RayJobs(address)
    try:
        job = _awaited(jobs, job_id, limit_seconds)
    except KeyboardInterrupt:
        return detached(jobs, job_id, console)
    if job.is_running:
        raise UserError(
            f"job {job_id}: is {job.status.lower()} after {limit_seconds:.0f} s; it goes on",
            ExitCode.BUSY,
        )
    return ended(jobs, job, console)


def _awaited(jobs: RayJobs, job_id: str, limit_seconds: float | None) -> Job:
    began = time.monotonic()
    while (job := jobs.get(job_id)).is_running:
        if limit_seconds is not None and time.monotonic() - began > limit_seconds:
            break
        time.sleep(_POLL_SECONDS)
    return job


def _since(job: Job) -> str:
    return "" if job.began is None else f"{clock_time(time.time() - job.began)} ago"


def _fields(job: Job) -> dict[str, object]:
    return {
        "job": job.submission_id,
        "status": job.status,
        "began": job.began,
        "ended": job.ended,
        "exit_code": job.exit_code,
        "metadata": dict(job.metadata),
    }
