"""Worker groups on GPUs and TPU slices that exist in Ray's books only.

A program for test_worker_groups.py. Nodes are raylets on this machine that are told what they
have; everything else is Ray's own. In the place of `jax.distributed.initialize` each worker
writes down what it would be called with. Prints one line of JSON: for each group its workers, by
process of the mesh, or the error.

Usage: python on_faked_hardware.py FOLDER HARDWARE
"""

import inspect
import json
import os
import sys
from pathlib import Path
from typing import Any

from jobs.cluster.ray_session import ray_session
from jobs.errors import UserError
from jobs.recipe import ClusterConfig
from jobs.training.trainer import on_workers

# By hardware: the groups that are put on it, one after the other.
GROUPS: dict[str, tuple[dict[str, Any], ...]] = {
    "gpus": (
        {"workers": 4, "accelerator": "gpu"},
        {"workers": 2, "accelerator": "gpu", "devices_per_worker": 4},
        {"workers": 3, "accelerator": "gpu", "devices_per_worker": 4, "start_timeout_seconds": 5},
        {
            "workers": (3, 4),
            "accelerator": "gpu",
            "devices_per_worker": 4,
            "start_timeout_seconds": 5,
        },
        {"workers": (1, 4), "accelerator": "gpu", "devices_per_worker": 4},
    ),
    "slices": tuple(
        {
            "workers": workers,
            "accelerator": "tpu",
            "accelerator_version": "v4",
            "topology": "2x2x2",
            "start_timeout_seconds": seconds,
        }
        for workers, seconds in ((2, 60), (4, 60), (6, 5))
    ),
    "cpus": ({"workers": 2, "devices_per_worker": 2},),
}


def record(**arguments: Any) -> None:
    """Takes the place of `jax.distributed.initialize`: leaves its arguments for `report`."""
    import jax

    inspect.signature(jax.distributed.initialize).bind(**arguments)
    os.environ["ARGUMENTS"] = json.dumps(arguments)


def report(config: dict[str, Any]) -> None:
    """Writes down where this worker is and what it sees."""
    import jax
    import ray
    import ray.train

    context = ray.get_runtime_context()
    [node] = [node for node in ray.nodes() if node["NodeID"] == context.get_node_id()]
    train = ray.train.get_context()
    seen = {
        "rank": train.get_world_rank(),
        "node": node["NodeManagerPort"],  # tells nodes that share an address apart
        "gpus": context.get_accelerator_ids()["GPU"],
        "reserved": context.get_assigned_resources(),
        "labels": node["Labels"],
        "environment": dict(os.environ),
        "platforms": jax.config.values["jax_platforms"],
        "arguments": json.loads(os.environ["ARGUMENTS"]),
    }
    process = seen["arguments"]["process_id"]
    (config["settings"] / f"{process}.json").write_text(json.dumps(seen))


def add_up(config: dict[str, Any]) -> None:
    """Sums over a real mesh of CPU devices, each holding its own number."""
    import jax
    import numpy as np
    from jax.sharding import NamedSharding, PartitionSpec

    devices = jax.devices()
    mesh = jax.sharding.Mesh(np.array(devices), ("all",))
    numbers = 10.0 ** np.arange(len(devices), dtype=np.float32)
    placed = jax.make_array_from_callback(
        numbers.shape, NamedSharding(mesh, PartitionSpec("all")), numbers.__getitem__
    )
    seen = {
        "process": jax.process_index(),
        "processes": jax.process_count(),
        "local": jax.local_device_count(),
        "sum": float(jax.jit(lambda x: x.sum())(placed)),
    }
    (config["settings"] / f"{jax.process_index()}.json").write_text(json.dumps(seen))


def add_slice(cluster: Any, name: str) -> None:
    """Two hosts of four chips each, the second one first: no order of theirs is the right one."""
    for host in (1, 0):
        cluster.add_node(
            num_cpus=1,
            resources={"TPU": 4, name: 1, "accelerator_type:TPU-V4": 1}
            | ({"TPU-v4-16-head": 1} if host == 0 else {}),
            labels={
                "ray.io/tpu-slice-name": name,
                "ray.io/tpu-worker-id": str(host),
                "ray.io/tpu-pod-type": "v4-16",
                "ray.io/tpu-topology": "2x2x2",
                "ray.io/accelerator-type": "TPU-V4",
            },
            env_vars={
                "TPU_NAME": name,
                "TPU_WORKER_ID": str(host),
                "TPU_ACCELERATOR_TYPE": "v4-16",
                "TPU_TOPOLOGY": "2x2x2",
            },
        )


def main(folder: Path, hardware: str) -> None:
    os.environ["RAY_ENABLE_WINDOWS_OR_OSX_CLUSTER"] = "0"  # to loopback, and to nothing else
    os.environ["RAY_enable_worker_prestart"] = "0"  # noqa: SIM112
    from ray.cluster_utils import Cluster

    memory: dict[str, Any] = {"object_store_memory": 80 * 2**20}
    nodes = Cluster(
        initialize_head=True, head_node_args={"num_cpus": 2, "include_dashboard": False, **memory}
    )
    if hardware == "gpus":
        for _ in range(2):
            nodes.add_node(num_cpus=4, num_gpus=4, **memory)
    if hardware == "slices":
        add_slice(nodes, "slice-b")
        add_slice(nodes, "slice-a")
    ended: list[Any] = []
    with ray_session(nodes.address, cpus=0):
        for number, fields in enumerate(GROUPS[hardware]):
            written = folder / str(number)
            written.mkdir()
            stub = {"initialize": record} if hardware != "cpus" else {}
            try:
                on_workers(
                    add_up if hardware == "cpus" else report,
                    written,
                    ClusterConfig(heartbeat_seconds=17, **fields),
                    **stub,
                )
            except UserError as error:
                ended.append(str(error))
            else:
                ended.append([json.loads(path.read_text()) for path in sorted(written.iterdir())])
    nodes.shutdown()
    print(json.dumps(ended))


if __name__ == "__main__":
    main(Path(sys.argv[1]), sys.argv[2])
