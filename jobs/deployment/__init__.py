"""A recipe as the manifests that run it."""
