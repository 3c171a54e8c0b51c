"""What `tvq submit` sends and refuses, without a cluster."""

import io
import json
import re
import subprocess
import sys
import venv
import zipfile
from pathlib import Path

import pytest

from jobs import recipe as recipes
from jobs.cli.main import run_cli
from jobs.console import Console
from jobs.errors import ExitCode, UserError
from jobs.submission.job_failure import failure
from jobs.submission.submit import Request, settled, submit_command
from jobs.submission.wheel import built_wheel

REMOTE = "http://head.example:8265"


def request(address: str = REMOTE, **fields) -> Request:
    return Request(address, **fields)


def recipe(**data):
    overrides = [f"data.{name}={value}" for name, value in data.items()]
    return recipes.load("tiny", tuple(overrides))


def test_what_lies_on_this_machine_only_is_refused(monkeypatch, tmp_path):
    monkeypatch.delenv("MLFLOW_TRACKING_URI", raising=False)
    with pytest.raises(UserError, match=r"data.corpus: /here/books is on this machine.*--shared"):
        settled(recipe(corpus="/here/books"), "gs://bucket/runs", request())
    with pytest.raises(UserError, match=r"--root: .* is on this machine.*gs://BUCKET/runs"):
        settled(recipe(corpus="gs://bucket/books"), tmp_path, request())
    with pytest.raises(UserError, match=r"tracking.uri: the runs lie in gs://bucket/runs"):
        settled(recipe(corpus="gs://bucket/books"), "gs://bucket/runs", request())
    monkeypatch.setenv("MLFLOW_TRACKING_URI", f"sqlite:///{tmp_path}/mlflow.db")
    with pytest.raises(UserError, match=r"tracking.uri: .*mlflow.db is on this machine"):
        settled(recipe(corpus="gs://bucket/books"), "gs://bucket/runs", request())


def test_a_declared_folder_and_this_machines_cluster_see_local_paths(monkeypatch, tmp_path):
    monkeypatch.delenv("MLFLOW_TRACKING_URI", raising=False)
    monkeypatch.chdir(tmp_path)
    shared = request(shared=(tmp_path,))
    sent, root = settled(recipe(corpus="books"), Path("runs"), shared)
    assert (sent.data.corpus, root) == (f"{tmp_path}/books", f"{tmp_path}/runs")
    here = request("http://127.0.0.1:8265")
    assert settled(recipe(corpus="books"), Path("runs"), here) == (sent, root)
    mixed = recipe(mixture="{a: 1, gs://bucket/b: 3}")
    assert settled(mixed, Path("runs"), here)[0].data.mixture == {
        f"{tmp_path}/a": 1,
        "gs://bucket/b": 3,
    }


def test_the_tracking_server_of_the_environment_goes_along(monkeypatch):
    monkeypatch.setenv("MLFLOW_TRACKING_URI", "https://mlflow.example")
    sent, _ = settled(recipe(corpus="gs://bucket/books"), "gs://bucket/runs", request())
    assert sent.tracking.uri == "https://mlflow.example"
    monkeypatch.setenv("MLFLOW_TRACKING_URI", "https://me:hunter2@mlflow.example")
    with pytest.raises(UserError, match="holds a password") as caught:
        settled(recipe(corpus="gs://bucket/books"), "gs://bucket/runs", request())
    assert "hunter2" not in str(caught.value)


def test_a_tracking_file_of_this_folder_is_that_of_the_job(monkeypatch, tmp_path):
    monkeypatch.delenv("MLFLOW_TRACKING_URI", raising=False)
    monkeypatch.chdir(tmp_path)
    here = request("http://127.0.0.1:8265")
    for stated in ("sqlite:///mlflow.db", f"sqlite:///{tmp_path}/mlflow.db"):
        stating = ("data.corpus=gs://bucket/books", f"tracking.uri={stated}")
        local = recipes.load("tiny", stating)
        assert settled(local, "runs", here)[0].tracking.uri == f"sqlite:///{tmp_path}/mlflow.db"
        with pytest.raises(UserError, match=f"tracking.uri: {tmp_path}/mlflow.db is on this"):
            settled(local, "gs://bucket/runs", request())


def dry(capsys, *, as_json: bool = False, **fields) -> str:
    submit_command(
        "tiny",
        ("data.corpus=gs://bucket/books", "tracking.uri=https://mlflow.example"),
        request(**fields),
        root="gs://bucket/runs",
        name="tiny",
        detach=False,
        dry=True,
        console=Console(quiet=as_json),
        as_json=as_json,
    )
    return capsys.readouterr().out


