"""infra/alerts.yaml and the dashboard: they ask for what is exported, in PromQL that parses."""

import ast
import json
import re
from typing import Any

import pytest

from tests.infra.manifests import INFRA, ROOT, documents

DASHBOARD = INFRA / "compose/grafana/dashboards/training.json"
ALERTS = {
    *("NoProgress", "CheckpointTooOld", "UploadsLag", "SpoolGrows", "UpdatesSkipped"),
    *("CodesDie", "TickMissed"),
}


def rules() -> list[dict[str, Any]]:
    [document] = documents((INFRA / "alerts.yaml").read_text())
    return [rule for group in document["groups"] for rule in group["rules"]]


def expressions() -> list[str]:
    panels = json.loads(DASHBOARD.read_text())["panels"]
    shown = [target["expr"] for panel in panels for target in panel["targets"]]
    return [rule["expr"] for rule in rules()] + shown


def asked_for() -> set[str]:
    return {name for text in expressions() for name in re.findall(r"\b\w*tvq_\w+", text)}


def exported() -> set[str]:
    """The names of metrics that code under jobs/ writes out: strings that are one, whole."""
    found = set()
    for path in (ROOT / "jobs").rglob("*.py"):
        prefix = "ray_" if path.name == "ray_metrics.py" else ""  # Ray's exporter puts it there
        for node in ast.walk(ast.parse(path.read_text())):
            if isinstance(node, ast.Constant) and isinstance(node.value, str):
                found |= (
                    {prefix + node.value} if re.fullmatch(r"tvq_[a-z_]+", node.value) else set()
                )
    return found - {"tvq_format"}  # a field of exported checkpoints


def test_every_metric_asked_for_is_exported():
    assert asked_for() <= exported()
    assert {"tvq_missed_ticks", "ray_tvq_progress_update"} <= asked_for()


def test_there_is_an_alert_for_each_thing_that_goes_wrong():
    assert {rule["alert"] for rule in rules()} == ALERTS
    readme = (INFRA / "README.md").read_text()
    for rule in rules():
        assert set(rule) <= {"alert", "expr", "for", "labels", "annotations"}
        assert rule["labels"]["severity"] in ("page", "warn")
        assert {"summary", "description", "runbook"} == rule["annotations"].keys()
        assert rule["annotations"]["runbook"] == f"infra/README.md#{rule['alert'].lower()}"
        assert f"### {rule['alert']}\n" in readme


def test_every_expression_parses():
    parser = pytest.importorskip("promql_parser", reason="the extra `infra` brings promql-parser")
    for text in expressions():
        parser.parse(text)
    with pytest.raises(ValueError, match=r"."):
        parser.parse("max by (run (ray_tvq_spool_depth)")


def test_the_dashboard_reads_the_data_source_that_is_provisioned():
    [source] = documents(
        (INFRA / "compose/grafana/provisioning/datasources/prometheus.yaml").read_text()
    )
    uids = {found["uid"] for found in source["datasources"]}
    panels = json.loads(DASHBOARD.read_text())["panels"]
    assert {panel["datasource"]["uid"] for panel in panels} == uids
    assert len({panel["id"] for panel in panels}) == len(panels)
