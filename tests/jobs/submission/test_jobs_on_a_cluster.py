"""`tvq submit` and `tvq jobs` on a real Ray cluster of this machine, with its job server."""

import json
import os
import re
import signal
import subprocess
import sys
import tempfile
import time
from collections.abc import Iterator
from pathlib import Path

import pytest

from jobs.checkpoints.manifest import newest_update
from jobs.cli.main import run_cli
from jobs.runs.run_directory import RunDirectory, list_runs
from tests.jobs.submission.relay import Relay
from tests.micro import RECIPE, write_micro
from tests.ray_head import RayHead, ray_head

pytestmark = [pytest.mark.cluster, pytest.mark.timeout(900)]

TVQ = [sys.executable, "-P", "-c", "from jobs.cli.main import main; main()"]


@pytest.fixture(scope="module")
def head() -> Iterator[RayHead]:
    with tempfile.TemporaryDirectory(prefix="tvq-ray-") as folder, ray_head(Path(folder)) as head:
        yield head


@pytest.fixture(scope="module")
def workplace(tmp_path_factory) -> Path:
    """A corpus, a recipe, and beside them what nobody wants to upload."""
    folder = tmp_path_factory.mktemp("work")
    write_micro(folder)
    (folder / "secrets.txt").write_text("hunter2")
    (folder / "huge.bin").write_bytes(bytes(30_000_000))
    (folder / "model").mkdir()
    (folder / "model/__init__.py").write_text("raise SystemExit('shadowed')")
    return folder


def tvq(head: RayHead, folder: Path, *arguments: str, code: int | None = 0) -> str:
    ran = subprocess.run(
        [*TVQ, *arguments, "--address", head.url],
        cwd=folder, env=head.environment, capture_output=True, text=True, timeout=600, check=False,
    )  # fmt: skip
    output = ran.stdout + ran.stderr
    assert code is None or ran.returncode == code, (ran.returncode, output)
    assert "Traceback (most recent call last)" not in ran.stderr
    assert "INFO" not in ran.stderr, "Ray talks"
    return output


def submit(head: RayHead, folder: Path, name: str, *more: str, code: int | None = 0) -> str:
    command = ["submit", "./micro.yaml", "data.corpus=corpus", "--run", name, *more]
    return tvq(head, folder, *command, code=code)


def job_of(output: str) -> str:
    found = re.search(r"tvq-\S+-[0-9a-f]{8}-\d+", output)
    assert found, output
    return found[0]


def test_submitted_followed_and_submitted_again(head, workplace):
    output = submit(head, workplace, "first")
    run = RunDirectory(workplace / "runs" / "first")
    assert newest_update(run) == 40
    assert "uploads   tvq-" in output
    assert "trained to update 40" in output
    assert f"{job_of(output)}: succeeded" in output
    again = submit(head, workplace, "first")
    assert "already finished at update 40; nothing to do" in again
    assert job_of(again) != job_of(output)
    waited = json.loads(submit(head, workplace, "first", "--json"))  # and nothing of the log
    assert waited["job"] not in (job_of(again), job_of(output))
    listed = json.loads(tvq(head, workplace, "jobs", "list", "--json"))
    ours = [job for job in listed if job["metadata"]["tvq_run"] == "first"]
    assert [job["status"] for job in ours] == ["SUCCEEDED"] * 3
    assert tvq(head, workplace, "jobs", "wait", job_of(output)).endswith("succeeded\n")


def test_the_wheel_alone_lies_where_the_job_runs(head, workplace):
    session = next(Path(head.temp).glob("session_*"))
    unpacked = "runtime_resources/working_dir_files/_ray_pkg_*"
    packages = list(session.rglob(f"{unpacked}/jobs/cli/main.py"))
    assert packages
    for path in packages:
        tops = {entry.name.partition("-")[0] for entry in path.parents[2].iterdir()}
        assert tops <= {"pipeline", "model", "jobs", "infra", "tvq"}
        assert not list(path.parents[2].rglob("secrets.txt"))


def test_a_failure_has_its_exit_code_and_the_reason_first(head, workplace):
    output = submit(head, workplace, "broken", "data.corpus=nowhere", code=2)
    reason = output.split("failed with exit code 2\n", 1)[1].splitlines()[0]
    assert reason.strip().startswith("error: ")
    assert "nowhere" in reason
    tvq(head, workplace, "jobs", "wait", job_of(output), code=2)
    assert tvq(head, workplace, "jobs", "status", job_of(output), code=2) == "failed\n"


