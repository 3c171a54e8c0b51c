"""What `tvq doctor` looks at elsewhere: the store of the runs, MLflow, their clocks, Ray."""

import base64
import email.utils
import json
import math
import os
import socket
import subprocess
import sys
import time
import urllib.error
import urllib.parse
import urllib.request
import uuid
from collections.abc import Iterator, Mapping, Sequence
from importlib import metadata
from pathlib import Path

from jobs.cluster import accelerators
from jobs.doctor.checkup import Finding
from jobs.recipe import ClusterConfig
from pipeline.errors import CorpusError
from pipeline.storage import LocalStore, Location, is_url, open_store

_SECONDS = 10
_RAY_SECONDS = 90
_SKEW_SECONDS = 5
"""A lease is taken from who has not renewed it for 60 s, by the clock of who takes it."""


def store(root: Location) -> Iterator[Finding]:
    """Whether files can be written, created by one of many, read, renamed, listed and removed."""
    runs = open_store(root)
    folder = f".doctor-{uuid.uuid4().hex}"
    step = "written to"
    try:
        probe = runs.child(folder)
        ours = uuid.uuid4().hex.encode()
        probe.write("file", ours)
        step = "read"
        if probe.read("file") != ours:
            yield Finding(
                "runs",
                f"{runs.location}: other bytes are read than were written",
                "use another store: this one loses data",
            )
            return
        step = "claimed (files created by one of many)"
        if not probe.create("claim", b"first") or probe.create("claim", b"second"):
            yield Finding(
                "runs",
                f"{runs.location}: two can create the same file",
                "use another store: leases do not hold on this one",
            )
            return
        step = "renamed in"
        temporary = probe.scratch("placed")
        temporary.write_bytes(ours)
        probe.place(temporary, "placed")
        step = "listed"
        names = [entry.name for entry in probe.list()]
        if not {"file", "claim", "placed"} <= set(names):
            yield Finding(
                "runs",
                f"{runs.location}: a listing lacks what was written",
                "use another store: checkpoints would be overlooked",
            )
            return
        step = "removed from"
        runs.remove_tree(folder)
    except (CorpusError, OSError) as error:
        found, mend = f"{runs.location} cannot be {step}", str(error)
        if isinstance(runs, LocalStore):
            found, mend = f"{found} ({error})", "--root FOLDER that you may write to"
        yield Finding("runs", found, mend)
        return
    found = "can be written, claimed, read, renamed, listed and removed"
    yield Finding("runs", f"{runs.location}: {found}")


def mlflow(uri: str | None, root: Location) -> Iterator[Finding]:
    """Whether MLflow answers, to whom we are, in a version that goes with ours."""
    if uri is None or not uri.startswith(("http://", "https://")):
        if uri is None and is_url(str(root)):
            yield Finding(
                "mlflow",
                f"none is named, and none can lie beside {root}",
                "export MLFLOW_TRACKING_URI=http://HOST:5000",
            )
            return
        yield Finding("mlflow", uri or f"a file beside the runs in {root}")
        return
    if "@" in urllib.parse.urlsplit(uri).netloc:
        yield Finding(
            "mlflow",
            f"{uri}: holds a user name or password, which ends in logs",
            "leave them out; export MLFLOW_TRACKING_USERNAME=... MLFLOW_TRACKING_PASSWORD=...",
        )
        return
    login = _mlflow_login()
    server = uri.rstrip("/")
    try:
        _get(f"{server}/health", login)
        version = _get(f"{server}/version", login).decode().strip()
        # Those are open to all; what a tracker asks first is not.
        _get(f"{server}/api/2.0/mlflow/experiments/get-by-name?experiment_name=Default", login)
    except urllib.error.HTTPError as error:
        mend = {
            401: "export MLFLOW_TRACKING_USERNAME=... MLFLOW_TRACKING_PASSWORD=...",
            403: f"start the server with --allowed-hosts {urllib.parse.urlsplit(uri).netloc},"
            " or ask for the permission READ and EDIT",
        }.get(error.code, "look into the server's log")
        yield Finding("mlflow", f"{uri}: answered {error.code}", mend)
        return
    except (OSError, ValueError) as error:
        yield Finding(
            "mlflow",
            f"{uri}: cannot be reached ({getattr(error, 'reason', error)})",
            "start it (`mlflow server ...`), or name another: export MLFLOW_TRACKING_URI=...",
        )
        return
    ours = metadata.version("mlflow")
    fits = version.split(".")[0] == ours.split(".")[0]
    yield Finding(
        "mlflow",
        f"{uri}: version {version}, ours {ours}",
        "" if fits else f"upgrade the server: python -m pip install 'mlflow=={ours}'",
    )


def clock(uri: str | None, root: Location) -> Iterator[Finding]:
    """How far our clock is from those of the services."""
    servers = []
    if is_url(str(root)):
        emulator = os.environ.get("STORAGE_EMULATOR_HOST")
        servers.append(emulator or "https://storage.googleapis.com")
    if uri and uri.startswith(("http://", "https://")):
        servers.append(uri)
    for server in servers:
        before = time.time()
        try:
            theirs = _server_time(server)
        except (OSError, ValueError):
            continue  # whether it answers at all is for others to say
        if theirs is None:
            continue
        after = time.time()
        # Theirs is cut to whole seconds; it was right at some moment while we waited.
        skew = max(before - (theirs + 1), theirs - after, 0.0)
        yield Finding(
            "clock",
            f"within {math.ceil(skew + 1)} s of {server}",
            "sudo timedatectl set-ntp true" if skew > _SKEW_SECONDS else "",
        )
    if not servers:
        yield Finding("clock", f"{time.strftime('%Y-%m-%dT%H:%M:%SZ', time.gmtime())}, alone")


