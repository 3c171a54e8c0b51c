"""The spool's promises: whole segments, numbers that go on, nothing lost but the unflushed."""

import json
import math
import os
import subprocess
import sys
from pathlib import Path

import pytest

from jobs.runs.metric_spool import (
    MetricPoint,
    MetricSpool,
    acknowledge,
    last_number,
    read_segment,
    segments,
)
from pipeline.errors import CorpusError


def point(step: int, value: float = 0.5) -> MetricPoint:
    return MetricPoint(step, step * 10, 1000 + step, {"train/loss_nats_per_token": value})


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    return tmp_path / "a run" / "metrics"


def names(folder: Path) -> list[str]:
    return sorted(path.name for path in folder.iterdir())


def test_a_flush_is_one_numbered_file_of_the_documented_lines(folder: Path):
    spool = MetricSpool(folder)
    spool.append(MetricPoint(7, 70, 1234, {"train/loss_nats_per_token": 2.31}))
    spool.append(point(8))
    assert segments(folder) == []
    spool.flush()
    spool.flush()
    assert names(folder) == ["00000001.jsonl"]
    first = (folder / "00000001.jsonl").read_text().splitlines()[0]
    assert json.loads(first) == {
        "step": 7,
        "tokens": 70,
        "time_ms": 1234,
        "values": {"train/loss_nats_per_token": 2.31},
    }


def test_values_that_are_not_finite_and_numpy_scalars_survive(folder: Path):
    import numpy as np

    values = {"nan": math.nan, "inf": math.inf, "less": -math.inf, "tenth": np.float32(0.1)}
    spool = MetricSpool(folder)
    spool.append(MetricPoint(np.int32(1), np.int64(10), 5, values))  # type: ignore[arg-type]
    spool.flush()
    [read] = read_segment(folder, "00000001.jsonl").points
    assert (read.step, read.tokens) == (1, 10)
    assert math.isnan(read.values["nan"])
    assert read.values["inf"] == math.inf
    assert read.values["less"] == -math.inf
    assert read.values["tenth"] == float(np.float32(0.1))


def test_numbers_go_on_after_what_exists_and_after_what_was_acknowledged(folder: Path):
    for _ in range(2):
        spool = MetricSpool(folder)
        spool.append(point(1))
        spool.flush()
    assert names(folder) == ["00000001.jsonl", "00000002.jsonl"]
    for name in segments(folder):
        acknowledge(folder, name)
    assert segments(folder) == []
    assert last_number(folder) == 2
    later = MetricSpool(folder)
    later.append(point(2))
    later.flush()
    assert segments(folder) == ["00000003.jsonl"]


def test_two_writers_at_once_overwrite_nothing(folder: Path):
    first, second = MetricSpool(folder), MetricSpool(folder)
    for step in range(3):
        for spool, shift in ((first, 0), (second, 100)):
            spool.append(point(step + shift))
            spool.flush()
    steps = [p.step for name in segments(folder) for p in read_segment(folder, name).points]
    assert steps == [0, 100, 1, 101, 2, 102]


def test_segments_are_ordered_by_number_beyond_eight_digits(folder: Path):
    folder.mkdir(parents=True)
    for number in ("100000000", "99999999", "00000002"):
        (folder / f"{number}.jsonl").touch()
    assert segments(folder) == ["00000002.jsonl", "99999999.jsonl", "100000000.jsonl"]


def test_foreign_files_are_ignored_and_unfinished_ones_removed(folder: Path):
    MetricSpool(folder)
    for name in ("notes.jsonl", "1.json", "0000001x.jsonl", "00000001.jsonl.5f.tmp"):
        folder.mkdir(parents=True, exist_ok=True)
        (folder / name).write_text("{}\n")
    assert segments(folder) == []
    MetricSpool(folder)
    assert names(folder) == ["0000001x.jsonl", "1.json", "notes.jsonl"]


def test_a_missing_folder_has_no_segments(folder: Path):
    assert segments(folder) == []
    assert last_number(folder) == 0


@pytest.mark.parametrize(
    "line",
    ['{"step": 3, "tok', '{"step": 3}', "[1, 2]", "null", '{"step":1,"tokens":1,"time_ms":1,'
     '"values":{"a":null}}', "\0\0\0\0"],
)  # fmt: skip
def test_a_damaged_line_is_named_and_the_others_are_read(folder: Path, line: str):
    spool = MetricSpool(folder)
    spool.append(point(1))
    spool.append(point(2))
    spool.flush()
    path = folder / "00000001.jsonl"
    good = path.read_text().splitlines()
    path.write_text("\n".join([good[0], line, good[1]]))
    read = read_segment(folder, path.name)
    assert [p.step for p in read.points] == [1, 2]
    assert read.damage
    assert f"{path}, line 2" in read.damage
    assert "\n" not in read.damage


def test_an_empty_segment_is_damage_and_is_kept_aside(folder: Path):
    folder.mkdir(parents=True)
    path = folder / "00000001.jsonl"
    path.touch()
    assert "empty" in str(read_segment(folder, path.name).damage)
    acknowledge(folder, path.name, damaged=True)
    assert names(folder) == ["00000001.jsonl.damaged", "acknowledged"]


def test_a_killed_writer_leaves_whole_segments_and_loses_only_what_it_had_not_flushed(folder: Path):
    program = f"""
import os, signal, sys
from pathlib import Path
from jobs.runs.metric_spool import MetricPoint, MetricSpool
spool = MetricSpool(Path({str(folder)!r}))
for step in range(100):
    spool.append(MetricPoint(step, step, step, {{"a": step / 3}}))
    if step % 10 == 9 and step < 90:
        spool.flush()
os.kill(os.getpid(), signal.SIGKILL)
"""
    environment = {**os.environ, "PYTHONPATH": str(Path(__file__).parents[3])}
    ended = subprocess.run([sys.executable, "-c", program], env=environment, check=False)
    assert ended.returncode == -9
    read = [read_segment(folder, name) for name in segments(folder)]
    assert all(segment.damage is None for segment in read)
    points = [p for segment in read for p in segment.points]
    assert points == [MetricPoint(step, step, step, {"a": step / 3}) for step in range(90)]


def test_without_hard_links_nothing_is_written_rather_than_overwritten(folder: Path, monkeypatch):
    def no_links(*_: object) -> None:
        raise PermissionError("this file system has no hard links")

    monkeypatch.setattr(os, "link", no_links)
    spool = MetricSpool(folder)
    spool.append(point(1))
    with pytest.raises(CorpusError, match=r"00000001\.jsonl: cannot be written"):
        spool.flush()
    assert names(folder) == []
    monkeypatch.undo()
    spool.flush()
    assert names(folder) == ["00000001.jsonl"]
