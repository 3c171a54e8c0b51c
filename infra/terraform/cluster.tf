resource "google_compute_network" "tvq" {
  name                    = "tvq"
  auto_create_subnetworks = false
}

resource "google_compute_subnetwork" "tvq" {
  name                     = "tvq"
  network                  = google_compute_network.tvq.id
  ip_cidr_range            = "10.10.0.0/20"
  private_ip_google_access = true

  secondary_ip_range {
    range_name    = "pods"
    ip_cidr_range = "10.20.0.0/14"
  }

  secondary_ip_range {
    range_name    = "services"
    ip_cidr_range = "10.30.0.0/20"
  }
}

resource "google_container_cluster" "tvq" {
  name                     = "tvq"
  location                 = var.zone
  network                  = google_compute_network.tvq.id
  subnetwork               = google_compute_subnetwork.tvq.id
  remove_default_node_pool = true
  initial_node_count       = 1
  deletion_protection      = true
  datapath_provider        = "ADVANCED_DATAPATH" # network policies hold

  release_channel {
    channel = "REGULAR"
  }

  workload_identity_config {
    workload_pool = "${var.project}.svc.id.goog"
  }

  ip_allocation_policy {
    cluster_secondary_range_name  = "pods"
    services_secondary_range_name = "services"
  }

  private_cluster_config {
    enable_private_nodes = true
  }

  master_authorized_networks_config {
    dynamic "cidr_blocks" {
      for_each = var.authorized_networks
      content {
        display_name = cidr_blocks.key
        cidr_block   = cidr_blocks.value
      }
    }
  }

  maintenance_policy {
    recurring_window {
      start_time = "2026-01-03T08:00:00Z"
      end_time   = "2026-01-03T16:00:00Z"
      recurrence = "FREQ=WEEKLY;BYDAY=SA"
    }
  }
}
