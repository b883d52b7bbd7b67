"""POST: heartbeats from a request's body into Redis or the spool."""
