"""Every manifest obeys the schemas of the pinned releases and the policy of the house."""

import copy
import re
from typing import Any

import pytest

from tests.infra.manifests import (
    KUBERAY,
    KUBERNETES,
    ON_KUBERNETES,
    SCHEMAS,
    base_documents,
    documents,
    pods,
    problems,
    rendered,
)

BASE = [
    pytest.param(document, id=f"{document['kind']}-{document['metadata']['name']}")
    for document in base_documents()
]


def all_documents() -> list[dict[str, Any]]:
    made = [document for name in ON_KUBERNETES for document in documents(rendered(name))]
    return base_documents() + made


@pytest.mark.parametrize("document", BASE)
def test_base_obeys_the_schemas(document: dict[str, Any]):
    assert problems(document) == []


@pytest.mark.parametrize("name", ON_KUBERNETES)
def test_what_is_rendered_obeys_the_schemas(name: str):
    found = documents(rendered(name))
    assert found
    for document in found:
        assert problems(document) == []


def ray_job() -> dict[str, Any]:
    _, job = documents(rendered("rayjob-cpu"))
    return job


@pytest.mark.parametrize(
    ("path", "field", "value"),
    [
        ("spec", "entrypiont", "tvq"),
        ("spec", "backoffLimit", "two"),
        ("spec.rayClusterSpec.workerGroupSpecs.0", "minReplica", 1),
        ("spec.rayClusterSpec.authOptions", "mode", "tokens"),
        ("spec.rayClusterSpec.headGroupSpec.template.spec.containers.0", "ports", [{"port": 1}]),
        ("spec.rayClusterSpec.headGroupSpec.template.spec", "terminationGracePeriod", 60),
    ],
)
def test_a_mistake_in_a_rayjob_is_found(path: str, field: str, value: object):
    job = ray_job()
    node: Any = job
    for part in path.split("."):
        node = node[int(part)] if part.isdigit() else node[part]
    node[field] = value
    assert problems(job)


def test_a_mistake_in_a_deployment_is_found():
    [deployment] = [document for document in base_documents() if document["kind"] == "Deployment"]
    for field, value in (("replica", 1), ("replicas", "one")):
        broken = copy.deepcopy(deployment)
        broken["spec"][field] = value
        assert problems(broken)


# ---- Policy --------------------------------------------------------------------------------------


def containers() -> list[tuple[dict[str, Any], dict[str, Any]]]:
    """Each container with its pod, those that KubeRay makes of a bare section included."""
    found = []
    for document in all_documents():
        for pod in pods(document):
            for container in [*pod.get("initContainers", []), *pod["containers"]]:
                found.append((pod, container))
    assert len(found) > 20
    return found


def test_no_container_is_root_or_can_become_it():
    for pod, container in containers():
        of_pod, own = pod["securityContext"], container["securityContext"]
        assert of_pod["runAsNonRoot"] is True
        assert of_pod["runAsUser"] > 0
        assert not {"runAsUser", "runAsNonRoot", "privileged"} & own.keys()
        assert own["allowPrivilegeEscalation"] is False
        assert own["readOnlyRootFilesystem"] is True
        assert own["capabilities"] == {"drop": ["ALL"]}
        assert of_pod["seccompProfile"] == {"type": "RuntimeDefault"}
        assert not {"hostNetwork", "hostPID", "hostIPC"} & pod.keys()
        assert all("hostPath" not in volume for volume in pod["volumes"])


def test_no_limit_is_missing():
    for _, container in containers():
        for part in ("requests", "limits"):
            assert {"cpu", "memory", "ephemeral-storage"} <= container["resources"][part].keys()


def test_every_image_has_a_version():
    for _, container in containers():
        tag = container["image"].rpartition("/")[2].partition(":")[2]
        assert re.match(r"v?\d+\.\d+", tag), container["image"]


def test_every_pod_has_an_account_without_a_token_but_those_that_ask_kubernetes():
    asking = set()
    for document in all_documents():
        for pod in pods(document):
            if pod["automountServiceAccountToken"]:
                asking.add((document["kind"], pod["containers"][0]["name"]))
    assert asking == {("CronJob", "create"), ("RayCluster", "ray-head")}


