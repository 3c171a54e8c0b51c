# Who may do what. Pods become these accounts by workload identity: there are no keys.

resource "google_service_account" "tvq" {
  for_each = {
    train  = "Trains: reads corpora, writes runs"
    mlflow = "MLflow: its artifacts, its backups"
    nodes  = "The machines themselves: logs, metrics, images"
  }
  account_id   = "tvq-${each.key}"
  display_name = each.value
}

locals {
  # Object roles on single buckets; nobody may change a bucket or its policy.
  on_buckets = {
    train-runs    = { account = "train", bucket = "runs", role = "roles/storage.objectUser" }
    train-corpora = { account = "train", bucket = "corpora", role = "roles/storage.objectUser" }
    mlflow-runs   = { account = "mlflow", bucket = "runs", role = "roles/storage.objectUser" }
    # Writes and reads backups, and can neither remove nor overwrite them.
    mlflow-backups        = { account = "mlflow", bucket = "backups", role = "roles/storage.objectCreator" }
    mlflow-backups-reader = { account = "mlflow", bucket = "backups", role = "roles/storage.objectViewer" }
  }
}

resource "google_storage_bucket_iam_member" "tvq" {
  for_each = local.on_buckets
  bucket   = google_storage_bucket.tvq[each.value.bucket].name
  role     = each.value.role
  member   = google_service_account.tvq[each.value.account].member
}

resource "google_service_account_iam_member" "identity" {
  for_each           = toset(["train", "mlflow"])
  service_account_id = google_service_account.tvq[each.key].name
  role               = "roles/iam.workloadIdentityUser"
  member             = "serviceAccount:${var.project}.svc.id.goog[tvq/tvq-${each.key}]"
  depends_on         = [google_container_cluster.tvq]
}

resource "google_project_iam_member" "nodes" {
  for_each = toset(["roles/logging.logWriter", "roles/monitoring.metricWriter"])
  project  = var.project
  role     = each.key
  member   = google_service_account.tvq["nodes"].member
}

resource "google_artifact_registry_repository_iam_member" "nodes" {
  repository = google_artifact_registry_repository.tvq.name
  location   = var.region
  role       = "roles/artifactregistry.reader"
  member     = google_service_account.tvq["nodes"].member
}
