"""A run that somebody has claimed."""

from pathlib import Path

import pytest

from jobs.runs.run_directory import RunDirectory


@pytest.fixture
def run(tmp_path: Path) -> RunDirectory:
    """A claimed run, in a folder with a space."""
    run = RunDirectory.at(tmp_path / "my runs", "first")
    run.claim("identity", {"train": "a" * 64, "validation": "b" * 64}, "training: {}\n")
    return run
