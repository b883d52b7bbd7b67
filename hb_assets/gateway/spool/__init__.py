"""The spool: heartbeats accepted while Redis was away, on disk until they are replayed."""
