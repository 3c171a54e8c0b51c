"""Runs against each other, over seeds."""
