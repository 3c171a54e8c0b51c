"""`tvq doctor`: each line is well, or says what mends it; no secret is in any."""

import base64
import json
import subprocess
import sys
import threading
import time
from collections.abc import Iterator
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path

import pytest

from jobs.cli.main import run_cli
from jobs.doctor import machine_checks, service_checks
from jobs.doctor.checkup import Finding, redacted
from jobs.errors import ExitCode
from jobs.recipe import ClusterConfig
from tests.services import free_port

# ---- This machine --------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("installed", "expected"),
    [
        ({"jax": "0.10.2", "ray": "2.60.0", "jaxlib": "0.10.2"}, []),
        ({"jax": "0.10.2", "ray": "2.60.0", "jaxlib": "0.10.1"}, ["pip install 'jaxlib==0.10.2'"]),
        ({"jax": "0.12.0", "ray": "2.60.0", "jaxlib": "0.12.0"}, ["pip install 'jax<0.11,>=0.10"]),
        ({"jax": "0.10.2", "jaxlib": "0.10.2"}, ["pip install 'ray<2.61,>=2.60'"]),
        (
            {"jax": "0.10.2", "ray": "2.60.0", "jaxlib": "0.10.2", "jax-cuda13-plugin": "0.10.0"},
            ["pip install 'jax-cuda13-plugin==0.10.2'"],
        ),
    ],
)
def test_versions_that_do_not_fit_are_named(installed: dict[str, str], expected: list[str]):
    requirements = [
        "jax>=0.10,<0.11",
        "ray[data,train]>=2.60,<2.61",
        "pytest>=8; extra == 'dev'",
        "tomli>=2; python_version < '3'",
    ]
    found = list(machine_checks.misfits(requirements, installed.get))
    assert len(found) == len(expected)
    for finding, part in zip(found, expected, strict=True):
        assert not finding.ok
        assert part in finding.mend


def test_a_device_that_is_not_used_is_named(tmp_path: Path, monkeypatch):
    monkeypatch.delenv("JAX_PLATFORMS", raising=False)
    assert machine_checks._unused_device("cpu", tmp_path) == ""
    (tmp_path / "nvidia0").touch()
    assert "'tvq[gpu]'" in machine_checks._unused_device("cpu", tmp_path)
    assert machine_checks._unused_device("gpu", tmp_path) == ""
    monkeypatch.setenv("JAX_PLATFORMS", "cpu")
    assert "unset JAX_PLATFORMS" in machine_checks._unused_device("cpu", tmp_path)


def test_a_time_zone_that_is_none_is_named(monkeypatch):
    monkeypatch.setenv("TZ", "Europe/Nowhere")
    [finding] = machine_checks.time_zone()
    assert finding.mend == "export TZ=UTC"
    monkeypatch.setenv("TZ", "Europe/Berlin")
    [finding] = machine_checks.time_zone()
    assert finding.ok


def test_a_full_disk_is_named(tmp_path: Path, monkeypatch):
    monkeypatch.setattr(machine_checks, "_LEAST_FREE_BYTES", 2**60)
    found = list(machine_checks.disk(tmp_path / "runs"))
    assert any("TMPDIR=" in finding.mend for finding in found)
    assert any("--root" in finding.mend for finding in found)


# ---- Stores --------------------------------------------------------------------------------------


def test_a_folder_is_tried_and_left_as_it_was(tmp_path: Path):
    [finding] = service_checks.store(tmp_path)
    assert finding.ok
    assert "renamed" in finding.found
    assert list(tmp_path.rglob("*.*")) == []


def test_a_folder_that_cannot_be_written_is_named(tmp_path: Path):
    (tmp_path / "file").touch()
    [finding] = service_checks.store(tmp_path / "file" / "runs")
    assert not finding.ok
    assert "cannot be written to" in finding.found
    assert "--root" in finding.mend


def test_a_bucket_is_tried_and_left_as_it_was(bucket: str, object_store):
    [finding] = service_checks.store(f"{bucket}/runs")
    assert finding.ok, finding
    left = service_checks.open_store(bucket)
    assert list(left.list()) == []


def test_a_bucket_that_forbids_is_named_with_the_role_to_give(bucket: str, object_store):
    object_store.fault("403", "POST .*/upload/")
    [finding] = service_checks.store(f"{bucket}/runs")
    assert "cannot be written to" in finding.found
    assert "credentials" in finding.mend or "Storage Object User" in finding.mend


