"""Redis Streams, one a shard, that buffer heartbeats between producers and the drain.

Everything that talks to Redis is in this package, and the embedded server. It knows nothing of
files; decoding is in `lake.ingest`.
"""
