"""What needs several devices or processes, in processes of its own: a process has one backend."""

import contextlib
import json
import os
import subprocess
import sys
import time
from pathlib import Path
from typing import Any, NamedTuple

import jax
import numpy as np
import pytest
from jax.sharding import SingleDeviceSharding

from jobs import recipe as recipes
from jobs.checkpoints.manifest import complete_checkpoints
from jobs.checkpoints.restore import leaf_sums, restore_newest
from jobs.runs.run_directory import RunDirectory
from jobs.training.programs import Programs
from jobs.training.samples import Samples
from model.sharding import make_mesh
from pipeline.loader import training_batches
from pipeline.mixture import Mixture
from tests.micro import write_micro
from tests.services import free_port

pytestmark = pytest.mark.compiles

HERE = Path(__file__).parent
ROOT = HERE.parents[2]


def environment(**changes: str) -> dict[str, str]:
    return {**os.environ, "PYTHONPATH": str(ROOT), "JAX_PLATFORMS": "cpu", **changes}


@pytest.mark.parametrize(
    "program",
    [
        "on_four_devices.py",
        "programs_on_four_devices.py",
        pytest.param("training_on_four_devices.py", marks=pytest.mark.slow),
    ],
)
@pytest.mark.timeout(600)
def test_on_four_devices(program: str):
    """Runs the tests of the program."""
    # The second halves the time of compilation, which is most of it.
    flags = "--xla_force_host_platform_device_count=4 --xla_backend_optimization_level=0"
    ended = subprocess.run(
        [
            sys.executable,
            "-m",
            "pytest",
            "-q",
            "-p",
            "no:cacheprovider",
            HERE / program,
        ],
        cwd=ROOT,
        env=environment(XLA_FLAGS=flags),
        capture_output=True,
        text=True,
        check=False,
    )
    assert ended.returncode == 0, ended.stdout[-6000:] + ended.stderr[-2000:]


class Two(NamedTuple):
    """What two processes of one mesh saw, the run that they saved to, and their corpus."""

    seen: list[dict[str, Any]]
    run: RunDirectory
    corpus: Path


@pytest.fixture(scope="module")
def two(tmp_path_factory: pytest.TempPathFactory) -> Two:
    folder = tmp_path_factory.mktemp("two processes")
    corpus, recipe = write_micro(folder)
    run = RunDirectory.at(folder, "first")
    run.claim("identity", {}, "")
    (run.path / "lease.json").write_text('{"owner": "the test"}')
    port = free_port()
    processes = []
    for rank in range(2):
        with (folder / f"{rank}.out").open("w") as out, (folder / f"{rank}.err").open("w") as err:
            command = [sys.executable, HERE / "one_of_two_processes.py", str(port), str(rank)]
            processes.append(
                subprocess.Popen(
                    [*command, run.path, corpus, recipe],
                    cwd=ROOT,
                    env=environment(XLA_FLAGS="", NPROC="2"),
                    stdout=out,
                    stderr=err,
                )
            )
    try:
        # One that failed leaves the other waiting.
        while any(process.poll() is None for process in processes):
            assert not any(process.returncode for process in processes), _errors(folder)
            time.sleep(0.05)
    finally:
        for process in processes:
            process.kill()
            process.wait()
    assert [process.returncode for process in processes] == [0, 0], _errors(folder)
    outputs = [(folder / f"{rank}.out").read_text() for rank in range(2)]
    return Two([json.loads(output.splitlines()[-1]) for output in outputs], run, corpus)


def _errors(folder: Path) -> str:
    return "\n".join((folder / f"{rank}.err").read_text()[-3000:] for rank in range(2))


