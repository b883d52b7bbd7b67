"""The lake: raw fragments, consolidated days, minutes and quarantine, as hive-partitioned Parquet.

A heartbeat's way through this package: `ingest.decode` reads entries into columns,
`files.fragments` makes them durable, `compaction` deduplicates and sorts a day (`integrity.checks`
verify it before it is published), `minutes` aggregates it, `query` answers queries. What can't be
used goes to `files.quarantine`. The only package that uses DuckDB; it knows nothing of Redis.
"""
