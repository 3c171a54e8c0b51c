"""Trainings that differ in some fields, side by side."""
