"""`tvq logs` and `tvq gc`, on run directories made by hand."""

import json
import os
import subprocess
import sys
import time
from pathlib import Path

import pytest

from jobs.checkpoints.manifest import FORMAT_VERSION, CheckpointManifest, commit
from jobs.cli.main import run_cli
from jobs.runs import run_log
from jobs.runs.garbage import find_garbage, remove_garbage
from jobs.runs.lease import Lease
from jobs.runs.run_directory import RunDirectory

HOURS = 3600


@pytest.fixture
def root(tmp_path: Path) -> Path:
    return tmp_path / "runs"


def claimed(root: Path, name: str, hours_ago: float = 0) -> RunDirectory:
    run = RunDirectory.at(root, name)
    run.claim("identity", {}, "recipe")
    made = time.strftime("%Y-%m-%dT%H:%M:%SZ", time.gmtime(time.time() - hours_ago * HOURS))
    fields = json.loads((run.path / "run.json").read_text())
    (run.path / "run.json").write_text(json.dumps(fields | {"created": made}))
    return run


def checkpoint(
    run: RunDirectory, update: int, *, complete: bool = True, version: int = FORMAT_VERSION
) -> None:
    state = run.path / "checkpoints" / f"{update:08d}" / "state"
    state.mkdir(parents=True)
    (state / "array").write_bytes(bytes(1000))
    if complete:
        commit(
            run,
            CheckpointManifest(version, update, 1, "recipe", 1, {}, {}, {}, {"array": 1000}),
            lambda: None,
        )


def old(path: Path, hours: float) -> None:
    then = time.time() - hours * HOURS
    os.utime(path, (then, then))


def gc(capsys: pytest.CaptureFixture[str], root: Path, *options: str) -> set[tuple[str, str]]:
    assert run_cli(["gc", "--root", str(root), "--json", *options]) == 0
    return {(g["kind"], g["name"]) for g in json.loads(capsys.readouterr().out)["garbage"]}


def test_garbage_is_what_no_training_will_use_and_is_removed_only_when_told(
    root: Path, capsys: pytest.CaptureFixture[str]
):
    orphan = claimed(root, "orphan", 30)
    (orphan.path / "logs" / "driver.jsonl").write_text("{}\n")
    checkpoint(orphan, 100, complete=False)
    claimed(root, "young", 1)
    trained = claimed(root, "trained", 50)
    checkpoint(trained, 100)
    checkpoint(trained, 200, complete=False)
    checkpoint(trained, 300)
    (trained.path / "checkpoints/00000300/manifest.json").write_text("damaged")
    held = claimed(root, "held", 50)
    checkpoint(held, 50, complete=False)
    name = "recipe.yaml." + "0a" * 16 + ".tmp"
    torn = trained.path / name
    torn.write_text("torn")
    old(torn, 25)
    (trained.path / name.replace("0a", "0b")).write_text("being written")
    (held.path / name).write_text("its own")
    old(held.path / name, 25)
    (root / "models" / "NAME").mkdir(parents=True)
    (root / "models" / "NAME" / "weights").write_text("not a run")
    everything = {path for path in root.rglob("*") if path.is_file()}

    with Lease(held).held():
        expected = {
            ("run without a checkpoint", "orphan"),
            ("unfinished checkpoint", "trained/checkpoints/00000200"),
            ("temporary file", f"trained/{name}"),
        }
        assert gc(capsys, root) == expected
        present = {path for path in root.rglob("*") if path.is_file()}
        assert present - {held.path / "lease.json"} == everything, "listing changes nothing"
        assert run_cli(["gc", "--root", str(root)]) == 0
        shown = capsys.readouterr().out
        assert "add --yes to remove it" in shown
        assert "orphan" in shown
        assert gc(capsys, root, "--yes") == expected
    left = {path for path in root.rglob("*") if path.is_file()}
    assert not left - everything
    assert everything - left == {
        path for path in everything
        if orphan.path in path.parents or "00000200" in str(path) or path == torn
    }  # fmt: skip
    assert not orphan.path.exists()
    assert gc(capsys, root) == {("run without a checkpoint", "held")}  # its driver is gone
    assert ("run without a checkpoint", "young") in gc(capsys, root, "--older-than", "0.5")


