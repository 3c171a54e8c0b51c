"""The `tvq` command.

Each command imports what it needs when it runs: `tvq --help` imports neither JAX, Ray nor MLflow.
"""

import sys
from pathlib import Path

import click

from jobs.cli.bench import bench
from jobs.cli.checkpoints import checkpoints
from jobs.cli.corpora import inspect, prepare, verify
from jobs.cli.deployment import create_rayjob, doctor, render
from jobs.cli.evaluation import compare, evaluate, sample, ui
from jobs.cli.flows import flow, sweep
from jobs.cli.options import OrderedGroup
from jobs.cli.planning import plan
from jobs.cli.registry import lineage, promote, register, reproduce
from jobs.cli.runs import gc, logs
from jobs.cli.schedules import schedule
from jobs.cli.submission import jobs, submit
from jobs.cli.training import demo, import_, recipes, train
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


# In the order of `tvq --help`.
for command in (
    demo,
    prepare,
    verify,
    inspect,
    train,
    import_,
    evaluate,
    sample,
    plan,
    bench,
    checkpoints,
    logs,
    gc,
    submit,
    jobs,
    flow,
    schedule,
    sweep,
    render,
    doctor,
    create_rayjob,
    compare,
    register,
    promote,
    lineage,
    reproduce,
    ui,
    recipes,
):
    cli.add_command(command)


def main() -> None:
    """Runs `tvq` and exits; a user's mistake is one line on stderr."""
    sys.exit(run_cli(sys.argv[1:]))


def run_cli(arguments: list[str]) -> int:
    """Runs `tvq` with these arguments and returns its exit code."""
    try:
        _refuse_shadowed_packages()
        cli.main(arguments, prog_name="tvq", standalone_mode=False)
    except (click.exceptions.Abort, KeyboardInterrupt):
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

    home = Path(__file__).resolve().parents[2]
    for package in ("pipeline", "model", "jobs"):
        spec = importlib.util.find_spec(package)
        origin = Path(spec.origin).resolve() if spec and spec.origin else None
        if origin != home / package / "__init__.py":
            raise UserError(
                f"package {package!r} is imported from {origin}, not from tvq in {home}; remove"
                " that folder from PYTHONPATH or uninstall the other package"
            )
