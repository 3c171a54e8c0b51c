"""The commands of `tvq` that ask what runs are worth."""

from pathlib import Path
from typing import Any

import click

from jobs.cli.options import Root, console, json_option, root_option


@click.command(
    epilog="""\b
Examples:
  tvq evaluate tiny
  tvq evaluate tiny --split test --carry --json
  tvq evaluate runs/tiny/checkpoints/00000400 --length 16384
  tvq evaluate tiny --workers 4 --dump tokens.parquet"""
)
@click.argument("run", metavar="RUN|CHECKPOINT")
@click.option(
    "--split", type=click.Choice(["validation", "test"]), default="validation", show_default=True
)
@click.option("--update", type=click.IntRange(1), help="Of the checkpoint; default: the newest.")
@click.option(
    "--length", type=click.IntRange(1), help="Tokens of a window (T); default: as in training."
)
@click.option(
    "--carry", is_flag=True,
    help="Hand the cache on through each document: every token sees all of it that is before.",
)  # fmt: skip
@click.option(
    "--workers", type=click.IntRange(0), default=0, show_default=True,
    help="Ray workers, any number with the same result; 0: this process.",
)  # fmt: skip
@click.option(
    "--dump", type=click.Path(dir_okay=False, path_type=Path),
    help="Parquet file for the log-probability of every token.",
)  # fmt: skip
@root_option
@json_option
def evaluate(run: str, split: str, root: Root, as_json: bool, **options: Any) -> None:
    """Measure a checkpoint on a held-out split, every token exactly once.

    Next to its bits per byte stand gzip and xz on the same text, and the loss by how much text a
    token had before it. The figures are added to the run in MLflow, and with those of each
    document they are kept in the run's folder.
    """
    from jobs.evaluation.evaluate import evaluate_command

    evaluate_command(root, run, split, console=console(as_json), as_json=as_json, **options)


@click.command(
    epilog="""\b
Examples:
  tvq sample tiny --prompt "def main("
  tvq sample tiny --tokens 500 --temperature 0.8 --top-p 0.95 --seed 7
  tvq sample tiny --prompts lines.txt --samples 4 --top-k 40 --json"""
)
@click.argument("run")
@click.option(
    "--prompt", "prompts", multiple=True,
    help="Text to go on from; may be repeated; default: the start of a document.",
)  # fmt: skip
@click.option(
    "--prompts", "prompts_file", type=click.Path(path_type=Path),
    help="File with a prompt on each line.",
)  # fmt: skip
@click.option(
    "--samples", type=click.IntRange(1), default=1, show_default=True, help="Of each prompt."
)
@click.option("--tokens", type=click.IntRange(1), default=256, show_default=True)
@click.option(
    "--temperature", type=click.FloatRange(0), default=0.8, show_default=True,
    help="0: the likeliest token.",
)  # fmt: skip
@click.option(
    "--top-k", type=click.IntRange(0, 2**31 - 1), default=0, show_default=True,
    help="Draw from so many of the likeliest tokens; 0: from all.",
)  # fmt: skip
@click.option(
    "--top-p", type=click.FloatRange(0, 1), default=0.95, show_default=True,
    help="Draw from the likeliest tokens that have this probability together.",
)  # fmt: skip
@click.option(
    "--min-p", type=click.FloatRange(0, 1), default=0, show_default=True,
    help="Leave out tokens with less than this share of the likeliest one's probability.",
)  # fmt: skip
@click.option(
    "--output", type=click.Path(file_okay=False, path_type=Path),
    help="Folder for the pictures of a model of pictures.  [default: samples]",
)  # fmt: skip
@click.option("--ignore-eos", is_flag=True, help="Write all tokens: never end the document.")
@click.option("--seed", type=click.IntRange(0, 2**32 - 1), default=0, show_default=True)
@root_option
@json_option
def sample(run: str, root: Root, as_json: bool, **options: Any) -> None:
    """Let RUN's newest checkpoint write text, or draw pictures if it was trained on them.

    The same seed writes the same.
    """
    from jobs.evaluation.sample import sample_command

    sample_command(root, run, console=console(as_json), as_json=as_json, **options)


@click.command(
    epilog="""\b
Examples:
  tvq compare tiny wider
  tvq compare a-0 a-1 a-2 b-0 b-1 b-2 --html report.html --png curves.png
  tvq compare --query "params.`model.d_model` = '64'" --by tokens --json"""
)
@click.argument("runs", nargs=-1)
@click.option("--query", help="An MLflow filter, for the runs that it finds.")
@click.option("--experiment", default="tvq", show_default=True, help="Where the query looks.")
@click.option(
    "--by", type=click.Choice(["step", "tokens", "hours"]), default="step", show_default=True,
    help="What the curves are drawn over.",
)  # fmt: skip
@click.option("--png", type=click.Path(dir_okay=False, path_type=Path), help="Draw the curves.")
@click.option("--html", type=click.Path(dir_okay=False, path_type=Path), help="Write a report.")
@root_option
@json_option
def compare(
    runs: tuple[str, ...], png: Path | None, root: Root, as_json: bool, **options: Any
) -> None:
    """Set RUNS side by side: what differs in their recipes, and how good they became.

    Runs that differ in the seed alone are taken together, and the verdict says whether recipes
    differ by more than seeds do.
    """
    from jobs.comparison.compare import compare_command

    compare_command(root, runs, png, console=console(as_json), json=as_json, **options)


@click.command(
    epilog="""\b
Examples:
  tvq ui
  tvq ui --root demo/runs --port 5050"""
)
@click.option("--port", type=click.IntRange(1, 65535), help="Default: a free one, 5000 first.")
@root_option
def ui(port: int | None, root: Root) -> None:
    """Open the MLflow page with all runs under the root, until Ctrl-C."""
    from jobs.ui import show_runs

    show_runs(root, port, console())
