"""DuckDB engines: in memory, bounded, offline, in UTC.

Belongs here: how a connection is made. Doesn't belong here: SQL.
"""

from __future__ import annotations

import tempfile
from collections.abc import Iterator, Mapping
from contextlib import contextmanager

import duckdb

from hb_assets.settings import Settings


def connect(settings: Settings) -> duckdb.DuckDBPyConnection:
    """A new engine with the settings' bounds; it spills to the system's temp folder."""
    config: dict[str, str | bool | int | float | list[str]] = {
        "memory_limit": f"{settings.duckdb_memory // 2**20}MiB",
        "autoinstall_known_extensions": False,
        "autoload_known_extensions": False,
    }
    if settings.duckdb_threads:
        config["threads"] = settings.duckdb_threads
    connection = duckdb.connect(":memory:", config=config)
    connection.execute("SET TimeZone = 'UTC'")
    return connection


@contextmanager
def engine(settings: Settings) -> Iterator[duckdb.DuckDBPyConnection]:
    """A new engine for one piece of work, with a spill folder of its own."""
    with (
        tempfile.TemporaryDirectory(prefix="hb-duckdb-") as spill,
        connect(settings) as connection,
    ):
        connection.execute("SET temp_directory = $spill", {"spill": spill})
        yield connection


def figures(
    connection: duckdb.DuckDBPyConnection, query: str, params: Mapping[str, object]
) -> tuple[int, ...]:
    """The one row of counts that a query answers with."""
    (row,) = connection.sql(query, params=dict(params)).fetchall()
    return tuple(int(value) for value in row)
