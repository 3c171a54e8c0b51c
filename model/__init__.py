"""Transformer-VQ in JAX: pure functions of arrays. No input or output, no Ray, no MLflow."""
