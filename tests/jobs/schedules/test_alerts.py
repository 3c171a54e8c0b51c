"""Who is told of a failure and of the first success after it, and what becomes of a bad hook."""

import json
import sys
import threading
from collections.abc import Callable
from datetime import timedelta
from http.server import BaseHTTPRequestHandler, HTTPServer
from pathlib import Path
from typing import Any

import pytest

from jobs.errors import UserError
from jobs.schedules.alerts import AlertError, Hook, send
from jobs.schedules.scheduler import Scheduler
from tests.jobs.schedules.schedules_under_a_clock import Clock, Cluster, add, hours, outcomes, run


def test_failure_and_recovery_are_told_once_each(tmp_path: Path):
    alerts = tmp_path / "alerts"
    add(tmp_path, alert=Hook(command=("/bin/sh", "-c", f"cat >> {alerts}")))
    clock = Clock()
    cluster = Cluster(clock)
    cluster.ends |= {f"nightly-{id}": "failed" for id in hours(2, 3)}
    run(Scheduler(tmp_path, cluster, clock=clock), clock, timedelta(hours=5, minutes=5))
    events = [json.loads(line) for line in alerts.read_text().splitlines()]
    assert [(event["event"], event["tick"]) for event in events] == [
        ("failure", hours(2)[0]),
        ("failure", hours(3)[0]),
        ("recovery", hours(4)[0]),
    ]
    assert events[0]["output"] == f"log of nightly-{hours(2)[0]}"


def test_an_alert_that_does_not_get_through_is_tried_thrice_and_stops_nothing(tmp_path: Path):
    folder = add(tmp_path, alert=Hook(command=("/bin/sh", "-c", "echo too bad >&2; exit 3")))
    clock = Clock()
    cluster = Cluster(clock)
    cluster.ends[f"nightly-{hours(1)[0]}"] = "failed"
    said: list[str] = []
    scheduler = Scheduler(tmp_path, cluster, clock=clock, warn=said.append)
    run(scheduler, clock, timedelta(hours=2, minutes=5), every=40)
    assert len(said) == 2  # of the failure and of the recovery
    assert all(line.endswith("given up: /bin/sh ended with 3: too bad") for line in said)
    assert outcomes(folder) == dict(zip(hours(1, 2), ("failed", "succeeded"), strict=True))


@pytest.fixture
def webhook() -> Any:
    got: list[tuple[str, bytes]] = []

    class Handler(BaseHTTPRequestHandler):
        def do_POST(self) -> None:
            got.append((self.path, self.rfile.read(int(self.headers["Content-Length"]))))
            self.send_response(500 if "bad" in self.path else 204)
            self.end_headers()

        def log_message(self, format: str, *arguments: object) -> None:
            pass

    server = HTTPServer(("127.0.0.1", 0), Handler)
    threading.Thread(target=server.serve_forever, daemon=True).start()
    yield f"http://127.0.0.1:{server.server_port}", got
    server.shutdown()
    server.server_close()


def test_webhook(webhook, monkeypatch):
    url, got = webhook
    send(Hook(webhook=f"{url}/hook"), {"event": "failure"})
    monkeypatch.setenv("TVQ_TEST_HOOK", f"{url}/secret")
    send(Hook(webhook="env:TVQ_TEST_HOOK"), {"event": "recovery"})
    assert [(path, json.loads(body)) for path, body in got] == [
        ("/hook", {"event": "failure"}),
        ("/secret", {"event": "recovery"}),
    ]
    monkeypatch.setenv("TVQ_TEST_HOOK", f"{url}/bad-secret")
    with pytest.raises(AlertError, match="answered 500") as error:
        send(Hook(webhook="env:TVQ_TEST_HOOK"), {})
    assert "secret" not in str(error.value)


def test_failure_and_recovery_are_posted(tmp_path: Path, webhook):
    url, got = webhook
    add(tmp_path, alert=Hook(webhook=f"{url}/hook"))
    clock = Clock()
    cluster = Cluster(clock)
    cluster.ends[f"nightly-{hours(2)[0]}"] = "failed"
    run(Scheduler(tmp_path, cluster, clock=clock), clock, timedelta(hours=4, minutes=5))
    events = [json.loads(body) for _, body in got]
    assert [(event["event"], event["tick"]) for event in events] == [
        ("failure", hours(2)[0]),
        ("recovery", hours(3)[0]),
    ]


def test_a_command_is_no_line_of_shell(tmp_path: Path):
    given = tmp_path / "given"
    code = "import sys; open(sys.argv[1], 'w').write(sys.argv[2] + sys.stdin.read())"
    send(Hook(command=(sys.executable, "-c", code, str(given), "$(id);")), {"event": "failure"})
    assert given.read_text() == '$(id);{"event": "failure"}\n'


@pytest.mark.parametrize(
    ("make", "expected"),
    [
        (lambda: Hook(), "give one"),
        (lambda: Hook(command=("a",), webhook="http://x/"), "give one"),
        (lambda: Hook(webhook="ftp://x/"), "expected http"),
        (lambda: Hook(webhook="http://me:secret@x/"), "without a user"),
    ],
)
def test_hooks_that_are_none(make: Callable[[], Hook], expected):
    with pytest.raises(UserError, match=expected):
        make()
