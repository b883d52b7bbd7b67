"""GET: heart rate of one user over time."""