def test_a_bucket_that_is_read_only_late_is_named_by_the_step(bucket: str, object_store):
    object_store.fault("403", "DELETE ")
    [finding] = service_checks.store(f"{bucket}/runs")
    assert "cannot be removed from" in finding.found


# ---- MLflow and clocks ---------------------------------------------------------------------------


@pytest.fixture
def server() -> Iterator[type]:
    """An HTTP server that answers as a test says: for what MLflow answers to nobody."""

    class Handler(BaseHTTPRequestHandler):
        status = 200
        version = "3.17.2"
        ahead = 0.0
        seen: list[dict[str, str]] = []  # noqa: RUF012
        url = ""

        def do_GET(self) -> None:
            self.seen.append(dict(self.headers))
            open_to_all = self.path in ("/health", "/version")
            self.send_response_only(200 if open_to_all else self.status)
            self.send_header("Date", self.date_time_string(int(time.time() + self.ahead)))
            self.end_headers()
            self.wfile.write(self.version.encode())

        def log_message(self, format: str, *arguments: object) -> None:
            """Nothing."""

    http = ThreadingHTTPServer(("127.0.0.1", 0), Handler)
    Handler.url = f"http://127.0.0.1:{http.server_port}"
    Handler.seen = []
    threading.Thread(target=http.serve_forever, daemon=True).start()
    yield Handler
    http.shutdown()
    http.server_close()


def test_mlflow_that_is_well(server, tmp_path: Path, monkeypatch):
    monkeypatch.setenv("MLFLOW_TRACKING_USERNAME", "me")
    monkeypatch.setenv("MLFLOW_TRACKING_PASSWORD", "hunter2")
    [finding] = service_checks.mlflow(server.url, tmp_path)
    assert finding.ok
    assert "3.17.2" in finding.found
    login = base64.b64encode(b"me:hunter2").decode()
    assert all(headers["Authorization"] == f"Basic {login}" for headers in server.seen)
    server.seen.clear()
    list(service_checks.clock(server.url, tmp_path))
    assert all("Authorization" not in headers for headers in server.seen)


@pytest.mark.parametrize(
    ("status", "version", "expected"),
    [
        (401, "3.17.2", "MLFLOW_TRACKING_USERNAME"),
        (403, "3.17.2", "--allowed-hosts"),
        (500, "3.17.2", "log"),
        (200, "2.22.0", "upgrade the server"),
    ],
)
def test_mlflow_that_is_not(server, tmp_path: Path, status: int, version: str, expected: str):
    server.status, server.version = status, version
    [finding] = service_checks.mlflow(server.url, tmp_path)
    assert expected in finding.mend


def test_a_password_in_mlflows_url_is_not_sent(server, tmp_path: Path):
    [finding] = service_checks.mlflow(server.url.replace("//", "//me:hunter2@"), tmp_path)
    assert "MLFLOW_TRACKING_PASSWORD" in finding.mend
    assert server.seen == []


def test_mlflow_that_is_away(tmp_path: Path):
    [finding] = service_checks.mlflow(f"http://127.0.0.1:{free_port()}", tmp_path)
    assert "cannot be reached" in finding.found
    assert "MLFLOW_TRACKING_URI" in finding.mend
    [finding] = service_checks.mlflow(None, "gs://bucket/runs")
    assert "MLFLOW_TRACKING_URI" in finding.mend
    [finding] = service_checks.mlflow(None, tmp_path)
    assert finding.ok


@pytest.mark.parametrize(("ahead", "ok"), [(0, True), (-120, False), (120, False)])
def test_a_clock_that_is_wrong_is_named(server, tmp_path: Path, ahead: float, ok: bool):
    server.ahead = ahead
    [finding] = service_checks.clock(server.url, tmp_path)
    assert finding.ok == ok
    assert ok or "set-ntp" in finding.mend


# ---- Ray -----------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("nodes", "cluster", "expected"),
    [
        ([{"CPU": 4.0}], ClusterConfig(workers=4), ""),
        ([{"CPU": 4.0}], ClusterConfig(workers=5), "cluster.workers=4"),
        ([{"CPU": 3.0}, {"CPU": 3.0}], ClusterConfig(workers=3, cpus_per_worker=2), "=2"),
        ([{"CPU": 64.0}], ClusterConfig(workers=1, accelerator="gpu"), "add nodes with CPU 1, GPU"),
        ([{"CPU": 1.0}], None, ""),
    ],
)
def test_room_is_counted_by_node(nodes, cluster, expected: str):
    assert expected in service_checks.room("auto", nodes, cluster).mend
    assert service_checks.room("auto", nodes, cluster).ok == (not expected)


