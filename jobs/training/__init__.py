"""Training: the loop, what it is given, how it starts, goes on and stops."""
