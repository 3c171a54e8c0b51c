"""`tvq bench train --ray`: its differences by hand, and all of it once, small."""

import json
from pathlib import Path

import pytest

from jobs.bench.ray_overhead import Timed, _summary
from jobs.cli.main import run_cli
from tests.micro import write_micro


def timed(update: float, **others: float) -> Timed:
    figures = {
        "coordination": 0.0, "step": 1.0, "saving": 0.0, "longest_save": 0.0, "last_save": 0.0,
    } | others  # fmt: skip
    return Timed(update=update, starts={"restore": update}, **figures)


def test_what_ray_adds_is_the_difference_within_a_block():
    bare = [timed(1), timed(3), timed(10, saving=0.5, step=2, longest_save=3), timed(10)]
    rayed = [timed(4), timed(6), timed(11), timed(11.5)]
    tree = _summary(bare, rayed)
    assert tree["rounds"] == 2
    assert tree["added_seconds"] == {"median": 2.125, "least": 1.25, "greatest": 3}
    assert tree["saving_share"]["greatest"] == 0.5
    assert tree["longest_save_in_steps"]["greatest"] == 1.5
    assert tree["start_seconds_bare"] == {"restore": 6.5}


def test_too_few_updates_are_refused(tmp_path: Path, capsys: pytest.CaptureFixture[str]):
    corpus, recipe = write_micro(tmp_path)
    command = ["bench", "train", str(recipe), f"data.corpus={corpus}", "--ray", "--updates", "60"]
    assert run_cli(command) == 2
    assert "--updates: must be at least 100, for a save besides" in capsys.readouterr().err
    assert run_cli(["bench", "train", str(recipe), "--ray"]) == 2
    assert "data.corpus: no corpus given" in capsys.readouterr().err


@pytest.mark.ray
@pytest.mark.slow
def test_a_block_is_measured(tmp_path: Path, capsys: pytest.CaptureFixture[str]):
    corpus, recipe = write_micro(tmp_path)
    command = ["bench", "train", str(recipe), f"data.corpus={corpus}", "--ray", "--rounds", "1"]
    assert run_cli([*command, "--updates", "104", "--json"]) == 0
    tree = json.loads(capsys.readouterr().out)
    assert 0 < tree["coordination_seconds"]["median"] < tree["update_seconds_ray"]["median"]
    assert 0 < tree["saving_share"]["median"] < 1
    assert list(tree["start_seconds_ray"]) == [
        "Ray", "a worker", "join", "imports", "restore", "first step",
    ]  # fmt: skip
    assert list(tree["start_seconds_bare"]) == ["a worker", "imports", "restore", "first step"]
    assert min(tree["start_seconds_ray"].values()) >= 0
    assert min(tree["start_seconds_bare"].values()) > 0
