terraform {
  required_version = ">= 1.9"
  required_providers {
    google = {
      source  = "hashicorp/google"
      version = "~> 7.10"
    }
  }
  # The state knows no secret, but it must be one for all: terraform init -backend-config=bucket=...
  backend "gcs" {
    prefix = "tvq"
  }
}

provider "google" {
  project = var.project
  region  = var.region
}
