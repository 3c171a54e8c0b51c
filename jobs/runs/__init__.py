"""A run's folder and all that lies in it but its checkpoints: claims, spool, ledger, logs."""
