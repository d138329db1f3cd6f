"""The cost of a run before a pod is rented: preflight, estimates, compiled programs."""
