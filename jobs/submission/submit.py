"""`tvq submit`: the training of a recipe as a job on a Ray cluster, whatever lies on this machine.

A training is one job at a time. Its submission id is made of its run, so that who submits it again
follows the job that runs, or starts the next one, which resumes the run; two who do so at once
start one.
"""

import dataclasses
import hashlib
import os
import re
import urllib.parse
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import NamedTuple

from jobs import recipe as recipes
from jobs.console import Console
from jobs.deployment.render import stated_text
from jobs.errors import ExitCode, UserError
from jobs.lineage.provenance import COMMIT, provenance
from jobs.planning.forecast import forecast, refuse_what_does_not_fit
from jobs.recipe import Recipe
from jobs.runs.run_directory import RunDirectory
from jobs.submission import submitted
from jobs.submission.job_failure import failure
from jobs.submission.ray_jobs import Job, RayJobs
from jobs.submission.wheel import Wheel, built_wheel
from jobs.tracking.store import without_credentials
from pipeline.storage import Location, is_url, open_store

ENTRYPOINT = "python -m jobs.submission.submitted"
"""In the unpacked wheel, with the Python of `ray start`."""
STOP_MARGIN_SECONDS = 15
"""What Ray waits after SIGTERM beyond the grace that a save has."""
_LOOPBACK = ("127.0.0.1", "localhost", "::1", "[::1]")
_SECRET = re.compile(r"TOKEN|SECRET|PASSWORD|CREDENTIAL|(^|_)KEY($|_)", re.IGNORECASE)


class Request(NamedTuple):
    """The cluster that a command line asks for, and what its jobs are given."""

    address: str
    """URL of the cluster's dashboard."""
    shared: tuple[Path, ...] = ()
    """Folders that the cluster's machines have under the same path."""
    variables: tuple[str, ...] = ()
    """NAME or NAME=VALUE for the job's environment."""
    secrets: tuple[str, ...] = ()
    """Variables that the cluster itself must have."""
    cpus: float = 0
    """That the driver reserves; it computes nothing."""
    resources: tuple[str, ...] = ()
    """NAME=AMOUNT that the driver reserves: where it is to run."""

    def environment(self) -> dict[str, str]:
        """The values of `variables`.

        Raises:
            UserError: one looks like a secret, or is not set here.
        """
        found = {}
        for each in self.variables:
            name, given, value = each.partition("=")
            if _SECRET.search(name):
                raise UserError(
                    f"--env {name}: looks like a secret, and Ray shows a job's environment to all"
                    f" who see its jobs; set {name} on the cluster and give --secret {name}"
                )
            if not given and name not in os.environ:
                raise UserError(
                    f"--env {name}: is not set here; set it, or give --env {name}=VALUE"
                )
            found[name] = value if given else os.environ[name]
        return found

    def driver_resources(self) -> dict[str, float]:
        """The amounts of `resources` by name. Raises UserError for what is none."""
        found = {}
        for each in self.resources:
            name, _, amount = each.partition("=")
            try:
                found[name] = float(amount)
            except ValueError:
                raise UserError(f"--driver-resource {each}: expected NAME=AMOUNT") from None
        return found


def submit_command(
    recipe_name: str,
    overrides: tuple[str, ...],
    request: Request,
    *,
    root: Location,
    name: str,
    detach: bool,
    dry: bool,
    console: Console,
    as_json: bool,
) -> ExitCode | int:
    """Submits, follows the log and returns the code that `tvq train` ended with there.

    Raises:
        UserError: the cluster could not see what the recipe names, cannot be reached, or runs
            another recipe under this name; or its devices are known to be too small.
    """
    recipe = recipes.load(recipe_name, overrides)
    if not recipe.data.corpora:
        raise UserError(
            "data.corpus: no corpus given; name one that the cluster sees, as"
            " data.corpus=gs://BUCKET/corpus"
        )
    recipe, root = settled(recipe, root, request)
    # Refuses what is none before anything is built.
    RunDirectory.at(root, name)
    request.driver_resources()
    variables = job_variables(
        ["train", submitted.RECIPE, "--run", name, "--root", str(root)],
        stated_text(recipe),
        request,
        request.environment(),
        recipe.cluster.grace_seconds,
    )
    wheel = built_wheel()
    _show_upload(console, wheel, recipe, root, name, variables, request)
    foreseen = forecast(recipe, console, compiles=dry)
    console.line(f"plan      {foreseen.text}")
    refuse_what_does_not_fit(foreseen.plan)
    if dry:
        if as_json:
            console.json(
                {
                    "run": name,
                    "root": str(root),
                    "data": recipe.data.corpora,
                    "tracking": recipe.tracking.uri,
                    "uploads": {"name": wheel.name, "files": wheel.files, "bytes": len(wheel.data)},
                    "sets": list(variables),
                    "expects": request.secrets,
                    "plan": foreseen.text,
                }
            )
        return ExitCode.OK
    jobs = RayJobs(request.address)
    job_id, started = _start(jobs, recipe, root, name, wheel, variables, request)
    if as_json:
        console.json({"job": job_id, "started": started, "run": name, "root": str(root)})
    console.line(f"{'submitted' if started else 'attached to'} {job_id}")
    if detach:
        console.line(f"follow it: {_logs_command(request.address, job_id)}")
        return ExitCode.OK
    return follow(jobs, job_id, console, quiet=console.quiet)


