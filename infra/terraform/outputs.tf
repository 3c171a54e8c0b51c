output "registry" {
  description = "newName of the image in site/kustomization.yaml."
  value       = "${google_artifact_registry_repository.tvq.registry_uri}/tvq"
}

output "buckets" {
  value = { for key, bucket in google_storage_bucket.tvq : key => bucket.url }
}

output "credentials" {
  description = "The command with which kubectl finds the cluster."
  value       = "gcloud container clusters get-credentials tvq --zone ${var.zone} --project ${var.project}"
}