def test_ctrl_c_detaches_stop_saves_and_the_same_command_resumes(head, workplace):
    run = RunDirectory(workplace / "runs" / "long")
    steps = ["training.steps=100000", "optimizer.schedule_steps=100000", "checkpoint.every=1000"]
    follower = subprocess.Popen(
        [*TVQ, "submit", "./micro.yaml", "data.corpus=corpus", "--run", "long", *steps,
         "--address", head.url],
        cwd=workplace, env=head.environment, stdout=subprocess.PIPE, stderr=subprocess.STDOUT,
        text=True,
    )  # fmt: skip
    assert follower.stdout is not None
    seen = ""
    while "tokens/s" not in seen:
        line = follower.stdout.readline()
        assert line, seen
        seen += line
    time.sleep(2)  # a line comes every ten seconds: it waits for one
    follower.send_signal(signal.SIGINT)
    seen += follower.communicate(timeout=60)[0]
    assert follower.returncode == 130, seen
    assert "detached" in seen
    job = job_of(seen)
    assert tvq(head, workplace, "jobs", "status", job) == "running\n"

    attached = submit(head, workplace, "long", *steps, "--detach")
    assert f"attached to {job}" in attached
    busy = submit(head, workplace, "long", "--detach", "training.seed=1", code=3)
    assert f"job {job}: trains run long by another recipe now" in busy

    stopped = tvq(head, workplace, "jobs", "stop", job)
    assert f"{job}: stopped" in stopped
    saved = newest_update(run)
    assert saved > 0, "it was to save"
    assert saved % 1000, "it saved where it was, and not where a checkpoint was due"

    resumed = submit(head, workplace, "long", f"training.steps={saved + 4}",
                     "optimizer.schedule_steps=100000")  # fmt: skip
    assert f"resuming from the checkpoint at update {saved}" in resumed
    assert newest_update(run) == saved + 4


def test_a_job_that_no_node_has_room_for_says_so(head, workplace):
    follower = subprocess.Popen(
        [*TVQ, "submit", "./micro.yaml", "data.corpus=corpus", "--run", "roomless",
         "--driver-resource", "unobtainium=1", "--address", head.url],
        cwd=workplace, env=head.environment, stdout=subprocess.PIPE, stderr=subprocess.STDOUT,
        text=True,
    )  # fmt: skip
    assert follower.stdout is not None
    while "has not begun: " not in (line := follower.stdout.readline()):
        assert line
    assert "waiting for resources" in line
    follower.send_signal(signal.SIGINT)
    assert "detached" in follower.communicate()[0]
    assert follower.returncode == 130


def test_workers_that_have_to_wait_for_a_place_say_so(head, workplace):
    waits = ["cluster.workers=3", "cluster.start_timeout_seconds=5"]
    output = submit(head, workplace, "many", *waits, code=4)
    assert "room for 2 of 3 workers of CPU 1 each now; the training waits for it, 5 s" in output
    assert "error: no place for 3 workers" in output


def test_a_secret_that_the_cluster_lacks_ends_the_job(head, workplace):
    output = submit(head, workplace, "poor", "--secret", "NOWHERE_SET", code=2)
    assert "error: NOWHERE_SET: not set on this cluster" in output


FOLLOWED = """
import io, sys, zipfile
from jobs.submission.ray_jobs import RayJobs

package = io.BytesIO()
with zipfile.ZipFile(package, "w") as archive:
    archive.writestr("lines.py", sys.argv[2])
jobs = RayJobs(sys.argv[1])
assert jobs.submit("lines", "python -u lines.py", package=package.getvalue(),
                   variables={}, metadata={})

def write(text):
    sys.stdout.write(text)
    sys.stdout.flush()

assert jobs.follow("lines", write).status == "SUCCEEDED"
"""
LINES = """
import time
for k in range(60):
    print(f"line {k}, wörtlich")
    time.sleep(0.3)
"""


def test_a_connection_that_breaks_is_made_again_and_no_line_is_lost_or_repeated(head, workplace):
    with Relay(int(head.url.rpartition(":")[2])) as relay:
        follower = subprocess.Popen(
            [sys.executable, "-P", "-c", FOLLOWED, f"http://127.0.0.1:{relay.port}", LINES],
            cwd=workplace, env=head.environment, stdout=subprocess.PIPE, text=True,
        )  # fmt: skip
        assert follower.stdout is not None
        seen = []
        for line in follower.stdout:
            seen.append(line.strip())
            if seen[-1].startswith(("line 5,", "line 30,")):
                relay.cut()
                time.sleep(5)
                relay.mend()
        assert follower.wait() == 0
    numbered = [line for line in seen if line.startswith("line ")]
    assert numbered == [f"line {k}, wörtlich" for k in range(60)]


