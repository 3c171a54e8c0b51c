"""Ray's job server, as `tvq submit` and `tvq jobs` need it."""

import asyncio
import contextlib
import logging
import math
import os
import re
import tempfile
import time
from collections.abc import Callable, Iterator, Mapping
from pathlib import Path
from typing import Any, NamedTuple

from jobs.errors import UserError

log = logging.getLogger("tvq.ray_jobs")

RUNNING = ("PENDING", "RUNNING")
_TALKATIVE = ("ray.dashboard.modules.dashboard_sdk", "ray.dashboard.modules.job.sdk")
"""Ray's loggers that tell of uploads and sockets, each at a level of its own (ray 2.60)."""
_RECONNECT_SECONDS = 2.0
_PENDING_POLL_SECONDS = 0.5
_PENDING_SECONDS = 15.0
_PATIENCE_SECONDS = 300.0
"""How long an unreachable server is asked again while a job is followed."""


class UnreachableError(UserError):
    """Nobody answers at the address, or not now."""


class Job(NamedTuple):
    """A job as the server knows it."""

    submission_id: str
    status: str
    """PENDING, RUNNING, SUCCEEDED, FAILED or STOPPED."""
    metadata: Mapping[str, str]
    began: float | None
    """Unix time; None before it began."""
    ended: float | None
    exit_code: int | None
    """Of `tvq` in it; None while it runs, or where it was killed."""
    message: str
    """The server's, as long as nothing better is known."""

    @property
    def is_running(self) -> bool:
        """Whether it has not ended."""
        return self.status in RUNNING


