"""Health, metrics, and the probes that they are made of."""
