"""The `tvq bench` commands: how fast it is here."""

from pathlib import Path
from typing import Any

import click

from jobs.cli.options import OrderedGroup, console, json_option


@click.group(
    cls=OrderedGroup,
    epilog="""\b
Examples:
  tvq bench train small
  tvq bench attention small
  tvq bench decode small
  tvq bench data
  tvq bench recall""",
)
def bench() -> None:
    """Time attention, training, writing and the data pipeline, and test recall, each beside a
    yardstick."""


def _bench_options(command: Any) -> Any:
    options = (
        click.argument("name", metavar="[RECIPE]", default="small"),
        click.argument("overrides", nargs=-1),
        click.option(
            "--lengths", default="2048,8192,32768", show_default=True, help="Tokens of a row (T)."
        ),
        click.option(
            "--forms",
            default="serial,parallel,dense,full-chunked,full-dense",
            show_default=True,
            help="Forms of attention; the others are compared with the first. full-: over keys that"
            " are not quantised.",
        ),
        click.option("--rounds", type=click.IntRange(1), default=5, show_default=True),
        click.option(
            "--seconds", type=click.FloatRange(0), default=0.5, show_default=True,
            help="Repeat a program in a round for so long.",
        ),
        click.option("--batch-size", type=click.IntRange(1), default=1, show_default=True),
        json_option,
    )  # fmt: skip
    for option in reversed(options):
        command = option(command)
    return command


@bench.command(
    name="attention",
    epilog="""\b
Examples:
  tvq bench attention
  tvq bench attention small --lengths 2048,8192 --forms serial,full-chunked
  tvq bench attention small model.block_length=128 --json""",
)
@_bench_options
def bench_attention(as_json: bool, **options: Any) -> None:
    """Time one layer of a model, forward and backward.

    A figure is the median of the rounds, in which all forms take turns. OVERRIDES are
    section.field=value.
    """
    from jobs.bench.forms import bench_command

    bench_command("attention", console=console(as_json), as_json=as_json, **options)


@bench.command(
    name="train",
    epilog="""\b
Examples:
  tvq bench train
  tvq bench train small --lengths 131072 --forms serial,parallel
  tvq bench train small --lengths 8192 --update-length 2048 model.block_length=128 --json
  tvq bench train small data.corpus=corpora/books --ray --rounds 3""",
)
@_bench_options
@click.option("--update-length", type=click.IntRange(1), help="Tokens of an update; default: T.")
@click.option(
    "--ray", "on_ray", is_flag=True,
    help="Time whole trainings instead, bare and under Ray: what Ray adds to an update, what saves"
    " cost, what a start is made of. Of the options, only --rounds, --updates and --json count.",
)  # fmt: skip
@click.option(
    "--updates", type=click.IntRange(1), default=150, show_default=True, help="With --ray."
)
def bench_train(as_json: bool, on_ray: bool, updates: int, **options: Any) -> None:
    """Time a training step of a whole model: forward, backward, optimizer.

    A figure is the median of the rounds, in which all forms take turns. OVERRIDES are
    section.field=value.
    """
    if on_ray:
        from jobs.bench.ray_overhead import ray_command

        ray_command(
            options["name"], options["overrides"], rounds=options["rounds"], updates=updates,
            console=console(as_json), as_json=as_json,
        )  # fmt: skip
        return
    from jobs.bench.forms import bench_command

    bench_command("train", console=console(as_json), as_json=as_json, **options)


@bench.command(
    name="decode",
    epilog="""\b
Examples:
  tvq bench decode
  tvq bench decode small --positions 1000,100000,1000000 --rounds 20
  tvq bench decode small model.quantized_keys=false --json""",
)
@click.argument("name", metavar="[RECIPE]", default="small")
@click.argument("overrides", nargs=-1)
@click.option(
    "--positions", default="1000,100000", show_default=True,
    help="Tokens before those that are timed; the others are compared with the first.",
)  # fmt: skip
@click.option(
    "--tokens", type=click.IntRange(1), default=128, show_default=True, help="Tokens of a call."
)
@click.option("--rounds", type=click.IntRange(1), default=9, show_default=True)
@click.option(
    "--seconds", type=click.FloatRange(0), default=0.5, show_default=True,
    help="Repeat a position's calls in a round for so long.",
)  # fmt: skip
@click.option("--batch-size", type=click.IntRange(1), default=1, show_default=True)
@json_option
def bench_decode(as_json: bool, **options: Any) -> None:
    """Time a token that a model writes, at several positions, with one executable for all.

    A figure is the median of the rounds, in which all positions take turns. OVERRIDES are
    section.field=value.
    """
    from jobs.bench.decode import decode_command

    decode_command(console=console(as_json), as_json=as_json, **options)


@bench.command(
    name="data",
    epilog="""\b
Examples:
  tvq bench data
  tvq bench data --megabytes 100 --rounds 3
  tvq bench data --corpus ~/books --json""",
)
@click.option(
    "--megabytes", type=click.FloatRange(1), default=1024, show_default=True,
    help="Text that is prepared; the first files of --corpus have as much.",
)  # fmt: skip
@click.option("--corpus", metavar="FOLDER", help="Text files of your own, each a document.")
@click.option("--rounds", type=click.IntRange(1), default=5, show_default=True)
@click.option(
    "--train-tokens-per-second", type=click.FloatRange(0, min_open=True), default=3542,
    show_default=True, help="That a training of `small` reaches: see `tvq bench train small`.",
)  # fmt: skip
@json_option
def bench_data(as_json: bool, **options: Any) -> None:
    """Time the preparing and the loading of text, each beside a bare process doing the least.

    Ratios are taken within a round, of CPU time and of wall-clock time.
    """
    from jobs.bench.corpora import data_command

    data_command(console=console(as_json), as_json=as_json, **options)


@bench.command(
    name="recall",
    epilog="""\b
Examples:
  tvq bench recall
  tvq bench recall recall model.n_codes=16 --output recall-16
  tvq bench recall --documents 65536 training.steps=4000 --json""",
)
@click.argument("name", metavar="[RECIPE]", default="recall")
@click.argument("overrides", nargs=-1)
@click.option(
    "--output", type=click.Path(file_okay=False, path_type=Path), default=Path("recall"),
    show_default=True, help="Folder of the corpus, the runs and the log-probabilities.",
)  # fmt: skip
@click.option(
    "--documents", type=click.IntRange(1), default=32768, show_default=True,
    help="Documents to train on.",
)  # fmt: skip
@json_option
def bench_recall(as_json: bool, **options: Any) -> None:
    """Train to recall values by their keys, and show accuracy by distance.

    The same recipe three times: attention to all keys as they are, the control; quantised keys
    and the compressive cache; the window alone. OVERRIDES are section.field=value. The same
    command goes on where it was ended.
    """
    from jobs.bench.recall_suite import recall_command

    recall_command(console=console(as_json), as_json=as_json, **options)
