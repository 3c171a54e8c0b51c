"""What people run: the command line, training on Ray, checkpoints, tracking."""
