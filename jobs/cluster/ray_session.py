"""Ray for the length of a command: a cluster of its own on this machine, or a running one."""

import contextlib
import json
import logging
import os
import shlex
import socket
import sys
from collections.abc import Iterator
from typing import Any, TextIO

from jobs.errors import UserError

log = logging.getLogger("tvq.ray")
_QUIET = {
    "RAY_USAGE_STATS_ENABLED": "0",
    # Ray's notices about its own progress would break up ours.
    "RAY_TRAIN_METRICS_ENABLED": "0",
    # Look for nodes that are about to be taken away once a second.
    "RAY_TRAIN_PREEMPTION_POLL_INTERVAL_S": "1",
    # Poll the workers five times a second: a lost one is noticed, and the end, at once.
    "RAY_TRAIN_HEALTH_CHECK_INTERVAL_S": "0.2",
    "RAY_CHDIR_TO_TRIAL_DIR": "0",
    "RAY_DEDUP_LOGS": "0",
    "RAY_ACCEL_ENV_VAR_OVERRIDE_ON_ZERO": "0",
}
_ON_LOOPBACK = {
    # Ray's switch for machines that are no cluster: every process binds to 127.0.0.1, none of them
    # to the address that others reach. (_node_ip_address="127.0.0.1" is replaced by that address.)
    "RAY_ENABLE_WINDOWS_OR_OSX_CLUSTER": "0",
    # Nobody takes this machine's only node away without the driver: a process less to start.
    "RAY_TRAIN_ENABLE_PREEMPTION_WATCHER": "0",
}
_OBJECT_STORE_BYTES = 200 * 2**20
_ANSWER_SECONDS = 10


@contextlib.contextmanager
def ray_session(address: str | None, *, cpus: int) -> Iterator[None]:
    """Connects to Ray and disconnects at the end; a cluster that it started ends with it.

    Args:
        address: of a running cluster; None takes RAY_ADDRESS, else starts one bound to loopback.
        cpus: the least number of CPUs that a cluster started here offers, counted, not measured:
            two workers run on a machine of one core too.

    Raises:
        UserError: no cluster answers at the address.
    """
    if "ray" in sys.modules:
        import ray

        if ray.is_initialized():  # the caller's own session, as in the demo
            yield
            return
    address = address or os.environ.get("RAY_ADDRESS")
    # Ray reads them when it is imported.
    for name, value in (_QUIET if address else _QUIET | _ON_LOOPBACK).items():
        os.environ.setdefault(name, value)
    import ray

    if address:
        _check_answers(address)
        ray.init(address=address, log_to_driver=False, logging_level=logging.ERROR)
    else:
        ray.init(
            # Else Ray joins a cluster that somebody started on this machine, and refuses num_cpus.
            address="local",
            num_cpus=max(cpus, os.cpu_count() or 1),
            include_dashboard=False,
            log_to_driver=False,
            logging_level=logging.ERROR,
            object_store_memory=_OBJECT_STORE_BYTES,
            runtime_env=_quoted_python(),
        )
    # Ray prints the raylet's messages (a killed worker: a page of text) on our stdout, whatever
    # log_to_driver says, and has no setting for it.
    import ray._private.worker as ray_worker

    printer, ray_worker.print_worker_logs = ray_worker.print_worker_logs, _to_log
    try:
        yield
    finally:
        ray.shutdown()
        ray_worker.print_worker_logs = printer


def _check_answers(address: str) -> None:
    # Ray itself tries for more than two minutes (ray 2.60), and then ends the process.
    host, _, port = address.removeprefix("ray://").rpartition(":")
    if not port.isdigit():  # "auto"
        return
    try:
        socket.create_connection((host.strip("[]"), int(port)), _ANSWER_SECONDS).close()
    except OSError as error:
        raise UserError(
            f"cluster.address: no Ray cluster answers at {address} ({error}); check the address"
            " (also RAY_ADDRESS) and that its head node runs, or set it to null for a cluster of"
            " this command's own"
        ) from None


def print_nodes(address: str) -> None:
    """Prints the resources of each node of a running cluster, as one line of JSON."""
    with ray_session(address, cpus=0):
        import ray

        nodes = [node["Resources"] for node in ray.nodes() if node["Alive"]]
    print(json.dumps(nodes))


def _quoted_python() -> dict[str, str] | None:
    # Ray puts the path of this Python into a line of shell, unquoted (ray 2.60): a checkout in a
    # folder with spaces could not start a worker.
    quoted = shlex.quote(sys.executable)
    return {"py_executable": quoted} if quoted != sys.executable else None


def _to_log(data: dict[str, Any], sink: TextIO, ignore_prefix: bool) -> None:
    for line in data["lines"]:
        log.info("%s: %s", data.get("pid"), line)