def test_a_secret_is_passed_by_name_alone(monkeypatch, capsys, tmp_path):
    monkeypatch.setenv("TVQ_PLAN_CACHE", str(tmp_path))
    monkeypatch.setenv("HF_TOKEN", "hunter2")
    monkeypatch.setenv("LANG", "C.UTF-8")
    with pytest.raises(UserError, match="--env HF_TOKEN: looks like a secret"):
        dry(capsys, variables=("HF_TOKEN",))
    with pytest.raises(UserError, match="--env NOWHERE_SET: is not set here"):
        dry(capsys, variables=("NOWHERE_SET",))
    shown = dry(capsys, variables=("LANG", "DEPTH=3"), secrets=("HF_TOKEN",))
    assert "LANG, DEPTH" in shown
    assert re.search(r"^plan .* of cpu:2 not made yet: `tvq plan`", shown, re.MULTILINE)
    assert "HF_TOKEN to be set on the cluster" in shown
    assert "hunter2" not in shown
    assert "C.UTF-8" not in shown
    fields = json.loads(dry(capsys, as_json=True, variables=("LANG",), secrets=("HF_TOKEN",)))
    assert (fields["data"], fields["expects"]) == ({"gs://bucket/books": 1}, ["HF_TOKEN"])
    assert "LANG" in fields["sets"]


@pytest.mark.parametrize(
    ("address", "more", "expected"),
    [
        ("127.0.0.1:8265", [], "expected the URL of a Ray cluster's dashboard"),
        ("ray://127.0.0.1:10001", [], "expected the URL of a Ray cluster's dashboard"),
        ("http://head:port", [], "expected the URL of a Ray cluster's dashboard"),
        ("http://me:hunter2@head:8265", [], "holds a user or password"),
        ("http://127.0.0.1:9", ["data.corpus=null"], "data.corpus: no corpus given"),
        ("http://127.0.0.1:9", ["--driver-resource", "x"], "expected NAME=AMOUNT"),
        ("http://127.0.0.1:9", ["--run", "a b"], "run name 'a b': expected letters"),
    ],
)
def test_what_is_wrong_is_said_before_anybody_is_asked(capsys, address, more, expected):
    command = ["submit", "tiny", "data.corpus=gs://b/books", *more, "--address", address]
    tracking = ["tracking.uri=https://mlflow.example", "--root", "gs://b/runs"]
    assert run_cli([*command, *tracking]) == ExitCode.USER
    said = capsys.readouterr()
    [line] = said.err.splitlines()
    assert expected in line
    assert "hunter2" not in line
    assert said.out == ""


def test_the_wheel_is_the_packages_and_nothing_else():
    wheel = built_wheel()
    assert wheel.data == built_wheel().data  # uploaded once
    names = zipfile.ZipFile(io.BytesIO(wheel.data)).namelist()
    assert len(names) == wheel.files
    tops = {name.partition("/")[0].partition("-")[0] for name in names}
    assert tops == {"pipeline", "model", "jobs", "infra", "tvq"}
    assert "jobs/recipes/tiny.yaml" in names
    assert "model/attention.py" in names
    assert not [name for name in names if "test" in name or name.endswith(".pyc")]


def test_an_installed_wheel_sends_itself(tmp_path):
    built = built_wheel()
    (tmp_path / built.name).write_bytes(built.data)
    venv.create(tmp_path / "env", symlinks=True)
    python = tmp_path / "env/bin/python"
    [site] = (tmp_path / "env/lib").glob("python*/site-packages")
    install = ["install", "--quiet", "--no-deps", "--no-index", "--target", str(site)]
    subprocess.run([sys.executable, "-m", "pip", *install, tmp_path / built.name], check=True)
    (site / "zz_rest.pth").write_text("\n".join(path for path in sys.path if "site-pack" in path))
    code = (
        "import io, json, zipfile; from jobs.submission.wheel import built_wheel;"
        "w = built_wheel();"
        "z = zipfile.ZipFile(io.BytesIO(w.data));"
        "print(json.dumps({n: z.getinfo(n).CRC for n in z.namelist()}))"
    )
    ran = subprocess.run(
        [python, "-c", code], cwd=tmp_path, capture_output=True, text=True, check=True
    )
    archive = zipfile.ZipFile(io.BytesIO(built.data))
    ours = {name: archive.getinfo(name).CRC for name in archive.namelist()}
    theirs = json.loads(ran.stdout)
    record = next(name for name in ours if name.endswith("RECORD"))
    assert theirs.keys() == ours.keys()
    assert {n for n in ours if ours[n] != theirs[n]} <= {record}  # pip adds its own files there


LOG = """\
update 1/12  loss 6.18
Traceback (most recent call last):
  File "/env/lib/python3.11/site-packages/ray/train/trainer.py", line 10, in fit
    return go()
  File "/tmp/ray/_ray_pkg_1/jobs/training/train.py", line 99, in train
    run()
  File "/tmp/ray/_ray_pkg_1/model/training.py", line 7, in train_step
    raise ZeroDivisionError
ZeroDivisionError: by zero
"""


def test_the_reason_of_a_failure_comes_first():
    assert failure(LOG, 1) == [
        "ZeroDivisionError: by zero",
        "  in train_step (model/training.py:7)",
        "  in train (jobs/training/train.py:99)",
        "  and 1 frame of libraries",
    ]
    assert failure(LOG + "error: data.corpus: not found\n", 2) == ["error: data.corpus: not found"]
    assert failure("one\ntwo\n", 1) == ["one", "two"]
    assert failure("", 1) == []
    [killed] = failure(LOG + "Killed\n", 137)
    assert killed.startswith("killed by SIGKILL, perhaps since memory was short")
    assert failure("one\n", ExitCode.INTERRUPTED) == ["one"]
