"""The `tvq` command.

Each command imports what it needs when it runs: `tvq --help` imports neither JAX, Ray nor MLflow.
"""

import sys
from pathlib import Path
from typing import Any

import click

from jobs.cli_bench import bench
from jobs.cli_data import inspect, prepare, verify
from jobs.cli_flow import flow, sweep
from jobs.cli_infra import create_rayjob, doctor, render
from jobs.cli_options import OrderedGroup, Root, json_option, root_option
from jobs.cli_options import console as new_console
from jobs.cli_plan import plan
from jobs.cli_registry import lineage, promote, register, reproduce
from jobs.cli_runs import checkpoints
from jobs.cli_schedule import schedule
from jobs.cli_submit import jobs, submit
from jobs.cli_upkeep import gc, logs
from jobs.errors import ExitCode, UserError


@click.group(
    cls=OrderedGroup,
    epilog="""\b
Examples:
  tvq demo                                          everything once, in some minutes
  tvq prepare ~/books --output corpora/books        text files to a corpus
  tvq train tiny data.corpus=corpora/books --run a  train; again: resume
  tvq evaluate a && tvq sample a --prompt "Once"    how good is it, what does it write
  tvq compare a b --png curves.png                  side by side
  tvq ui                                            all of it in MLflow

\b
Exit codes: 0 done; 1 a defect of tvq, with its traceback; 2 bad input, one line says what to do;
3 the run is busy; 4 the training failed; 5 it became unstable; 6 it was told to stop (SIGTERM, stop
request, preemption) and is saved; 130 stopped by Ctrl-C.""",
)
@click.option("--quiet", "-q", is_flag=True, help="Print results only.")
@click.version_option(package_name="tvq")
@click.pass_context
def cli(ctx: click.Context, quiet: bool) -> None:
    """Train, evaluate and compare linear-time Transformer-VQ language models.

    A corpus is prepared once into Arrow shards; a recipe says everything about a training; a run
    is a training under a name, tracked in MLflow and resumed by repeating its command.
    """
    ctx.obj = {"quiet": quiet}


@cli.command(
    epilog="""\b
Examples:
  tvq demo
  tvq demo --corpus ~/notes"""
)
@click.option(
    "--corpus",
    "source",
    type=click.Path(),
    help="Your own text files; default: the standard library of this Python.",
)
@click.option(
    "--output",
    type=click.Path(file_okay=False, path_type=Path),
    default=Path("demo"),
    show_default=True,
    help="Folder of everything that the demo makes.",
)
def demo(source: str | None, output: Path) -> None:
    """Prepare, train (through a killed worker), evaluate, sample and compare, in some minutes."""
    from jobs.demo import demo as run_demo

    run_demo(source, output, new_console())


cli.add_command(prepare)
cli.add_command(verify)
cli.add_command(inspect)


@cli.command(
    epilog="""\b
Examples:
  tvq train tiny data.corpus=corpora/books
  tvq train tiny data.corpus=corpora/books training.steps=200 --run short
  tvq train tiny data.corpus=corpora/books --dry-run
  tvq train my-recipe.yaml cluster.workers=0        in this process, without Ray"""
)
@click.argument("recipe")
@click.argument("overrides", nargs=-1)
@click.option("--run", "name", help="Name of the run; default: the recipe's.")
@click.option("--dry-run", "dry", is_flag=True, help="Print what it would do, and do nothing.")
@root_option
@json_option
def train(
    recipe: str, overrides: tuple[str, ...], name: str | None, dry: bool, root: Root, as_json: bool
) -> None:
    """Train by RECIPE (a name that `tvq recipes` lists, or a .yaml file).

    OVERRIDES are section.field=value; `tvq recipes --fields` explains every field. The same
    command resumes the run after whatever ended it; a finished run is left as it is. Ctrl-C saves
    and stops.
    """
    from jobs import recipe as recipes
    from jobs.recipe_yaml import stated
    from jobs.train import train as run_training

    console = new_console(as_json)
    loaded = recipes.load(recipe, overrides)
    if dry:
        from jobs.dry_run import dry_run

        dry_run(
            loaded,
            root=root,
            name=name or Path(recipe).stem,
            console=new_console(),
            stated=stated(recipe, overrides),
            as_json=as_json,
        )
        return
    trained = run_training(
        loaded,
        root=root,
        name=name or Path(recipe).stem,
        console=console,
        stated=stated(recipe, overrides),
    )
    if as_json:
        console.json(
            {
                "run": trained.run.name,
                "path": trained.run.location,
                "update": trained.update,
                "reused": trained.reused,
            }
        )


@cli.command(
    name="import",
    epilog="""\b
Examples:
  tvq import checkpoint_125000 --flags flags.json --corpus corpora/enwik8 --run official""",
)
@click.argument("checkpoint", type=click.Path(path_type=Path))
@click.option(
    "--flags", required=True, type=click.Path(path_type=Path),
    help="The flags of the script that trained it, as a JSON object.",
)  # fmt: skip
@click.option(
    "--corpus", required=True, type=click.Path(path_type=Path),
    help="A corpus of the same tokens, that `tvq prepare` wrote.",
)  # fmt: skip
@click.option("--run", "name", required=True, help="Name of the run that it becomes.")
@root_option
@json_option
def import_(checkpoint: Path, root: Root, name: str, as_json: bool, **options: Any) -> None:
    """Make a run of CHECKPOINT, a flax msgpack file that the official Transformer-VQ code wrote.

    `tvq sample` and `tvq evaluate` take it as a run of ours that has ended. Parameters and
    codebooks are imported, the optimizer's state is not.
    """
    from jobs.import_official import import_command

    import_command(
        checkpoint, root=root, name=name, console=new_console(as_json), as_json=as_json, **options
    )


