"""The commands of `tvq` that look after runs: their logs, and what they left behind."""

import click

from jobs.cli.options import Root, console, json_option, root_option


@click.command(
    epilog="""\b
Examples:
  tvq logs tiny
  tvq logs tiny --rank 1
  tvq logs tiny --driver --follow"""
)
@click.argument("run")
@click.option("--rank", type=click.IntRange(0), help="Of this worker only.")
@click.option("--driver", is_flag=True, help="Of the driver only.")
@click.option("--follow", "-f", is_flag=True, help="Go on with what is added, until Ctrl-C.")
@root_option
@click.option("--json", "as_json", is_flag=True, help="Print each line as a JSON object.")
def logs(run: str, rank: int | None, driver: bool, follow: bool, root: Root, as_json: bool) -> None:
    """Print what RUN's driver and workers logged, in the order of time.

    The logs lie in the run directory: they are there when the cluster is gone.
    """
    from jobs.errors import UserError
    from jobs.runs.logs import logs_command

    if driver and rank is not None:
        raise UserError("--driver and --rank: give one of them; neither shows all logs")
    who = "driver" if driver else None if rank is None else f"rank-{rank}"
    logs_command(root, run, who, follow=follow, console=console(), as_json=as_json)


@click.command(
    epilog="""\b
Examples:
  tvq gc
  tvq gc --yes
  tvq gc --root gs://bucket/runs --older-than 168"""
)
@click.option("--yes", is_flag=True, help="Remove it; otherwise it is only listed.")
@click.option(
    "--older-than", "older_than_hours", type=click.FloatRange(0), default=24, show_default=True,
    help="Hours: younger runs and temporary files are left alone.",
)  # fmt: skip
@root_option
@json_option
def gc(yes: bool, older_than_hours: float, root: Root, as_json: bool) -> None:
    """List what no training will use: orphaned runs, unfinished checkpoints, temporary files.

    An orphaned run was claimed, never had a checkpoint, and nobody holds it. A run that is being
    trained is left alone. Runs in MLflow stay.
    """
    from jobs.runs.garbage import gc_command

    gc_command(
        root, older_than_hours=older_than_hours, yes=yes, console=console(as_json), as_json=as_json
    )
