"""Registered models, their champion, and the proof that it is one."""
