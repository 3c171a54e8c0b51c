"""Load of a machine, from files of /proc written by hand; of two, see test_several_devices.py."""

from pathlib import Path

import pytest

from jobs.training.host_load import HostLoad


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
