"""The commands of `tvq` that register, promote, trace and repeat what was trained."""

import click

from jobs.cli.options import Root, console, json_option, root_option
from jobs.errors import UserError


@click.command(
    epilog="""\b
Examples:
  tvq register tiny --as books
  tvq register tiny --as books --update 400"""
)
@click.argument("run")
@click.option("--as", "name", required=True, help="Name of the model.")
@click.option("--update", type=click.IntRange(1), help="Which checkpoint; default: the newest.")
@root_option
@json_option
def register(run: str, name: str, update: int | None, root: Root, as_json: bool) -> None:
    """Copy RUN's weights, recipe and tokenizer to a version of a model, and tell MLflow.

    No retention touches the copy. The same checkpoint again is the version that is there.
    `mlflow.pyfunc.load_model("models:/NAME@champion")` scores texts and writes them.
    """
    from jobs.registry.register import register as register_run
    from jobs.runs.run_directory import RunDirectory

    registered = register_run(RunDirectory.existing(root, run), name, update=update)
    version = registered.version
    out = console(as_json)
    if as_json:
        out.json(
            {
                "model": name,
                "version": version.version,
                "path": registered.location,
                "run": version.run,
                "update": version.update,
                "parameters": version.parameters,
                "bytes": version.n_bytes,
                "reused": registered.reused,
            }
        )
        return
    out.result(
        f"{'already ' if registered.reused else ''}registered: {name} version {version.version},"
        f" update {version.update:,} of run {version.run}, {version.parameters:,} parameters,"
        f" {version.n_bytes:,} bytes in {registered.location}"
    )


@click.command(
    epilog="""\b
Examples:
  tvq promote books --if-better eval/bits_per_byte
  tvq promote books --version 3 --if-better eval/bits_per_byte --min-delta 0.01"""
)
@click.argument("model")
@click.option("--version", type=click.IntRange(1), help="Which one; default: the newest.")
@click.option("--if-better", "metric", required=True, help="eval/bits_per_byte, or the loss.")
@click.option(
    "--min-delta", type=float, default=0.0, show_default=True,
    help="How much better it has to be for certain.",
)  # fmt: skip
@root_option
@json_option
def promote(
    model: str, version: int | None, metric: str, min_delta: float, root: Root, as_json: bool
) -> None:
    """Make a version of MODEL its champion if it is better on the validation split.

    Both are scored on the same text; the differences of the documents are drawn again and again,
    and the version is promoted if 95% of the draws, both ends left out, are below -MIN_DELTA.
    """
    from jobs.registry.promote import promote as promote_version

    out = console(as_json)
    done = promote_version(
        root, model, version=version, metric=metric, min_delta=min_delta, console=out
    )
    if done.outcome == "refused":
        raise UserError(f"model {model}: version {done.version} is not promoted: {done.why}")
    if as_json:
        out.json(done._asdict())
        return
    champion = f"the champion is version {done.champion}"
    out.result(f"{done.outcome}: {model} version {done.version}, {done.why}; {champion}")


@click.command(
    epilog="""\b
Examples:
  tvq lineage tiny
  tvq lineage books@champion
  tvq lineage books/3 --json"""
)
@click.argument("name")
@root_option
@json_option
def lineage(name: str, root: Root, as_json: bool) -> None:
    """Say what NAME, a run or a registered model, was made of.

    Commit, versions and hardware, recipe, corpus with its shards, tokenizer, and the runs that it
    reproduces.
    """
    from jobs.lineage.origins import lineage_command

    lineage_command(root, name, console=console(as_json), as_json=as_json)


@click.command(
    epilog="""\b
Examples:
  tvq reproduce tiny
  tvq reproduce tiny data.corpus=/mnt/books cluster.workers=0 --run tiny-there"""
)
@click.argument("run")
@click.argument("overrides", nargs=-1)
@click.option("--run", "new_name", help="Name of the new run; default: RUN-again.")
@root_option
@json_option
def reproduce(
    run: str, overrides: tuple[str, ...], new_name: str | None, root: Root, as_json: bool
) -> None:
    """Train RUN again from its recipe and corpus, and say what cannot be the same.

    OVERRIDES may change where it runs, not what it computes. At the end the states of both are
    compared, bit by bit.
    """
    from jobs.lineage.reproduce import reproduce_command

    reproduce_command(
        root, run, overrides, new_name=new_name, console=console(as_json), as_json=as_json
    )
