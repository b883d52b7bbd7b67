"""Heart-rate ingestion: HTTP gateway, Redis Streams buffer, Parquet lake, Dagster control room."""

__version__ = "0.1.0"
