"""Creates the RayJob of a tick; what the pod of a rendered CronJob runs.

The RayJob bears the name of the Job that Kubernetes made for the tick, so a pod that is repeated,
or a tick that Kubernetes fires twice, creates nothing twice.
"""

import json
import os
import ssl
import urllib.error
import urllib.request
from pathlib import Path
from typing import Any

from jobs.errors import ExitCode, UserError

_IDENTITY = Path("/var/run/secrets/kubernetes.io/serviceaccount")
_SECONDS = 30


def create_rayjob(
    template: str, name: str, *, api: str | None = None, identity: Path = _IDENTITY
) -> bool:
    """Creates a RayJob; whether it was not there yet.

    Args:
        template: name of the RayCronJob whose jobTemplate it is made by.
        name: of the RayJob.
        api: URL of the API server; None: that of the cluster this pod is in.
        identity: folder with the pod's token, namespace and the server's certificate.

    Raises:
        UserError: this is no pod, or Kubernetes refuses; the pod's Job tries again.
    """
    server = _Server(api or _in_cluster(), identity)
    made_by = server.ask("raycronjobs", template)
    assert made_by
    body = {
        "apiVersion": "ray.io/v1",
        "kind": "RayJob",
        "metadata": {"name": name, "labels": made_by["metadata"].get("labels", {})},
        "spec": made_by["spec"]["jobTemplate"],
    }
    return server.ask("rayjobs", name, body) is not None


def _in_cluster() -> str:
    host = os.environ.get("KUBERNETES_SERVICE_HOST")
    if host is None:
        raise UserError(
            "KUBERNETES_SERVICE_HOST is not set: this is no pod; `tvq render --for cronjob` writes"
            " the one that runs this command"
        )
    return f"https://{host}:{os.environ.get('KUBERNETES_SERVICE_PORT_HTTPS', '443')}"


class _Server:
    """Kubernetes's API for Ray's kinds in the pod's namespace, asked as the pod's account."""

    def __init__(self, url: str, identity: Path):
        try:
            self._token = (identity / "token").read_text().strip()
            namespace = (identity / "namespace").read_text().strip()
        except OSError as error:
            raise UserError(
                f"{error.filename}: cannot be read ({error.strerror}); the pod needs the account"
                " tvq-cron, with automountServiceAccountToken"
            ) from None
        certificate = identity / "ca.crt"
        self._context = (
            ssl.create_default_context(cafile=certificate) if certificate.exists() else None
        )
        self._url = f"{url}/apis/ray.io/v1/namespaces/{namespace}"

    def ask(
        self, kind: str, name: str, body: dict[str, Any] | None = None
    ) -> dict[str, Any] | None:
        """Reads an object, or creates it with `body`; None if it was there before."""
        request = urllib.request.Request(
            f"{self._url}/{kind}" + ("" if body else f"/{name}"),
            json.dumps(body).encode() if body else None,
            {"Authorization": f"Bearer {self._token}", "Content-Type": "application/json"},
        )
        try:
            with urllib.request.urlopen(request, timeout=_SECONDS, context=self._context) as answer:
                return json.load(answer)
        except urllib.error.HTTPError as error:
            if body and error.code == 409:
                return None
            said = " ".join(error.read(500).decode(errors="replace").split())
            raise UserError(
                f"{kind}/{name}: Kubernetes answered {error.code}: {said}", ExitCode.FAILED
            ) from None
        except OSError as error:
            raise UserError(
                f"{kind}/{name}: Kubernetes cannot be reached ({error}); is egress to its API"
                " server allowed (infra/kubernetes/base/network.yaml)?",
                ExitCode.FAILED,
            ) from None
