"""A training on two raylets, of which one takes itself for another machine.

A program for test_host_load.py. The second raylet runs in a mount namespace whose /proc shows the
boot id and the memory of a machine that is not there; all else is Ray's own. Prints one line of
JSON: each metric of the machines as MLflow holds it, by update.

Usage: python on_two_machines.py FOLDER
"""

import ctypes
import json
import os
import subprocess
import sys
from pathlib import Path
from typing import Any

os.environ["RAY_ENABLE_WINDOWS_OR_OSX_CLUSTER"] = "0"  # to loopback, and to nothing else
os.environ["RAY_enable_worker_prestart"] = "0"  # noqa: SIM112
os.environ["XLA_FLAGS"] = "--xla_backend_optimization_level=0"  # halves the compilation

from ray.cluster_utils import Cluster

from jobs import recipe as recipes
from jobs.cluster.ray_session import ray_session
from jobs.console import Console
from jobs.runs.run_directory import RunDirectory
from jobs.tracking import reading
from jobs.training.train import store_of_run, train
from tests.micro import write_micro
from tests.runs import summary

# Of 16 GiB a quarter is free.
MEMORY = {"MemTotal": 2**24, "MemFree": 2**20, "MemAvailable": 2**22, "Buffers": 0, "Cached": 0}


def become_another_machine(folder: Path) -> None:
    """What this thread starts from now on sees the /proc of a machine that is not there."""
    boot_id, memory = folder / "boot_id", folder / "meminfo"
    boot_id.write_text("another machine\n")
    memory.write_text("".join(f"{name}: {kib} kB\n" for name, kib in MEMORY.items()))
    new_mount_namespace = 0x20000  # CLONE_NEWNS; os.unshare is there from Python 3.12 on
    assert ctypes.CDLL(None).unshare(new_mount_namespace) == 0
    for arguments in (
        ["--make-rprivate", "/"],  # else the other namespaces would see it too
        ["--bind", str(boot_id), "/proc/sys/kernel/random/boot_id"],
        ["--bind", str(memory), "/proc/meminfo"],
    ):
        subprocess.run(["mount", *arguments], check=True)


def main(folder: Path) -> None:
    corpus, micro = write_micro(folder)
    fields = (
        f"data.corpus={corpus}", "cluster.workers=2", "training.steps=16",
        "checkpoint.every=8", "training.evaluate_every=16",
    )  # fmt: skip
    memory: dict[str, Any] = {"object_store_memory": 80 * 2**20}
    cluster = Cluster(
        initialize_head=True, head_node_args={"num_cpus": 1, "include_dashboard": False, **memory}
    )
    become_another_machine(folder)
    cluster.add_node(num_cpus=1, **memory)
    with ray_session(cluster.address, cpus=0):
        recipe = recipes.load(str(micro), fields)
        train(recipe, root=folder / "runs", name="r", console=Console(quiet=True))
    cluster.shutdown()
    run = RunDirectory(folder / "runs" / "r")
    held = summary(run)
    uri = store_of_run(run).uri
    names = [name for name in held.metrics if name.startswith("system/")]
    print(json.dumps({name: reading.history(uri, held.run_id, name) for name in names}))


if __name__ == "__main__":
    main(Path(sys.argv[1]))
