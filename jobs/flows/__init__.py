"""Prepare, train, judge, promote and report as one thing that can break anywhere."""
