"""What a worker asks of Ray and what JAX is told in it, for every kind of accelerator."""

import itertools
import random
from typing import Any

import pytest

from jobs.cluster.accelerators import (
    Host,
    check,
    devices_per_worker,
    environment,
    memberships,
    process_ids,
    ray_accelerator_type,
    resources,
)
from jobs.cluster.tpu_slices import Slice, tpu_slice
from jobs.errors import UserError
from jobs.recipe import ClusterConfig
from model.config import ConfigError

V5E = {"accelerator": "tpu", "accelerator_version": "v5e", "topology": "4x4"}
V4 = {"accelerator": "tpu", "accelerator_version": "v4", "topology": "2x2x2"}
AT = ("10.0.0.7", 4321)


def cluster(**fields: Any) -> ClusterConfig:
    return ClusterConfig(**fields)


# ---- A worker ------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("fields", "reserved", "devices", "platforms"),
    [
        ({}, {"CPU": 1}, 1, "cpu"),
        ({"cpus_per_worker": 3, "devices_per_worker": 2}, {"CPU": 3}, 2, "cpu"),
        ({"accelerator": "gpu"}, {"CPU": 1, "GPU": 1}, 1, "cuda"),
        ({"accelerator": "gpu", "devices_per_worker": 8}, {"CPU": 1, "GPU": 8}, 8, "cuda"),
        (V5E, {"CPU": 1, "TPU": 4}, 4, "tpu"),
        (V5E | {"topology": "2x4"}, {"CPU": 1, "TPU": 8}, 8, "tpu"),
        (V4 | {"cpus_per_worker": 9}, {"CPU": 9, "TPU": 4}, 4, "tpu"),
    ],
)
def test_worker(fields, reserved, devices, platforms):
    config = cluster(**fields)
    threads = str(config.cpus_per_worker)
    assert resources(config) == reserved
    assert devices_per_worker(config) == devices
    assert environment(config, {"HOME": "/", "XLA_FLAGS": ""}) == {
        "NPROC": threads,
        "OMP_NUM_THREADS": threads,
        "JAX_PLATFORMS": platforms,
    } | ({"MALLOC_ARENA_MAX": "1"} if platforms == "cpu" else {})
    given = {"XLA_FLAGS": "--a", "JAX_ENABLE_X64": "1"}
    assert environment(config, given).items() >= given.items()


# ---- Joining a mesh ------------------------------------------------------------------------------


def test_cpu_workers_join_by_rank_with_the_recipes_limits():
    config = cluster(workers=2, devices_per_worker=3, heartbeat_seconds=7, join_timeout_seconds=50)
    first, second = memberships(config, [Host(), Host()], AT)
    assert first.variables == second.variables == {}
    assert (
        first.settings
        == second.settings
        == {
            "jax_platforms": "cpu",
            "jax_cpu_collectives_implementation": "gloo",
            "jax_num_cpu_devices": 3,
        }
    )
    assert first.arguments == {
        "coordinator_address": "10.0.0.7:4321",
        "num_processes": 2,
        "process_id": 0,
        "coordinator_bind_address": "10.0.0.7:4321",
        "cluster_detection_method": "deactivate",
        "initialization_timeout": 50,
        "heartbeat_timeout_seconds": 7,
        "shutdown_timeout_seconds": 10,
    }
    differ = {"process_id": 1, "coordinator_bind_address": None}
    assert second.arguments == first.arguments | differ


@pytest.mark.parametrize("visible", ["2", "0", "GPU-7f2c-11"])
def test_gpu_worker_takes_what_ray_made_visible(visible):
    # Whatever its number on the node, the only visible GPU is number 0 in the process.
    [told] = memberships(cluster(workers=1, accelerator="gpu"), [Host(visible_gpus=visible)], AT)
    assert told.arguments["local_device_ids"] == [0]
    assert "CUDA_VISIBLE_DEVICES" not in told.variables
    assert told.settings == {"jax_platforms": "cuda"}


