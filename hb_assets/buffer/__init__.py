"""The buffer: Redis Streams by shard, between whoever sends heartbeats and the drain.

Belongs here: everything that talks to Redis, and the embedded server. Doesn't belong here: what a
heartbeat is (`record`), decoding and files (`lake/`).
"""
