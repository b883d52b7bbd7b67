"""What a forkserver's processes begin with: libraries that `hb` needs, none of our own modules."""

from __future__ import annotations

import importlib

import pyarrow as pa

for name in (
    *("dateutil.tz", "duckdb", "filelock", "httpx", "jinja2", "msgspec", "pandera.polars"),
    *("platformdirs", "polars", "prometheus_client.multiprocess", "psutil", "pyarrow.compute"),
    *("pyarrow.csv", "pyarrow.dataset", "pyarrow.parquet", "pydantic_settings", "redis.asyncio"),
    *("rich.progress", "rich.table", "starlette.applications", "typer", "uvicorn", "uvloop"),
    *("xmlrpc.client",),
):
    importlib.import_module(name)
pa.array([""])  # the first one looks for pandas