SECRET = re.compile(r"password|passwd|secret|token|credential|(?<!public)key$", re.IGNORECASE)


def secrets_in_clear(node: Any) -> list[str]:
    """Names of values that should come from a secret and are written out."""
    found = []
    if isinstance(node, dict):
        name = node.get("name")
        value = node.get("value")
        if isinstance(name, str) and SECRET.search(name) and value and not value.startswith("/"):
            found.append(name)
        if node.get("kind") == "Secret" and (node.get("data") or node.get("stringData")):
            found.append("Secret")
        for key, item in node.items():
            if isinstance(item, str) and re.search(r"://[^/\s:@]+:[^/\s@]+@", item):
                found.append(key)
            found += secrets_in_clear(item)
    elif isinstance(node, list):
        for item in node:
            found += secrets_in_clear(item)
    return found


def test_no_secret_is_in_clear():
    assert [name for document in all_documents() for name in secrets_in_clear(document)] == []


def test_a_secret_in_clear_would_be_found():
    assert secrets_in_clear({"env": [{"name": "PGPASSWORD", "value": "hunter2"}]})
    assert secrets_in_clear({"args": {"uri": "postgresql://mlflow:hunter2@postgres/mlflow"}})
    assert secrets_in_clear({"kind": "Secret", "stringData": {"a": "b"}})


def test_every_pod_is_covered_by_a_policy_and_a_budget():
    """By the labels alone, as Kubernetes does it; the wildcard policy denies all else."""
    budgets = [d for d in base_documents() if d["kind"] == "PodDisruptionBudget"]
    policies = [d for d in base_documents() if d["kind"] == "NetworkPolicy"]

    def selects(selector: dict[str, Any], labels: dict[str, str]) -> bool:
        return all(
            labels.get(key) == value for key, value in selector.get("matchLabels", {}).items()
        ) and all(
            labels.get(rule["key"]) in rule["values"]
            for rule in selector.get("matchExpressions", [])
        )

    def templates(node: Any) -> list[dict[str, Any]]:
        if isinstance(node, list):
            return [found for item in node for found in templates(item)]
        if not isinstance(node, dict):
            return []
        own = [node] if "containers" in node.get("spec", {}) else []
        return own + [found for item in node.values() for found in templates(item)]

    long_lived = 0
    for template in templates(all_documents()):
        labels = template["metadata"]["labels"]
        egress = [p for p in policies if selects(p["spec"]["podSelector"], labels)]
        assert len(egress) > 2, labels  # besides those that hold for all pods
        if template["spec"].get("restartPolicy") != "Never":
            long_lived += 1
            assert sum(selects(b["spec"]["selector"], labels) for b in budgets) == 1, labels
    assert long_lived > 10


def test_the_accounts_and_settings_that_pods_name_are_those_there_are():
    accounts = {d["metadata"]["name"] for d in base_documents() if d["kind"] == "ServiceAccount"}
    for document in all_documents():
        for pod in pods(document):
            if pod["containers"][0]["name"] != "postgres":
                assert pod["serviceAccountName"] in accounts


def test_pods_have_longer_to_end_than_a_save_may_take():
    for name, grace in (("rayjob-cpu", 25), ("rayjob-tpu-multislice", 60)):
        found = {
            pod["containers"][0]["name"]: pod
            for document in documents(rendered(name))
            for pod in pods(document)
        }
        for container in ("ray-head", "ray-worker"):
            assert found[container]["terminationGracePeriodSeconds"] > grace


# ---- The schemas themselves ----------------------------------------------------------------------


def test_the_schemas_are_those_of_the_release():
    """Derived anew from the package, they are what lies in tests/golden."""
    pytest.importorskip(
        "kubernetes_validate", reason="the extra `infra` brings Kubernetes's schemas"
    )
    import json

    from tests.infra.make_schemas import kubernetes

    stored = json.loads((SCHEMAS / f"kubernetes-{KUBERNETES}.json").read_text())
    assert kubernetes() == stored
    assert (SCHEMAS / f"kuberay-{KUBERAY}.json").is_file()
