"""The commands of `tvq` that look after where it runs."""

import os
from pathlib import Path
from typing import Any

import click

from jobs.cli.options import Root, console, json_option, root_option

_TARGETS = ("kuberay", "raycluster", "raycronjob", "cronjob", "compose", "ray-up")


@click.command(
    epilog="""\b
Examples:
  tvq render enwik8 data.corpus=gs://b/corpora/enwik8 cluster.workers=8 --for kuberay
  tvq render my.yaml cluster.accelerator=tpu cluster.accelerator_version=v5e cluster.topology=4x4 \\
      cluster.workers=4 --for kuberay --output deploy
  tvq render nightly.yaml --for cronjob --cron "0 2 * * *" --output deploy
  tvq render tiny data.corpus=/corpora/books --for compose --output box

\b
--for  kuberay     a RayJob: one training on a cluster that lives as long as it
       raycluster  a standing RayCluster for `tvq submit`
       raycronjob  RECIPE is a flow's file: the flow at each tick, by KubeRay
       cronjob     the same by Kubernetes's own CronJob
       compose     one box, without Kubernetes
       ray-up      a cluster of Google's machines, without Kubernetes"""
)
@click.argument("recipe")
@click.argument("overrides", nargs=-1)
@click.option("--for", "target", type=click.Choice(_TARGETS), required=True, help="See below.")
@click.option(
    "--output", "-o", type=click.Path(path_type=Path),
    help="Folder to write, ready to apply (ray-up: file); default: print.",
)  # fmt: skip
@click.option("--image", help="NAME:VERSION without the device that ends the tag.")
@click.option("--name", help="Of the run and all that belongs to it; default: the recipe's.")
@click.option("--cron", help="Of schedules: five fields, such as '0 2 * * *'.")
@click.option("--timezone", default="Etc/UTC", show_default=True, help="Of --cron.")
@json_option
def render(recipe: str, overrides: tuple[str, ...], as_json: bool, **options: Any) -> None:
    """Print or write the manifests that run RECIPE (with OVERRIDES) on a cluster."""
    from jobs.deployment.render import render_command

    render_command(recipe, overrides, console=console(as_json), as_json=as_json, **options)


@click.command(
    epilog="""\b
Examples:
  tvq doctor
  tvq doctor --address http://127.0.0.1:8265 --root gs://bucket/runs --json
  tvq doctor enwik8 cluster.workers=8 --address auto     has the cluster room for this recipe?"""
)
@click.argument("recipe", required=False)
@click.argument("overrides", nargs=-1)
@click.option("--address", help="Of Ray; default: RAY_ADDRESS, else Ray is not looked at.")
@click.option("--tracking-uri", help="Of MLflow; default: MLFLOW_TRACKING_URI.")
@root_option
@json_option
def doctor(
    recipe: str | None,
    overrides: tuple[str, ...],
    address: str | None,
    tracking_uri: str | None,
    root: Root,
    as_json: bool,
) -> None:
    """Look at everything that a training needs; each line is ok, or says what mends it.

    Exit code 2 if something has to be mended.
    """
    from jobs.doctor.checkup import doctor_command

    doctor_command(
        recipe,
        overrides,
        address=address or os.environ.get("RAY_ADDRESS"),
        root=root,
        tracking_uri=tracking_uri or os.environ.get("MLFLOW_TRACKING_URI"),
        console=console(as_json),
        as_json=as_json,
    )


@click.command(
    name="create-rayjob",
    hidden=True,
    epilog="""\b
Examples:
  tvq create-rayjob nightly --name nightly-29345""",
)
@click.argument("template")
@click.option("--name", envvar="TVQ_RAYJOB", required=True, help="Of the RayJob.")
def create_rayjob(template: str, name: str) -> None:
    """Create a RayJob by the RayCronJob TEMPLATE, from within a pod; a rendered CronJob runs it."""
    from jobs.deployment.rayjob_creation import create_rayjob as create

    created = create(template, name)
    console().line(f"RayJob {name}: {'created' if created else 'was created before'}")
