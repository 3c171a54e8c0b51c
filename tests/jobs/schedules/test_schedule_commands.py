"""`tvq schedule` as a user meets it, and the daemon on the real clock."""

import dataclasses
import json
import os
import re
import signal
import socket
import subprocess
import sys
import time
import urllib.request
from datetime import UTC, datetime
from pathlib import Path

import pytest

from jobs.cli.main import run_cli
from jobs.errors import ExitCode
from jobs.schedules.schedule import ScheduleFolder
from tests.micro import write_micro

TVQ = [sys.executable, "-P", "-c", "from jobs.cli.main import main; main()"]


@pytest.fixture
def workplace(tmp_path, monkeypatch) -> Path:
    write_micro(tmp_path)
    (tmp_path / "books").mkdir()
    (tmp_path / "books" / "one.txt").write_text("Once upon a time. " * 50)
    flow = "name: nightly\nprepare: books --output corpora/books\ntrain: ./micro.yaml\n"
    (tmp_path / "nightly.yaml").write_text(flow)
    monkeypatch.chdir(tmp_path)
    monkeypatch.delenv("TVQ_ROOT", raising=False)
    return tmp_path


def say(capsys, *arguments: str) -> str:
    assert run_cli(list(arguments)) == ExitCode.OK
    return capsys.readouterr().out


ADD = ("schedule", "add", "nightly.yaml", "--cron", "30 2 * * *", "--timezone", "Europe/Berlin")


def test_a_schedule_from_its_beginning_to_its_end(workplace: Path, capsys):
    assert "no schedules yet" in say(capsys, "schedule", "list")
    assert re.search(r"next +\w{3} \d{4}-\d\d-\d\d \d\d:\d\d CES?T", say(capsys, *ADD))
    say(capsys, *ADD)  # again: the same
    header, row = say(capsys, "schedule", "list").splitlines()
    assert header.index("cron") == row.index("30 2 * * * Europe/Berlin")
    ticks = json.loads(say(capsys, "schedule", "next", "nightly", "--count", "3", "--json"))
    assert len(ticks) == 3
    assert all(re.fullmatch(r"\d{8}T0[01]3000Z", tick) for tick in ticks)
    # What it runs can be run from anywhere.
    stored = (workplace / "runs" / "schedules" / "nightly" / "flow.yaml").read_text()
    assert str(workplace / "books") in stored
    assert str(workplace / "corpora" / "books") in stored
    assert str(workplace / "micro.yaml") in stored
    assert "no tick yet" in say(capsys, "schedule", "history", "nightly")
    say(capsys, "schedule", "run-now", "nightly")
    [asked] = json.loads(say(capsys, "schedule", "history", "nightly", "--json"))
    assert asked["outcome"] == "asked for"
    say(capsys, "schedule", "pause", "nightly")
    assert "paused" in say(capsys, "schedule", "list")
    assert "next" in say(capsys, "schedule", "pause", "nightly", "--off")
    say(capsys, "schedule", "remove", "nightly")
    assert "no schedules yet" in say(capsys, "schedule", "list")


@pytest.mark.parametrize(
    ("arguments", "expected"),
    [
        ((*ADD[:4], "30 2 * *"), "expected five fields"),
        ((*ADD[:6], "Europe/Atlantis"), "no such time zone"),
        (("schedule", "add", "none.yaml", "--cron", "@daily"), "no such file"),
        ((*ADD, "--alert-command", "'"), "--alert-command"),
        ((*ADD, "--alert-webhook", "http://me:secret@x/"), "without a user and password"),
        ((*ADD, "--alert-command", "a", "--alert-webhook", "http://x/"), "give one"),
        (("schedule", "next", "nobody"), "`tvq schedule add` makes one"),
        (("schedule", "tick", "nobody"), "`tvq schedule add` makes one"),
        (("schedule", "serve", "--address", "http://head.example:8265"), "does not see it"),
        (("schedule", "serve", "--address", "http://127.0.0.1:9", "--env", "MY_TOKEN=1"), "secret"),
        (("schedule", "serve", "--env", "A=1"), "give --address too"),
        (
            ("schedule", "serve", "--address", "auto"),
            "expected the URL of a Ray cluster's dashboard",
        ),
        (
            ("schedule", "serve", "--address", "http://127.0.0.1:9", "--driver-resource", "x"),
            "--driver-resource x: expected NAME=AMOUNT",
        ),
    ],
)
def test_mistakes(workplace: Path, capsys, arguments, expected):
    assert run_cli(list(arguments)) == ExitCode.USER
    [line] = capsys.readouterr().err.splitlines()
    assert expected in line
    assert not (workplace / "runs").exists()


