"""A recipe as the file of `ray up`: a Ray cluster on Google's machines, without Kubernetes."""

import math
from typing import Any

from jobs.cluster import accelerators
from jobs.deployment.kuberay import Job
from jobs.deployment.kubernetes_pods import worker_size
from jobs.recipe import ClusterConfig
from model.config import ConfigError

_G2_MACHINES = {1: "g2-standard-8", 2: "g2-standard-24", 4: "g2-standard-48", 8: "g2-standard-96"}
"""By their number of L4 GPUs. For others, edit machineType."""
_TPU_SLICES = {
    # What Google calls a slice, whether that counts cores (two a chip) or chips, and what runs it.
    "v4": ("v4", 2, "tpu-ubuntu2204-base"),
    "v5e": ("v5litepod", 1, "v2-alpha-tpuv5-lite"),
    "v5p": ("v5p", 2, "v2-alpha-tpuv5"),
    "v6e": ("v6e", 1, "v2-alpha-tpuv6e"),
}
_SYSTEM = "projects/deeplearning-platform-release/global/images/family/common-cu128-ubuntu-2204"
"""Docker, and NVIDIA's driver."""


def ray_up(job: Job) -> list[dict[str, Any]]:
    """The one document. PROJECT, REGION and ZONE are the site's: replace them."""
    cluster = job.recipe.cluster
    tpu = cluster.accelerator == "tpu"
    groups = cluster.most_workers // (accelerators.slice_of(cluster).hosts if tpu else 1)
    environment = "TVQ_ROOT=gs://PROJECT-tvq-runs/runs"
    docker: dict[str, Any] = {
        "head_image": f"{job.image}-cpu",
        "worker_image": f"{job.image}-{cluster.accelerator}",
        "container_name": "tvq",
        "pull_before_run": True,
        "run_options": [f"--env={environment}", "--ulimit=nofile=65536:65536"],
    }
    if tpu:
        # The chips are devices of the host; the container's user is not root all the same.
        docker["worker_run_options"] = ["--privileged"]
    return [
        {
            "cluster_name": job.name,
            "max_workers": groups,
            "idle_timeout_minutes": 10,
            "provider": {
                "type": "gcp",
                "region": "REGION",
                "availability_zone": "ZONE",
                "project_id": "PROJECT",
            },
            "auth": {"ssh_user": "ubuntu"},
            "docker": docker,
            "head_node_type": "head",
            "available_node_types": {
                "head": {
                    "resources": {"CPU": 0},
                    "node_config": _machine("e2-standard-4", spot=False),
                },
                "worker": {
                    "min_workers": 0,
                    "max_workers": groups,
                    "resources": _resources(cluster),
                    "node_config": _worker(cluster),
                },
            },
            "head_start_ray_commands": [
                "ray stop",
                "ray start --head --port=6379 --num-cpus=0 --dashboard-host=127.0.0.1"
                " --metrics-export-port=8080 --autoscaling-config=~/ray_bootstrap_config.yaml",
            ],
            "worker_start_ray_commands": [
                "ray stop",
                "ray start --address=$RAY_HEAD_IP:6379 --metrics-export-port=8080",
            ],
        }
    ]


def _worker(cluster: ClusterConfig) -> dict[str, Any]:
    if cluster.accelerator == "tpu":
        slice_of = accelerators.slice_of(cluster)
        name, each, runtime = _TPU_SLICES[cluster.accelerator_version or ""]
        return {
            "acceleratorType": f"{name}-{slice_of.hosts * slice_of.chips_per_host * each}",
            "runtimeVersion": runtime,
            "schedulingConfig": {"preemptible": True},
        }
    if cluster.accelerator == "gpu":
        count = accelerators.devices_per_worker(cluster)
        if count not in _G2_MACHINES:
            raise ConfigError(
                f"cluster.devices_per_worker: no machine of Google has {count} GPUs; use one of"
                f" {', '.join(map(str, _G2_MACHINES))}"
            )
        return _machine(_G2_MACHINES[count], spot=True)
    # Custom machines have an even number of cores, and 0.5 to 8 GB each.
    cores = 2 * math.ceil(cluster.cpus_per_worker / 2)
    memory = min(max(cluster.memory_gib, math.ceil(cores / 2)), 8 * cores)
    return _machine(f"n2-custom-{cores}-{memory * 1024}", spot=True)


def _resources(cluster: ClusterConfig) -> dict[str, int]:
    resources = {"CPU": cluster.cpus_per_worker}
    if devices := worker_size(cluster).devices:
        resources[cluster.accelerator.upper()] = devices[1]
    return resources


def _machine(kind: str, *, spot: bool) -> dict[str, Any]:
    scheduling: dict[str, Any] = {"onHostMaintenance": "TERMINATE"}
    if spot:
        scheduling |= {"provisioningModel": "SPOT", "instanceTerminationAction": "DELETE"}
    return {
        "machineType": kind,
        "disks": [
            {
                "boot": True,
                "autoDelete": True,
                "type": "PERSISTENT",
                "initializeParams": {"diskSizeGb": 100, "sourceImage": _SYSTEM},
            }
        ],
        "scheduling": [scheduling],
        "serviceAccounts": [
            {
                "email": "tvq-train@PROJECT.iam.gserviceaccount.com",
                "scopes": ["https://www.googleapis.com/auth/cloud-platform"],
            }
        ],
    }