def test_gpu_worker_with_all_of_a_node():
    config = cluster(workers=2, accelerator="gpu", devices_per_worker=4)
    told = memberships(config, [Host(visible_gpus="0,1,2,3"), Host(visible_gpus="4,5,6,7")], AT)
    assert [each.arguments["local_device_ids"] for each in told] == [[0, 1, 2, 3]] * 2


@pytest.mark.parametrize("visible", [None, "", "0,1,2,3", "NoDevFiles,"])
def test_gpu_worker_that_sees_another_number_of_gpus_is_refused(visible):
    config = cluster(workers=2, accelerator="gpu", devices_per_worker=2)
    with pytest.raises(UserError, match=r"worker 1 asked for 2 GPUs and sees") as caught:
        memberships(config, [Host(visible_gpus="0,1"), Host(visible_gpus=visible)], AT)
    assert "\n" not in str(caught.value)


def test_processes_follow_slices_and_hosts_in_whatever_order_ray_ranks_them():
    """Against libtpu's own numbering: the slice times its hosts, plus the host."""
    config = cluster(workers=8, **V5E)  # two slices of four hosts
    placed = [
        Host(slice_name=name, tpu_worker_id=host)
        for name, host in itertools.product(("slice-a", "slice-b"), range(4))
    ]
    for seed in range(20):
        hosts = random.Random(seed).sample(placed, 8)
        told = memberships(config, hosts, AT)
        assert process_ids(config, hosts) == [each.arguments["process_id"] for each in told]
        for host, each in zip(hosts, told, strict=True):
            slice_id = ("slice-a", "slice-b").index(host.slice_name or "")
            assert each.arguments["process_id"] == 4 * slice_id + (host.tpu_worker_id or 0)
            assert each.variables == {
                "MEGASCALE_COORDINATOR_ADDRESS": "10.0.0.7",
                "MEGASCALE_PORT": "8081",
                "MEGASCALE_NUM_SLICES": "2",
                "MEGASCALE_SLICE_ID": str(slice_id),
            }
            assert each.settings == {"jax_platforms": "tpu"}
            assert "local_device_ids" not in each.arguments


def test_single_slice_has_no_variables_of_several():
    hosts = [Host(slice_name="only", tpu_worker_id=host) for host in (1, 0)]
    told = memberships(cluster(workers=2, **V4), hosts, AT)
    assert [each.variables for each in told] == [{}, {}]
    assert [each.arguments["process_id"] for each in told] == [1, 0]
    assert [each.arguments["coordinator_bind_address"] for each in told] == [
        None,
        "10.0.0.7:4321",
    ]


def test_slices_of_one_host_need_no_name():
    config = cluster(workers=3, **V5E | {"topology": "2x4"})
    told = memberships(config, [Host(tpu_worker_id=0)] * 3, AT)
    assert [each.variables["MEGASCALE_SLICE_ID"] for each in told] == ["0", "1", "2"]


@pytest.mark.parametrize("names", ["abab", "aabc", "abcd", "aaaa"])
def test_slices_that_are_not_whole_are_refused(names):
    config = cluster(workers=4, **V4)
    hosts = [
        Host(slice_name=name, tpu_worker_id=names[:place].count(name))
        for place, name in enumerate(names)
    ]
    if sorted(names) == ["a", "a", "b", "b"]:
        assert len(memberships(config, hosts, AT)) == 4
        return
    with pytest.raises(UserError, match="were to fill 2 slices of 2x2x2, 2 hosts each"):
        memberships(config, hosts, AT)


# ---- The recipe's fields -------------------------------------------------------------------------


@pytest.mark.parametrize(
    "fields",
    [
        {},
        {"workers": 2, "devices_per_worker": 4, "fsdp": 8},
        {"workers": 3, "accelerator": "gpu", "devices_per_worker": 8, "fsdp": 4, "tensor": 2},
        {"workers": 4, "fsdp": 16} | V5E,
        {"workers": 8, "data": 2, "fsdp": 4, "tensor": 4} | V5E,
        {"workers": 1} | V5E | {"topology": "2x4"},
        {"workers": 0, "fsdp": 3},
        {"workers": (1, 5)},
        {"workers": (2, 6), "devices_per_worker": 4, "fsdp": 2, "tensor": 2},
        {"workers": (4, 12), "fsdp": 16} | V5E,
    ],
)
def test_possible(fields):
    check(cluster(**fields))


