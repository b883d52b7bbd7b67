"""Importing files: NDJSON and JSON, CSV and Parquet, plain or compressed, through the buffer.

`importer` appends what the readers of the formats yield; `sources` opens files and pipes for them.
A file goes the way of any heartbeat, so that importing it twice changes nothing.
"""
