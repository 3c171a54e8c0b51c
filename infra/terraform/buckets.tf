# Which checkpoints stay is decided in one place, the recipe's `checkpoint` section: no rule here
# removes files of runs/ by age. tvq writes no temporary objects; what a rule here removes are cut-off
# uploads, runs that were only tries, and old versions.

locals {
  buckets = {
    runs    = { versioned = false } # many large files that are removed soon: versions would keep them all
    corpora = { versioned = true }
    backups = { versioned = true }
  }
}

resource "google_storage_bucket" "tvq" {
  for_each                    = local.buckets
  name                        = "${var.project}-tvq-${each.key}"
  location                    = var.region
  storage_class               = "STANDARD"
  uniform_bucket_level_access = true
  public_access_prevention    = "enforced"

  versioning {
    enabled = each.value.versioned
  }

  soft_delete_policy {
    retention_duration_seconds = var.keep_deleted_days * 86400
  }

  # Uploads that a kill cut off: they cost as stored bytes and appear in no listing.
  lifecycle_rule {
    condition {
      age = 7
    }
    action {
      type = "AbortIncompleteMultipartUpload"
    }
  }

  dynamic "lifecycle_rule" {
    for_each = each.value.versioned ? [1] : []
    content {
      condition {
        days_since_noncurrent_time = 30
        num_newer_versions         = 3
        with_state                 = "ARCHIVED"
      }
      action {
        type = "Delete"
      }
    }
  }

  dynamic "lifecycle_rule" {
    for_each = each.key == "runs" ? [1] : []
    content {
      condition {
        age            = var.keep_scratch_days
        matches_prefix = ["scratch/", "runs/.doctor-"] # and what a killed `tvq doctor` left
      }
      action {
        type = "Delete"
      }
    }
  }

  dynamic "lifecycle_rule" {
    for_each = each.key == "backups" ? [1] : []
    content {
      condition {
        age = 90
      }
      action {
        type = "Delete"
      }
    }
  }
}

resource "google_artifact_registry_repository" "tvq" {
  repository_id = "tvq"
  location      = var.region
  format        = "DOCKER"

  cleanup_policies {
    id     = "keep-the-newest"
    action = "KEEP"
    most_recent_versions {
      keep_count = 10
    }
  }

  cleanup_policies {
    id     = "remove-the-rest"
    action = "DELETE"
    condition {
      older_than = "7776000s"
    }
  }
}
