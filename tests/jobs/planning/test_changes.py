"""What is proposed for a recipe that does not fit."""

import dataclasses

import pytest

from jobs import recipe as recipes
from jobs.cluster.accelerators import mesh_axes
from jobs.planning.changes import offered, possible_changes, spread_axes, with_changes
from jobs.planning.chips import GIB, read_target
from jobs.planning.plan import Plan, Program
from model.config import ConfigError


@pytest.mark.parametrize(
    ("name", "devices", "fsdp", "tensor"),
    [
        ("pg19", 32, 32, 1),  # 32 rows, one a device
        ("pg19", 64, 32, 2),  # there is no row for the other half
        ("imagenet64", 64, 16, 4),
        ("enwik8", 8, 8, 1),
        ("enwik8", 24, 8, 3),
        ("enwik8", 28, 4, 1),  # no mesh of 28 divides 32 rows, and 7 no axis of the model
    ],
)
def test_parameters_are_split_over_what_divides_them_and_no_device_is_idle(
    name: str, devices: int, fsdp: int, tensor: int
):
    assert spread_axes(recipes.resolve(recipes.load(name)), devices) == (fsdp, tensor)


def test_what_is_left_is_the_axis_that_says_so():
    cluster = recipes.ClusterConfig(data=1, fsdp=-1, tensor=2)
    assert mesh_axes(cluster, 16, "") == {"data": 1, "fsdp": 8, "tensor": 2}
    assert mesh_axes(cluster, 2, "") == {"data": 1, "fsdp": 1, "tensor": 2}
    both = dataclasses.replace(cluster, data=-1)
    with pytest.raises(ConfigError, match=r"sixteen, and .* -1 x -1 x 2 does not make 16"):
        mesh_axes(both, 16, "sixteen")
    with pytest.raises(ConfigError, match="does not make 3"):
        mesh_axes(cluster, 3, "")


def refused(needed_gib: float, rows: int, **parts_gib: float) -> Plan:
    """On one TPU v5e, of whose program no more is known."""
    target = read_target("v5e:1x1")
    program = Program("train", int(needed_gib * GIB), fits=False, seconds_to_compile=4)
    return Plan(
        target, {"data": 1, "fsdp": 1, "tensor": 1}, rows, 0, [program],
        {name: int(size * GIB) for name, size in parts_gib.items()}, target.chip.memory,
        updates=0, batches=0, batch_rows=rows, batch_tokens=0, flops_formula=0, flops_compiler=None,
        traffic=None, collectives={}, parameter_collectives=0, time=None, evaluation_seconds=None,
        decode_seconds=None, checkpoint_bytes=0, checkpoints_kept=0, open_loops=0, money=None,
    )  # fmt: skip


def test_where_caches_fill_the_memory_a_smaller_batch_is_proposed():
    """libtpu: enwik8 on v5e:1x1 needs 31.07 GiB of 15.75 GiB, with a row at a time still 25.03,
    since each row of the batch keeps its caches."""
    enwik8 = recipes.resolve(recipes.load("enwik8"))
    made = refused(31.07, 32, parameters=0.69, optimizer=1.37, gradients=0.69, cache=7.13)
    most, smaller, *_ = possible_changes(enwik8, made)
    assert most == {"training.accumulate": 32}
    assert smaller == {"training.batch_size": 8}
    identities = [recipes.identity(with_changes(enwik8, each)) for each in (most, smaller)]
    assert identities[0] == recipes.identity(enwik8) != identities[1]
    assert offered(most) == "training.accumulate=32"
    assert offered(smaller) == "training.batch_size=8 (another training)"


def test_where_activations_fill_it_the_rows_are_split_and_the_batch_stays():
    enwik8 = recipes.resolve(recipes.load("enwik8"))
    made = refused(33, 32, parameters=0.69, optimizer=1.37, gradients=0.69, cache=0.2)
    first = next(possible_changes(enwik8, made))
    # 2.75 GiB of state and 1 of caches stay; of the other 29.25 a quarter does.
    assert first == {"training.accumulate": 4}
