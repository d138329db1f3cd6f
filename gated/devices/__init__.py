"""Where arrays and processes live: mesh, collectives, chips, processes, determinism."""