LAUNCHED_TWICE = """
import sys, time
from concurrent.futures import ThreadPoolExecutor
from jobs.schedules.ray_launcher import RayLauncher
from jobs.submission.submit import Request

address, root, id, *command = sys.argv[1:]
launchers = [RayLauncher(Request(address), root) for _ in range(2)]
assert launchers[0].state(id) is None
with ThreadPoolExecutor(2) as pool:
    list(pool.map(lambda launcher: launcher.launch(id, command), launchers))
assert launchers[0].state(id) is not None
while (state := launchers[1].state(id)) == "running":
    time.sleep(0.2)
launchers[0].launch(id, command)
print(state)
"""


def jobs_of(head: RayHead, folder: Path, run: str) -> list[str]:
    listed = json.loads(tvq(head, folder, "jobs", "list", "--json"))
    return [job["job"] for job in listed if job["metadata"]["tvq_run"] == run]


@pytest.mark.parametrize(("recipe", "end"), [("tiny", "succeeded"), ("tinny", "failed")])
def test_an_id_that_two_daemons_launch_is_one_job(head, workplace, recipe, end):
    id = f"{recipe}-20260101T020000Z"
    ran = subprocess.run(
        [sys.executable, "-P", "-c", LAUNCHED_TWICE, head.url, "runs", id, "recipes", recipe],
        cwd=workplace, env=head.environment, capture_output=True, text=True, check=False,
    )  # fmt: skip
    assert ran.stdout == f"{end}\n", ran.stderr
    [job] = jobs_of(head, workplace, id)
    # Another root's schedule of that name has another job.
    assert job.startswith(f"tvq-{id}-")
    assert tvq(head, workplace, "jobs", "logs", job).count("sequence_length") == (end != "failed")


def test_one_tick_of_two_daemons_is_one_job_that_trains_once(head, tmp_path, monkeypatch, capsys):
    (tmp_path / "micro.yaml").write_text(RECIPE)
    (tmp_path / "books").mkdir()
    for number in range(40):
        lines = [f"In the year {number * 37 + k} the {k % 17}th ship came home." for k in range(80)]
        (tmp_path / "books" / f"{number}.txt").write_text("\n".join(lines))
    prepare = "prepare: books --output corpora/books --validation 0.3 --test 0\n"
    (tmp_path / "nightly.yaml").write_text(f"{prepare}train: ./micro.yaml\n")
    monkeypatch.chdir(tmp_path)
    assert run_cli(["schedule", "add", "nightly.yaml", "--cron", "0 2 1 1 *"]) == 0
    assert run_cli(["schedule", "run-now", "nightly"]) == 0
    daemons = [
        subprocess.Popen(
            [*TVQ, "schedule", "tick", "nightly", "--address", head.url],
            cwd=tmp_path, env=head.environment, stdout=subprocess.PIPE, stderr=subprocess.STDOUT,
            text=True,
        )
        for _ in range(2)
    ]  # fmt: skip
    said = [daemon.communicate(timeout=600)[0] for daemon in daemons]
    assert [daemon.returncode for daemon in daemons] == [0, 0], said
    assert sum("launched as" in each for each in said) == 1
    capsys.readouterr()
    assert run_cli(["schedule", "history", "nightly", "--json"]) == 0
    [tick] = json.loads(capsys.readouterr().out)
    assert (tick["outcome"], tick["attempts"]) == ("succeeded", 1)
    [job] = jobs_of(head, tmp_path, f"nightly-{tick['tick']}")
    assert "promoted: the first champion" in tvq(head, tmp_path, "jobs", "logs", job)
    assert len(list_runs(tmp_path / "runs")) == 1


def test_with_a_token_and_without(workplace):
    with (
        tempfile.TemporaryDirectory(prefix="tvq-ray-") as folder,
        ray_head(Path(folder), token="a" * 64) as head,
    ):
        output = submit(head, workplace, "first")
        assert "already finished at update 40" in output
        for wrong in ({}, {"RAY_AUTH_TOKEN": "b" * 64}):
            home = {"HOME": folder, **wrong}
            plain = {k: v for k, v in head.environment.items() if not k.startswith("RAY_AUTH")}
            other = head._replace(environment=plain | home)
            refused = submit(other, workplace, "first", code=2)
            assert "the cluster wants a token" in refused


def test_nobody_at_the_address(workplace):
    nobody = RayHead("http://127.0.0.1:9", dict(os.environ), "")
    assert "nobody answers there" in submit(nobody, workplace, "first", code=2)
