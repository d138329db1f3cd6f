"""The workdir of a run and its lock, checkpoints, metrics, events and exit codes."""
