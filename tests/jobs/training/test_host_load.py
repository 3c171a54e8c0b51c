"""Load of a machine, from files of /proc written by hand; of two, on raylets with their own /proc.

Who speaks for a machine, see test_several_devices.py.
"""

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest

from jobs.training.host_load import HostLoad

HERE = Path(__file__).parent


def test_processor_use_is_between_two_calls_and_memory_is_what_is_not_available(tmp_path: Path):
    stat = tmp_path / "stat"
    stat.write_text("cpu 100 0 100 700 100 0 0 0 50 0\ncpu0 1 2 3\n")
    (tmp_path / "meminfo").write_text("MemTotal: 1000000 kB\nMemAvailable: 250000 kB\nX: 3\n")
    load = HostLoad(tmp_path)
    # 100 ticks more, 20 of them idle and 5 waiting.
    stat.write_text("cpu 160 0 115 720 105 0 0 0 99 0\n")
    assert load.values() == {
        "system/cpu_utilization_percentage": pytest.approx(75.0),
        "system/system_memory_usage_megabytes": pytest.approx(768.0),
        "system/system_memory_usage_percentage": pytest.approx(75.0),
    }
    assert "system/cpu_utilization_percentage" not in load.values()


def test_a_system_that_does_not_tell_has_no_such_metrics(tmp_path: Path):
    assert HostLoad(tmp_path).values() == {}


@pytest.mark.ray
@pytest.mark.tracking
@pytest.mark.slow
@pytest.mark.timeout(600)
def test_each_machine_of_a_cluster_is_told_of_at_every_checkpoint(tmp_path: Path):
    other_proc = ["unshare", "--mount", "mount", "--bind", "/dev/null", "/proc/meminfo"]
    if subprocess.run(other_proc, stderr=subprocess.DEVNULL, check=False).returncode:
        pytest.skip("no process may have a /proc of its own here (root, CAP_SYS_ADMIN)")
    ended = subprocess.run(
        [sys.executable, HERE / "on_two_machines.py", tmp_path],
        capture_output=True,
        text=True,
        timeout=580,
        cwd=tmp_path,
        env={**os.environ, "PYTHONPATH": str(HERE.parents[2])},
        check=False,
    )
    assert ended.returncode == 0, ended.stdout[-2000:] + ended.stderr[-4000:]
    found = json.loads(ended.stdout.splitlines()[-1])
    names = (
        "cpu_utilization_percentage",
        "system_memory_usage_megabytes",
        "system_memory_usage_percentage",
    )
    groups = ("system/", "system/host-1/")
    assert found.keys() == {group + name for group in groups for name in names}
    assert all([update for update, _ in points] == [8, 16] for points in found.values())
    shares = [
        [value for _, value in found[f"{group}system_memory_usage_percentage"]] for group in groups
    ]
    # Rank 0 is on the one or on the other.
    assert shares.count([75.0, 75.0]) == 1
