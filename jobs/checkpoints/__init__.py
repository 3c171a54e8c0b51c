"""Checkpoints: written, found, verified, kept, restored, taken out and in."""
