"""A worker group that finds no place in the cluster, told in one line."""

import time
from collections import Counter
from collections.abc import Mapping

import ray
from ray.train.v2._internal.execution.callback import ControllerCallback
from ray.train.v2._internal.execution.controller.state import (
    PreemptingState,
    RunningState,
    ShuttingDownState,
    TrainControllerState,
)

from jobs.cluster import accelerators
from jobs.errors import ExitCode, UserError
from jobs.recipe import ClusterConfig

TRY_SECONDS = 15
"""How long a group of [least, most] workers waits for a size before it counts what is there again:
Ray still counts a node that died this moment."""


class PlacementLimit(ControllerCallback):
    """Ends a training whose group has not been at work for `cluster.start_timeout_seconds`.

    Ray's elastic policy waits for ever where there is no room for the least number of workers.
    """

    def __init__(self, cluster: ClusterConfig):
        self._cluster = cluster
        self._waiting_since: float | None = None

    def after_controller_state_update(
        self, previous_state: TrainControllerState, current_state: TrainControllerState
    ) -> None:
        """Called by Ray's controller at each round of its loop."""
        at_work = isinstance(current_state, RunningState | PreemptingState | ShuttingDownState)
        if at_work or current_state.is_terminal():
            self._waiting_since = None
            return
        now = time.monotonic()
        self._waiting_since = self._waiting_since or now
        if now - self._waiting_since > self._cluster.start_timeout_seconds:
            raise no_place(self._cluster)
        if type(previous_state) is type(current_state):
            time.sleep(0.2)  # the loop does not, and would take a whole core


def waits_for_place(cluster: ClusterConfig) -> str | None:
    """What a group is about to wait for, on one line; None: there is room for it now."""
    nodes = [node["Resources"] for node in ray.nodes() if node["Alive"]]
    # What is free is known of the cluster as a whole.
    free = min(accelerators.room(cluster, each) for each in (nodes, [ray.available_resources()]))
    if free >= cluster.least_workers:
        return None
    asked = ", ".join(f"{name} {n:g}" for name, n in accelerators.resources(cluster).items())
    return (
        f"the cluster has room for {free} of {cluster.least_workers} workers of {asked} each now;"
        f" the training waits for it, {cluster.start_timeout_seconds} s at most"
    )


def no_place(cluster: ClusterConfig) -> UserError:
    """What was asked for and what is there, on one line."""
    asked = accelerators.resources(cluster)

    def shown(resources: Mapping[str, float]) -> str:
        return ", ".join(f"{name} {resources.get(name, 0):g}" for name in asked)

    nodes = Counter(shown(node["Resources"]) for node in ray.nodes() if node["Alive"])
    has = "; ".join(f"{count} x ({node})" for node, count in nodes.most_common())
    slices = ""
    if cluster.topology:
        each = accelerators.slice_of(cluster).hosts
        slices = (
            f", {cluster.least_workers // each} whole slices of {cluster.accelerator_version}"
            f" {cluster.topology}"
        )
    return UserError(
        f"no place for {cluster.least_workers} workers of {shown(asked)} each{slices} after"
        f" {cluster.start_timeout_seconds} s; the cluster's nodes: {has}, of which"
        f" {shown(ray.available_resources())} is free; add nodes, ask for less (cluster.workers and"
        " what each takes), or wait longer (cluster.start_timeout_seconds)",
        ExitCode.FAILED,
    )
