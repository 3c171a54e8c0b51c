"""infra/terraform: it parses, and gives nobody more than is said."""

import re
from pathlib import Path
from typing import Any

import pytest

from tests.infra.manifests import INFRA

FILES = sorted((INFRA / "terraform").glob("*.tf"))


def parsed() -> dict[str, list[Any]]:
    hcl2 = pytest.importorskip("hcl2", reason="the extra `infra` brings python-hcl2")
    blocks: dict[str, list[Any]] = {}
    for path in FILES:
        with path.open() as file:
            for kind, found in hcl2.load(file).items():
                blocks.setdefault(kind, []).extend(found if isinstance(found, list) else [found])
    return blocks


def resources(kind: str) -> list[dict[str, Any]]:
    found = []
    for block in parsed()["resource"]:
        for name, named in block.items():
            if name.strip('"') == kind:
                found += list(named.values())
    assert found, kind
    return found


def text_of(path: Path) -> str:
    return re.sub(r"#.*", "", path.read_text())


def test_every_file_parses_and_every_reference_is_to_something_there_is():
    blocks = parsed()
    declared = {
        (kind.strip('"'), name.strip('"'))
        for block in blocks["resource"]
        for kind, named in block.items()
        for name in named
    }
    variables = {name.strip('"') for block in blocks["variable"] for name in block}
    used_variables, used_resources = set(), set()
    for path in FILES:
        text = text_of(path)
        used_variables |= set(re.findall(r"\bvar\.(\w+)", text))
        used_resources |= set(re.findall(r"\b(google_\w+)\.(\w+)\b", text))
    assert used_variables == variables
    assert used_resources <= declared


def test_buckets_are_closed_and_deleted_files_can_be_had_back():
    for bucket in resources("google_storage_bucket"):
        assert bucket["uniform_bucket_level_access"] is True
        assert bucket["public_access_prevention"].strip('"') == "enforced"
        assert bucket["soft_delete_policy"]
        assert bucket["versioning"]


def test_no_rule_removes_a_run_by_age():
    text = text_of(INFRA / "terraform" / "buckets.tf")
    prefixes = re.search(r"matches_prefix\s*=\s*\[(.*)\]", text)
    assert prefixes
    # Whoever's root is gs://BUCKET/runs keeps what its recipes keep.
    for prefix in re.findall(r'"([^"]+)"', prefixes[1]):
        assert not "runs/some-run/checkpoints/1".startswith(prefix)


def test_roles_are_narrow_and_there_are_no_keys():
    roles = {role for path in FILES for role in re.findall(r"roles/[\w.]+", text_of(path))}
    assert roles == {
        "roles/storage.objectUser",
        "roles/storage.objectCreator",
        "roles/storage.objectViewer",
        "roles/iam.workloadIdentityUser",
        "roles/logging.logWriter",
        "roles/monitoring.metricWriter",
        "roles/artifactregistry.reader",
    }
    assert not any("google_service_account_key" in path.read_text() for path in FILES)


def test_everything_that_computes_is_spot_and_comes_from_nothing():
    pools = resources("google_container_node_pool")
    assert len(pools) == 2
    steady = [pool for pool in pools if pool["name"].strip('"') == "steady"]
    for pool in pools:
        [node], [scaling] = pool["node_config"], pool["autoscaling"]
        assert pool in steady or node["spot"] is True
        least = scaling.get("min_node_count", scaling.get("total_min_node_count"))
        assert pool in steady or least == 0
        assert node["workload_metadata_config"][0]["mode"].strip('"') == "GKE_METADATA"


def test_the_accounts_are_those_of_the_manifests():
    site = (INFRA / "kubernetes/site/kustomization.yaml").read_text()
    named = set(re.findall(r"tvq-(\w+)@PROJECT", site))
    assert named
    identities = resources("google_service_account_iam_member")[0]
    assert set(re.findall(r"\w+", str(identities["for_each"]))) >= named
    buckets = set(re.findall(r"gs://PROJECT-tvq-(\w+)", site))
    assert buckets
    text = text_of(INFRA / "terraform" / "buckets.tf")
    assert all(re.search(rf"^\s+{name}\s+= \{{", text, re.MULTILINE) for name in buckets)
