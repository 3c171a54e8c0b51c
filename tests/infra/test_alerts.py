"""infra/alerts.yaml and the dashboard: they ask for what is exported, in PromQL that parses."""

import ast
import json
import re
import shutil
import subprocess
from pathlib import Path
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


CASES = {
    # Metric to its values from minute to minute: of a run that is well, and of one that is not.
    "NoProgress": {"ray_tvq_progress_update": ("0+10x120", "0+10x60 600x60")},
    "CheckpointTooOld": {"ray_tvq_checkpoint_age_seconds": ("1800x120", "0+60x120")},
    "UploadsLag": {"ray_tvq_upload_lag_seconds": ("60x120", "60x60 1000x60")},
    "SpoolGrows": {"ray_tvq_spool_depth": ("30-0.1x120", "0+1x120")},
    "UpdatesSkipped": {
        "ray_tvq_progress_update": ("0+10x120", "0+10x120"),
        "ray_tvq_skipped_updates": ("1x120", "0x60 1+1x60"),
    },
    "CodesDie": {"ray_tvq_dead_codes": ("200x120", "300x120")},
    "TickMissed": {"tvq_missed_ticks": ("0x120", "0x110 1x10")},
}


@pytest.mark.parametrize("alert", sorted(ALERTS))
def test_prometheus_calls_for_who_is_ill_and_for_nobody_else(alert: str, tmp_path: Path):
    """By Prometheus's own evaluation of the rules, over two hours of one run that is well."""
    promtool = shutil.which("promtool")
    if promtool is None:
        pytest.skip("no promtool on this machine: it comes with Prometheus")
    label = "schedule" if alert == "TickMissed" else "run"
    [severity] = [rule["labels"]["severity"] for rule in rules() if rule["alert"] == alert]
    called = f'{{alertname="{alert}", {label}="ill", severity="{severity}"}}'
    test = {
        "interval": "1m",
        "input_series": [
            {"series": f'{metric}{{{label}="{who}", WorkerId="{who}"}}', "values": values}
            for metric, both in CASES[alert].items()
            for who, values in zip(("well", "ill"), both, strict=True)
        ],
        "promql_expr_test": [
            {"expr": 'sum without (alertstate) (ALERTS{alertstate="firing"})', "eval_time": at,
             "exp_samples": samples}
            for at, samples in (("30m", []), ("119m", [{"labels": called, "value": 1}]))
        ],
    }  # fmt: skip
    file = tmp_path / "test.yaml"
    told = {"rule_files": [str(INFRA / "alerts.yaml")], "evaluation_interval": "1m"}
    file.write_text(json.dumps(told | {"tests": [test]}))  # JSON is YAML
    ended = subprocess.run([promtool, "test", "rules", file], capture_output=True, text=True)
    assert ended.returncode == 0, ended.stdout + ended.stderr


def test_prometheus_reads_the_configuration_of_the_box(tmp_path: Path):
    promtool = shutil.which("promtool")
    if promtool is None:
        pytest.skip("no promtool on this machine: it comes with Prometheus")
    shutil.copy(INFRA / "compose/prometheus/prometheus.yaml", tmp_path)
    shutil.copy(INFRA / "alerts.yaml", tmp_path)
    command = [promtool, "check", "config", tmp_path / "prometheus.yaml"]
    ended = subprocess.run(command, capture_output=True, text=True)
    assert ended.returncode == 0, ended.stdout + ended.stderr
    assert "7 rules found" in ended.stdout


def test_the_dashboard_reads_the_data_source_that_is_provisioned():
    [source] = documents(
        (INFRA / "compose/grafana/provisioning/datasources/prometheus.yaml").read_text()
    )
    uids = {found["uid"] for found in source["datasources"]}
    panels = json.loads(DASHBOARD.read_text())["panels"]
    assert {panel["datasource"]["uid"] for panel in panels} == uids
    assert len({panel["id"] for panel in panels}) == len(panels)
