"""The commands of `tvq` that look after what a run has stored."""

from pathlib import Path

import click

from jobs.cli.options import OrderedGroup, Root, console, json_option, root_option


@click.group(cls=OrderedGroup, epilog="""\b
Examples:
  tvq checkpoints list tiny
  tvq checkpoints verify tiny --update 400
  tvq checkpoints export tiny --output tiny.safetensors""")  # fmt: skip
def checkpoints() -> None:
    """List, verify, keep and remove the checkpoints of a run."""


@checkpoints.command(
    name="list",
    epilog="""\b
Examples:
  tvq checkpoints list tiny
  tvq checkpoints list tiny --root gs://bucket/runs --json""",
)
@click.argument("run")
@root_option
@json_option
def list_(run: str, root: Root, as_json: bool) -> None:
    """List RUN's checkpoints: update, size, age, the evaluation's figures, pinned."""
    from jobs.checkpoints.commands import list_command

    list_command(root, run, console=console(as_json), as_json=as_json)


@checkpoints.command(
    epilog="""\b
Examples:
  tvq checkpoints verify tiny
  tvq checkpoints verify tiny --update 400"""
)
@click.argument("run")
@click.option("--update", type=click.IntRange(1), help="Only this one; default: all.")
@root_option
@json_option
def verify(run: str, update: int | None, root: Root, as_json: bool) -> None:
    """Read RUN's checkpoints to the last byte and compare every array's sum."""
    from jobs.checkpoints.commands import verify_command

    verify_command(root, run, update, console=console(as_json), as_json=as_json)


@checkpoints.command(
    epilog="""\b
Examples:
  tvq checkpoints export tiny --output tiny.safetensors
  tvq checkpoints export tiny --update 400 --output tiny-400.safetensors"""
)
@click.argument("run")
@click.option("--update", type=click.IntRange(1), help="Which one; default: the newest.")
@click.option("--output", required=True, type=click.Path(dir_okay=False, path_type=Path))
@root_option
def export(run: str, update: int | None, output: Path, root: Root) -> None:
    """Write RUN's parameters and codebooks, with the recipe, as a safetensors file."""
    from jobs.checkpoints.export import export_command

    export_command(root, run, update, output, console=console())


@checkpoints.command(
    name="import",
    epilog="""\b
Examples:
  tvq checkpoints import tiny.safetensors --run copy""",
)
@click.argument("file", type=click.Path(dir_okay=False, path_type=Path))
@click.option("--run", "name", required=True, help="Name of the run that it becomes.")
@root_option
def import_(file: Path, name: str, root: Root) -> None:
    """Make a run of FILE, which `tvq checkpoints export` wrote. It has ended at its update."""
    from jobs.checkpoints.export import import_command

    import_command(file, root, name, console=console())


@checkpoints.command(
    epilog="""\b
Examples:
  tvq checkpoints pin tiny 400
  tvq checkpoints pin tiny 400 --off"""
)
@click.argument("run")
@click.argument("update", type=click.IntRange(1))
@click.option("--off", is_flag=True, help="Let the retention remove it again.")
@root_option
def pin(run: str, update: int, off: bool, root: Root) -> None:
    """Keep RUN's checkpoint at UPDATE, whatever checkpoint.keep says."""
    from jobs.checkpoints.commands import pin_command

    pin_command(root, run, update, not off, console=console())


@checkpoints.command(
    epilog="""\b
Examples:
  tvq checkpoints prune tiny"""
)
@click.argument("run")
@root_option
@json_option
def prune(run: str, root: Root, as_json: bool) -> None:
    """Remove what RUN's recipe does not keep, and what killed or damaged saves left."""
    from jobs.checkpoints.commands import prune_command

    prune_command(root, run, console=console(as_json), as_json=as_json)