@pytest.mark.parametrize(
    ("text", "expected"),
    [
        ("prepare: books --output corpus", "train: expected what follows `tvq train`"),
        ("prepare: books\ntrain: tiny", "Missing option '--output'"),
        ("prepare: books -o corpus\ntrain: tinny", "did you mean tiny?"),
        ("prepare: books -o corpus\ntrain: tiny data.corpus=x", "the flow decides this"),
        ("prepare: books -o c\ntrain: tiny\npromot: {}", "did you mean promote?"),
        ("prepare: books -o c\ntrain: tiny\npromote: {min_delta: -1}", "expected 0 or more"),
        ("prepare: books -o c\ntrain: tiny\nbegin_from: nothing", "expected scratch or champion"),
        ("prepare: http://me:secret@x/ -o c\ntrain: tiny", "user name or password"),
        ("name: ../up\nprepare: books -o c\ntrain: tiny", "nightly.yaml: name: expected letters"),
        ("prepare: books -o c\ntrain: tiny training.step=8", "flow nightly.yaml: recipe tiny"),
    ],
)
def test_a_flow_that_is_none_is_refused_when_it_is_added(workplace: Path, capsys, text, expected):
    (workplace / "nightly.yaml").write_text(text)
    assert run_cli(list(ADD)) == ExitCode.USER
    [line] = capsys.readouterr().err.splitlines()
    assert expected in line
    assert not (workplace / "runs").exists()


def test_another_schedule_of_that_name_needs_replace(workplace: Path, capsys):
    say(capsys, *ADD)
    assert run_cli([*ADD, "--overlap", "queue"]) == ExitCode.USER
    assert "--replace" in capsys.readouterr().err
    say(capsys, *ADD, "--overlap", "queue", "--replace")
    schedule = ScheduleFolder(workplace / "runs", "nightly").load()
    assert schedule
    assert schedule.overlap == "queue"


@pytest.mark.parametrize("over", [False, True], ids=["running", "over"])
def test_a_killed_daemon_leaves_its_launch_to_the_next(workplace: Path, capsys, over):
    """The flow fails at once (there is no such source): what counts is who saw to it, and when."""
    say(capsys, *ADD)
    (workplace / "books" / "one.txt").unlink()
    say(capsys, "schedule", "run-now", "nightly")
    daemon = subprocess.Popen([*TVQ, "schedule", "serve"], stdout=subprocess.PIPE, text=True)
    assert daemon.stdout
    while "launched as" not in (line := daemon.stdout.readline()):
        assert line
    os.kill(daemon.pid, signal.SIGKILL)
    daemon.wait()
    daemon.stdout.close()
    while over and not list(workplace.glob("runs/launches/*/exit.json")):
        time.sleep(0.1)
    tick = [*TVQ, "schedule", "tick", "nightly"]
    ended = subprocess.run(tick, capture_output=True, text=True, check=False, timeout=240)
    assert ended.returncode == ExitCode.FAILED, ended.stderr
    assert "nothing is due" not in ended.stdout
    assert "taken over from a daemon that is gone" in ended.stdout
    assert "launched as" not in ended.stdout
    again = subprocess.run(tick, capture_output=True, text=True, check=True, timeout=240)
    assert "nothing is due" in again.stdout
    [tick] = json.loads(say(capsys, "schedule", "history", "nightly", "--json"))
    assert (tick["outcome"], tick["attempts"]) == ("failed", 1)
    [output] = re.findall(r"its output: (\S+)", tick["detail"])
    assert "no file matches" in Path(output).read_text()


def test_a_daemon_that_is_told_to_stop_ends(workplace: Path):
    daemon = subprocess.Popen([*TVQ, "schedule", "serve"], stdout=subprocess.PIPE, text=True)
    assert daemon.stdout
    assert "serving" in daemon.stdout.readline()
    time.sleep(0.2)
    daemon.send_signal(signal.SIGTERM)
    rest, _ = daemon.communicate(timeout=60)
    assert daemon.returncode == 0
    assert "stopped" in rest


def test_a_daemon_tells_prometheus_what_was_missed(workplace: Path, capsys):
    say(capsys, *ADD[:3], "--cron", "0 2 1 1 *")
    folder = ScheduleFolder(workplace / "runs", "nightly")
    schedule = folder.load()
    assert schedule
    since = f"{datetime.now(UTC).year - 3}0601T000000Z"
    folder.save(dataclasses.replace(schedule, since=since))
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        port = probe.getsockname()[1]
        # It is taken: one line, and no daemon.
        assert run_cli(["schedule", "serve", "--metrics-port", str(port)]) == ExitCode.USER
        assert "cannot be had" in capsys.readouterr().err
    daemon = subprocess.Popen(
        [*TVQ, "schedule", "serve", "--metrics-port", str(port)], stdout=subprocess.PIPE, text=True
    )
    assert daemon.stdout
    while "missed" not in (line := daemon.stdout.readline()):
        assert line
    text = ""
    while "tvq_missed_ticks{" not in text:  # the first look is being finished
        with urllib.request.urlopen(f"http://127.0.0.1:{port}/metrics", timeout=60) as answer:
            text = answer.read().decode()
    assert 'tvq_missed_ticks{schedule="nightly"} 3.0' in text
    daemon.send_signal(signal.SIGTERM)
    daemon.communicate(timeout=60)
    assert daemon.returncode == 0
