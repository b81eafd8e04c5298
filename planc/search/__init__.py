"""The best plan for a model, a cluster and bounds: the declared space, bounds on all of it, and exact predictions of what may be best."""
