"""One JAX mesh over a Ray Train worker group.

Ray's stock backend (ray 2.60) initialises `jax.distributed` for TPU and GPU groups only, with fixed
time limits, binds all workers of a node to its first GPUs, and numbers TPU hosts in the order in
which it placed them. This one takes its place.
"""

import logging
import os
from collections.abc import Callable
from dataclasses import dataclass, field
from typing import Any

import ray
from ray._private.accelerators import TPUAcceleratorManager
from ray.exceptions import GetTimeoutError, RayTaskError
from ray.train._internal.utils import get_address_and_port
from ray.train.backend import BackendConfig
from ray.train.v2._internal.exceptions import WorkerGroupStartupFailedError
from ray.train.v2.jax import JaxConfig
from ray.train.v2.jax.config import _JaxBackend

from jobs.cluster.accelerators import Host, Membership, memberships, process_ids
from jobs.cluster.ray_worker import save_and_end
from jobs.recipe import ClusterConfig

log = logging.getLogger("tvq.jax_backend")


@dataclass
class MeshConfig(JaxConfig):
    """A `jax.distributed` process group over the workers.

    Policy: a worker that is silent for `cluster.heartbeat_seconds` counts as lost and ends the
    group, which Ray Train then starts anew. One that cannot join within
    `cluster.join_timeout_seconds` fails the start, which may be tried again. A group that Ray ends
    while it is well, to start one of another size, saves before.
    """

    cluster: ClusterConfig = field(default_factory=ClusterConfig)
    initialize: Callable[..., None] | None = None
    """Called in each worker in the place of `jax.distributed.initialize`."""

    @property
    def backend_cls(self) -> type[_JaxBackend]:
        return _Mesh


class _Mesh(_JaxBackend):
    def on_start(self, worker_group: Any, backend_config: BackendConfig) -> None:
        assert isinstance(backend_config, MeshConfig)
        cluster = backend_config.cluster
        hosts = _wait(worker_group.execute_async(_host, cluster.accelerator == "tpu"), 60)
        first = process_ids(cluster, hosts).index(0)
        [(address, port)] = _wait(
            [worker_group.execute_single_async(first, get_address_and_port)], 60
        )
        coordinator = address, cluster.coordinator_port or port
        joins = [
            worker_group.execute_single_async(rank, _join, membership, backend_config.initialize)
            for rank, membership in enumerate(memberships(cluster, hosts, coordinator))
        ]
        _wait(joins, cluster.join_timeout_seconds + 30)

    def on_shutdown(self, worker_group: Any, backend_config: BackendConfig) -> None:
        assert isinstance(backend_config, MeshConfig)
        status = worker_group.get_latest_poll_status()
        if status is None or status.finished or status.errors or status.get_preemption_info():
            return  # at its end, or beyond help: each wait for a dead worker would delay the next
        grace = backend_config.cluster.grace_seconds
        saving: list[Any] = worker_group.execute_async(save_and_end, grace)
        _, late = ray.wait(saving, num_returns=len(saving), timeout=grace + 5)
        if late:
            log.warning("not saved before its end: %d workers of a group", len(late))


def _wait(replies: list[Any], seconds: int) -> list[Any]:
    try:
        return ray.get(replies, timeout=seconds)
    except (RayTaskError, GetTimeoutError) as error:
        # What Ray takes for a failed start, and not for a defect of the controller.
        raise WorkerGroupStartupFailedError(
            f"the workers did not find each other: {error}"
        ) from None


def _host(tpu: bool) -> Host:
    if not tpu:
        return Host(visible_gpus=os.environ.get("CUDA_VISIBLE_DEVICES"))
    return Host(
        slice_name=TPUAcceleratorManager.get_current_node_tpu_name() or None,
        tpu_worker_id=TPUAcceleratorManager.get_current_node_tpu_worker_id(),
    )


def _join(membership: Membership, initialize: Callable[..., None] | None) -> None:
    os.environ.update(membership.variables)
    import jax

    for name, value in membership.settings.items():
        jax.config.update(name, value)
    (initialize or jax.distributed.initialize)(**membership.arguments)
