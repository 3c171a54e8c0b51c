"""`tvq ui`: shows the runs in MLflow's own web pages, on this machine."""

import contextlib
import json
import os
import signal
import socket
import subprocess
import sys
import tempfile
import time
import urllib.error
import urllib.parse
import urllib.request
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import NamedTuple

from jobs.console import Console
from jobs.errors import UserError
from jobs.recipe import from_yaml
from jobs.runs.run_directory import RunDirectory, list_runs
from jobs.tracking.dead_runs import end_dead_runs
from jobs.tracking.store import Store, without_credentials
from jobs.training.train import store_of_run
from pipeline.storage import Location

_HOST = "127.0.0.1"
_DEFAULT_PORT = 5000
_STOP_SECONDS = 10.0


class Server(NamedTuple):
    """A running MLflow server."""

    url: str
    """`http://127.0.0.1:PORT`."""
    process: subprocess.Popen[bytes]
    log: Path
    """Where it writes what it has to say."""


@contextlib.contextmanager
def serve(
    store: Store, log: Path, port: int | None = None, limit_s: float = 120.0
) -> Iterator[Server]:
    """Runs an MLflow server over an embedded store; ends it and its children on leaving.

    Args:
        store: as `jobs.tracking.store.embedded_store` names it.
        log: file for the server's output.
        port: None: 5000, or a free one if that is taken.
        limit_s: to wait for its first answer (15 to 40 s is usual).

    Raises:
        UserError: there is no store yet, the port is taken, or the server does not answer in time.
    """
    database = Path(store.uri.removeprefix("sqlite:///"))
    if store.uri.startswith("sqlite:///") and not database.exists():
        raise UserError(f"{database}: no runs are tracked there yet; `tvq train` makes it")
    port = _port(port)
    command = [sys.executable, "-m", "mlflow", "server"]
    command += ["--host", _HOST, "--port", str(port), "--workers", "1"]
    environment = {
        **os.environ,
        # Two processes instead of fifteen: no job runner.
        "MLFLOW_SERVER_ENABLE_JOB_EXECUTION": "false",
        "MLFLOW_DISABLE_TELEMETRY": os.environ.get("MLFLOW_DISABLE_TELEMETRY", "true"),
        # Not as an argument, where every user of the machine could read a password in it.
        "MLFLOW_BACKEND_STORE_URI": store.uri,
        # A folder named mlflow where `tvq ui` is run must not be imported.
        "PYTHONSAFEPATH": "1",
    }
    environment.pop("MLFLOW_TRACKING_URI", None)  # The server would track into itself.
    if store.artifact_location:
        environment["MLFLOW_ARTIFACTS_DESTINATION"] = store.artifact_location
    log.parent.mkdir(parents=True, exist_ok=True)
    with log.open("wb") as output:
        # A session of its own: Ctrl-C reaches us alone, and we end the whole group.
        process = subprocess.Popen(
            command,
            env=environment,
            stdin=subprocess.DEVNULL,
            stdout=output,
            stderr=subprocess.STDOUT,
            start_new_session=True,
        )
    try:
        server = Server(f"http://{_HOST}:{port}", process, log)
        _wait_until_it_answers(server, limit_s)
        yield server
    finally:
        _end_group(process)


def show_runs(root: Location, port: int | None, console: Console) -> None:
    """`tvq ui`: shows the runs under `root`, in the experiment of the one begun last.

    Those whose driver was killed with everything else are shown as killed, not as running.

    Raises:
        UserError: there are no runs, or the page cannot be served.
    """
    runs = sorted(list_runs(root), key=_begun)
    if not runs:
        raise UserError(f"{root}: no runs there yet; `tvq train` makes one, --root names a folder")
    recipe = from_yaml(runs[-1].recipe_text(), f"the recipe of run {runs[-1].name}")
    store = store_of_run(runs[-1])
    end_dead_runs(runs, console.line)
    with tempfile.TemporaryDirectory(prefix="tvq-ui-") as folder:
        log = Path(folder) / "mlflow.log"
        show(store, recipe.tracking.experiment, log=log, say=console.result, port=port)