def ray(address: str | None, cluster: ClusterConfig | None) -> Iterator[Finding]:
    """Whether the Ray cluster answers, and has room for the recipe's workers."""
    if address is None:
        yield Finding("ray", "none is named; a training starts one of its own on this machine")
        return
    if address.startswith(("http://", "https://")):
        yield _dashboard(address)
        return
    if (mend := _unreachable(address)) is not None:
        yield Finding("ray", f"{address}: cannot be reached", mend)
        return
    code = "import sys; from jobs.cluster.ray_session import print_nodes; print_nodes(sys.argv[1])"
    try:
        ended = subprocess.run(
            [sys.executable, "-c", code, address],
            capture_output=True,
            text=True,
            timeout=_RAY_SECONDS,
        )
    except subprocess.TimeoutExpired:
        yield Finding(
            "ray",
            f"{address}: no answer within {_RAY_SECONDS} s",
            "look into its logs: /tmp/ray/session_latest/logs/gcs_server.out",
        )
        return
    if ended.returncode:
        said = (ended.stderr.strip().splitlines() or ["nothing was said"])[-1][:300]
        wrong_token = "uthentication" in ended.stderr or "token" in said
        mend = (
            "export RAY_AUTH_MODE=token RAY_AUTH_TOKEN_PATH=/the/token/of/the/cluster"
            if wrong_token
            else "install the versions of Python and Ray that the cluster has, or upgrade it"
        )
        yield Finding("ray", f"{address}: {said}", mend)
        return
    nodes = json.loads(ended.stdout.splitlines()[-1])
    yield room(address, nodes, cluster)


def room(
    address: str, nodes: Sequence[Mapping[str, float]], cluster: ClusterConfig | None
) -> Finding:
    """Whether the nodes have what the workers ask for.

    Args:
        nodes: the resources of each, by Ray's names.
    """
    totals = {
        name: sum(node.get(name, 0.0) for node in nodes)
        for name in ("CPU", "GPU", "TPU")
        if any(name in node for node in nodes)
    }
    has = ", ".join(f"{name} {amount:g}" for name, amount in totals.items()) or "nothing"
    found = f"{address}: {len(nodes)} nodes with {has}"
    if cluster is None or not cluster.workers:
        return Finding("ray", found)
    asked = accelerators.resources(cluster)
    fit = accelerators.room(cluster, nodes)
    each = ", ".join(f"{name} {amount:g}" for name, amount in asked.items())
    needed = cluster.least_workers
    if fit >= needed:
        return Finding("ray", f"{found}; room for {needed} workers of {each}")
    return Finding(
        "ray",
        f"{found}; room for {fit} of {needed} workers of {each}",
        f"add nodes, or ask for less: cluster.workers={fit}"
        if fit
        else f"add nodes with {each} each, or ask for less (cluster.cpus_per_worker)",
    )


def _dashboard(address: str) -> Finding:
    headers = {}
    path = os.environ.get("RAY_AUTH_TOKEN_PATH") or Path.home() / ".ray" / "auth_token"
    token = os.environ.get("RAY_AUTH_TOKEN", "")
    if not token and Path(path).is_file():
        token = Path(path).read_text().strip()
    if token:
        headers["Authorization"] = f"Bearer {token}"
    try:
        version = json.loads(_get(f"{address.rstrip('/')}/api/version", headers))["ray_version"]
    except urllib.error.HTTPError as error:
        mend = "--address http://HOST:8265 of Ray's dashboard, or a look into its log"
        if error.code in (401, 403):
            mend = "export RAY_AUTH_MODE=token RAY_AUTH_TOKEN_PATH=/the/token/of/the/cluster"
        return Finding("ray", f"{address}: answered {error.code}", mend)
    except (OSError, ValueError, KeyError) as error:
        said = getattr(error, "reason", error)
        return Finding(
            "ray",
            f"{address}: no job server answers ({said})",
            "kubectl port-forward service/NAME-head-svc 8265, or `ray start --head`",
        )
    ours = metadata.version("ray")
    return Finding(
        "ray",
        f"{address}: version {version}, ours {ours}",
        "" if version == ours else f"{sys.executable} -m pip install 'ray=={version}'",
    )


def _unreachable(address: str) -> str | None:
    """What mends that nobody listens there; None if somebody does."""
    if address in ("auto", "local"):
        return None
    host, _, port = address.removeprefix("ray://").rpartition(":")
    try:
        socket.create_connection((host, int(port)), timeout=_SECONDS).close()
    except ValueError:
        return "write HOST:PORT, such as 10.0.0.2:6379"
    except OSError as error:
        return f"ray start --head --port={port} on {host}, or another --address ({error})"
    return None


def _mlflow_login() -> dict[str, str]:
    """The header that says who we are, for MLflow and for nobody else."""
    user = os.environ.get("MLFLOW_TRACKING_USERNAME")
    if not user:
        return {}
    login = f"{user}:{os.environ.get('MLFLOW_TRACKING_PASSWORD', '')}"
    return {"Authorization": f"Basic {base64.b64encode(login.encode()).decode()}"}


def _get(url: str, headers: Mapping[str, str]) -> bytes:
    request = urllib.request.Request(url, headers=dict(headers))
    with urllib.request.urlopen(request, timeout=_SECONDS) as answer:
        return answer.read()


def _server_time(url: str) -> float | None:
    """Unix time by the server's clock, whole seconds; None if it does not say."""
    try:
        with urllib.request.urlopen(url, timeout=_SECONDS) as answer:
            date = answer.headers.get("Date")
    except urllib.error.HTTPError as error:
        date = error.headers.get("Date")
    return email.utils.parsedate_to_datetime(date).timestamp() if date else None
