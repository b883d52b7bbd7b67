"""POST: heartbeats out of a request's body, into Redis or the spool."""
