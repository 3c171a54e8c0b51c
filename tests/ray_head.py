"""A Ray cluster of one node on loopback, with its job server: `ray start --head` on free ports."""

import contextlib
import os
import random
import signal
import socket
import subprocess
import sys
import time
import urllib.error
import urllib.request
from collections.abc import Iterator
from pathlib import Path
from typing import NamedTuple

_START_SECONDS = 180


class RayHead(NamedTuple):
    """A running cluster."""

    url: str
    """Of its dashboard and job server."""
    environment: dict[str, str]
    """For processes that talk to it."""
    temp: str
    """Where it and its jobs keep their files."""


@contextlib.contextmanager
def ray_head(folder: Path, *, token: str | None = None) -> Iterator[RayHead]:
    """Starts a head and ends all its processes.

    Args:
        folder: empty, for its logs; a short path, as Ray puts sockets into it.
        token: that its clients must have; None: it asks for none.
    """
    authentication = {"RAY_AUTH_MODE": "token" if token else "disabled"}
    if token:
        authentication["RAY_AUTH_TOKEN"] = token
    environment = {name: value for name, value in os.environ.items() if name != "RAY_ADDRESS"}
    environment |= {
        **authentication,
        "RAY_USAGE_STATS_ENABLED": "0",
        "PATH": f"{Path(sys.executable).parent}{os.pathsep}{os.environ['PATH']}",
    }
    port, dashboard, client, agent = _free_ports(4)
    command = [
        "ray", "start", "--head", "--block", "--node-ip-address=127.0.0.1", f"--port={port}",
        "--dashboard-host=127.0.0.1", f"--dashboard-port={dashboard}",
        f"--ray-client-server-port={client}", f"--dashboard-agent-listen-port={agent}",
        "--num-cpus=2", "--object-store-memory=200000000", f"--temp-dir={folder}",
        "--disable-usage-stats",
    ]  # fmt: skip
    with (folder / "head.log").open("w") as log:
        head = subprocess.Popen(
            command, cwd=folder, env=environment, stdout=log, stderr=log, start_new_session=True
        )
    url = f"http://127.0.0.1:{dashboard}"
    try:
        _wait_until_it_answers(url, head)
        yield RayHead(url, environment, str(folder))
    finally:
        # Its processes are in its process group; the dashboard's agents outlive the head.
        with contextlib.suppress(ProcessLookupError, subprocess.TimeoutExpired):
            os.killpg(head.pid, signal.SIGTERM)
            head.wait(30)
        with contextlib.suppress(ProcessLookupError):
            os.killpg(head.pid, signal.SIGKILL)


def _wait_until_it_answers(url: str, head: subprocess.Popen) -> None:
    end = time.monotonic() + _START_SECONDS
    while True:
        try:
            with urllib.request.urlopen(f"{url}/api/version", timeout=5):
                return
        except urllib.error.HTTPError:
            return  # it wants a token
        except OSError:
            assert head.poll() is None, "ray start has ended"
            assert time.monotonic() < end, "ray start does not answer"
            time.sleep(0.5)


def _free_ports(count: int) -> list[int]:
    """Outside 10002 to 19999, from which Ray gives ports to its workers."""
    found: list[int] = []
    while len(found) < count:
        port = random.randint(20_000, 32_000)
        with socket.socket() as probe, contextlib.suppress(OSError):
            probe.bind(("127.0.0.1", port))
            found.append(port)
    return found
