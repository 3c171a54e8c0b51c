"""`tvq render`: golden files, folders that kustomize reads, and mistakes that cost nothing."""

import json
import os
import re
import shlex
import shutil
import subprocess
from importlib.metadata import version
from pathlib import Path
from typing import Any

import pytest

from jobs import recipe as recipes
from jobs.cli import deployment as cli_infra
from jobs.cli.flows import run as command_of_flow
from jobs.cli.main import run_cli
from jobs.deployment.manifest_yaml import dump_manifests
from jobs.deployment.render import TARGETS, stated_text
from jobs.errors import ExitCode
from jobs.flows.flow_file import load_flow
from jobs.recipe_yaml import named_recipes
from tests.infra.manifests import (
    FLOW,
    GOLDEN,
    INFRA,
    RENDERED,
    documents,
    pods,
    problems,
    rendered,
)

KUBERAY = ("render", "tiny", "data.corpus=gs://b/c", "--for", "kuberay")


@pytest.mark.parametrize("name", RENDERED)
def test_rendered_is_as_recorded(name: str):
    """TVQ_UPDATE_GOLDEN=1 writes the files anew: read the difference before you commit it."""
    path = GOLDEN / f"{name}.yaml"
    text = rendered(name)
    if os.environ.get("TVQ_UPDATE_GOLDEN"):
        path.write_text(text)
    assert text == path.read_text()


def test_there_is_no_golden_file_too_many():
    assert {path.stem for path in GOLDEN.glob("*")} == set(RENDERED)


@pytest.mark.parametrize("name", named_recipes())
def test_the_recipe_that_travels_is_the_recipe(name: str):
    recipe = recipes.load(name, ("data.corpus=gs://b/c", "data.cache_bytes=1000000"))
    assert recipes.from_yaml(stated_text(recipe), "text") == recipe


def job_of(name: str) -> dict[str, Any]:
    return documents(rendered(name))[-1]["spec"]


def test_a_tpu_slice_is_had_whole():
    [group] = job_of("rayjob-tpu-multislice")["rayClusterSpec"]["workerGroupSpecs"]
    # 8 workers of 4 chips are 2 slices of 4 hosts each.
    assert (group["replicas"], group["numOfHosts"]) == (2, 4)
    spec = group["template"]["spec"]
    assert spec["nodeSelector"] == {
        "cloud.google.com/gke-tpu-accelerator": "tpu-v5-lite-podslice",
        "cloud.google.com/gke-tpu-topology": "4x4",
    }
    [container] = spec["containers"]
    assert container["resources"]["limits"]["google.com/tpu"] == "4"
    assert container["resources"]["limits"] == container["resources"]["requests"]
    assert container["image"] == "europe/tvq:1.2.3-tpu"


def test_a_gpu_worker_asks_for_its_gpu():
    [group] = job_of("rayjob-gpu")["rayClusterSpec"]["workerGroupSpecs"]
    assert (group["replicas"], group["numOfHosts"]) == (8, 1)
    [container] = group["template"]["spec"]["containers"]
    assert container["resources"]["limits"]["nvidia.com/gpu"] == "1"
    assert container["image"].endswith("-gpu")
    [toleration] = group["template"]["spec"]["tolerations"]
    assert toleration["key"] == "nvidia.com/gpu"


def test_ray_reserves_no_more_than_the_pod_has():
    for name in ("rayjob-cpu", "rayjob-gpu", "rayjob-tpu-multislice"):
        [group] = job_of(name)["rayClusterSpec"]["workerGroupSpecs"]
        [container] = group["template"]["spec"]["containers"]
        cpus = float(container["resources"]["limits"]["cpu"])
        assert float(group["rayStartParams"]["num-cpus"]) <= cpus


def test_the_suspended_template_of_a_cronjob_is_the_raycronjob():
    [_, alone] = documents(rendered("raycronjob"))
    [_, template, cron] = documents(rendered("cronjob"))
    assert template["spec"].pop("suspend") is True
    assert template == alone
    assert cron["spec"]["schedule"] == alone["spec"]["schedule"] == "0 2 * * *"
    assert cron["spec"]["timeZone"] == "Europe/Berlin"
    [container] = next(pods(cron))["containers"]
    assert container["command"] == ["tvq", "create-rayjob", template["metadata"]["name"]]


def test_a_tick_carries_the_expression_that_it_is_claimed_by():
    spec = job_of("raycronjob")
    entrypoint = spec["jobTemplate"]["entrypoint"]
    assert "--tick-from-cron '0 2 * * *' --timezone Europe/Berlin" in entrypoint
    [configuration, _] = documents(rendered("raycronjob"))
    flow = load_flow(FLOW)
    assert configuration["data"] == {"flow.yaml": flow.to_yaml()}
    [*command, cron, option, zone] = shlex.split(entrypoint)
    assert command == ["tvq", "flow", "run", "/etc/tvq/flow.yaml", "--tick-from-cron"]
    with command_of_flow.make_context("run", [*command[3:], cron, option, zone]) as context:
        assert (context.params["cron"], context.params["timezone"]) == (cron, zone)
        assert (cron, zone) == ("0 2 * * *", "Europe/Berlin")


