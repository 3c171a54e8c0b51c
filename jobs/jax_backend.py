"""One JAX mesh over a Ray Train worker group.

Ray's stock backend initialises `jax.distributed` for TPU and GPU groups only (ray 2.60) and fixes
its time limits; on CPU this one takes its place, with gloo for the collectives.
"""

import logging
from dataclasses import dataclass
from typing import Any

import ray
from ray.train._internal.utils import get_address_and_port
from ray.train.backend import BackendConfig
from ray.train.v2.jax import JaxConfig
from ray.train.v2.jax.config import _JaxBackend

log = logging.getLogger("tvq.jax_backend")
_INITIALIZATION_SECONDS = 120
_SHUTDOWN_SECONDS = 10


@dataclass
class CpuMeshConfig(JaxConfig):
    """A `jax.distributed` process group of CPU workers.

    Policy: a worker that is silent for `heartbeat_seconds` counts as lost and ends the group,
    which Ray Train then starts anew.
    """

    heartbeat_seconds: int = 20

    @property
    def backend_cls(self) -> type[_JaxBackend]:
        return _CpuMesh


class _CpuMesh(_JaxBackend):
    def on_start(self, worker_group: Any, backend_config: BackendConfig) -> None:
        assert isinstance(backend_config, CpuMeshConfig)
        host, port = worker_group.execute_single(0, get_address_and_port)
        count = len(worker_group)
        joins: list[Any] = [
            worker_group.execute_single_async(
                rank, _join, f"{host}:{port}", count, rank, backend_config.heartbeat_seconds
            )
            for rank in range(count)
        ]
        ray.get(joins, timeout=_INITIALIZATION_SECONDS + 30)

    def on_shutdown(self, worker_group: Any, backend_config: BackendConfig) -> None:
        try:
            leaving: list[Any] = worker_group.execute_async(_leave)
            ray.get(leaving, timeout=_SHUTDOWN_SECONDS + 5)
        except Exception as error:  # the group may be dead already
            log.info("leaving the mesh: %r", error)


def _join(coordinator: str, count: int, rank: int, heartbeat_seconds: int) -> None:
    import jax

    jax.config.update("jax_platforms", "cpu")
    jax.config.update("jax_cpu_collectives_implementation", "gloo")
    jax.distributed.initialize(
        coordinator,
        count,
        rank,
        # Not to all interfaces, which is the default: whoever reaches it could join.
        coordinator_bind_address=coordinator if rank == 0 else None,
        cluster_detection_method="deactivate",
        initialization_timeout=_INITIALIZATION_SECONDS,
        heartbeat_timeout_seconds=heartbeat_seconds,
        shutdown_timeout_seconds=_SHUTDOWN_SECONDS,
    )


def _leave() -> None:
    import jax

    if jax.distributed.is_initialized():
        jax.distributed.shutdown()
