"""Imports of files through the buffer: NDJSON and JSON, CSV and Parquet, plain or compressed.

`importer` appends what the readers of the formats yield; `sources` opens files and pipes for them.
A file goes the way of any heartbeat, so that importing it twice changes nothing.
"""
