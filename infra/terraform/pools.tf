# Heads, MLflow and the operator stand on one steady node; all that computes is spot, and comes and
# goes with the work: an idle cluster costs that one node.

locals {
  node = {
    service_account = google_service_account.tvq["nodes"].email
    oauth_scopes    = ["https://www.googleapis.com/auth/cloud-platform"]
  }
  spot_taint = { key = "cloud.google.com/gke-spot", value = "true", effect = "NO_SCHEDULE" }
}

resource "google_container_node_pool" "steady" {
  name    = "steady"
  cluster = google_container_cluster.tvq.id

  autoscaling {
    min_node_count = 1
    max_node_count = 3
  }

  management {
    auto_repair  = true
    auto_upgrade = true
  }

  node_config {
    machine_type    = "e2-standard-8"
    service_account = local.node.service_account
    oauth_scopes    = local.node.oauth_scopes

    workload_metadata_config {
      mode = "GKE_METADATA"
    }

    shielded_instance_config {
      enable_secure_boot = true
    }
  }
}

resource "google_container_node_pool" "cpu" {
  count   = var.cpu_nodes > 0 ? 1 : 0
  name    = "cpu"
  cluster = google_container_cluster.tvq.id

  autoscaling {
    min_node_count = 0
    max_node_count = var.cpu_nodes
  }

  management {
    auto_repair  = true
    auto_upgrade = true
  }

  node_config {
    machine_type    = "n2-standard-16"
    spot            = true
    service_account = local.node.service_account
    oauth_scopes    = local.node.oauth_scopes

    taint {
      key    = local.spot_taint.key
      value  = local.spot_taint.value
      effect = local.spot_taint.effect
    }

    workload_metadata_config {
      mode = "GKE_METADATA"
    }

    shielded_instance_config {
      enable_secure_boot = true
    }
  }
}

resource "google_container_node_pool" "gpu" {
  for_each = var.gpu_pools
  name     = each.key
  cluster  = google_container_cluster.tvq.id

  autoscaling {
    min_node_count = 0
    max_node_count = each.value.most_nodes
  }

  management {
    auto_repair  = true
    auto_upgrade = true
  }

  node_config {
    machine_type    = each.value.machine_type
    spot            = true
    service_account = local.node.service_account
    oauth_scopes    = local.node.oauth_scopes

    guest_accelerator {
      type  = each.value.accelerator
      count = each.value.per_node
      gpu_driver_installation_config {
        gpu_driver_version = "DEFAULT"
      }
    }

    taint {
      key    = local.spot_taint.key
      value  = local.spot_taint.value
      effect = local.spot_taint.effect
    }

    workload_metadata_config {
      mode = "GKE_METADATA"
    }
  }
}

resource "google_container_node_pool" "tpu" {
  for_each = var.tpu_pools
  name     = each.key
  cluster  = google_container_cluster.tvq.id

  # A slice of several hosts is scaled as one.
  autoscaling {
    total_min_node_count = 0
    total_max_node_count = each.value.hosts
    location_policy      = "ANY"
  }

  dynamic "placement_policy" {
    for_each = each.value.hosts > 1 ? [1] : []
    content {
      type         = "COMPACT"
      tpu_topology = each.value.topology
    }
  }

  management {
    auto_repair  = true
    auto_upgrade = true
  }

  node_config {
    machine_type    = each.value.machine_type
    spot            = true
    service_account = local.node.service_account
    oauth_scopes    = local.node.oauth_scopes

    taint {
      key    = local.spot_taint.key
      value  = local.spot_taint.value
      effect = local.spot_taint.effect
    }

    workload_metadata_config {
      mode = "GKE_METADATA"
    }
  }
}