@cli.command(
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
    from jobs.evaluate import evaluate_command

    evaluate_command(root, run, split, console=new_console(as_json), as_json=as_json, **options)


@cli.command(
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
    from jobs.sample import sample_command

    sample_command(root, run, console=new_console(as_json), as_json=as_json, **options)


cli.add_command(plan)
cli.add_command(bench)
cli.add_command(checkpoints)
cli.add_command(logs)
cli.add_command(gc)
cli.add_command(submit)
cli.add_command(jobs)
cli.add_command(flow)
cli.add_command(schedule)
cli.add_command(sweep)
cli.add_command(render)
cli.add_command(doctor)
cli.add_command(create_rayjob)


@cli.command(
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
    from jobs.compare import compare_command

    compare_command(root, runs, png, console=new_console(as_json), json=as_json, **options)


cli.add_command(register)
cli.add_command(promote)
cli.add_command(lineage)
cli.add_command(reproduce)


@cli.command(
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

    show_runs(root, port, new_console())


@cli.command(
    epilog="""\b
Examples:
  tvq recipes
  tvq recipes tiny training.steps=200
  tvq recipes --fields"""
)
@click.argument("name", required=False)
@click.argument("overrides", nargs=-1)
@click.option("--fields", is_flag=True, help="Explain every field of a recipe.")
@json_option
def recipes(name: str | None, overrides: tuple[str, ...], fields: bool, as_json: bool) -> None:
    """List the recipes, or print one with every field resolved."""
    from jobs.recipe import field_reference, flatten, load, resolve, to_yaml
    from jobs.recipe_yaml import named_recipes

    console = new_console(as_json)
    if fields:
        rows = field_reference()
        if as_json:
            keys = ("field", "default", "operational", "description")
            console.json([dict(zip(keys, row, strict=True)) for row in rows])
            return
        for field, default, operational, description in rows:
            mark = " (operational)" if operational else ""
            console.result(f"{field} = {'null' if default is None else default}{mark}")
            console.result(f"    {description}")
    elif name:
        recipe = resolve(load(name, overrides))
        if as_json:
            console.json(flatten(recipe))
        else:
            console.result(to_yaml(recipe).rstrip())
    elif as_json:
        console.json(named_recipes())
    else:
        console.table(["recipe", "what it is"], list(named_recipes().items()))


def main() -> None:
    """Runs `tvq` and exits; a user's mistake is one line on stderr."""
    sys.exit(run_cli(sys.argv[1:]))


def run_cli(arguments: list[str]) -> int:
    """Runs `tvq` with these arguments and returns its exit code."""
    try:
        _refuse_shadowed_packages()
        cli.main(arguments, prog_name="tvq", standalone_mode=False)
    except click.exceptions.Abort:
        click.echo("interrupted; what was done is kept, the same command goes on", err=True)
        return ExitCode.INTERRUPTED
    except KeyboardInterrupt:
        click.echo("interrupted; what was done is kept, the same command goes on", err=True)
        return ExitCode.INTERRUPTED
    except click.exceptions.Exit as exit_:
        return exit_.exit_code
    except click.exceptions.NoArgsIsHelpError as error:  # `tvq` alone, or a group of commands
        error.show()
        return ExitCode.USER
    except click.ClickException as error:
        click.echo(f"error: {_in_one_line(error)}", err=True)
        return ExitCode.USER
    except UserError as error:
        mark = "" if error.code is ExitCode.INTERRUPTED else "error: "
        click.echo(f"{mark}{error}", err=True)
        return error.code
    except Exception as error:
        if not _is_user_error(error):
            raise
        click.echo(f"error: {error}", err=True)
        return ExitCode.USER
    return ExitCode.OK


def _in_one_line(error: click.ClickException) -> str:
    """What click says is wrong with the arguments, and where their help is."""
    message = " ".join(error.format_message().split()).rstrip(".")  # a list of choices has lines
    context = getattr(error, "ctx", None)
    return f"{message}; see `{context.command_path} --help`" if context else message


def _is_user_error(error: Exception) -> bool:
    from model.config import ConfigError
    from pipeline.errors import CorpusError

    return isinstance(error, ConfigError | CorpusError)


def _refuse_shadowed_packages() -> None:
    # `model`, `pipeline` and `jobs` are common names: another package of that name, earlier on the
    # path, would be imported in place of ours.
    import importlib.util

    home = Path(__file__).resolve().parent.parent
    for package in ("pipeline", "model", "jobs"):
        spec = importlib.util.find_spec(package)
        origin = Path(spec.origin).resolve() if spec and spec.origin else None
        if origin != home / package / "__init__.py":
            raise UserError(
                f"package {package!r} is imported from {origin}, not from tvq in {home}; remove"
                " that folder from PYTHONPATH or uninstall the other package"
            )
