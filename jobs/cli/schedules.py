"""The commands of `tvq` about what runs by itself, again and again."""

from pathlib import Path
from typing import TYPE_CHECKING, Any

import click

from jobs.cli.options import Dashboard, OrderedGroup, Root, console, json_option, root_option
from jobs.cli.submission import request_options
from jobs.errors import UserError

if TYPE_CHECKING:
    from jobs.submission.submit import Request

address_option = click.option(
    "--address",
    type=Dashboard(),
    metavar="URL",
    help="Run the flows as jobs of the Ray cluster with this dashboard; default: processes here.",
)


@click.group(cls=OrderedGroup, epilog="""\b
Examples:
  tvq schedule add nightly.yaml --cron "0 2 * * *" --timezone Europe/Berlin
  tvq schedule serve
  tvq schedule history nightly""")  # fmt: skip
def schedule() -> None:
    """Run a flow every night, or whenever: once a tick, whatever happens."""


@schedule.command(
    epilog="""\b
Examples:
  tvq schedule add nightly.yaml --cron "0 2 * * *" --timezone Europe/Berlin
  tvq schedule add nightly.yaml --cron @hourly --overlap queue --deadline 3000 --retries 2
  tvq schedule add nightly.yaml --cron "0 2 * * *" --alert-command "notify-send tvq" """
)
@click.argument("flow", type=click.Path(path_type=Path))
@click.option(
    "--cron", required=True, metavar="EXPRESSION",
    help="Minute, hour, day of the month, month, day of the week; or @hourly, @daily, ...",
)  # fmt: skip
@click.option("--timezone", default="UTC", show_default=True, help="That the clock is read in.")
@click.option(
    "--overlap", type=click.Choice(["skip", "queue", "replace"]), default="skip",
    show_default=True,
    help="While an earlier tick is not done, a tick is not run, waits, or takes its place.",
)  # fmt: skip
@click.option(
    "--misfire", "misfire_seconds", type=click.FloatRange(0), default=3600.0, show_default=True,
    help="Seconds after which a tick that no daemon saw to is not run any more.",
)  # fmt: skip
@click.option(
    "--deadline", "deadline_seconds", type=click.FloatRange(1),
    help="Seconds after which a run is stopped and has failed, retries included.",
)  # fmt: skip
@click.option(
    "--retries", type=click.IntRange(0), default=0, show_default=True,
    help="Of a run that failed; it goes on where it was.",
)  # fmt: skip
@click.option(
    "--backoff", "backoff_seconds", type=click.FloatRange(0), default=60.0, show_default=True,
    help="Seconds before the first retry; twice as long before each further one.",
)  # fmt: skip
@click.option(
    "--history", type=click.IntRange(2), default=100, show_default=True,
    help="Ticks to keep with what came of them.",
)  # fmt: skip
@click.option(
    "--alert-command", metavar="COMMAND",
    help="Is given failures and recoveries as JSON on standard input; no shell.",
)  # fmt: skip
@click.option(
    "--alert-webhook", metavar="URL",
    help="Is posted the same; env:NAME takes the address from the daemon's environment.",
)  # fmt: skip
@click.option("--replace", is_flag=True, help="Change the schedule that there is.")
@root_option
def add(flow: Path, root: Root, **options: Any) -> None:
    """Run FLOW at the ticks of a cron expression, as soon as a daemon serves.

    The flow is stored as it is now. A local time that the clock skips fires at the first one
    after it; one that comes twice fires the first time only.
    """
    from jobs.schedules.commands import add_command

    add_command(root, flow, console=console(), **options)


@schedule.command(
    name="list",
    epilog="""\b
Examples:
  tvq schedule list
  tvq schedule list --json""",
)
@root_option
@json_option
def list_(root: Root, as_json: bool) -> None:
    """List the schedules: when they fire next, and how the last tick ended."""
    from jobs.schedules.commands import list_command

    list_command(root, console=console(as_json), as_json=as_json)


@schedule.command(
    epilog="""\b
Examples:
  tvq schedule next nightly
  tvq schedule next nightly --count 10 --json"""
)
@click.argument("name")
@click.option("--count", type=click.IntRange(1, 1000), default=5, show_default=True)
@root_option
@json_option
def next(name: str, count: int, root: Root, as_json: bool) -> None:
    """Show when NAME fires next, in its time zone and in UTC."""
    from jobs.schedules.commands import next_command

    next_command(root, name, count, console=console(as_json), as_json=as_json)


