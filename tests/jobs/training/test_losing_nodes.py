"""A training whose nodes are announced to go, lost and added; see on_a_shrinking_cluster.py."""

import json
import os
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest

from jobs.errors import ExitCode

pytestmark = [pytest.mark.ray, pytest.mark.tracking, pytest.mark.slow, pytest.mark.timeout(900)]

HERE = Path(__file__).parent
ROOT = HERE.parents[2]


def trained(folder: Path, scenario: str) -> dict[str, Any]:
    ended = subprocess.run(
        [sys.executable, HERE / "on_a_shrinking_cluster.py", folder, scenario],
        capture_output=True,
        text=True,
        timeout=880,
        cwd=folder,
        env={**os.environ, "PYTHONPATH": str(ROOT)},
        check=False,
    )
    assert ended.returncode == 0, ended.stdout[-2000:] + ended.stderr[-4000:]
    seen = json.loads(ended.stdout.splitlines()[-1])
    assert seen["problem"] is None, seen["problem"]
    return seen


def test_an_announced_loss_of_a_node_is_saved_before_and_ends_a_fixed_group(tmp_path):
    seen = trained(tmp_path, "preempted")
    assert seen["code"] == ExitCode.PREEMPTED
    [[update, reason]] = seen["ends"]
    assert reason == "PREEMPTED"
    assert seen["newest"] == update >= 8
    assert f"stopped at update {update}, which is saved" in seen["message"]


def test_an_elastic_group_shrinks_and_grows_and_loses_nothing_when_it_grows(tmp_path):
    seen = trained(tmp_path, "elastic")
    first, second = seen["starts"]
    assert len(first) == 3
    assert first[0] == 0
    assert len(second) == 2, "two workers, one, two"
    assert second == [first[0], first[2]]
    # The one worker saved before its group ended for a larger one.
    resized, stopped = seen["ends"]
    assert resized == [first[2], "RESIZED"]
    assert first[1] < first[2] < stopped[0] == seen["newest"]
    assert stopped[1] == "REQUESTED"
    assert seen["code"] == ExitCode.PREEMPTED


def test_a_node_is_lost_and_the_training_ends_on_the_others_as_if_none_had_been(tmp_path):
    """Three raylets, a group of two workers spread over two of them."""
    seen = trained(tmp_path, "spread")
    assert "code" not in seen, seen["message"]
    first, second = seen["starts"]
    assert first == second
    assert len(first) == 2
    assert 0 == first[0] < first[1] < seen["newest"] == 800
    calm, moved = seen["sums"]
    assert moved == calm
