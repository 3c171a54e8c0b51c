"""The pods of a Ray cluster on Kubernetes, from the recipe's `cluster` section.

Plain trees, as Kubernetes reads them. No container is root, can become it, writes to its image or
is without limits.
"""

from typing import Any, NamedTuple

from jobs.cluster import accelerators
from jobs.recipe import ClusterConfig

Tree = dict[str, Any]

USER = 10001
"""The user `tvq` of infra/image/Dockerfile."""
SETTINGS = "tvq-site"
"""The config map with the site's TVQ_ROOT and MLFLOW_TRACKING_URI."""
LOGIN = "mlflow-login"
"""The secret with MLFLOW_TRACKING_USERNAME and _PASSWORD of the runs."""
CONFIGURATION = "/etc/tvq"
"""Where a pod finds its recipe and its flow."""

_AFTER_GRACE_SECONDS = 35
"""What the driver and Ray get when the save's grace is over: the last points reach MLflow, the
workers leave the mesh (jobs/cluster/accelerators.py gives them 10 s)."""

_GKE_ACCELERATORS = {
    "v4": "tpu-v4-podslice",
    "v5e": "tpu-v5-lite-podslice",
    "v5p": "tpu-v5p-slice",
    "v6e": "tpu-v6e-slice",
}


class Size(NamedTuple):
    """What a container asks for and is held to."""

    cpus: float
    memory_gib: float
    disk_gib: int = 10
    devices: tuple[str, int] | None = None
    """Kubernetes's name for the device, and how many of them."""

    def resources(self) -> Tree:
        """Requests equal to limits: a container is never killed for what another one takes."""
        held: Tree = {
            "cpu": f"{self.cpus:g}",
            "memory": f"{round(self.memory_gib * 1024)}Mi",
            "ephemeral-storage": f"{self.disk_gib}Gi",
        }
        if self.devices:
            held[self.devices[0]] = str(self.devices[1])
        return {"requests": dict(held), "limits": dict(held)}


HEAD = Size(cpus=2, memory_gib=8)
"""Ray's own services and the driver; no training runs there."""
_SUBMITTER = Size(cpus=0.5, memory_gib=1, disk_gib=1)


def worker_size(cluster: ClusterConfig) -> Size:
    """Of a worker's pod, which holds one worker."""
    devices = None
    if cluster.accelerator == "gpu":
        devices = "nvidia.com/gpu", accelerators.devices_per_worker(cluster)
    elif cluster.accelerator == "tpu":
        devices = "google.com/tpu", accelerators.devices_per_worker(cluster)
    # Ray reserves all of cpus_per_worker for the worker; its own processes take from the same.
    return Size(cluster.cpus_per_worker, cluster.memory_gib, disk_gib=50, devices=devices)


def labels(name: str, component: str) -> Tree:
    """What the network policies and disruption budgets of infra/kubernetes know a pod by."""
    return {
        "app.kubernetes.io/name": "tvq",
        "app.kubernetes.io/instance": name,
        "app.kubernetes.io/component": component,
    }


def head_pod(name: str, image: str, cluster: ClusterConfig) -> Tree:
    """Of Ray's head, on which the driver runs."""
    ports = {"gcs": 6379, "dashboard": 8265, "metrics": 8080}
    return _pod(
        labels(name, "head"),
        _container("ray-head", image, HEAD, ports=ports, configured=True),
        volumes=_node_volumes(HEAD, name),
        grace_seconds=stop_seconds(cluster),
    )


def worker_pod(name: str, image: str, cluster: ClusterConfig) -> Tree:
    """Of one worker."""
    size = worker_size(cluster)
    pod = _pod(
        labels(name, "worker"),
        _container("ray-worker", image, size, ports={"metrics": 8080}),
        volumes=_node_volumes(size),
        grace_seconds=stop_seconds(cluster),
    )
    spec = pod["spec"]
    # There even if empty: the components of infra/kubernetes add to them.
    spec["nodeSelector"], spec["tolerations"] = {}, []
    if cluster.accelerator == "tpu":
        assert cluster.accelerator_version
        spec["nodeSelector"] = {
            "cloud.google.com/gke-tpu-accelerator": _GKE_ACCELERATORS[cluster.accelerator_version],
            "cloud.google.com/gke-tpu-topology": cluster.topology,
        }
    if size.devices:
        spec["tolerations"] = [
            {"key": size.devices[0], "operator": "Exists", "effect": "NoSchedule"}
        ]
    return pod


