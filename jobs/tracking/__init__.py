"""MLflow: one training is one run, whatever restarts. The only package that imports MLflow."""
