"""Where Ray puts a group's workers, what they see there, and how they become one mesh.

The GPUs and TPU slices are in Ray's books only; see on_faked_hardware.py.
"""

import json
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest

pytestmark = [pytest.mark.ray, pytest.mark.slow, pytest.mark.timeout(600)]

PROGRAM = Path(__file__).parent / "on_faked_hardware.py"


def groups_on(hardware: str, folder: Path) -> list[Any]:
    """Of each group: what its workers saw, by process of the mesh, or the error's text."""
    run = subprocess.run(
        [sys.executable, PROGRAM, folder, hardware],
        capture_output=True,
        text=True,
        timeout=580,
        cwd=folder,
        check=False,
    )
    assert run.returncode == 0, run.stderr[-4000:]
    return json.loads(run.stdout.splitlines()[-1])


def visible(worker: dict[str, Any]) -> str:
    return worker["environment"]["CUDA_VISIBLE_DEVICES"]


def joined(workers: list[dict[str, Any]]) -> None:
    """Checks that the workers would find each other, each as a process of its own."""
    told = [worker["arguments"] for worker in workers]
    assert [each["process_id"] for each in told] == list(range(len(workers)))
    assert {each["num_processes"] for each in told} == {len(workers)}
    [address] = {each["coordinator_address"] for each in told}
    assert address.startswith("127.0.0.1:")
    bound = [each["coordinator_bind_address"] for each in told]
    assert bound == [address] + [None] * (len(workers) - 1)
    assert {each["heartbeat_timeout_seconds"] for each in told} == {17}


# ---- GPUs ----------------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def gpus(tmp_path_factory: pytest.TempPathFactory) -> list[Any]:
    return groups_on("gpus", tmp_path_factory.mktemp("gpus"))


def test_a_worker_for_each_gpu_of_a_node(gpus):
    workers = gpus[0]
    joined(workers)
    assert [worker["rank"] for worker in workers] == [0, 1, 2, 3]
    assert len({worker["node"] for worker in workers}) == 1
    # What Ray gave is what CUDA shows, and no two workers share it.
    assert [worker["gpus"] for worker in workers] == [["0"], ["1"], ["2"], ["3"]]
    assert [visible(worker) for worker in workers] == ["0", "1", "2", "3"]
    assert all(worker["arguments"]["local_device_ids"] == [0] for worker in workers)
    assert all(worker["reserved"] == {"CPU": 1, "GPU": 1} for worker in workers)
    assert {worker["environment"]["JAX_PLATFORMS"] for worker in workers} == {"cuda"}
    assert {worker["platforms"] for worker in workers} == {"cuda"}


def test_a_worker_for_all_gpus_of_a_node(gpus):
    workers = gpus[1]
    joined(workers)
    assert len({worker["node"] for worker in workers}) == 2
    assert [visible(worker) for worker in workers] == ["0,1,2,3"] * 2
    assert all(worker["arguments"]["local_device_ids"] == [0, 1, 2, 3] for worker in workers)


def test_elastic_group_takes_what_is_there(gpus):
    workers = gpus[4]
    joined(workers)
    assert [visible(worker) for worker in workers] == ["0,1,2,3"] * 2


@pytest.mark.parametrize("group", [2, 3], ids=["fixed", "elastic"])
def test_group_without_a_place_says_what_was_asked_and_what_is_there(gpus, group):
    message = gpus[group]
    assert message.startswith(
        "no place for 3 workers of CPU 1, GPU 4 each after 5 s; the cluster's nodes:"
        " 2 x (CPU 4, GPU 4); 1 x (CPU 2, GPU 0), of which CPU 10, GPU 8 is free;"
    )
    assert "\n" not in message
    assert "cluster.start_timeout_seconds" in message


# ---- TPU slices ----------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def slices(tmp_path_factory: pytest.TempPathFactory) -> list[Any]:
    return groups_on("slices", tmp_path_factory.mktemp("slices"))


def host(worker: dict[str, Any]) -> tuple[str, int]:
    """The slice and the place in it, by the node's labels; the raylet's environment agrees."""
    environment, labels = worker["environment"], worker["labels"]
    assert environment["TPU_NAME"] == labels["ray.io/tpu-slice-name"]
    assert environment["TPU_WORKER_ID"] == labels["ray.io/tpu-worker-id"]
    return environment["TPU_NAME"], int(environment["TPU_WORKER_ID"])


def test_one_slice_is_filled_and_numbered_by_its_hosts(slices):
    workers = slices[0]
    joined(workers)
    [name] = {host(worker)[0] for worker in workers}
    assert [host(worker) for worker in workers] == [(name, 0), (name, 1)]
    for worker in workers:
        assert worker["reserved"]["TPU"] == 4
        assert worker["environment"]["JAX_PLATFORMS"] == worker["platforms"] == "tpu"
        assert not any(variable.startswith("MEGASCALE") for variable in worker["environment"])


def test_several_slices_are_filled_whole_and_know_each_other(slices):
    workers = slices[1]
    joined(workers)
    places = [(name, place) for name in ("slice-a", "slice-b") for place in (0, 1)]
    assert [host(worker) for worker in workers] == places
    megascale = [
        {
            name: value
            for name, value in worker["environment"].items()
            if name.startswith("MEGASCALE")
        }
        for worker in workers
    ]
    assert megascale == [
        {
            "MEGASCALE_COORDINATOR_ADDRESS": "127.0.0.1",
            "MEGASCALE_PORT": "8081",
            "MEGASCALE_NUM_SLICES": "2",
            "MEGASCALE_SLICE_ID": slice_id,
        }
        for slice_id in ("0", "0", "1", "1")
    ]


def test_more_slices_than_there_are_have_no_place(slices):
    message = slices[2]
    assert message.startswith(
        "no place for 6 workers of CPU 1, TPU 4 each, 3 whole slices of v4 2x2x2 after 5 s;"
    )
    assert "4 x (CPU 1, TPU 4)" in message


# ---- CPUs ----------------------------------------------------------------------------------------


def test_cpu_workers_of_two_devices_form_one_mesh(tmp_path):
    [workers] = groups_on("cpus", tmp_path)
    assert [worker["process"] for worker in workers] == [0, 1]
    # 1 + 10 + 100 + 1000: each of the four devices added its own.
    assert all(
        worker | {"process": 0} == {"process": 0, "processes": 2, "local": 2, "sum": 1111}
        for worker in workers
    )
