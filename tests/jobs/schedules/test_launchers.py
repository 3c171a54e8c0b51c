"""Launches as real processes: once each, living on without their daemon, known when they died."""

import json
import os
import signal
import time
from collections.abc import Callable
from pathlib import Path

import pytest

from jobs.schedules.launchers import LocalLauncher


def wait_for(condition: Callable[[], object]) -> None:
    end = time.monotonic() + 120
    while not condition():
        assert time.monotonic() < end, "it did not come to pass within two minutes"
        time.sleep(0.05)


@pytest.fixture
def launcher(tmp_path: Path) -> LocalLauncher:
    return LocalLauncher(tmp_path / "launches")


def test_a_launch_runs_once_and_says_how_it_ended(tmp_path: Path, launcher: LocalLauncher):
    assert launcher.state("good") is None
    launcher.launch("good", ["recipes", "tiny"])
    assert launcher.state("good") in ("running", "succeeded")
    # Again, and by another daemon.
    LocalLauncher(tmp_path / "launches").launch("good", ["recipes", "tiny"])
    launcher.launch("bad", ["recipes", "tinny"])
    wait_for(lambda: launcher.state("good") != "running" != launcher.state("bad"))
    assert (launcher.state("good"), launcher.state("bad")) == ("succeeded", "failed")
    launcher.launch("good", ["recipes", "tiny"])
    output = Path(launcher.where("good")).read_text()
    assert output.count("sequence_length") == 1
    assert "did you mean tiny?" in Path(launcher.where("bad")).read_text()
    assert json.loads((tmp_path / "launches" / "bad" / "exit.json").read_text())["code"] == 2


def test_a_launch_that_is_asked_to_stop_or_killed(tmp_path: Path, launcher: LocalLauncher):
    served = ["schedule", "serve", "--root", str(tmp_path / "runs")]  # it runs until Ctrl-C
    for id in ("stopped", "killed"):
        launcher.launch(id, served)
        wait_for(lambda id=id: "serving" in Path(launcher.where(id)).read_text())
        assert launcher.state(id) == "running"
    launcher.stop("stopped")
    wait_for(lambda: launcher.state("stopped") != "running")
    assert launcher.state("stopped") == "succeeded"
    assert "what was launched goes on" in Path(launcher.where("stopped")).read_text()
    folder = tmp_path / "launches" / "killed"
    supervisor = json.loads((folder / "started.json").read_text())["pid"]
    [child] = Path(f"/proc/{supervisor}/task/{supervisor}/children").read_text().split()
    os.kill(supervisor, signal.SIGKILL)
    wait_for(lambda: launcher.state("killed") != "running")
    assert launcher.state("killed") == "lost"
    os.kill(int(child), signal.SIGKILL)


def test_a_daemon_that_died_before_the_process_began_has_launched_nothing(
    tmp_path: Path, launcher: LocalLauncher
):
    folder = tmp_path / "launches" / "half"
    folder.mkdir(parents=True)
    (folder / "command.json").write_text('["recipes", "tiny"]')
    (folder / "lock").touch()
    assert launcher.state("half") is None
    launcher.launch("half", ["recipes", "tiny"])
    wait_for(lambda: launcher.state("half") == "succeeded")
