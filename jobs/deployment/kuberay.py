"""A recipe as KubeRay's kinds: RayJob, RayCluster, RayCronJob, and a CronJob that makes RayJobs."""

import shlex
from importlib.metadata import version
from typing import NamedTuple

from jobs.cluster import accelerators
from jobs.deployment.kubernetes_pods import (
    CONFIGURATION,
    Size,
    Tree,
    creator_pod,
    head_pod,
    labels,
    submitter_pod,
    worker_pod,
)
from jobs.recipe import Recipe

_ATTEMPTS = 3
"""A RayJob whose cluster is lost begins anew, on a new one, and resumes the run."""
_KEEP_SECONDS = 600
"""A finished job's cluster stays for its logs; it costs as much as it did before."""
_IDLE_SECONDS = 300
_MISSED_SECONDS = 3600


class Tick(NamedTuple):
    """When a flow runs."""

    flow_name: str
    flow: str
    """Its file's text."""
    cron: str
    timezone: str


class Job(NamedTuple):
    """What is rendered."""

    name: str
    recipe: Recipe
    recipe_text: str
    image: str
    """Without the device, which is the end of its tag: `tvq:0.1.0`."""
    tick: Tick | None = None

    @property
    def command(self) -> list[str]:
        """What the driver runs on the head."""
        if self.tick is None:
            return ["tvq", "train", f"{CONFIGURATION}/recipe.yaml", "--run", self.name]
        return [
            *("tvq", "flow", "run", f"{CONFIGURATION}/flow.yaml"),
            *("--tick-from-cron", self.tick.cron, "--timezone", self.tick.timezone),
        ]


def ray_job(job: Job) -> list[Tree]:
    """One training, on a cluster that lives as long as it."""
    return [_configuration(job), _object("RayJob", job.name, job_spec(job))]


def ray_cluster(job: Job) -> list[Tree]:
    """A standing cluster for `tvq submit`: workers come when a job asks and go when none does."""
    spec = _cluster_spec(job)
    [group] = spec["workerGroupSpecs"]
    group["minReplicas"] = 0
    # It asks Kubernetes for pods, under the role that the operator gives it.
    spec["headGroupSpec"]["template"]["spec"]["automountServiceAccountToken"] = True
    spec |= {
        "enableInTreeAutoscaling": True,
        "autoscalerOptions": {
            "version": "v2",
            "idleTimeoutSeconds": _IDLE_SECONDS,
            "resources": Size(0.5, 0.5, 1).resources(),
            "securityContext": {
                "allowPrivilegeEscalation": False,
                "readOnlyRootFilesystem": True,
                "capabilities": {"drop": ["ALL"]},
            },
        },
    }
    return [_configuration(job), _object("RayCluster", job.name, spec)]


def ray_cron_job(job: Job) -> list[Tree]:
    """The flow at each tick, by KubeRay (1.7 or later, feature gate RayCronJob).

    It may fire twice or late: the flow claims its tick, and a second one finds it claimed.
    """
    assert job.tick
    spec = {
        "schedule": job.tick.cron,
        "timeZone": job.tick.timezone,
        "jobTemplate": job_spec(job),
    }
    return [_configuration(job), _object("RayCronJob", job.name, spec)]


def cron_job(job: Job) -> list[Tree]:
    """The flow at each tick, by Kubernetes's own CronJob, where that feature gate is closed.

    What it creates is the template of a RayCronJob that is suspended: there the patches of
    kustomize reach it.
    """
    assert job.tick
    configuration, template = ray_cron_job(job)
    template["spec"]["suspend"] = True
    spec = {
        "schedule": job.tick.cron,
        "timeZone": job.tick.timezone,
        # It only creates: what may overlap are the runs, which the flow's policy decides about.
        "concurrencyPolicy": "Forbid",
        "startingDeadlineSeconds": _MISSED_SECONDS,
        "successfulJobsHistoryLimit": 3,
        "failedJobsHistoryLimit": 3,
        "jobTemplate": {
            "spec": {
                "backoffLimit": 5,
                "activeDeadlineSeconds": _MISSED_SECONDS,
                "template": creator_pod(
                    job.name, f"{job.image}-cpu", ["tvq", "create-rayjob", job.name]
                ),
            }
        },
    }
    cron = _object("CronJob", job.name, spec) | {"apiVersion": "batch/v1"}
    return [configuration, template, cron]


def job_spec(job: Job) -> Tree:
    """Of a RayJob."""
    return {
        "entrypoint": shlex.join(job.command),
        "submissionMode": "K8sJobMode",
        "backoffLimit": _ATTEMPTS,
        # Kueue admits only what ends by itself.
        "shutdownAfterJobFinishes": True,
        "ttlSecondsAfterFinished": _KEEP_SECONDS,
        "submitterPodTemplate": submitter_pod(job.name, f"{job.image}-cpu"),
        "rayClusterSpec": _cluster_spec(job),
    }


def _cluster_spec(job: Job) -> Tree:
    cluster = job.recipe.cluster
    hosts = accelerators.slice_of(cluster).hosts if cluster.accelerator == "tpu" else 1
    least, most = (workers // hosts for workers in (cluster.least_workers, cluster.most_workers))
    return {
        "rayVersion": version("ray"),
        # The operator makes the token and hands it to every node.
        "authOptions": {"mode": "token"},
        "headGroupSpec": {
            "serviceType": "ClusterIP",
            "rayStartParams": {"dashboard-host": "0.0.0.0", "num-cpus": "0"},
            "template": head_pod(job.name, f"{job.image}-cpu", cluster),
        },
        "workerGroupSpecs": [
            {
                "groupName": cluster.accelerator,
                "replicas": most,
                "minReplicas": least,
                "maxReplicas": most,
                # A slice is had whole or not at all.
                "numOfHosts": hosts,
                "rayStartParams": {
                    # As jobs/cluster/accelerators.py asks of Ray, whatever the kubelet rounds to.
                    "num-cpus": str(cluster.cpus_per_worker),
                },
                "template": worker_pod(job.name, f"{job.image}-{cluster.accelerator}", cluster),
            }
        ],
    }


def _configuration(job: Job) -> Tree:
    files = {"flow.yaml": job.tick.flow} if job.tick else {"recipe.yaml": job.recipe_text}
    return {
        "apiVersion": "v1",
        "kind": "ConfigMap",
        "metadata": {"name": job.name, "labels": labels(job.name, "configuration")},
        "data": files,
    }


def _object(kind: str, name: str, spec: Tree) -> Tree:
    return {
        "apiVersion": "ray.io/v1",
        "kind": kind,
        "metadata": {"name": name, "labels": labels(name, "run")},
        "spec": spec,
    }