def test_a_flow_without_a_name_has_that_of_its_file_there_too(tmp_path: Path, capsys):
    """A daemon that serves the same file finds the ticks under the same name."""
    lines = [line for line in FLOW.read_text().splitlines() if not line.startswith("name:")]
    (tmp_path / "weekly.yaml").write_text("\n".join(lines))
    arguments = [tmp_path / "weekly.yaml", "--for", "raycronjob", "--cron", "0 2 * * *"]
    assert tvq("render", *arguments) == 0
    [configuration, cron] = documents(capsys.readouterr().out)
    assert cron["metadata"]["name"] == "weekly"
    (tmp_path / "flow.yaml").write_text(configuration["data"]["flow.yaml"])
    assert load_flow(tmp_path / "flow.yaml") == load_flow(tmp_path / "weekly.yaml")


def test_strings_stay_strings_to_a_reader_of_yaml_1_1():
    tree = {"a": ["off", "yes", "1e3", "0x1", "12:30:00", "null", "tvq", "~", ".5"], "b": "x\ny\n"}
    assert documents(dump_manifests([tree])) == [tree]


# ---- Folders -------------------------------------------------------------------------------------


def tvq(*arguments: object) -> int:
    return run_cli([str(argument) for argument in arguments])


def test_the_site_is_written_once_and_runs_lie_side_by_side(tmp_path: Path, capsys):
    out = tmp_path / "deploy"
    assert tvq(*KUBERAY, "--output", out) == 0
    site = out / "site" / "kustomization.yaml"
    site.write_text(site.read_text().replace("PROJECT", "mine"))
    (out / "base" / "network.yaml").write_text("stale")
    assert tvq(*KUBERAY, "--output", out, "--name", "other") == 0
    assert "PROJECT" not in site.read_text()
    [kustomization] = documents((out / "run" / "kustomization.yaml").read_text())
    assert kustomization["resources"] == ["other.yaml", "tiny.yaml"]
    assert (out / "base" / "network.yaml").read_text() != "stale"


def test_mlflow_runs_from_the_image_of_the_run(tmp_path: Path, capsys):
    def images(folder: Path) -> set[str]:
        text = "".join(path.read_text() for path in folder.rglob("*.yaml"))
        return set(re.findall(r"image: (\S*tvq:\S+)", text))

    assert images(INFRA / "kubernetes" / "base") == {f"tvq:{version('tvq')}-cpu"}
    assert tvq(*KUBERAY, "--output", tmp_path / "d", "--image", "europe/tvq:9.9.9") == 0
    assert images(tmp_path / "d" / "base") == {"europe/tvq:9.9.9-cpu"}


def test_the_targets_offered_are_those_there_are():
    assert cli_infra._TARGETS == TARGETS  # said twice, so that `tvq --help` need not load them


def test_a_folder_of_somebody_else_is_refused(tmp_path: Path, capsys):
    (tmp_path / "thesis.tex").write_text("precious")
    for target in ("kuberay", "compose"):
        arguments = ["render", "tiny", "data.corpus=gs://b/c", "--for", target, "-o", tmp_path]
        assert tvq(*arguments) == ExitCode.USER
        assert "was not written by this" in capsys.readouterr().err
    assert [path.name for path in tmp_path.iterdir()] == ["thesis.tex"]


KUBECTL = shutil.which("kubectl")


def references(node: Any) -> set[tuple[str, str]]:
    """(kind, name) of the config maps that a tree refers to."""
    found = set()
    if isinstance(node, list):
        for item in node:
            found |= references(item)
    elif isinstance(node, dict):
        for key, value in node.items():
            if key in ("configMap", "configMapRef", "configMapKeyRef"):
                found.add(("ConfigMap", value["name"]))
            found |= references(value)
    return found


@pytest.mark.skipif(KUBECTL is None, reason="the extra `infra` brings kubectl, which is kustomize")
@pytest.mark.parametrize("queue", [False, True])
def test_kustomize_puts_the_site_into_everything(tmp_path: Path, capsys, queue: bool):
    out = tmp_path / "deploy"
    assert tvq(*KUBERAY, "--output", out) == 0
    assert tvq("render", "tiny", "--for", "raycluster", "--name", "shared", "-o", out) == 0
    assert tvq("render", FLOW, "--for", "cronjob", "--cron", "0 2 * * *", "-o", out) == 0
    site = out / "site" / "kustomization.yaml"
    if queue:
        site.write_text(site.read_text() + "  - ../components/queue\n")
    ended = subprocess.run(
        [str(KUBECTL), "kustomize", site.parent], capture_output=True, text=True, check=False
    )
    assert ended.returncode == 0, ended.stderr
    built = documents(ended.stdout)
    for document in built:
        assert problems(document) == []
        assert document["kind"] == "Namespace" or document["metadata"]["namespace"] == "tvq"
    config_maps = {("ConfigMap", d["metadata"]["name"]) for d in built if d["kind"] == "ConfigMap"}
    assert references(built) == config_maps
    spot = 0
    for document in built:
        for pod in pods(document):
            for container in pod["containers"]:
                name, _, tag = container["image"].rpartition(":")
                if tag.startswith("0.1.0-"):
                    assert name == "REGISTRY/PROJECT/tvq/tvq"
            spot += pod.get("nodeSelector", {}).get("cloud.google.com/gke-spot") == "true"
    assert spot == 3  # workers of the RayJob, the RayCluster and the RayCronJob
    queued = [
        document["kind"]
        for document in built
        if "kueue.x-k8s.io/queue-name" in document["metadata"].get("labels", {})
    ]
    assert sorted(queued) == (["RayCronJob", "RayJob"] if queue else [])


