"""Trainings as jobs of a Ray cluster."""