@schedule.command(
    epilog="""\b
Examples:
  tvq schedule history nightly
  tvq schedule history nightly --json"""
)
@click.argument("name")
@root_option
@json_option
def history(name: str, root: Root, as_json: bool) -> None:
    """Show the ticks of NAME, the newest first, and what came of them."""
    from jobs.schedules.commands import history_command

    history_command(root, name, console=console(as_json), as_json=as_json)


@schedule.command(
    name="run-now",
    epilog="""\b
Examples:
  tvq schedule run-now nightly""",
)
@click.argument("name")
@root_option
def run_now(name: str, root: Root) -> None:
    """Ask the daemon to run NAME now, besides its ticks. The overlap policy holds for it too."""
    from jobs.schedules.commands import run_now_command

    run_now_command(root, name, console=console())


@schedule.command(
    epilog="""\b
Examples:
  tvq schedule pause nightly
  tvq schedule pause nightly --off"""
)
@click.argument("name")
@click.option("--off", is_flag=True, help="Go on with the next tick; none is made up for.")
@root_option
def pause(name: str, off: bool, root: Root) -> None:
    """Begin no tick of NAME until `--off`. What runs is seen to its end."""
    from jobs.schedules.commands import pause_command

    pause_command(root, name, not off, console=console())


@schedule.command(
    epilog="""\b
Examples:
  tvq schedule remove nightly"""
)
@click.argument("name")
@root_option
def remove(name: str, root: Root) -> None:
    """Remove NAME and its history. Its runs, and a flow that is running, stay."""
    from jobs.schedules.commands import remove_command

    remove_command(root, name, console=console())


@schedule.command(
    epilog="""\b
Examples:
  tvq schedule serve
  tvq schedule serve --root gs://bucket/runs --metrics-port 9464
  tvq schedule serve --root gs://bucket/runs --address http://head:8265"""
)
@address_option
@request_options
@click.option(
    "--metrics-port", type=click.IntRange(1, 65535),
    help="Answer Prometheus there, at /metrics: tvq_missed_ticks of each schedule.",
)  # fmt: skip
@click.option(
    "--metrics-host", default="127.0.0.1", show_default=True, metavar="ADDRESS",
    help="Of this machine, for --metrics-port; 0.0.0.0 for all that it has.",
)  # fmt: skip
@root_option
def serve(
    metrics_port: int | None, metrics_host: str, root: Root, address: str | None, **options: Any
) -> None:
    """See to all schedules under the root, until Ctrl-C.

    Several daemons may serve the same schedules, on one machine or many: each tick is run by one
    of them, and another takes over if that one dies. What was launched goes on without them.
    """
    from jobs.schedules.daemon import serve_command

    serve_command(
        root,
        request=_request(address, options),
        metrics_host=metrics_host,
        metrics_port=metrics_port,
        console=console(),
    )


@schedule.command(
    epilog="""\b
Examples:
  tvq schedule tick nightly                 as a line of a crontab"""
)
@click.argument("name")
@address_option
@request_options
@root_option
def tick(name: str, root: Root, address: str | None, **options: Any) -> None:
    """Run what is due of NAME and end with it: for a cron of your own, in a daemon's place.

    Which tick that is follows from the expression, not from the time at which this is called; a
    tick that a daemon or another call has claimed is not run again.
    """
    from jobs.schedules.daemon import tick_command

    tick_command(root, name, request=_request(address, options), console=console())


@schedule.command(hidden=True)
@click.argument("folder", type=click.Path(path_type=Path))
def supervise(folder: Path) -> None:
    """Run the launch in FOLDER; the local launcher starts this."""
    from jobs.schedules.launchers import supervise as run_supervisor

    run_supervisor(folder)


def _request(address: str | None, options: dict[str, Any]) -> "Request | None":
    """The cluster that is to run the flows; None for this machine."""
    if address is not None:
        from jobs.submission.submit import Request

        return Request(address, **options)
    if any(options.values()):
        raise UserError("--shared, --env, --secret, --driver-...: are of jobs; give --address too")
    return None