@pytest.mark.parametrize(
    ("mesh", "asked"),
    [
        # 6 rows; 4 devices along the rows hold 2 of 8 each, 2 devices 3 of 6, 1 all 6.
        ("data", [[0, 1, 2, 3], [4, 5, 6, 7]]),
        ("fsdp", [[0, 1, 2, 3], [4, 5, 6, 7]]),
        ("mixed", [[0, 1, 2], [3, 4, 5]]),
        ("tensor", [[0, 1, 2, 3, 4, 5], [0, 1, 2, 3, 4, 5]]),
    ],
)
def test_each_host_loads_its_rows_and_together_they_are_the_batch(
    two: Two, mesh: str, asked: list[list[int]]
):
    padding = max(max(rows) for rows in asked) + 1 - 6
    for rank, seen in enumerate(two.seen):
        assert seen["batches"][mesh]["asked"] == asked[rank]
        assert seen["batches"][mesh]["targets"] == [1, 2, 3, 4, 5, 6] + [0] * padding
        assert seen["batches"][mesh]["mask"] == [True] * 6 + [False] * padding
        assert seen["batches"][mesh]["flag"] == 1  # raised by rank 1 alone


@pytest.mark.parametrize("mesh", ["data", "fsdp", "mixed", "tensor"])
def test_what_the_hosts_load_is_the_batch_that_one_host_loads(two: Two, mesh: str):
    with training_batches(two.corpus, sequence_length=32, batch_size=6, seed=0) as batches:
        expected = next(batches).targets.tolist()
    assert [seen["batches"][mesh]["loaded"] for seen in two.seen] == [expected, expected]


@pytest.mark.parametrize("harm", ["length", "content", "listing"])
def test_damage_that_one_host_sees_makes_both_take_the_one_before(two: Two, harm: str):
    for seen in two.seen:
        assert seen["checkpoint"]["damaged"][harm]["update"] == 4
        assert seen["checkpoint"]["damaged"][harm]["same"]


def test_each_host_is_told_of_by_its_lowest_rank(two: Two):
    used = {0: 25.0, 1: 75.0}, {0: 20.0, 1: 80.0}  # of memory, of processors: percent by rank

    def told(rank: int, group: str) -> dict[str, Any]:
        memory, processors = (percent[rank] for percent in used)
        return {
            f"system/{group}cpu_utilization_percentage": pytest.approx(processors),
            f"system/{group}system_memory_usage_megabytes": pytest.approx(memory * 10 * 1.024e-3),
            f"system/{group}system_memory_usage_percentage": pytest.approx(memory),
        }

    for seen in two.seen:  # both know, rank 0 records
        first, then = seen["loads"]["two machines"]
        assert first == told(0, "") | told(1, "host-1/")
        # No processor time has gone by since.
        assert then == {name: value for name, value in first.items() if "cpu" not in name}
        assert seen["loads"]["one machine"][0] == told(0, "")


def test_all_hosts_write_one_text_and_rank_0_keeps_it(two: Two):
    assert all(seen["samples"]["split"] for seen in two.seen)
    ours, other = (two.run.path.with_name(f"of-rank-{rank}") / "samples" for rank in range(2))
    assert not other.exists()
    text = (ours / "00000020.txt").read_text()
    # One device, which draws from the same logits but for rounding.
    fields = (f"data.corpus={two.corpus}", "training.samples=3")
    recipe = recipes.resolve(recipes.load(str(two.corpus.with_name("micro.yaml")), fields))
    mesh = make_mesh(jax.devices()[:1])
    programs = Programs(recipe, mesh)
    alone = RunDirectory(two.corpus.with_name("alone"))
    kept = Samples(alone, recipe, Mixture.load(recipe.data.corpora), mesh, programs.write)
    with contextlib.closing(kept):
        kept.write(programs.create(), 20)
    expected = (alone.path / "samples" / "00000020.txt").read_text()
    assert text == expected.replace("alone,", "of-rank-0,")


def test_two_hosts_save_one_checkpoint_that_one_host_restores(two: Two):
    values = np.arange(40, dtype=np.float32).reshape(8, 5) ** 2
    for seen in two.seen:
        assert seen["checkpoint"]["update"] == 6
        assert seen["checkpoint"]["same"]
    assert [manifest.update for manifest in complete_checkpoints(two.run)] == [4, 6]
    sharding = SingleDeviceSharding(jax.devices()[0])
    restored = restore_newest(
        two.run, {"a": jax.ShapeDtypeStruct(values.shape, values.dtype, sharding=sharding)}
    )
    assert restored is not None
    state, manifest = restored
    np.testing.assert_array_equal(np.asarray(state["a"]), values)
    assert manifest.sums == {"['a']": int(leaf_sums({"a": jax.numpy.asarray(values)})["['a']"])}
