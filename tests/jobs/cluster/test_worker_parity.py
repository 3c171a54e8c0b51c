"""Groups of two, three and four Ray workers train as one process does."""

import json
from pathlib import Path

import jax
import numpy as np
import pytest

from jobs import recipe as recipes
from jobs.cluster.ray_session import ray_session
from jobs.console import Console
from jobs.runs.run_directory import RunDirectory
from jobs.training.train import train
from tests.micro import write_micro
from tests.runs import losses, state_difference

pytestmark = [pytest.mark.ray, pytest.mark.tracking, pytest.mark.slow, pytest.mark.timeout(900)]

UPDATES = 50


def test_two_three_and_four_workers_are_one_process(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
):
    """Batches of four rows: three workers are given padding."""
    monkeypatch.setenv("XLA_FLAGS", "--xla_backend_optimization_level=0")
    monkeypatch.setenv("JAX_ENABLE_X64", "1")  # for the workers
    corpus, micro = write_micro(tmp_path)

    def trained(workers: int) -> RunDirectory:
        overrides = (
            f"data.corpus={corpus}", "model.dtype=float64", f"training.steps={UPDATES}",
            "training.evaluate_every=50", "checkpoint.every=50", f"cluster.workers={workers}",
        )  # fmt: skip
        recipe = recipes.load(str(micro), overrides)
        root, console = tmp_path / "runs", Console(quiet=True)
        return train(recipe, root=root, name=f"on-{workers}", console=console).run

    jax.config.update("jax_enable_x64", True)  # the loop runs in another thread of this process
    try:
        alone = trained(0)
        with ray_session(None, cpus=4):
            groups = [trained(workers) for workers in (2, 3, 4)]
        expected = losses(alone)
        assert [step for step, _ in expected] == list(range(1, UPDATES + 1))
        seen = {}
        for run in groups:
            found = losses(run)
            assert [step for step, _ in found] == [step for step, _ in expected]
            # They come as float32: equal but for their last place.
            np.testing.assert_allclose(
                [loss for _, loss in found], [loss for _, loss in expected], rtol=2e-7
            )
            seen[run.name] = state_difference(run, alone)
        print(json.dumps(seen))
        assert max(seen.values()) < 1e-9
    finally:
        jax.config.update("jax_enable_x64", False)
