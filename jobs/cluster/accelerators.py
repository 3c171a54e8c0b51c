"""What a worker is on each kind of accelerator: what it asks of Ray, and what JAX is told in it.

Needs neither Ray nor JAX. A recipe is checked with it before anything starts.
"""

import math
import os
from collections.abc import Mapping, Sequence
from typing import TYPE_CHECKING, Any, NamedTuple

from jobs.cluster.tpu_slices import Slice, ray_name, tpu_slice
from jobs.errors import UserError
from jobs.training.host_memory import ONE_ARENA
from model.config import ConfigError

if TYPE_CHECKING:
    from jobs.recipe import ClusterConfig


# ---- A worker ------------------------------------------------------------------------------------


def devices_per_worker(cluster: "ClusterConfig") -> int:
    """The devices that each worker brings into the mesh."""
    if cluster.accelerator == "tpu":
        return slice_of(cluster).chips_per_host
    return cluster.devices_per_worker or 1


def resources(cluster: "ClusterConfig") -> dict[str, float]:
    """What Ray reserves for a worker."""
    asked: dict[str, float] = {"CPU": cluster.cpus_per_worker}
    if cluster.accelerator != "cpu":
        asked[cluster.accelerator.upper()] = devices_per_worker(cluster)
    return asked


def room(cluster: "ClusterConfig", nodes: Sequence[Mapping[str, float]]) -> int:
    """How many workers find a place on nodes that have these resources each, by Ray's names."""
    asked = resources(cluster).items()
    return sum(int(min(node.get(name, 0.0) // amount for name, amount in asked)) for node in nodes)


def ray_accelerator_type(cluster: "ClusterConfig") -> str | None:
    """Ray's name for the kind of TPU; None for what is none."""
    if cluster.accelerator != "tpu":
        return None
    return ray_name(cluster.accelerator_version or "")


def environment(cluster: "ClusterConfig", ours: Mapping[str, str] = os.environ) -> dict[str, str]:
    """The variables that a worker starts with; `ours` are the driver's."""
    # XLA sizes its thread pools by NPROC: as many threads as cores reserved, so that workers that
    # share a machine do not fight for cores and sums are cut the same way every time.
    threads = str(cluster.cpus_per_worker)
    variables = {
        "NPROC": threads,
        "OMP_NUM_THREADS": threads,
        "JAX_PLATFORMS": _PLATFORMS[cluster.accelerator],
    }
    if cluster.accelerator == "cpu":
        variables |= ONE_ARENA
    # What the driver was given goes for the workers of a running cluster too.
    return variables | {name: ours[name] for name in _HANDED_ON if ours.get(name)}


_PLATFORMS = {"cpu": "cpu", "gpu": "cuda", "tpu": "tpu"}
_HANDED_ON = ("XLA_FLAGS", "JAX_ENABLE_X64")


# ---- A group of workers --------------------------------------------------------------------------


class Host(NamedTuple):
    """What a worker finds where Ray has put it."""

    visible_gpus: str | None = None
    """CUDA_VISIBLE_DEVICES, as Ray has set it."""
    slice_name: str | None = None
    """Of its TPU slice; None where the cluster gives it no name."""
    tpu_worker_id: int | None = None
    """Which host of that slice it is."""


class Membership(NamedTuple):
    """How a worker becomes a process of the mesh."""

    variables: dict[str, str]
    """Environment variables, to set before JAX is first used."""
    settings: dict[str, Any]
    """Of `jax.config`."""
    arguments: dict[str, Any]
    """Of `jax.distributed.initialize`."""


SHUTDOWN_SECONDS = 10


def process_ids(cluster: "ClusterConfig", hosts: Sequence[Host]) -> list[int]:
    """The JAX process of each worker: a permutation of 0..n-1.

    On TPU it follows the slice and the host's place in it, as libtpu numbers them itself; Ray's
    rank does not (ray 2.60). Elsewhere it is Ray's rank: workers of a node side by side, by GPU.
    """
    ranks = range(len(hosts))
    if cluster.accelerator != "tpu":
        return list(ranks)
    by_place = sorted(
        ranks, key=lambda rank: (hosts[rank].slice_name or "", hosts[rank].tpu_worker_id or 0, rank)
    )
    return [by_place.index(rank) for rank in ranks]


def memberships(
    cluster: "ClusterConfig", hosts: Sequence[Host], coordinator: tuple[str, int]
) -> list[Membership]:
    """What each worker is told, by Ray's rank.

    Args:
        hosts: by Ray's rank.
        coordinator: address and port on the host of process 0.

    Raises:
        UserError: a worker does not see as many GPUs as it asked for, or a slice is not whole.
    """
    local = devices_per_worker(cluster)
    address = f"{coordinator[0]}:{coordinator[1]}"
    slices = _slices(cluster, hosts, coordinator[0])
    told = []
    for rank, (process, host) in enumerate(zip(process_ids(cluster, hosts), hosts, strict=True)):
        settings: dict[str, Any] = {"jax_platforms": _PLATFORMS[cluster.accelerator]}
        arguments: dict[str, Any] = {
            "coordinator_address": address,
            "num_processes": len(hosts),
            "process_id": process,
            # Not to all interfaces, which is the default: whoever reaches it could join.
            "coordinator_bind_address": address if process == 0 else None,
            "cluster_detection_method": "deactivate",
            "initialization_timeout": cluster.join_timeout_seconds,
            "heartbeat_timeout_seconds": cluster.heartbeat_seconds,
            "shutdown_timeout_seconds": SHUTDOWN_SECONDS,
        }
        if cluster.accelerator == "cpu":
            settings["jax_cpu_collectives_implementation"] = "gloo"
            settings["jax_num_cpu_devices"] = local
        elif cluster.accelerator == "gpu":
            _check_gpus(rank, host, local)
            # They count within CUDA_VISIBLE_DEVICES, which holds this worker's GPUs alone.
            arguments["local_device_ids"] = list(range(local))
        told.append(Membership(slices[rank], settings, arguments))
    return told


def _check_gpus(rank: int, host: Host, asked: int) -> None:
    seen = [gpu for gpu in (host.visible_gpus or "").split(",") if gpu]
    if len(seen) != asked:
        raise UserError(
            f"cluster.devices_per_worker: worker {rank} asked for {asked} GPUs and sees"
            f" CUDA_VISIBLE_DEVICES={host.visible_gpus or ''}; where Ray is kept from setting it"
            " (RAY_EXPERIMENTAL_NOSET_CUDA_VISIBLE_DEVICES), workers would share GPUs: unset that"
        )


def _slices(
    cluster: "ClusterConfig", hosts: Sequence[Host], coordinator: str
) -> list[dict[str, str]]:
    """By rank, the variables with which libtpu joins several slices; none for a single one."""
    if cluster.accelerator != "tpu":
        return [{} for _ in hosts]
    hosts_per_slice = slice_of(cluster).hosts
    count = len(hosts) // hosts_per_slice
    ids = [process // hosts_per_slice for process in process_ids(cluster, hosts)]
    pairs = {(slice_id, host.slice_name) for slice_id, host in zip(ids, hosts, strict=True)}
    names = {host.slice_name for host in hosts}
    if hosts_per_slice > 1 and not len(pairs) == len(names) == count:
        found = sorted(map(str, names))
        raise UserError(
            f"cluster.topology: {len(hosts)} workers were to fill {count} slices of"
            f" {cluster.topology}, {hosts_per_slice} hosts each, but Ray put them on"
            f" {', '.join(found)}; check TPU_NAME and TPU_TOPOLOGY of the cluster's nodes"
        )
    if count == 1:
        return [{} for _ in hosts]
    return [
        {
            "MEGASCALE_COORDINATOR_ADDRESS": coordinator,
            "MEGASCALE_PORT": "8081",
            "MEGASCALE_NUM_SLICES": str(count),
            "MEGASCALE_SLICE_ID": str(slice_id),
        }
        for slice_id in ids
    ]


# ---- The recipe's fields -------------------------------------------------------------------------


def check(cluster: "ClusterConfig") -> None:
    """Raises ConfigError, naming the field, where they cannot go together."""
    if cluster.data != -1 and cluster.data < 1:
        raise ConfigError(
            f"cluster.data: must be at least 1, or -1 for all that is left, got {cluster.data}"
        )
    tpu = cluster.accelerator == "tpu"
    for name, value, example in (
        ("topology", cluster.topology, "4x4"),
        ("accelerator_version", cluster.accelerator_version, "v5e"),
    ):
        if value is not None and not tpu:
            raise ConfigError(
                f"cluster.{name}: is of TPUs; set cluster.accelerator=tpu, or null here"
            )
        if value is None and tpu:
            raise ConfigError(
                f"cluster.{name}: cluster.accelerator=tpu needs it, such as {example}"
            )
    if tpu and cluster.devices_per_worker is not None:
        raise ConfigError(
            f"cluster.devices_per_worker: on TPU a worker has all chips of its host, here"
            f" {devices_per_worker(cluster)}; leave it null"
        )
    if not cluster.most_workers:
        return  # the devices of this process are known only there
    local = devices_per_worker(cluster)
    hosts = slice_of(cluster).hosts if tpu else 1
    for workers in (cluster.least_workers, cluster.most_workers):
        if workers % hosts:
            raise ConfigError(
                f"cluster.workers: a {cluster.accelerator_version} slice of {cluster.topology} has"
                f" {hosts} hosts, each a worker, so it must be a multiple of {hosts},"
                f" got {workers}"
            )
    if not isinstance(cluster.workers, int):
        _check_elastic(cluster, local * hosts)
        return
    brings = "one device" if local == 1 else f"{local} devices"
    mesh_axes(cluster, cluster.workers * local, f"cluster.workers: each brings {brings}")


def mesh_axes(cluster: "ClusterConfig", devices: int, why: str) -> dict[str, int]:
    """Devices along each axis of a mesh of all of them.

    `why` begins the message: what says how many there are. Raises ConfigError if the axes do not
    make so many.
    """
    axes = {"data": cluster.data, "fsdp": cluster.fsdp, "tensor": cluster.tensor}
    left = [name for name, size in axes.items() if size == -1]
    rest = math.prod(size for size in axes.values() if size != -1)
    if len(left) == 1 and rest > 0:
        axes[left[0]] = devices // rest
    if min(axes.values()) < 1 or math.prod(axes.values()) != devices:
        raise ConfigError(
            f"{why}, and data x fsdp x tensor ="
            f" {cluster.data} x {cluster.fsdp} x {cluster.tensor} does not make {devices};"
            " set one of cluster.data and cluster.fsdp to -1 for what is left, or other axes"
        )
    return axes


def _check_elastic(cluster: "ClusterConfig", step: int) -> None:
    """`step`: devices that the smallest possible change of the group adds."""
    least, most = cluster.least_workers, cluster.most_workers
    if least > most:
        raise ConfigError(f"cluster.workers: [least, most], got [{least}, {most}]")
    if cluster.data != -1 or cluster.fsdp < 1 or cluster.tensor < 1:
        raise ConfigError(
            f"cluster.data: it alone must be -1 with cluster.workers=[{least}, {most}], whose"
            f" devices it takes up, got {cluster.data} x {cluster.fsdp} x {cluster.tensor}"
        )
    if step % (cluster.fsdp * cluster.tensor):
        raise ConfigError(
            f"cluster.workers: [{least}, {most}] adds and loses {step} devices at a time, which"
            f" fsdp x tensor = {cluster.fsdp} x {cluster.tensor} must divide; set them lower, or a"
            " fixed number of workers"
        )


def slice_of(cluster: "ClusterConfig") -> Slice:
    return tpu_slice(cluster.accelerator_version or "", cluster.topology or "")
