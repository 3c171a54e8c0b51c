"""Writes the schemas in tests/golden/schemas/ anew, from the releases that they are taken from.

    python -m tests.infra.make_schemas FOLDER_OF_KUBERAY_CRDS

Kubernetes's come from the package kubernetes-validate (extra `infra`), KubeRay's from the custom
resource definitions of its release, crd_ray*.yaml. What only people read is left out, and what is
said several times is said once: 3 MB become 0.2.
"""

import hashlib
import importlib.resources
import json
import sys
from collections import Counter
from pathlib import Path
from typing import Any

from ruamel.yaml import YAML

from tests.infra.manifests import KUBERAY, KUBERNETES, SCHEMAS

KINDS = {
    "v1": ["ConfigMap", "Namespace", "Service", "ServiceAccount"],
    "apps/v1": ["Deployment", "StatefulSet"],
    "batch/v1": ["CronJob"],
    "networking.k8s.io/v1": ["NetworkPolicy"],
    "policy/v1": ["PodDisruptionBudget"],
    "rbac.authorization.k8s.io/v1": ["Role", "RoleBinding"],
}
_SHARED_BYTES = 200
"""A part that is said several times and is longer becomes a definition."""


def kubernetes() -> dict[str, Any]:
    """A schema for each kind, and the definitions that they refer to."""
    source = importlib.resources.files("kubernetes_validate") / "kubernetes-json-schema"
    folder = source / f"v{KUBERNETES}.0-local-strict"
    known = json.loads((folder / "_definitions.json").read_text())["$defs"]
    taken: dict[str, Any] = {}
    kinds = {}

    def take(node: Any) -> Any:
        if isinstance(node, list):
            return [take(item) for item in node]
        if not isinstance(node, dict):
            return node
        if "$ref" in node:
            name = node["$ref"].rpartition("/")[2]
            if name not in taken:
                taken[name] = None  # it may refer to itself
                taken[name] = take(known[name])
            return {"$ref": f"#/definitions/{name}"}
        return {key: take(value) for key, value in _for_machines(node).items()}

    for api, names in KINDS.items():
        group, _, version = api.rpartition("/")
        for name in names:
            suffix = f"-{group.partition('.')[0]}" if group else ""
            schema = json.loads((folder / f"{name.lower()}{suffix}-{version}.json").read_text())
            kinds[f"{api} {name}"] = take(schema)
    return {"kinds": kinds, "definitions": taken}


def kuberay(folder: Path) -> dict[str, Any]:
    """A strict schema for each kind: a field that is not there is an error, and not ignored."""
    kinds = {}
    for path in sorted(folder.glob("crd_*.yaml")):
        crd = YAML(typ="safe").load(path)
        for version in crd["spec"]["versions"]:
            if version["name"] == "v1":
                schema = _strict(version["schema"]["openAPIV3Schema"])
                schema["properties"]["metadata"] = {"type": "object"}
                kinds[f"ray.io/v1 {crd['spec']['names']['kind']}"] = schema
    counts: Counter[str] = Counter()
    _count(kinds, counts)
    definitions: dict[str, Any] = {}
    shared = {kind: _share(schema, counts, definitions) for kind, schema in kinds.items()}
    return {"kinds": shared, "definitions": definitions}


def _for_machines(node: dict[str, Any]) -> dict[str, Any]:
    # A property may be called "description": only a text is one.
    return {
        key: value
        for key, value in node.items()
        if not (key in ("description", "$schema", "$id") and isinstance(value, str))
        and not key.startswith("x-kubernetes")
    }


def _strict(node: Any) -> Any:
    if isinstance(node, list):
        return [_strict(item) for item in node]
    if not isinstance(node, dict):
        return node
    made = {key: _strict(value) for key, value in _for_machines(node).items()}
    if node.get("x-kubernetes-int-or-string"):
        made = {"anyOf": [{"type": "integer"}, {"type": "string"}]}
    elif "properties" in node and not node.get("x-kubernetes-preserve-unknown-fields"):
        made.setdefault("additionalProperties", False)
    return made


def _key(node: Any) -> str | None:
    if not isinstance(node, dict) or "type" not in node:
        return None
    text = json.dumps(node, sort_keys=True)
    return hashlib.sha256(text.encode()).hexdigest()[:12] if len(text) > _SHARED_BYTES else None


def _count(node: Any, counts: Counter[str]) -> None:
    if (key := _key(node)) is not None:
        counts[key] += 1
    for value in (
        node.values() if isinstance(node, dict) else node if isinstance(node, list) else ()
    ):
        _count(value, counts)


def _share(node: Any, counts: Counter[str], definitions: dict[str, Any]) -> Any:
    if isinstance(node, list):
        return [_share(item, counts, definitions) for item in node]
    if not isinstance(node, dict):
        return node
    key = _key(node)
    if key is not None and counts[key] > 1:
        if key not in definitions:
            definitions[key] = {
                name: _share(value, counts, definitions) for name, value in node.items()
            }
        return {"$ref": f"#/definitions/{key}"}
    return {name: _share(value, counts, definitions) for name, value in node.items()}


def main() -> None:
    """See above."""
    [folder] = sys.argv[1:]
    for name, made in (
        (f"kubernetes-{KUBERNETES}.json", kubernetes()),
        (f"kuberay-{KUBERAY}.json", kuberay(Path(folder))),
    ):
        (SCHEMAS / name).write_text(json.dumps(made, sort_keys=True, indent=1) + "\n")


if __name__ == "__main__":
    main()
