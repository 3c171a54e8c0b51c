"""The commands of `tvq` that begin and resume runs."""

from pathlib import Path
from typing import Any

import click

from jobs.cli.options import Root, console, json_option, root_option


@click.command(
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

    run_demo(source, output, console())


@click.command(
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
    from jobs.training.train import train as run_training

    output = console(as_json)
    loaded = recipes.load(recipe, overrides)
    if dry:
        from jobs.training.dry_run import dry_run

        dry_run(
            loaded,
            root=root,
            name=name or Path(recipe).stem,
            console=console(),
            stated=stated(recipe, overrides),
            as_json=as_json,
        )
        return
    trained = run_training(
        loaded,
        root=root,
        name=name or Path(recipe).stem,
        console=output,
        stated=stated(recipe, overrides),
    )
    if as_json:
        output.json(
            {
                "run": trained.run.name,
                "path": trained.run.location,
                "update": trained.update,
                "reused": trained.reused,
            }
        )


@click.command(
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
    from jobs.checkpoints.import_official import import_command

    import_command(
        checkpoint, root=root, name=name, console=console(as_json), as_json=as_json, **options
    )


@click.command(
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

    output = console(as_json)
    if fields:
        rows = field_reference()
        if as_json:
            keys = ("field", "default", "operational", "description")
            output.json([dict(zip(keys, row, strict=True)) for row in rows])
            return
        for field, default, operational, description in rows:
            mark = " (operational)" if operational else ""
            output.result(f"{field} = {'null' if default is None else default}{mark}")
            output.result(f"    {description}")
    elif name:
        recipe = resolve(load(name, overrides))
        if as_json:
            output.json(flatten(recipe))
        else:
            output.result(to_yaml(recipe).rstrip())
    elif as_json:
        output.json(named_recipes())
    else:
        output.table(["recipe", "what it is"], list(named_recipes().items()))
