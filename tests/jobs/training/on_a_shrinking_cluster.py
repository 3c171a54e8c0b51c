"""A training on a cluster of several nodes, one of which is announced to go, lost or added.

A program for test_losing_nodes.py. Nodes are raylets on this machine; all else is Ray's own.
Prints one line of JSON.

Usage: python on_a_shrinking_cluster.py FOLDER SCENARIO
"""

import json
import os
import sys
import threading
import time
import traceback
from collections.abc import Callable
from pathlib import Path
from typing import Any

os.environ["RAY_ENABLE_WINDOWS_OR_OSX_CLUSTER"] = "0"  # to loopback, and to nothing else
os.environ["RAY_enable_worker_prestart"] = "0"  # noqa: SIM112
os.environ["XLA_FLAGS"] = "--xla_backend_optimization_level=0"  # halves the compilation

from ray.cluster_utils import Cluster

from jobs import recipe as recipes
from jobs.checkpoints.manifest import complete_checkpoints, newest_update
from jobs.cluster.ray_session import ray_session
from jobs.console import Console
from jobs.errors import UserError
from jobs.runs import run_log
from jobs.runs.run_directory import RunDirectory, list_runs
from jobs.training.train import train
from tests.micro import write_micro

MEMORY: dict[str, Any] = {"object_store_memory": 80 * 2**20}


class Place:
    """The cluster, and the run that is trained on it."""

    def __init__(self, folder: Path, head_cpus: int):
        self.run = RunDirectory(folder / "runs" / "moved")
        head = {"num_cpus": head_cpus, "include_dashboard": False, **MEMORY}
        self.cluster = Cluster(initialize_head=True, head_node_args=head)
        self.nodes = [self.add_node(), self.add_node()]

    def add_node(self) -> Any:
        return self.cluster.add_node(num_cpus=1, **MEMORY)

    def node_of(self, rank: int) -> Any:
        """Where the newest group's worker of that rank runs: its raylet has started it."""
        worker = run_log.events(self.run.logs, f"rank-{rank}", "group start")[-1]["worker_pid"]
        raylet = int(Path(f"/proc/{worker}/stat").read_text().rpartition(")")[2].split()[1])
        nodes: list[Any] = [self.cluster.head_node, *self.nodes]
        [node] = [
            node
            for node in nodes
            # One that was lost has none left.
            if raylet in [each.process.pid for each in node.all_processes.get("raylet", ())]
        ]
        return node

    def announce(self, node: Any, seconds: float) -> None:
        """Says that the node is taken away in so many seconds, as a cloud does."""
        import ray._private.worker
        from ray.core.generated import autoscaler_pb2

        # Unknown to the type checker.
        reasons: Any = autoscaler_pb2
        worker: Any = ray._private.worker.global_worker
        reason = reasons.DrainNodeReason.Value("DRAIN_NODE_REASON_PREEMPTION")
        deadline = int((time.time() + seconds) * 1000)
        assert worker.gcs_client.drain_node(node.node_id, reason, "spot reclaim", deadline)

    def wait(self, what: str, condition: Callable[[], Any]) -> None:
        deadline = time.monotonic() + 300
        while not condition():
            assert time.monotonic() < deadline, f"waited in vain for {what}"
            time.sleep(0.1)

    def wait_for_update(self, update: int) -> None:
        self.wait(f"update {update}", lambda: newest_update(self.run) >= update)

    def starts(self, rank: int = 0) -> list[dict[str, Any]]:
        return run_log.events(self.run.logs, f"rank-{rank}", "state ready")


def preempted(place: Place) -> None:
    """A fixed group: its node's end is announced."""
    place.wait_for_update(8)
    place.announce(place.nodes[1], 60)


def elastic(place: Place) -> None:
    """A group of one or two workers: a node is lost, then another one comes."""
    place.wait_for_update(8)
    place.cluster.remove_node(place.nodes[1], allow_graceful=False)
    place.wait("a smaller group", lambda: len(place.starts()) == 2)
    place.wait_for_update(place.starts()[1]["update"] + 8)
    place.add_node()
    place.wait("a larger group", lambda: len(place.starts(1)) == 2)
    place.wait_for_update(place.starts()[2]["update"] + 8)
    place.run.request_stop(True)


def spread(place: Place) -> None:
    """Two workers on three nodes, the driver's included: one that holds a worker is lost."""
    place.wait_for_update(8)
    held = [place.node_of(rank) for rank in (0, 1)]
    assert held[0] is not held[1], "both workers lie on one node"
    lost = next(node for node in held if node is not place.cluster.head_node)
    place.cluster.remove_node(lost, allow_graceful=False)
    place.wait("a new group", lambda: len(place.starts(1)) == 2)
    again = [place.node_of(rank) for rank in (0, 1)]
    assert again[0] is not again[1]
    assert lost not in again


WORKERS = {"preempted": "2", "elastic": "[1,2]", "spread": "2"}
STEPS = {"preempted": 100_000, "elastic": 100_000, "spread": 800}


def main(folder: Path, scenario: str) -> None:
    corpus, micro = write_micro(folder)
    place = Place(folder, head_cpus=int(scenario == "spread"))
    overrides = (
        f"data.corpus={corpus}", f"training.steps={STEPS[scenario]}", "checkpoint.every=8",
        "training.evaluate_every=1000", f"cluster.workers={WORKERS[scenario]}",
        "cluster.resize_seconds=5", "cluster.start_timeout_seconds=240",
    )  # fmt: skip
    recipe = recipes.load(str(micro), overrides)
    ended: dict[str, Any] = {"problem": None}

    def training() -> None:
        try:
            train(recipe, root=folder / "runs", name="moved", console=Console(quiet=True))
        except UserError as error:
            ended["code"], ended["message"] = error.code, str(error)

    thread = threading.Thread(target=training)
    with ray_session(place.cluster.address, cpus=0):
        thread.start()
        try:
            globals()[scenario](place)  # in the main thread: only there can Ray start a node
        except BaseException:
            ended["problem"] = traceback.format_exc()
            place.run.request_stop(True)
        thread.join()
        if scenario == "spread" and not ended["problem"]:
            train(recipe, root=folder / "runs", name="calm", console=Console(quiet=True))
    place.cluster.shutdown()
    ends = run_log.events(place.run.logs, "rank-0", "group end")
    ended["newest"] = newest_update(place.run)
    ended["sums"] = [
        complete_checkpoints(run)[-1].sums for run in list_runs(folder / "runs") if run.record()
    ]
    ended["ends"] = [[end["update"], end["stopped"]] for end in ends]
    ended["starts"] = [[start["update"] for start in place.starts(rank)] for rank in (0, 1)]
    print(json.dumps(ended))


if __name__ == "__main__":
    main(Path(sys.argv[1]), sys.argv[2])
