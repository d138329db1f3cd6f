"""What a run keeps: its workdir and lock, checkpoints, metrics, events and exit codes."""