@pytest.mark.parametrize(
    ("fields", "message"),
    [
        ({"topology": "4x4"}, "cluster.topology: is of TPUs"),
        ({"accelerator": "gpu", "accelerator_version": "v4"}, "cluster.accelerator_version: is of"),
        ({"accelerator": "tpu", "accelerator_version": "v4"}, "cluster.topology: .* needs it"),
        ({"accelerator": "tpu", "topology": "4x4"}, "cluster.accelerator_version: .* needs it"),
        (V5E | {"topology": "3x5"}, "cluster.topology: no v5e slice is 3x5; use 1x1, 2x2"),
        (V5E | {"topology": "2x2x2"}, "cluster.topology: no v5e slice"),
        (V4 | {"topology": "4x4"}, "cluster.topology: no v4 slice is 4x4; use 2x2x1"),
        (V4 | {"topology": "4x4x24"}, "multiples of 4 up to 12x12x16"),
        (V4 | {"topology": "²x4x4"}, "cluster.topology: no v4 slice"),
        (V4 | {"topology": "04x4x4"}, "cluster.topology: no v4 slice"),
        (V5E | {"workers": 4, "devices_per_worker": 4}, "cluster.devices_per_worker: on TPU"),
        (V5E | {"workers": 2}, "cluster.workers: a v5e slice of 4x4 has 4 hosts"),
        (V5E | {"workers": 4, "fsdp": 3}, "cluster.workers: each brings 4 devices, .* make 16"),
        ({"workers": 3, "fsdp": 2}, "cluster.workers: each brings one device, .* make 3;"),
        ({"workers": 2, "data": 1}, "cluster.workers: each brings one device"),
        ({"workers": (3, 2)}, r"cluster.workers: \[least, most\], got \[3, 2\]"),
        ({"workers": (1, 2), "data": 2}, "cluster.data: it alone must be -1 with cluster.workers="),
        ({"workers": (2, 4), "fsdp": 2}, "cluster.workers: .* adds and loses 1 devices at a time"),
        (V5E | {"workers": (4, 6)}, "cluster.workers: a v5e slice of 4x4 .* got 6"),
        (
            {"workers": 2, "accelerator": "gpu", "devices_per_worker": 3, "tensor": 4},
            "cluster.workers: each brings 3 devices",
        ),
    ],
)
def test_impossible_names_the_field(fields, message):
    with pytest.raises(ConfigError, match=message) as caught:
        check(cluster(**fields))
    assert "\n" not in str(caught.value)


# ---- Against Ray's own tables --------------------------------------------------------------------


@pytest.mark.ray
@pytest.mark.parametrize("version", ["v4", "v5e", "v5p", "v6e"])
def test_slices_are_those_that_ray_knows(version):
    from ray._private.accelerators.tpu import VALID_TPU_TOPOLOGY
    from ray.util.tpu import get_tpu_version_from_type, get_tpu_worker_resources

    name = ray_accelerator_type(cluster(**V4 | {"accelerator_version": version})) or ""
    theirs = VALID_TPU_TOPOLOGY[get_tpu_version_from_type(name)]
    tried = {
        "x".join(map(str, sizes))
        for length in (2, 3)
        for sizes in itertools.product((0, 1, 2, 3, 4, 6, 8, 12, 16, 20, 24, 28), repeat=length)
    } | theirs
    for topology in tried:
        if topology in theirs:
            ours = tpu_slice(version, topology)
            hosts, worker = get_tpu_worker_resources(topology, name)
            assert ours == Slice(hosts, int(worker["TPU"])), topology
        else:
            with pytest.raises(ConfigError, match=r"cluster\.topology"):
                tpu_slice(version, topology)