def follow(jobs: RayJobs, job_id: str, console: Console, *, quiet: bool = False) -> ExitCode | int:
    """Shows what the job prints until it ends; Ctrl-C leaves it alone. Returns its exit code.

    `quiet`: shows nothing of it, and only waits.
    """
    try:
        job = jobs.follow(job_id, (lambda text: None) if quiet else console.write)
    except KeyboardInterrupt:
        return detached(jobs, job_id, console)
    return ended(jobs, job, console)


def detached(jobs: RayJobs, job_id: str, console: Console) -> ExitCode:
    """Tells after Ctrl-C that the job goes on, and how to come back to it."""
    console.line(f"\ndetached; {job_id} goes on")
    console.line(f"follow it: {_logs_command(jobs.address, job_id)}")
    console.line(f"stop it:   tvq jobs stop {job_id} --address {jobs.address}")
    return ExitCode.INTERRUPTED


def exit_code(job: Job) -> ExitCode | int:
    """What `tvq` exited with in a job that has ended."""
    if job.status == "SUCCEEDED":
        return ExitCode.OK
    if job.status == "STOPPED":
        return ExitCode.PREEMPTED
    return job.exit_code or ExitCode.FAILED


def ended(jobs: RayJobs, job: Job, console: Console) -> ExitCode | int:
    """Tells how a job ended, the reason first; returns its exit code."""
    code = exit_code(job)
    if job.status == "SUCCEEDED":
        console.line(f"{job.submission_id}: succeeded")
    elif job.status == "STOPPED":
        console.warning(f"{job.submission_id}: stopped; submit it again to go on")
    else:
        reason = failure(jobs.log(job.submission_id), code) or [job.message]
        said = [f"{job.submission_id}: failed with exit code {int(code)}", *reason]
        console.warning("\n  ".join(said))
    return code


def settled(recipe: Recipe, root: Location, request: Request) -> tuple[Recipe, Location]:
    """The recipe and the root with absolute paths, all of which the cluster can see.

    A cluster on this machine sees what we see.

    Raises:
        UserError: a path that is neither in a bucket nor under a shared folder.
    """
    data = recipe.data
    copy = "copy it to gs://BUCKET/... and name that"
    if data.corpus is not None:
        data = dataclasses.replace(data, corpus=seen(request, "data.corpus", data.corpus, copy))
    if data.mixture is not None:
        mixture = {seen(request, "data.mixture", path, copy): w for path, w in data.mixture.items()}
        data = dataclasses.replace(data, mixture=mixture)
    uri = seen_tracking(request, recipe.tracking.uri)
    where = seen_root(request, root)
    if not uri and is_url(where):
        raise UserError(
            f"tracking.uri: the runs lie in {where}, where MLflow cannot keep its SQLite file; give"
            " tracking.uri=http://SERVER"
        )
    tracking = dataclasses.replace(recipe.tracking, uri=uri)
    return dataclasses.replace(recipe, data=data, tracking=tracking), where


def seen(request: Request, field: str, location: Location, remedy: str) -> str:
    """A location as the cluster is to be told it: absolute.

    Raises:
        UserError: it is on this machine, and the cluster does not see it.
    """
    where = open_store(location).location
    local = urllib.parse.urlsplit(request.address).hostname in _LOOPBACK
    shared = any(Path(where).is_relative_to(path.absolute()) for path in request.shared)
    if is_url(where) or local or shared:
        return where
    raise UserError(
        f"{field}: {where} is on this machine, and the cluster at {request.address} does not"
        f" see it; {remedy}, or say with --shared FOLDER that all its machines have that path"
    )


def seen_root(request: Request, root: Location) -> str:
    """The root as the cluster is to be told it. Raises UserError if it does not see it."""
    return seen(request, "--root", root, "give --root gs://BUCKET/runs")