def submitter_pod(name: str, image: str) -> Tree:
    """Of the pod that hands the job to Ray and shows its log; KubeRay fills in the command."""
    pod = _pod(
        labels(name, "submitter"),
        _container("ray-job-submitter", image, _SUBMITTER),
        volumes=_scratch(_SUBMITTER),
        grace_seconds=30,
    )
    pod["spec"]["restartPolicy"] = "Never"
    return pod


def creator_pod(name: str, image: str, command: list[str]) -> Tree:
    """Of the pod that creates a tick's RayJob; the only one that may talk to Kubernetes."""
    container = _container("create", image, _SUBMITTER, settings=False)
    container["command"] = command
    # The job's name ends in the tick's minute since 1970: as the RayJob's it is unique to the tick.
    of_pod = {"fieldPath": "metadata.labels['batch.kubernetes.io/job-name']"}
    container["env"] = [{"name": "TVQ_RAYJOB", "valueFrom": {"fieldRef": of_pod}}]
    pod = _pod(
        {**labels(name, "cron"), "app.kubernetes.io/name": "tvq-cron"},
        container,
        volumes=_scratch(_SUBMITTER),
        grace_seconds=30,
    )
    pod["spec"] |= {
        "restartPolicy": "Never",
        "serviceAccountName": "tvq-cron",
        "automountServiceAccountToken": True,
    }
    return pod


def stop_seconds(cluster: ClusterConfig) -> int:
    """From SIGTERM to SIGKILL: more than a save may take."""
    return cluster.grace_seconds + _AFTER_GRACE_SECONDS


def _container(
    name: str,
    image: str,
    size: Size,
    *,
    ports: dict[str, int] | None = None,
    configured: bool = False,
    settings: bool = True,
) -> Tree:
    mounts: list[Tree] = [
        {"name": "scratch", "mountPath": "/tmp"},
        {"name": "home", "mountPath": "/home/tvq"},
    ]
    if ports:
        mounts.append({"name": "objects", "mountPath": "/dev/shm"})
    if configured:
        mounts.append({"name": "configuration", "mountPath": CONFIGURATION, "readOnly": True})
    container: Tree = {"name": name, "image": image, "imagePullPolicy": "IfNotPresent"}
    if settings:
        container["envFrom"] = [
            {"configMapRef": {"name": SETTINGS}},
            {"secretRef": {"name": LOGIN}},
        ]
    if ports:
        container["ports"] = [{"name": of, "containerPort": port} for of, port in ports.items()]
    container |= {
        "resources": size.resources(),
        "securityContext": {
            "allowPrivilegeEscalation": False,
            "readOnlyRootFilesystem": True,
            "capabilities": {"drop": ["ALL"]},
        },
        "volumeMounts": mounts,
    }
    return container


def _pod(pod_labels: Tree, container: Tree, *, volumes: list[Tree], grace_seconds: int) -> Tree:
    return {
        "metadata": {"labels": pod_labels},
        "spec": {
            "serviceAccountName": "tvq-train",
            "automountServiceAccountToken": False,
            "terminationGracePeriodSeconds": grace_seconds,
            "securityContext": {
                "runAsNonRoot": True,
                "runAsUser": USER,
                "runAsGroup": USER,
                "fsGroup": USER,
                "seccompProfile": {"type": "RuntimeDefault"},
            },
            "containers": [container],
            "volumes": volumes,
        },
    }


def _scratch(size: Size) -> list[Tree]:
    limit = f"{size.disk_gib}Gi"
    return [{"name": name, "emptyDir": {"sizeLimit": limit}} for name in ("scratch", "home")]


def _node_volumes(size: Size, configuration: str | None = None) -> list[Tree]:
    # Ray's object store: memory, counted against the container's.
    shared = {"medium": "Memory", "sizeLimit": f"{round(size.memory_gib * 1024 * 0.3)}Mi"}
    volumes = [*_scratch(size), {"name": "objects", "emptyDir": shared}]
    return [*volumes, _configuration(configuration)] if configuration else volumes


def _configuration(name: str) -> Tree:
    return {"name": "configuration", "configMap": {"name": name}}