def test_what_a_training_took_up_meanwhile_stays(root: Path):
    run = claimed(root, "taken-up", 30)
    busy = claimed(root, "busy", 30)
    found = find_garbage(root, 24 * HOURS, time.time(), left_alone=pytest.fail)
    assert {garbage.name for garbage in found} == {"taken-up", "busy"}
    checkpoint(run, 10)
    with Lease(busy).held():
        remove_garbage(root, found)
    assert run.record()
    assert busy.record()


def test_a_run_of_a_newer_tvq_is_left_and_the_others_are_not(
    root: Path, capsys: pytest.CaptureFixture[str]
):
    newer = claimed(root, "newer", 30)
    checkpoint(newer, 10, version=FORMAT_VERSION + 1)
    checkpoint(newer, 20, complete=False)
    claimed(root, "orphan", 30)
    before = {path for path in newer.path.rglob("*") if path.is_file()}
    assert gc(capsys, root, "--yes") == {("run without a checkpoint", "orphan")}
    assert {path for path in newer.path.rglob("*") if path.is_file()} == before
    assert run_cli(["gc", "--root", str(root)]) == 0
    assert "warning: run newer is left as it is: " in capsys.readouterr().err


def lines_of(capsys: pytest.CaptureFixture[str], *arguments: str) -> list[str]:
    assert run_cli(["logs", *arguments]) == 0
    return capsys.readouterr().out.splitlines()


def write_log(run: RunDirectory, who: str, *lines: tuple[str, str, str]) -> None:
    text = "".join(
        json.dumps({"time": at, "level": level, "logger": "tvq", "pid": 1, "message": message})
        + "\n"
        for at, level, message in lines
    )
    with (run.path / "logs" / f"{who}.jsonl").open("a") as file:
        file.write(text)


def test_logs_come_in_the_order_of_time(root: Path, capsys: pytest.CaptureFixture[str]):
    run = claimed(root, "a")
    write_log(run, "driver", ("T1", "INFO", "begins"), ("T4", "ERROR", "ends"))
    write_log(run, "rank-1", ("T2", "INFO", "one"))
    write_log(run, "rank-10", ("T3", "WARNING", "two\nlines\x1b[31m"))
    where = ("a", "--root", str(root))
    assert lines_of(capsys, *where) == [
        "T1 driver begins",
        "T2 rank-1 one",
        r"T3 rank-10 WARNING: two\nlines\x1b[31m",
        "T4 driver ERROR: ends",
    ]
    assert lines_of(capsys, *where, "--rank", "1") == ["T2 rank-1 one"]
    assert lines_of(capsys, *where, "--driver") == ["T1 driver begins", "T4 driver ERROR: ends"]
    parsed = [json.loads(line) for line in lines_of(capsys, *where, "--json")]
    assert [line["who"] for line in parsed] == ["driver", "rank-1", "rank-10", "driver"]
    assert run_cli(["logs", *where, "--rank", "7"]) == 2
    assert "has no log of rank-7; there are driver, rank-1, rank-10" in capsys.readouterr().err
    assert run_cli(["logs", *where, "--rank", "7", "--driver"]) == 2


def test_a_log_that_is_followed_shows_what_is_added(root: Path):
    run = claimed(root, "a")
    write_log(run, "driver", ("T1", "INFO", "begins"))
    command = [
        sys.executable, "-c", "from jobs.cli.main import main; main()", "logs", "a", "--root",
        str(root), "--follow",
    ]  # fmt: skip
    process = subprocess.Popen(command, stdout=subprocess.PIPE, text=True)
    assert process.stdout is not None
    assert process.stdout.readline() == "T1 driver begins\n"
    write_log(run, "rank-0", ("T2", "INFO", "a new one"))
    assert process.stdout.readline() == "T2 rank-0 a new one\n"
    process.send_signal(2)
    assert process.wait(60) == 0


def test_logs_of_a_bucket_are_read_there(bucket: str, capsys: pytest.CaptureFixture[str]):
    root = f"{bucket}/runs"
    run = RunDirectory.at(root, "a")
    run.claim("identity", {}, "recipe")
    run_log.open_log(run.logs, "rank-0")
    run_log.event("group start", rank=0)
    run_log.close_log()
    [line] = lines_of(capsys, "a", "--root", root)
    assert line.endswith("Z rank-0 group start rank=0")