def test_the_folder_of_compose_is_whole(tmp_path: Path, capsys):
    out = tmp_path / "box"
    assert tvq("render", "tiny", "data.corpus=/corpora/b", "--for", "compose", "-o", out) == 0
    recipe = recipes.from_yaml((out / "recipe.yaml").read_text(), "recipe")
    assert recipe == recipes.load("tiny", ("data.corpus=/corpora/b",))
    for name in ("compose.yaml", "compose.gpu.yaml", "secrets.sh"):
        assert (out / name).read_text() == (INFRA / "compose" / name).read_text()
    assert (out / "prometheus/alerts.yaml").read_text() == (INFRA / "alerts.yaml").read_text()
    written = dict(
        line.split("=", 1) for line in (out / ".env").read_text().splitlines() if "=" in line
    )
    assert written == dict(line.split("=", 1) for line in rendered("compose-cpu").splitlines())


def test_what_compose_asks_for_is_what_render_says():
    asked = set(re.findall(r"\$\{(\w+)", (INFRA / "compose/compose.yaml").read_text()))
    said = {line.partition("=")[0] for line in rendered("compose-cpu").splitlines()}
    assert asked <= said
    gpu = set(re.findall(r"\$\{(\w+)", (INFRA / "compose/compose.gpu.yaml").read_text()))
    assert gpu <= {line.partition("=")[0] for line in rendered("compose-gpu").splitlines()}


def test_ray_up_obeys_rays_own_schema():
    import importlib.util

    import jsonschema

    [place] = importlib.util.find_spec("ray").submodule_search_locations  # type: ignore[union-attr]
    schema = json.loads((Path(place) / "autoscaler" / "ray-schema.json").read_text())
    for name in RENDERED:
        if name.startswith("ray-up"):
            [document] = documents(rendered(name))
            jsonschema.validate(document, schema)
            assert document["available_node_types"]["worker"]["min_workers"] == 0
    [document] = documents(rendered("ray-up-tpu"))
    node = document["available_node_types"]["worker"]["node_config"]
    assert node["acceleratorType"] == "v5litepod-16"
    with pytest.raises(jsonschema.ValidationError):
        jsonschema.validate(document | {"max_worker": 1}, schema)


# ---- Mistakes ------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("arguments", "expected"),
    [
        (["tiny", "--for", "kuberay"], "data.corpus: no corpus given"),
        (["tiny", "data.corpus=books", "--for", "kuberay"], "a folder of this machine"),
        (["tiny", "data.corpus=books", "--for", "compose"], "data.corpus=/corpora/NAME"),
        ([*KUBERAY[1:], "cluster.workers=0"], "cluster.workers: is 0"),
        ([*KUBERAY[1:], "cluster.address=ray://x:1"], "cluster.address"),
        ([*KUBERAY[1:], "tracking.uri=sqlite:///x.db"], "tracking.uri"),
        ([*KUBERAY[1:], "--name", "My_Run"], "give another with --name"),
        ([*KUBERAY[1:], "--name", "a" * 37], "at most 36"),
        ([*KUBERAY[1:], "--image", "tvq:latest"], "never `latest`"),
        ([*KUBERAY[1:], "--image", "tvq"], "NAME:VERSION"),
        ([*KUBERAY[1:], "--cron", "0 2 * * *"], "--cron: is of schedules"),
        ([str(FLOW), "--for", "cronjob"], "needs when, such as --cron"),
        (["none.yaml", "--for", "cronjob", "--cron", "0 2 * * *"], "no such file"),
        ([str(FLOW), "--for", "cronjob", "--cron", "0 2 *"], "has 3 fields"),
        ([str(FLOW), "--for", "cronjob", "--cron", "0 25 * * *"], "hour: expected 0 to 23"),
        ([str(FLOW), "a.b=1", "--for", "cronjob", "--cron", "0 2 * * *"], "behind `train:`"),
        (
            [*("tiny", "data.corpus=gs://b/c", "--for", "ray-up", "cluster.accelerator=gpu"),
             "cluster.devices_per_worker=3"],
            "no machine of Google has 3 GPUs",
        ),
        (["tiny", "--for", "docker"], "'docker'"),
    ],
)  # fmt: skip
def test_a_mistake_is_one_line(capsys, arguments: list[str], expected: str):
    assert tvq("render", *arguments) == ExitCode.USER
    output = capsys.readouterr()
    assert output.out == ""
    assert len(output.err.splitlines()) == 1
    assert expected in output.err