def _begun(run: RunDirectory) -> str:
    record = run.record()
    return record.created if record else ""


def show(
    store: Store,
    experiment: str,
    *,
    log: Path,
    say: Callable[[str], None],
    port: int | None = None,
    limit_s: float = 120.0,
) -> None:
    """Serves the store until Ctrl-C or SIGTERM, telling `say` the one URL to open.

    A store that is a server already is only named.
    """
    if store.uri.startswith(("http://", "https://")):
        say(f"the runs are on an MLflow server; open {without_credentials(store.uri)}")
        return
    with _ends_like_ctrl_c(), contextlib.suppress(KeyboardInterrupt):
        say("starting the MLflow server (15 to 40 s)")
        with serve(store, log, port, limit_s) as server:
            say(f"open {charts_url(server.url, experiment)}   (Ctrl-C ends it)")
            server.process.wait()
            raise UserError(f"the MLflow server ended by itself; it said: {_last_words(log)}")


def charts_url(url: str, experiment: str) -> str:
    """The page of the experiment's charts; of all experiments if there is none of that name."""
    query = urllib.parse.urlencode({"experiment_name": experiment})
    request = f"{url}/api/2.0/mlflow/experiments/get-by-name?{query}"
    try:
        with urllib.request.urlopen(request, timeout=30) as answer:
            found = json.load(answer)["experiment"]["experiment_id"]
    except urllib.error.HTTPError:
        return f"{url}/#/experiments"
    # MLflow's pages open in their mode for generative AI unless told otherwise.
    return f"{url}/#/experiments/{found}/runs?compareRunsMode=CHART&workflowType=machine_learning"


def _port(wanted: int | None) -> int:
    for port in (wanted,) if wanted else (_DEFAULT_PORT, 0):
        with socket.socket() as probe, contextlib.suppress(OSError):
            probe.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
            probe.bind((_HOST, port))
            return probe.getsockname()[1]
    raise UserError(f"port {wanted} on {_HOST} is taken; give another with --port")


def _wait_until_it_answers(server: Server, limit_s: float) -> None:
    deadline = time.monotonic() + limit_s
    while time.monotonic() < deadline:
        if server.process.poll() is not None:
            raise UserError(f"the MLflow server did not start; it said: {_last_words(server.log)}")
        with (
            contextlib.suppress(OSError),
            urllib.request.urlopen(f"{server.url}/health", timeout=5),
        ):
            return
        time.sleep(0.3)
    raise UserError(
        f"the MLflow server did not answer on {server.url} within {limit_s:.0f} s;"
        f" its output is in {server.log}"
    )


def _last_words(log: Path) -> str:
    """The last error in the log, else its last line."""
    lines = [line.strip() for line in log.read_text(errors="replace").splitlines() if line.strip()]
    errors = [line for line in lines if "rror" in line and not line.startswith("(Background")]
    said = [*(lines or ["nothing"])[-1:], *errors][-1]
    return f"{without_credentials(said)[:300]} (all of it: {log})"


def _end_group(process: subprocess.Popen[bytes]) -> None:
    """SIGTERM to the server and its children, SIGKILL to what is left after ten seconds."""
    for number in (signal.SIGTERM, signal.SIGKILL):
        with contextlib.suppress(ProcessLookupError):
            os.killpg(process.pid, number)
        deadline = time.monotonic() + _STOP_SECONDS
        while time.monotonic() < deadline:
            process.poll()  # Reaps the leader; its children are not ours to wait for.
            try:
                os.killpg(process.pid, 0)
            except ProcessLookupError:
                return
            time.sleep(0.05)


@contextlib.contextmanager
def _ends_like_ctrl_c() -> Iterator[None]:
    """SIGTERM and a closed terminal end what is running as Ctrl-C does, cleaning up."""

    def interrupt(number: int, frame: object) -> None:
        raise KeyboardInterrupt

    before = {
        number: signal.signal(number, interrupt) for number in (signal.SIGTERM, signal.SIGHUP)
    }
    try:
        yield
    finally:
        for number, handler in before.items():
            signal.signal(number, handler)
