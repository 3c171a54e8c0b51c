"""Corpora as people ask for them: made, verified, looked into."""