def seen_tracking(request: Request, stated: str | None) -> str | None:
    """The MLflow that a recipe states, else this environment's; None: a file beside the runs.

    Raises:
        UserError: it holds a password, or the cluster does not see it.
    """
    uri = stated or os.environ.get("MLFLOW_TRACKING_URI")
    if uri and without_credentials(uri) != uri:
        raise UserError(
            "MLFLOW_TRACKING_URI: holds a password, which Ray would show to all who see its jobs;"
            " leave it out and give --secret MLFLOW_TRACKING_USERNAME --secret"
            " MLFLOW_TRACKING_PASSWORD"
        )
    if not (file := re.fullmatch(r"(sqlite:///|file://)?([^:]+)", uri or "")):
        return uri
    where = seen(request, "tracking.uri", file[2], "give the URL of an MLflow server")
    return f"{file[1] or ''}{where}"  # absolute: a job runs in a folder of its own


def job_variables(
    arguments: Sequence[str],
    recipe: str | None,
    request: Request,
    given: Mapping[str, str],
    grace_seconds: int,
) -> dict[str, str]:
    """The environment of a job that runs `tvq`.

    Args:
        arguments: of `tvq`.
        recipe: that travels with them, as in jobs/submission/submitted.py.
        request: which secrets the cluster must have.
        given: what the user or the recipe adds.
        grace_seconds: that a save has after SIGTERM.
    """
    commit = provenance()
    return {
        **given,
        submitted.VARIABLE: submitted.encode(arguments, recipe, request.secrets),
        COMMIT: f"{commit.commit}{'+changes' if commit.dirty else ''}" if commit.commit else "",
        "RAY_JOB_STOP_WAIT_TIME_S": str(grace_seconds + STOP_MARGIN_SECONDS),
        "PYTHONUNBUFFERED": "1",
    }


def root_mark(root: Location) -> str:
    """Of a job's id: one cluster may serve several roots, with runs of the same names."""
    return hashlib.sha256(str(root).encode()).hexdigest()[:8]


def _logs_command(address: str, job_id: str) -> str:
    return f"tvq jobs logs {job_id} --follow --address {address}"


def _start(
    jobs: RayJobs,
    recipe: Recipe,
    root: Location,
    name: str,
    wheel: Wheel,
    variables: dict[str, str],
    request: Request,
) -> tuple[str, bool]:
    """The id of the run's job, and whether it was started now."""
    prefix = f"tvq-{name}-{root_mark(root)}-"
    identity = recipes.identity(recipes.resolve(recipe))
    metadata = {
        "tvq_run": name,
        "tvq_root": str(root),
        "tvq_identity": identity,
        "tvq_grace_seconds": str(recipe.cluster.grace_seconds),
        "tvq_commit": variables[COMMIT],
    }
    while True:
        earlier = {
            int(job.submission_id.removeprefix(prefix)): job
            for job in jobs.list()
            if job.submission_id.startswith(prefix)
            and job.submission_id.removeprefix(prefix).isdigit()
        }
        last = earlier[max(earlier)] if earlier else None
        if last and last.is_running:
            if last.metadata.get("tvq_identity") != identity:
                raise UserError(
                    f"job {last.submission_id}: trains run {name} by another recipe now; wait for"
                    f" it, stop it (`tvq jobs stop {last.submission_id} --address"
                    f" {request.address}`), or choose another name with --run",
                    ExitCode.BUSY,
                )
            return last.submission_id, False
        job_id = f"{prefix}{max(earlier, default=0) + 1}"
        if jobs.submit(
            job_id,
            ENTRYPOINT,
            package=wheel.data,
            variables=variables,
            metadata=metadata,
            cpus=request.cpus,
            resources=request.driver_resources(),
        ):
            return job_id, True
        # Somebody else was faster: looked at again, theirs is the one that runs.


def _show_upload(
    console: Console,
    wheel: Wheel,
    recipe: Recipe,
    root: Location,
    name: str,
    variables: dict[str, str],
    request: Request,
) -> None:
    console.line(f"run       {root}/{name}")
    data = ", ".join(recipe.data.corpora) or "none"
    console.line(f"data      {data}")
    console.line(f"tracking  {recipe.tracking.uri or 'a SQLite file beside the runs'}")
    console.line(
        f"uploads   {wheel.name}: {wheel.files} files, {len(wheel.data) / 2**20:.2f} MiB, and the"
        " recipe; nothing else of this machine"
    )
    console.line(f"sets      {', '.join(variables)}")
    if request.secrets:
        console.line(f"expects   {', '.join(request.secrets)} to be set on the cluster")
