"""Over how many devices a recipe's parameters can be split."""

import dataclasses

import pytest

from jobs import recipe as recipes
from jobs.cluster.accelerators import mesh_axes
from jobs.planning.changes import spread_axes
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
