"""The lake: raw fragments, consolidated days, minutes and quarantine, as hive-partitioned Parquet.

A heartbeat's way through this folder: `decode` reads entries into columns, `fragments` makes them
durable, `consolidation` deduplicates and sorts a day (`checks` look at it before it is published),
`minutes` sums it up, `query` answers questions. What can't be used goes to `quarantine`.
The only place that uses DuckDB; it knows nothing of Redis.
"""
