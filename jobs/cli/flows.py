"""The commands of `tvq` that run several others, in order or side by side."""

import click

from jobs.cli.options import OrderedGroup, Root, console, json_option, root_option
from jobs.errors import UserError


@click.group(cls=OrderedGroup, epilog="""\b
Examples:
  tvq flow run nightly.yaml
  tvq flow show nightly.yaml""")  # fmt: skip
def flow() -> None:
    """Prepare, train, compare with the champion and promote, as one command."""


@flow.command(
    epilog="""\b
Examples:
  tvq flow run nightly.yaml
  tvq flow run nightly.yaml --tick 20260329T010000Z
  tvq flow run nightly.yaml --tick-from-cron "0 2 * * *" --timezone Europe/Berlin

\b
nightly.yaml:
  prepare: ~/books --output corpora/books
  train: small training.steps=4000
  begin_from: champion
  promote: {min_delta: 0.001}"""
)
@click.argument("flow")
@click.option("--tick", metavar="TICK", help="UTC instant that it is run for; default: now.")
@click.option(
    "--tick-from-cron", "cron", metavar="EXPRESSION",
    help="For the newest tick of this expression: the command of a cluster's own cron.",
)  # fmt: skip
@click.option("--timezone", default="UTC", show_default=True, help="That EXPRESSION is read in.")
@root_option
@json_option
def run(
    flow: str, tick: str | None, cron: str | None, timezone: str, root: Root, as_json: bool
) -> None:
    """Run FLOW once: what is new is prepared, a model trained, the better one kept.

    The same command goes on where it was, whatever ended it; a stage whose inputs are the same is
    not done again. With --tick-from-cron a tick that another process runs is waited for.
    """
    from jobs.flows.flow import run_command, run_newest_command

    out = console(as_json)
    if cron is None:
        run_command(flow, tick, root, console=out, as_json=as_json)
    elif tick is None:
        run_newest_command(flow, cron, timezone, root, console=out, as_json=as_json)
    else:
        raise UserError("--tick-from-cron: says which tick it is; leave --tick out")


@flow.command(
    epilog="""\b
Examples:
  tvq flow show nightly.yaml"""
)
@click.argument("flow")
@root_option
@json_option
def show(flow: str, root: Root, as_json: bool) -> None:
    """Show FLOW, its champion, and what came of it at each tick."""
    from jobs.flows.flow import show_command

    show_command(flow, root, console=console(as_json), as_json=as_json)


@click.command(
    epilog="""\b
Examples:
  tvq sweep rates.yaml
  tvq sweep rates.yaml --json

\b
rates.yaml:
  train: small data.corpus=corpora/books training.steps=400
  search: grid                      or random, or optuna, with trials: 20
  space:
    optimizer.learning_rate: [1e-3, 2e-3, 4e-3]
  seeds: [0, 1, 2]
  early_stopping: {after: 100, reduction: 3}"""
)
@click.argument("sweep")
@root_option
@json_option
def sweep(sweep: str, root: Root, as_json: bool) -> None:
    """Train what SWEEP's file spans, each with every seed, and say which values are best.

    The same command goes on where it was: a training that is done is not done again.
    """
    from jobs.sweeps.sweep import sweep_command

    sweep_command(sweep, root, console=console(as_json), as_json=as_json)
