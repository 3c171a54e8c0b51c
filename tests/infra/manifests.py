"""What the tests of infra/ share: its manifests, what is rendered, and the schemas they obey."""

import functools
import json
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import jsonschema
from click.testing import CliRunner
from jsonschema.protocols import Validator
from ruamel.yaml import YAML

from jobs.cli.main import cli

ROOT = Path(__file__).parents[2]
INFRA = ROOT / "infra"
GOLDEN = ROOT / "tests" / "golden" / "manifests"
SCHEMAS = ROOT / "tests" / "golden" / "schemas"
KUBERNETES = "1.35"
KUBERAY = "1.7.0"

FLOW = Path(__file__).parent / "flow.yaml"
RENDERED: dict[str, list[str]] = {
    "rayjob-cpu": ["tiny", "data.corpus=gs://b/corpora/books", "--for", "kuberay"],
    "rayjob-gpu": [
        *("enwik8", "data.corpus=gs://b/corpora/enwik8", "--for", "kuberay"),
        *("cluster.accelerator=gpu", "cluster.workers=8", "cluster.cpus_per_worker=8"),
        *("cluster.memory_gib=64",),
    ],
    "rayjob-tpu-multislice": [
        *("pg19", "data.corpus=gs://b/corpora/pg19", "--for", "kuberay"),
        *("cluster.accelerator=tpu", "cluster.accelerator_version=v5e"),
        *("cluster.topology=4x4", "cluster.workers=8", "cluster.cpus_per_worker=100"),
        *("cluster.memory_gib=160", "cluster.grace_seconds=60", "--image", "europe/tvq:1.2.3"),
    ],
    "raycluster-tpu": [
        *("pg19", "--for", "raycluster", "--name", "shared"),
        *("cluster.accelerator=tpu", "cluster.accelerator_version=v4"),
        *("cluster.topology=2x2x2", "cluster.workers=2"),
    ],
    "raycronjob": [
        *(str(FLOW), "--for", "raycronjob"),
        *("--cron", "0 2 * * *", "--timezone", "Europe/Berlin"),
    ],
    "cronjob": [
        *(str(FLOW), "--for", "cronjob"),
        *("--cron", "0 2 * * *", "--timezone", "Europe/Berlin"),
    ],
    "compose-cpu": ["tiny", "data.corpus=/corpora/books", "--for", "compose"],
    "compose-gpu": [
        *("small", "data.corpus=gs://tvq/corpora/books", "--for", "compose"),
        *("cluster.accelerator=gpu", "cluster.workers=1", "cluster.devices_per_worker=2"),
    ],
    "ray-up-tpu": [
        *("enwik8", "data.corpus=gs://b/corpora/enwik8", "--for", "ray-up"),
        *("cluster.accelerator=tpu", "cluster.accelerator_version=v5e"),
        *("cluster.topology=4x4", "cluster.workers=4", "cluster.cpus_per_worker=24"),
    ],
    "ray-up-gpu": [
        *("enwik8", "data.corpus=gs://b/corpora/enwik8", "--for", "ray-up"),
        *("cluster.accelerator=gpu", "cluster.workers=4", "cluster.devices_per_worker=4"),
    ],
    "ray-up-cpu": ["small", "data.corpus=gs://b/corpora/books", "--for", "ray-up"],
}
"""Name of the golden file: arguments of `tvq render`."""
ON_KUBERNETES = [name for name in RENDERED if not name.startswith(("compose", "ray-up"))]


@functools.cache
def rendered(name: str) -> str:
    """What `tvq render` prints, with the arguments of that golden file."""
    ended = CliRunner().invoke(cli, ["render", *RENDERED[name]], obj={"quiet": False})
    assert ended.exit_code == 0, (ended.output, ended.exception)
    return ended.stdout


def documents(text: str) -> list[dict[str, Any]]:
    """The documents of a YAML text, read as YAML 1.1, as Kubernetes does."""
    yaml = YAML(typ="safe", pure=True)
    yaml.version = (1, 1)
    return [document for document in yaml.load_all(text) if document]


def base_documents() -> list[dict[str, Any]]:
    """All that infra/kubernetes/base holds, kustomize's own files apart."""
    return [
        document
        for path in sorted((INFRA / "kubernetes" / "base").rglob("*.yaml"))
        if path.name != "kustomization.yaml"
        for document in documents(path.read_text())
    ]


@functools.cache
def _validators() -> dict[str, Validator]:
    found = {}
    for path in sorted(SCHEMAS.glob("*.json")):
        schemas = json.loads(path.read_text())
        for kind, schema in schemas["kinds"].items():
            whole = {**schema, "definitions": schemas["definitions"]}
            found[kind] = jsonschema.Draft7Validator(whole)
    return found


def problems(document: dict[str, Any]) -> list[str]:
    """What the schemas of the pinned releases say against a manifest: path and reason."""
    kind = f"{document['apiVersion']} {document['kind']}"
    if kind not in _validators():
        return [f"{kind}: no schema; add it to tests/infra/make_schemas.py"]
    found = _validators()[kind].iter_errors(document)
    return [f"{'.'.join(map(str, error.path))}: {error.message[:200]}" for error in found]


def pods(node: Any) -> Iterator[dict[str, Any]]:
    """The specs of all pods in a document, however deep."""
    if isinstance(node, dict):
        if "containers" in node:
            yield node
        for value in node.values():
            yield from pods(value)
    elif isinstance(node, list):
        for value in node:
            yield from pods(value)