def test_ray_that_is_away(tmp_path: Path):
    for address, expected in (
        (f"127.0.0.1:{free_port()}", "ray start --head"),
        (f"http://127.0.0.1:{free_port()}", "port-forward"),
        ("nonsense", "HOST:PORT"),
    ):
        [finding] = service_checks.ray(address, None)
        assert expected in finding.mend


@pytest.mark.ray
@pytest.mark.slow
def test_ray_that_is_there_and_too_small(monkeypatch: pytest.MonkeyPatch):
    """A real cluster on loopback, where who asks must look for it, too."""
    monkeypatch.setenv("RAY_ENABLE_WINDOWS_OR_OSX_CLUSTER", "0")
    # Ray asks for a token by default, and sends none unless it is told to.
    monkeypatch.setenv("RAY_AUTH_MODE", "token")
    monkeypatch.setenv("RAY_AUTH_TOKEN", "0123456789abcdef" * 4)
    # Another process: a test's own Ray session would be asked instead.
    code = (
        "import ray, sys; c = ray.init('local', num_cpus=2, include_dashboard=False,"
        " log_to_driver=False, object_store_memory=10**8)\n"
        "print(c.address_info['gcs_address'], flush=True)\n"
        "sys.stdin.read()"
    )
    process = subprocess.Popen(
        [sys.executable, "-c", code], stdin=subprocess.PIPE, stdout=subprocess.PIPE,
        stderr=subprocess.DEVNULL, text=True,
    )  # fmt: skip
    try:
        assert process.stdout
        address = process.stdout.readline().strip()
        [finding] = service_checks.ray(address, ClusterConfig(workers=3))
        assert "1 nodes with CPU 2" in finding.found, finding
        assert "cluster.workers=2" in finding.mend
        [finding] = service_checks.ray(address, ClusterConfig(workers=2))
        assert finding.ok
    finally:
        process.communicate("", timeout=60)


# ---- The command ---------------------------------------------------------------------------------


@pytest.fixture
def quick(monkeypatch, tmp_path: Path) -> Path:
    """No JAX is started, and the machine's disk is large enough."""
    monkeypatch.setattr(machine_checks, "devices", lambda: iter([Finding("devices", "CPU")]))
    monkeypatch.setattr(machine_checks, "_LEAST_FREE_BYTES", 1)
    monkeypatch.setattr(machine_checks, "_FULL", 1.1)
    for name in ("RAY_ADDRESS", "MLFLOW_TRACKING_URI", "TZ", "TVQ_ROOT"):
        monkeypatch.delenv(name, raising=False)
    return tmp_path


def test_a_machine_that_is_well(quick: Path, capsys):
    assert run_cli(["doctor", "--root", str(quick)]) == 0
    lines = capsys.readouterr().out.splitlines()
    assert all(line.startswith("ok") for line in lines), lines
    seen = {line[6:16].strip() for line in lines}
    assert seen == {*("versions", "devices", "disk", "time zone", "runs", "mlflow", "clock", "ray")}


def test_what_is_to_be_mended_is_in_json_and_in_the_exit_code(quick: Path, capsys):
    gone = f"http://me:hunter2@127.0.0.1:{free_port()}"
    arguments = ["doctor", "--root", str(quick), "--tracking-uri", gone, "--json"]
    assert run_cli(arguments) == ExitCode.USER
    output = capsys.readouterr()
    findings = {finding["what"]: finding for finding in json.loads(output.out)}
    assert findings["mlflow"]["ok"] is False
    assert findings["runs"]["ok"] is True
    assert "to be mended: mlflow" in output.err
    assert "hunter2" not in output.out + output.err


def test_a_defect_of_one_examination_does_not_hide_the_others(quick: Path, monkeypatch, capsys):
    def broken() -> Iterator[Finding]:
        raise RuntimeError("boom")

    monkeypatch.setattr(machine_checks, "time_zone", broken)
    assert run_cli(["doctor", "--root", str(quick)]) == ExitCode.USER
    output = capsys.readouterr().out
    assert "could not be examined" in output
    assert "ray" in output.splitlines()[-1]


def test_secrets_of_the_environment_are_redacted(monkeypatch):
    monkeypatch.setenv("MLFLOW_TRACKING_PASSWORD", "correct horse")
    monkeypatch.setenv("RAY_AUTH_TOKEN", "abcdef0123")
    said = redacted("login correct horse at http://me:pw@host failed, token abcdef0123")
    assert said == "login *** at http://***@host failed, token ***"
