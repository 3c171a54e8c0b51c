"""The `tvq plan` command: whether a training fits, how long it takes, what it costs."""

from pathlib import Path

import click

from jobs.cli.options import console, json_option


@click.command(
    epilog="""\b
Examples:
  tvq plan enwik8 --on v5e:2x4
  tvq plan pg19 cluster.tensor=2 --on v5e:8x8 --json
  tvq plan imagenet64 --on v5e:4x4,v6e:4x4,h100:8 --figure plan.png
  tvq plan pg19 --attention 8192,32768,131072 --on v5e:1x1

\b
Exit code 2 where a recipe does not fit, whether or not a change is known with which it does.""",
)
@click.argument("recipe")
@click.argument("overrides", nargs=-1)
@click.option(
    "--on", "targets", metavar="DEVICES[,DEVICES...]",
    help="TPU slices (v4:2x2x1, v5e:4x4, v5p:2x2x2, v6e:2x4), h100:NUMBER or cpu:NUMBER."
    "  [default: the recipe's cluster]",
)  # fmt: skip
@click.option(
    "--attention", "lengths", metavar="T[,T...]",
    help="Instead: one layer with each form of attention at these lengths.",
)  # fmt: skip
@click.option(
    "--prices", type=click.Path(dir_okay=False, path_type=Path),
    help="Your own price file, like jobs/planning/prices.yaml.",
)  # fmt: skip
@click.option(
    "--figure", type=click.Path(dir_okay=False, path_type=Path), help="Draw memory and time."
)
@click.option(
    "--timeout", type=click.IntRange(1), default=1800, show_default=True,
    help="Seconds that the compiler may take each time it is started.",
)  # fmt: skip
@json_option
def plan(
    recipe: str,
    overrides: tuple[str, ...],
    targets: str | None,
    lengths: str | None,
    prices: Path | None,
    figure: Path | None,
    timeout: int,
    as_json: bool,
) -> None:
    """Compile RECIPE's programs for devices that you do not have yet, and say what they take.

    Fits or not, memory by kind, operations, collectives, an estimate of hours and money. OVERRIDES
    are section.field=value; the mesh is cluster.data, fsdp and tensor. What the compiler said is
    kept in ~/.cache/tvq/plans (or TVQ_PLAN_CACHE), so that the same question is answered at once.
    """
    from jobs.planning.command import attention_command, plan_command

    if lengths is None:
        plan_command(
            recipe, overrides, targets, prices=prices, figure=figure, limit_seconds=timeout,
            console=console(as_json), as_json=as_json,
        )  # fmt: skip
    else:
        attention_command(
            recipe, overrides, targets, lengths, limit_seconds=timeout, console=console(as_json),
            as_json=as_json,
        )  # fmt: skip
