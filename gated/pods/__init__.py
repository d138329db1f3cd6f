"""Before a pod is rented: preflight, estimates, and what a compiled program costs."""
