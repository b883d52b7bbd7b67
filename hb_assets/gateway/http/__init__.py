"""HTTP itself: connections, request bodies, problem details, TLS."""
