# Heads, MLflow and the operator stand on one steady node; all that computes is spot, and comes and
# goes with the work: an idle cluster costs that one node.

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
    service_account = google_service_account.tvq["nodes"].email
    oauth_scopes    = ["https://www.googleapis.com/auth/cloud-platform"]

    workload_metadata_config {
      mode = "GKE_METADATA"
    }

    shielded_instance_config {
      enable_secure_boot = true
    }
  }
}

resource "google_container_node_pool" "spot" {
  for_each = var.pools
  name     = each.key
  cluster  = google_container_cluster.tvq.id

  # A TPU slice of several hosts is scaled as one: none of them, or all.
  autoscaling {
    total_min_node_count = 0
    total_max_node_count = each.value.most_nodes
    location_policy      = "ANY"
  }

  dynamic "placement_policy" {
    for_each = each.value.most_nodes > 1 ? each.value.topology[*] : []
    content {
      type         = "COMPACT"
      tpu_topology = placement_policy.value
    }
  }

  management {
    auto_repair  = true
    auto_upgrade = true
  }

  node_config {
    machine_type    = each.value.machine_type
    spot            = true
    service_account = google_service_account.tvq["nodes"].email
    oauth_scopes    = ["https://www.googleapis.com/auth/cloud-platform"]

    dynamic "guest_accelerator" {
      for_each = each.value.gpu[*]
      content {
        type  = guest_accelerator.value.type
        count = guest_accelerator.value.per_node
        gpu_driver_installation_config {
          gpu_driver_version = "DEFAULT"
        }
      }
    }

    taint {
      key    = "cloud.google.com/gke-spot"
      value  = "true"
      effect = "NO_SCHEDULE"
    }

    workload_metadata_config {
      mode = "GKE_METADATA"
    }

    # NVIDIA's driver and the TPU images are not signed for it.
    shielded_instance_config {
      enable_secure_boot = each.value.gpu == null && each.value.topology == null
    }
  }
}
