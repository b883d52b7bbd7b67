"""HTTP as such: connections, request bodies, problem details, TLS."""
