"""infra/compose: its schema, its policy, and the same processes on this machine's loopback."""

import json
import os
import re
import stat
import subprocess
import time
from pathlib import Path
from typing import Any

import pytest

from jobs.cli.main import run_cli
from jobs.cli.schedules import serve
from tests.infra.manifests import INFRA, documents, rendered

COMPOSE = INFRA / "compose"
TEXT = (COMPOSE / "compose.yaml").read_text()


def interpolated(text: str, variables: dict[str, str]) -> str:
    """As compose does it: ${NAME:-default}, and $$ for a dollar."""

    def value(found: re.Match[str]) -> str:
        if found[0] == "$$":
            return "$"
        return variables.get(found[1]) or found[2] or ""

    return re.sub(r"\$\$|\$\{(\w+)(?::-([^}]*))?\}", value, text)


def services(variables: dict[str, str] | None = None) -> dict[str, Any]:
    [document] = documents(interpolated(TEXT, variables or {}))
    return document["services"]


def test_it_obeys_the_compose_specification():
    compose = pytest.importorskip("compose_spec", reason="the extra `infra` brings compose-spec")

    def read(text: str, variables: dict[str, str]) -> list[str]:
        [document] = documents(interpolated(text, variables))  # with its `<<` merged
        return compose.PyCompose.from_json(json.dumps(document)).service_names()

    for name in ("compose-cpu", "compose-gpu"):
        variables = dict(line.split("=", 1) for line in rendered(name).splitlines())
        assert {"head", "worker", "mlflow", "postgres"} <= set(read(TEXT, variables))
        assert read((COMPOSE / "compose.gpu.yaml").read_text(), variables) == ["worker"]
    with pytest.raises(ValueError, match="stop_grace"):
        read(TEXT.replace("stop_grace_period: 60s", "stop_grace: 60s"), {})


@pytest.mark.parametrize("name", services())
def test_no_container_is_root_without_limit_or_open_to_others(name: str):
    service = services()[name]
    assert int(service["user"].partition(":")[0]) > 0
    assert service["read_only"] is True
    assert service["cap_drop"] == ["ALL"]
    assert service["security_opt"] == ["no-new-privileges:true"]
    assert {"cpus", "memory"} <= service["deploy"]["resources"]["limits"].keys()
    assert re.search(r":v?\d+\.\d+", service["image"]), service["image"]
    assert all(port.startswith("127.0.0.1:") for port in service.get("ports", []))
    for key, value in service.get("environment", {}).items():
        if re.search(r"PASSWORD|TOKEN|SECRET", key):
            assert value.startswith("/run/secrets/") or key == "RAY_AUTH_MODE"


def test_every_name_that_a_service_is_called_by_is_one():
    named = set(re.findall(r"\b(objects|postgres|mlflow|head|prometheus|grafana):\d+", TEXT))
    assert named <= set(services())
    config = (COMPOSE / "prometheus" / "prometheus.yaml").read_text()
    [prometheus] = documents(config)
    options = {"ray": "--metrics-export-port", "schedule": "--metrics-port"}
    assert [scraped["job_name"] for scraped in prometheus["scrape_configs"]] == list(options)
    for scraped in prometheus["scrape_configs"]:
        [source] = scraped["dns_sd_configs"]
        for name in source["names"]:
            option = f"{options[scraped['job_name']]}={source['port']}"
            assert option in services()[name]["command"]


def test_the_daemon_of_the_box_is_one_that_there_is():
    program, *arguments = services()["schedule"]["command"]
    assert (program, *arguments[:2]) == ("tvq", "schedule", "serve")
    with serve.make_context("serve", arguments[2:]) as context:
        assert context.params["address"] == "http://head:8265"
        assert context.params["metrics_host"] == "0.0.0.0"


def test_secrets_are_made_once_and_lie_in_a_closed_folder(tmp_path: Path):
    out = tmp_path / "box"
    arguments = ["render", "tiny", "data.corpus=/corpora/b", "--for", "compose", "-o", str(out)]
    assert run_cli(arguments) == 0
    subprocess.run(["sh", out / "secrets.sh"], check=True, cwd=tmp_path)
    [document] = documents(TEXT)
    wanted = {item["file"].rpartition("/")[2] for item in document["secrets"].values()}
    made = {path.name: path.read_text() for path in (out / "secrets").iterdir()}
    assert made.keys() == wanted
    assert all(re.fullmatch("[0-9a-f]{64}", text) for text in made.values())
    assert len(set(made.values())) == len(made)
    assert stat.S_IMODE((out / "secrets").stat().st_mode) == 0o700
    subprocess.run(["sh", out / "secrets.sh"], check=True, cwd=tmp_path)
    assert made == {path.name: path.read_text() for path in (out / "secrets").iterdir()}


@pytest.mark.slow
@pytest.mark.timeout(1200)
@pytest.mark.ray
@pytest.mark.tracking
def test_the_same_processes_train_on_loopback(tmp_path: Path):
    """Postgres, the object store, MLflow, Ray's head and a worker, the daemon of the schedules and
    Prometheus, as compose.yaml starts them: all but Grafana.

    Commands and environment are the file's; only names of hosts, ports and folders are put in the
    place of the containers' own.
    """
    pytest.importorskip("psycopg2", reason="the extra `server` brings psycopg2")
    from tests.infra.native_box import NativeBox

    with NativeBox(tmp_path) as box:
        box.start("postgres")
        box.upgrade_database()  # an empty one
        box.upgrade_database()  # and one that is as it should be
        box.start("objects")
        box.start("mlflow")
        box.start("head")
        box.start("worker")
        assert box.run("worker", *box.service("worker")["healthcheck"]["test"][1:]) is not None
        trained = box.train()
        assert "trained to update 8" in trained
        stored = box.stored()
        assert any("checkpoints/00000008/manifest.json" in name for name in stored), stored
        [run] = box.tracked_runs()
        assert run["info"]["status"] == "FINISHED"
        name = box.back_up()
        assert any(name in stored_name for stored_name in box.stored())
        assert os.environ.get("RAY_ADDRESS") is None
        box.start("schedule")
        box.start("prometheus")  # last: where it is not installed, all before it was seen to work
        wanted, end = {"ray": 2, "schedule": 1}, time.monotonic() + 120
        while (scraped := box.scraped()) != wanted:
            assert time.monotonic() < end, scraped
            time.sleep(1)
