"""What a CronJob's pod does: one RayJob a tick, however often Kubernetes fires it.

Kubernetes itself cannot be started here; a server on loopback answers as its API is documented to.
"""

import json
import threading
from collections.abc import Iterator
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from typing import Any

import pytest

from jobs.cli.main import run_cli
from jobs.deployment.rayjob_creation import create_rayjob
from jobs.errors import ExitCode, UserError
from tests.infra.manifests import base_documents, documents, problems, rendered


class Kubernetes(BaseHTTPRequestHandler):
    """The part of the API server that the account tvq-cron may use."""

    objects: dict[str, dict[str, Any]] = {}  # noqa: RUF012
    url = ""

    def do_GET(self) -> None:
        self._as(
            "get", lambda path: (200, self.objects[path]) if path in self.objects else (404, {})
        )

    def do_POST(self) -> None:
        body = json.loads(self.rfile.read(int(self.headers["Content-Length"])))

        def create(path: str) -> tuple[int, dict[str, Any]]:
            path = f"{path}/{body['metadata']['name']}"
            if path in self.objects:
                return 409, {"reason": "AlreadyExists"}
            self.objects[path] = body
            return 201, body

        self._as("create", create)

    def _as(self, verb: str, act: Any) -> None:
        prefix = "/apis/ray.io/v1/namespaces/tvq/"
        resource = self.path.removeprefix(prefix).split("/")[0]
        allowed = {
            (verb, resource)
            for document in base_documents()
            if document["kind"] == "Role"
            for rule in document["rules"]
            for verb in rule["verbs"]
            for resource in rule["resources"]
        }
        if self.headers["Authorization"] != "Bearer the-token" or (verb, resource) not in allowed:
            status, body = 403, {"reason": "Forbidden"}
        else:
            status, body = act(self.path.removeprefix(prefix))
        self.send_response_only(status)
        self.end_headers()
        self.wfile.write(json.dumps(body).encode())

    def log_message(self, format: str, *arguments: object) -> None:
        """Nothing."""


@pytest.fixture
def kubernetes() -> Iterator[type[Kubernetes]]:
    server = ThreadingHTTPServer(("127.0.0.1", 0), Kubernetes)
    Kubernetes.objects = {}
    Kubernetes.url = f"http://127.0.0.1:{server.server_port}"
    threading.Thread(target=server.serve_forever, args=(0.02,), daemon=True).start()
    yield Kubernetes
    server.shutdown()
    server.server_close()


@pytest.fixture
def identity(tmp_path: Path) -> Path:
    (tmp_path / "token").write_text("the-token\n")
    (tmp_path / "namespace").write_text("tvq")
    return tmp_path


def test_a_tick_becomes_one_rayjob_with_what_the_site_changed(kubernetes, identity: Path):
    [_, template, _] = documents(rendered("cronjob"))
    template["metadata"]["labels"]["kueue.x-k8s.io/queue-name"] = "tvq"  # as a component would
    kubernetes.objects["raycronjobs/nightly"] = template
    made = [
        create_rayjob("nightly", name, api=kubernetes.url, identity=identity)
        for name in ("nightly-1", "nightly-1", "nightly-2")
    ]
    assert made == [True, False, True]
    jobs = [body for path, body in kubernetes.objects.items() if path.startswith("rayjobs/")]
    assert [job["metadata"]["name"] for job in jobs] == ["nightly-1", "nightly-2"]
    for job in jobs:
        assert problems(job) == []
        assert job["spec"] == template["spec"]["jobTemplate"]
        assert job["metadata"]["labels"]["kueue.x-k8s.io/queue-name"] == "tvq"


def test_what_kubernetes_refuses_is_said_and_tried_again(kubernetes, identity: Path):
    with pytest.raises(UserError, match="raycronjobs/gone: Kubernetes answered 404") as raised:
        create_rayjob("gone", "gone-1", api=kubernetes.url, identity=identity)
    assert raised.value.code is ExitCode.FAILED  # the pod fails, and its Job begins another
    (identity / "token").write_text("of somebody else")
    with pytest.raises(UserError, match=r"answered 403: .*Forbidden"):
        create_rayjob("nightly", "nightly-1", api=kubernetes.url, identity=identity)


def test_outside_a_pod_it_says_so(monkeypatch, capsys, tmp_path: Path):
    monkeypatch.delenv("KUBERNETES_SERVICE_HOST", raising=False)
    assert run_cli(["create-rayjob", "nightly", "--name", "x"]) == ExitCode.USER
    assert "this is no pod" in capsys.readouterr().err
    with pytest.raises(UserError, match="automountServiceAccountToken"):
        create_rayjob("nightly", "x", api="http://127.0.0.1:1", identity=tmp_path)