class RayJobs:
    """A connection to the job server of a cluster.

    Policy: where a token lies (RAY_AUTH_TOKEN, RAY_AUTH_TOKEN_PATH, ~/.ray/auth_token) it is
    used. Reading is tried again while the server cannot be reached, for five minutes.
    """

    def __init__(self, address: str):
        """
        Args:
            address: URL of the dashboard, such as http://127.0.0.1:8265.

        Raises:
            UserError: nobody answers there, or the token is missing or wrong.
        """
        self.address = address
        _use_token()
        # Ray reads what `_use_token` sets when it is imported.
        from ray.job_submission import JobSubmissionClient

        for name in _TALKATIVE:
            logging.getLogger(name).setLevel(logging.WARNING)
        with self._told():
            self._client = JobSubmissionClient(address)

    def submit(
        self,
        submission_id: str,
        entrypoint: str,
        *,
        package: bytes,
        variables: Mapping[str, str],
        metadata: Mapping[str, str],
        cpus: float = 0,
        resources: Mapping[str, float] | None = None,
    ) -> bool:
        """Starts a job in a folder with what is in the zip `package`.

        Returns whether it was started: False if there is a job of that id.

        Raises:
            UserError: the server refuses it.
        """
        with tempfile.TemporaryDirectory(prefix="tvq-submit-") as folder:
            path = Path(folder, "package.zip")
            path.write_bytes(package)
            with self._told():
                try:
                    self._client.submit_job(
                        entrypoint=entrypoint,
                        submission_id=submission_id,
                        runtime_env={"working_dir": str(path), "env_vars": dict(variables)},
                        metadata=dict(metadata),
                        entrypoint_num_cpus=cpus,
                        entrypoint_resources=dict(resources or {}) or None,
                    )
                except RuntimeError:  # a second one of an id: HTTP 500, untyped (ray 2.60)
                    if self.find(submission_id) is None:
                        raise
                    return False
        return True

    def find(self, submission_id: str) -> Job | None:
        """The job of that id; None if there is none."""
        return next((job for job in self.list() if job.submission_id == submission_id), None)

    def get(self, submission_id: str) -> Job:
        """The job of that id; raises UserError if there is none, naming those that are."""
        jobs = self.list()
        for job in jobs:
            if job.submission_id == submission_id:
                return job
        known = ", ".join(job.submission_id for job in jobs) or "none"
        raise UserError(f"job {submission_id}: not found at {self.address}; there are: {known}")

    def list(self) -> "list[Job]":
        """All submitted jobs, the newest first."""
        with self._told():
            details = self._client.list_jobs()
        jobs = [_job(each) for each in details if each.submission_id]
        return sorted(jobs, key=lambda job: -(job.began or time.time()))

    def log(self, submission_id: str) -> str:
        """All that it has printed."""
        with self._told():
            return self._client.get_job_logs(submission_id)

    def stop(self, submission_id: str) -> None:
        """Sends it SIGTERM, on which a training saves; returns at once."""
        with self._told():
            self._client.stop_job(submission_id)

    def follow(self, submission_id: str, write: Callable[[str], None]) -> Job:
        """Hands on what the job prints, from its beginning, until it has ended.

        A connection that is lost is made again, and goes on where it was. That a job does not
        begin is said once: one that no node has room for waits for ever (ray 2.60).

        Raises:
            UserError: the server cannot be reached for five minutes; the job goes on.
        """
        shown, lost_at = 0, None
        tell_at = time.monotonic() + _PENDING_SECONDS
        while True:
            try:
                while (job := self.get(submission_id)).status == "PENDING":
                    if time.monotonic() > tell_at:
                        write(f"{submission_id} has not begun: {job.message}\n")
                        tell_at = math.inf
                    time.sleep(_PENDING_POLL_SECONDS)
                lost_at = None
                for text in self._tail(submission_id, shown):
                    shown += len(text)
                    write(text)
                job = self.get(submission_id)
                if not job.is_running:
                    # The stream ends with the job, sometimes before its last lines.
                    write(self.log(submission_id)[shown:])
                    return job
            except UnreachableError as error:
                lost_at = lost_at or time.monotonic()
                if time.monotonic() - lost_at > _PATIENCE_SECONDS:
                    raise UserError(
                        f"{error}; the job goes on, and so does"
                        f" `tvq jobs logs {submission_id} --follow`"
                    ) from None
            time.sleep(_RECONNECT_SECONDS)

    def _tail(self, submission_id: str, skip: int) -> Iterator[str]:
        """What is printed while the connection stands, without the first `skip` characters."""
        lines = self._client.tail_job_logs(submission_id)

        async def more() -> str | None:
            return await anext(lines, None)

        # A Runner, since on Ctrl-C it cancels what is awaited; the generator could not be closed.
        with asyncio.Runner() as runner:
            try:
                while (text := runner.run(more())) is not None:
                    if skip < len(text):
                        yield text[skip:]
                    skip = max(0, skip - len(text))
            except (RuntimeError, OSError) as error:  # aiohttp's errors of connections are OSErrors
                log.info("the log of %s is interrupted: %r", submission_id, error)

    @contextlib.contextmanager
    def _told(self) -> Iterator[None]:
        """The server's errors in one line."""
        try:
            yield
        except UserError:
            raise
        except OSError:  # Ray's ConnectionError, and that of requests
            raise UnreachableError(
                f"--address {self.address}: nobody answers there; expected the URL of a Ray"
                " cluster's dashboard, such as http://127.0.0.1:8265"
            ) from None
        except Exception as error:
            text = str(error).strip()
            first = text.partition("\n")[0][:300]
            if "authenti" in text.lower() or "401" in first:
                raise UserError(
                    f"--address {self.address}: the cluster wants a token, and the one here is"
                    " missing or wrong; set RAY_AUTH_TOKEN_PATH to the file with the cluster's"
                    " (~/.ray/auth_token on its head)"
                ) from None
            if re.search(r"status code 50[234]", first):  # of a gateway before it
                raise UnreachableError(
                    f"--address {self.address}: its gateway says that nobody answers: {first}"
                ) from None
            raise UserError(f"--address {self.address}: Ray refuses: {first}") from None


def _use_token() -> None:
    given = "RAY_AUTH_TOKEN" in os.environ or "RAY_AUTH_TOKEN_PATH" in os.environ
    if given or Path("~/.ray/auth_token").expanduser().is_file():
        # A client alone takes the mode for `disabled` (ray 2.60).
        os.environ.setdefault("RAY_AUTH_MODE", "token")


def _job(details: Any) -> Job:
    return Job(
        details.submission_id,
        details.status.value,
        details.metadata or {},
        details.start_time / 1000 if details.start_time else None,
        details.end_time / 1000 if details.end_time else None,
        details.driver_exit_code,
        details.message or "",
    )
