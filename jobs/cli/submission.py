"""The commands of `tvq` that have a Ray cluster do the work."""

import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any, TypeVar

import click

from jobs.cli.options import Dashboard, OrderedGroup, Root, console, json_option, root_option

Command = TypeVar("Command", bound=Callable[..., Any])

address_option = click.option(
    "--address",
    envvar="TVQ_RAY_JOBS",
    required=True,
    type=Dashboard(),
    metavar="URL",
    help="Of the cluster's dashboard, http://HOST:8265 (or set TVQ_RAY_JOBS).",
)


def request_options(command: Command) -> Command:
    """The options of what a job is given, named as the fields of `submit.Request`."""
    for option in (
        click.option(
            "--driver-resource", "resources", multiple=True, metavar="NAME=AMOUNT",
            help="Run the driver on a node that has this resource; may be repeated.",
        ),
        click.option(
            "--driver-cpus", "cpus", type=click.FloatRange(0), default=0, show_default=True,
            help="CPUs to reserve for the driver, which computes nothing.",
        ),
        click.option(
            "--secret", "secrets", multiple=True, metavar="NAME",
            help="The cluster has this variable set; without it the job ends at once; may be"
            " repeated.",
        ),
        click.option(
            "--env", "variables", multiple=True, metavar="NAME[=VALUE]",
            help="Of the job's environment, which Ray shows to all who see its jobs; may be"
            " repeated.",
        ),
        click.option(
            "--shared", multiple=True, type=click.Path(path_type=Path), metavar="FOLDER",
            help="All machines of the cluster have this folder under the same path; may be"
            " repeated.",
        ),
    ):  # fmt: skip
        command = option(command)
    return command


@click.command(
    epilog="""\b
Examples:
  tvq submit tiny data.corpus=gs://bucket/books tracking.uri=http://mlflow:5000 \\
      --root gs://bucket/runs --address http://head:8265
  tvq submit my-recipe.yaml --address http://head:8265 --shared /nfs --root /nfs/runs --detach
  tvq submit tiny data.corpus=corpora/books --address http://127.0.0.1:8265 --dry-run"""
)
@click.argument("recipe")
@click.argument("overrides", nargs=-1)
@click.option("--run", "name", help="Name of the run; default: the recipe's.")
@address_option
@request_options
@click.option("--detach", is_flag=True, help="Do not follow the job's output.")
@click.option("--dry-run", "dry", is_flag=True, help="Show what would be sent, and send nothing.")
@root_option
@json_option
def submit(
    recipe: str,
    overrides: tuple[str, ...],
    name: str | None,
    detach: bool,
    dry: bool,
    root: Root,
    as_json: bool,
    **options: Any,
) -> None:
    """Train by RECIPE on a Ray cluster, as `tvq train` would here.

    The code travels as tvq's wheel, and nothing else of this machine. The same command again
    follows the job that runs, or begins one that resumes the run. Ctrl-C leaves the job alone.
    The exit code is that of the training.
    """
    from jobs.submission.submit import Request, submit_command

    sys.exit(
        submit_command(
            recipe,
            overrides,
            Request(**options),
            root=root,
            name=name or Path(recipe).stem,
            detach=detach,
            dry=dry,
            console=console(as_json),
            as_json=as_json,
        )
    )


@click.group(cls=OrderedGroup, epilog="""\b
Examples:
  tvq jobs list --address http://head:8265""")  # fmt: skip
def jobs() -> None:
    """Look after the jobs that `tvq submit` began."""


@jobs.command(
    name="list",
    epilog="""\b
Examples:
  tvq jobs list --address http://head:8265
  tvq jobs list --all --json --address http://head:8265""",
)
@address_option
@click.option("--all", "every", is_flag=True, help="Others than those of tvq, too.")
@json_option
def list_(address: str, every: bool, as_json: bool) -> None:
    """List the jobs, the newest first."""
    from jobs.submission.commands import list_command

    list_command(address, every=every, console=console(as_json), as_json=as_json)


@jobs.command(
    epilog="""\b
Examples:
  tvq jobs status tvq-tiny-1a2b3c4d-1 --address http://head:8265"""
)
@click.argument("job")
@address_option
@json_option
def status(job: str, address: str, as_json: bool) -> None:
    """Print JOB's status. Exits with 0 while it runs, then with its exit code (6: stopped)."""
    from jobs.submission.commands import status_command

    sys.exit(status_command(address, job, console=console(as_json), as_json=as_json))


@jobs.command(
    epilog="""\b
Examples:
  tvq jobs logs tvq-tiny-1a2b3c4d-1 --follow --address http://head:8265"""
)
@click.argument("job")
@click.option("--follow", is_flag=True, help="Until it ends; Ctrl-C leaves the job alone.")
@address_option
def logs(job: str, follow: bool, address: str) -> None:
    """Print what JOB has printed. With --follow, exits with its exit code."""
    from jobs.submission.commands import logs_command

    sys.exit(logs_command(address, job, following=follow, console=console()))


@jobs.command(
    epilog="""\b
Examples:
  tvq jobs stop tvq-tiny-1a2b3c4d-1 --address http://head:8265"""
)
@click.argument("job")
@address_option
def stop(job: str, address: str) -> None:
    """Ask JOB to save and end, and wait until it has."""
    from jobs.submission.commands import stop_command

    sys.exit(stop_command(address, job, console=console()))


@jobs.command(
    epilog="""\b
Examples:
  tvq jobs wait tvq-tiny-1a2b3c4d-1 --address http://head:8265
  tvq jobs wait tvq-tiny-1a2b3c4d-1 --limit 3600 --address http://head:8265"""
)
@click.argument("job")
@click.option("--limit", type=click.FloatRange(0), help="Seconds after which to exit with 3.")
@address_option
def wait(job: str, limit: float | None, address: str) -> None:
    """Wait until JOB has ended, and exit with its exit code (6: stopped)."""
    from jobs.submission.commands import wait_command

    sys.exit(wait_command(address, job, limit_seconds=limit, console=console()))
