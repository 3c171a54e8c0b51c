"""A recipe as the variables of infra/compose/compose.yaml: the whole of its .env."""

from jobs.cluster import accelerators
from jobs.deployment.kuberay import Job
from jobs.deployment.kubernetes_pods import stop_seconds


def compose_settings(job: Job) -> dict[str, str]:
    """By name."""
    cluster = job.recipe.cluster
    settings = {
        "TVQ_IMAGE": job.image,
        "TVQ_ACCELERATOR": cluster.accelerator,
        "TVQ_WORKERS": str(cluster.most_workers),
        "TVQ_CPUS": str(cluster.cpus_per_worker),
        "TVQ_MEMORY": f"{cluster.memory_gib}G",
        "TVQ_STOP_GRACE": f"{stop_seconds(cluster)}s",
    }
    if cluster.accelerator == "gpu":
        settings["TVQ_DEVICES"] = str(accelerators.devices_per_worker(cluster))
        settings["COMPOSE_FILE"] = "compose.yaml:compose.gpu.yaml"
    return settings
