"""`tvq render`: a recipe as the manifests that run it, so that nothing is said twice."""

import json
import re
import shutil
from collections.abc import Callable
from importlib.metadata import version
from pathlib import Path
from typing import Any

from jobs import recipe as recipes
from jobs.console import Console
from jobs.deployment.compose_settings import compose_settings
from jobs.deployment.kuberay import Job, Tick, cron_job, ray_cluster, ray_cron_job, ray_job
from jobs.deployment.manifest_yaml import dump_manifests
from jobs.deployment.ray_up import ray_up
from jobs.errors import UserError
from jobs.flows.flow_file import load_flow
from jobs.recipe import Recipe
from jobs.recipe_yaml import dump_yaml, named_recipes
from jobs.schedules.ticks import Cron
from pipeline.storage import is_url

INFRA = Path(__file__).resolve().parents[2] / "infra"
"""The files that go with what is rendered; in the checkout and in an installation alike."""

TARGETS = ("kuberay", "raycluster", "raycronjob", "cronjob", "compose", "ray-up")
SCHEDULED = ("raycronjob", "cronjob")
_NAME = re.compile(r"[a-z]([-a-z0-9]{0,34}[a-z0-9])?")
_NOTE = "# Written by `tvq render`; change the recipe and render again.\n"


def render_command(
    recipe_name: str,
    overrides: tuple[str, ...],
    *,
    target: str,
    output: Path | None,
    image: str | None,
    name: str | None,
    cron: str | None,
    timezone: str,
    console: Console,
    as_json: bool,
) -> None:
    """Prints the manifests, or writes the folder to apply.

    Raises:
        UserError: the recipe cannot run there, an option is missing or has no use, or the folder
            holds something else.
    """
    tick = None
    if target in SCHEDULED:
        tick, recipe_name, overrides = _scheduled(recipe_name, overrides, target, cron, timezone)
        name = name or tick.flow_name
    elif cron is not None:
        raise UserError(
            f"--cron: is of schedules; use --for {' or '.join(SCHEDULED)}, or leave it out"
        )
    recipe = recipes.load(recipe_name, overrides)
    job = Job(
        name=_checked_name(name or Path(recipe_name).stem),
        recipe=recipe,
        recipe_text=stated_text(recipe),
        image=_checked_image(image or f"tvq:{version('tvq')}"),
        tick=tick,
    )
    _check(recipe, target)
    if target == "compose":
        settings = compose_settings(job)
        if output is None and as_json:
            console.json(settings)
            return
        if output is None:
            console.result("\n".join(f"{key}={value}" for key, value in settings.items()))
            return
        _write_compose(output, job, settings, console)
        return
    kinds: dict[str, Callable[[Job], list[dict[str, Any]]]] = {
        "kuberay": ray_job,
        "raycluster": ray_cluster,
        "raycronjob": ray_cron_job,
        "cronjob": cron_job,
        "ray-up": ray_up,
    }
    documents = kinds[target](job)
    if output is None:
        if as_json:
            console.json(documents)
        else:
            console.result(_NOTE + dump_manifests(documents).rstrip())
    elif target == "ray-up":
        _write_file(output, _NOTE + dump_manifests(documents))
        console.line(f"`ray up {output}` starts the cluster, `ray down {output}` ends it")
    else:
        _write_kubernetes(output, job, documents, console)


def stated_text(recipe: Recipe) -> str:
    """The recipe as YAML, with what differs from the defaults; `from_yaml` gives it back."""
    defaults = recipes.flatten(Recipe())
    tree: dict[str, Any] = {}
    for field, value in recipes.flatten(recipe).items():
        if value != defaults[field]:
            section, _, item = field.partition(".")
            tree.setdefault(section, {})[item] = json.loads(json.dumps(value))
    return dump_yaml(tree) if tree else ""


def _scheduled(
    file: str, overrides: tuple[str, ...], target: str, cron: str | None, timezone: str
) -> tuple[Tick, str, tuple[str, ...]]:
    """When the flow in `file` runs, and the recipe and overrides that it trains by."""
    if cron is None:
        raise UserError(f"--for {target}: needs when, such as --cron '0 2 * * *'")
    fields = cron.split()
    if len(fields) != 5:
        raise UserError(
            f"--cron {cron!r}: has {len(fields)} fields, expected five: minute, hour, day of the"
            " month, month, day of the week"
        )
    if overrides:
        raise UserError(
            f"{overrides[0]}: a flow's recipe is in its file; write the override behind `train:`"
            f" in {file}"
        )
    flow = load_flow(file)
    Cron.parse(cron, timezone)  # refuses what is no expression
    name, *rest = flow.train
    if name not in named_recipes():
        raise UserError(
            f"flow {flow.name}: train: {name} is a file of this machine, which the pods do"
            " not see; name one of tvq's recipes and write what differs behind it"
        )
    # With its name: a daemon that serves the same flow must find the same ticks.
    tick = Tick(flow.name, flow.to_yaml(), " ".join(fields), timezone)
    return tick, name, (*rest, f"data.corpus={flow.corpus}")


def _checked_name(name: str) -> str:
    if not _NAME.fullmatch(name):
        raise UserError(
            f"name {name!r}: expected small letters, digits and '-', beginning with a letter, at"
            " most 36 (Kubernetes and KubeRay add to it); give another with --name"
        )
    return name


def _checked_image(image: str) -> str:
    _, colon, tag = image.rpartition("/")[2].partition(":")
    if not colon or not tag or tag == "latest" or "@" in image:
        raise UserError(
            f"--image {image!r}: expected NAME:VERSION, without the device that ends the tag"
            " (-cpu, -gpu, -tpu) and never `latest`: a node that starts later would run another"
        )
    return image


def _check(recipe: Recipe, target: str) -> None:
    """Refuses what would fail there, when it costs money already."""
    if not recipe.cluster.workers:
        raise UserError(
            "cluster.workers: is 0, which runs without Ray; set the number of workers to render"
        )
    if recipe.cluster.address:
        raise UserError(
            f"cluster.address: is {recipe.cluster.address}, but what is rendered brings its own"
            " cluster; leave it null"
        )
    corpora = recipe.data.corpora
    if target in ("kuberay", "compose") and not corpora:
        raise UserError("data.corpus: no corpus given; add data.corpus=gs://BUCKET/corpora/NAME")
    if target in ("kuberay", *SCHEDULED):
        for corpus in corpora:
            if not is_url(corpus):
                raise UserError(
                    f"data.corpus: {corpus} is a folder of this machine, which the pods do not see;"
                    " `tvq prepare ... --output gs://BUCKET/corpora/NAME` writes it where they do"
                )
    if target == "compose":
        for corpus in corpora:
            if not is_url(corpus) and not corpus.startswith("/corpora/"):
                raise UserError(
                    f"data.corpus: {corpus} is not in the containers; put it into the folder"
                    " corpora beside compose.yaml and say data.corpus=/corpora/NAME, or give a"
                    " gs:// URL"
                )
        if recipe.cluster.accelerator == "tpu":
            raise UserError(
                "cluster.accelerator: compose.yaml is for one box with CPUs or GPUs; for TPUs use"
                " --for kuberay or ray-up"
            )
    uri = recipe.tracking.uri
    if uri and not uri.startswith(("http://", "https://")):
        raise UserError(
            f"tracking.uri: {uri} is of this machine; leave it null, and the site's server is used"
        )


# ---- What is written -----------------------------------------------------------------------------


def _write_kubernetes(
    output: Path, job: Job, documents: list[dict[str, Any]], console: Console
) -> None:
    _refuse_foreign(output, "run/kustomization.yaml")
    for part in ("base", "components"):
        shutil.rmtree(output / part, ignore_errors=True)
        shutil.copytree(INFRA / "kubernetes" / part, output / part)
    for path in (output / "base").rglob("*.yaml"):  # MLflow's server runs from the same image
        text = path.read_text("utf-8")
        path.write_text(text.replace(f"image: tvq:{version('tvq')}-", f"image: {job.image}-"))
    run = output / "run"
    _write_file(run / f"{job.name}.yaml", _NOTE + dump_manifests(documents))
    kustomization = {
        "apiVersion": "kustomize.config.k8s.io/v1beta1",
        "kind": "Kustomization",
        "resources": sorted(
            path.name for path in run.glob("*.yaml") if path.name != "kustomization.yaml"
        ),
    }
    _write_file(run / "kustomization.yaml", _NOTE + dump_manifests([kustomization]))
    site = output / "site" / "kustomization.yaml"
    if not site.exists():
        _write_file(site, (INFRA / "kubernetes/site/kustomization.yaml").read_text("utf-8"))
        console.line(f"{site} is yours: put your project, buckets and registry in")
    console.line(f"`kubectl apply -k {output}/site` sets it going; infra/README.md says what first")


def _write_compose(output: Path, job: Job, settings: dict[str, str], console: Console) -> None:
    _refuse_foreign(output, "compose.yaml")
    shutil.copytree(INFRA / "compose", output, dirs_exist_ok=True)
    shutil.copy(INFRA / "alerts.yaml", output / "prometheus" / "alerts.yaml")
    _write_file(output / "recipe.yaml", _NOTE + job.recipe_text)
    lines = "".join(f"{key}={value}\n" for key, value in settings.items())
    _write_file(output / ".env", _NOTE + lines)
    console.line(
        f"`sh {output}/secrets.sh && docker compose --project-directory {output} up` sets it going"
    )


def _refuse_foreign(output: Path, mark: str) -> None:
    if output.exists() and any(output.iterdir()) and not (output / mark).exists():
        raise UserError(
            f"{output}: is there and was not written by this; name a new or empty folder"
        )


def _write_file(path: Path, text: str) -> None:
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text(text, encoding="utf-8")
