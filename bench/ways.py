"""Implementations that consolidate a day of raw fragments into one file: ours, the floor, others.

One function each, to be measured in a process of its own. All of them take the lake's folder and a
folder for what they make, and return how many rows and bytes that has. `consolidating` compares
them.

Where an alternative gets cheaper by leaving out what it could do, it does: the others keep the
survivor's reading and not its arrival, without which no later fragment could be merged in, check
nothing, sync nothing, and take the whole day's memory if they can get it.
"""

from __future__ import annotations

from pathlib import Path

from bench.measure import Found, needs
from bench.traffic import DAY
from hb_assets.core.schema import ARRIVAL, KEY, ORDER
from hb_assets.core.settings import Settings
from hb_assets.lake.compaction import consolidation
from hb_assets.lake.storage import layout
from hb_assets.lake.storage.layout import FragmentName
from hb_assets.lake.storage.store import Lake

_COPY = "COPY (FROM read_parquet($raw, hive_partitioning = false)) TO '{to}' ({written})"
_ARRIVAL = ", ".join(ARRIVAL)
_RANKED = f"""
COPY (
    SELECT user_id, device_id, timestamp, heart_rate
    FROM read_parquet($raw, hive_partitioning = false)
    QUALIFY row_number() OVER (
        PARTITION BY {", ".join(KEY)} ORDER BY {", ".join(f"{name} DESC" for name in ARRIVAL)}
    ) = 1
    ORDER BY {", ".join(ORDER)}
) TO '{{to}}' ({{written}})
"""
_GROUPED = f"""
COPY (
    SELECT user_id, device_id, timestamp, arg_max(heart_rate, ({_ARRIVAL})) AS heart_rate
    FROM read_parquet($raw, hive_partitioning = false)
    GROUP BY ALL ORDER BY {", ".join(ORDER)}
) TO '{{to}}' ({{written}})
"""
_WRITTEN = "FORMAT parquet, COMPRESSION zstd"
_MERGES = 4


def settings_in(home: Path, **more: object) -> Settings:
    """Settings of the bench: embedded server and lake under `home`, room for everything."""
    ample = {"buffer_max_heartbeats": 10**9, "buffer_max_bytes": 2**40}
    return Settings(home=home, **{**ample, **more})  # type: ignore[arg-type]  # pydantic checks


@needs("hb_assets.core.contracts")
def ours(home: str, memory: int = 2**30, rebuild: int = 0) -> Found:
    """The project's consolidation of what is pending, checks and fsync included."""
    settings = settings_in(Path(home), duckdb_memory=memory)
    done = consolidation.consolidate(Lake.open(settings), DAY, settings, rebuild=bool(rebuild))
    return {
        "rows": done.unique,
        "bytes": done.bytes,
        "written": done.written,
        "shards": done.shards_written,
    }


@needs("duckdb")
def copied(lake: str, folder: str) -> Found:
    """The floor: DuckDB copies the same rows into one file; no dedup, no sort."""
    return _by_duckdb(_COPY, lake, folder)


@needs("duckdb")
def ranked(lake: str, folder: str) -> Found:
    """One DuckDB query: row_number() over each key."""
    return _by_duckdb(_RANKED, lake, folder)


@needs("duckdb")
def grouped(lake: str, folder: str) -> Found:
    """One DuckDB query: arg_max() of each group."""
    return _by_duckdb(_GROUPED, lake, folder)


@needs("polars", "pyarrow.parquet")
def polars_streaming(lake: str, folder: str) -> Found:
    """Polars' streaming engine: the latest of each group."""
    import polars as pl

    to = Path(folder) / "polars.parquet"
    arrival = pl.col("arrival_ms").cast(pl.Int128) * 2**56 + pl.col("arrival_seq") * 2**36
    arrival += pl.col("arrival_shard").cast(pl.Int128) * 2**28 + pl.col("arrival_pos")
    rows = pl.scan_parquet(_raw(lake), hive_partitioning=False)
    latest = pl.col("heart_rate").max_by("arrival")
    rows.with_columns(arrival=arrival).group_by(KEY).agg(latest).sort(ORDER).sink_parquet(
        to, compression="zstd", engine="streaming"
    )
    return _written(to)


@needs("pandas", "pyarrow.parquet")
def pandas_in_memory(lake: str, folder: str) -> Found:
    """Pandas: sort, drop duplicates."""
    import pandas as pd

    to = Path(folder) / "pandas.parquet"
    rows = pd.read_parquet(_raw(lake), partitioning=None)
    rows = rows.sort_values([*ORDER, *ARRIVAL]).drop_duplicates(list(KEY), keep="last")
    rows[[*KEY, "heart_rate"]].to_parquet(to, compression="zstd", index=False)
    return _written(to)


@needs("deltalake", "duckdb")
def delta_merge(lake: str, folder: str) -> Found:
    """delta-rs: the day in four merges into one table, each deduplicated before; no sort."""
    import duckdb
    from deltalake import DeltaTable, write_deltalake

    to = Path(folder) / "delta"
    raw = _raw(lake)
    latest = _GROUPED.partition("(")[2].rpartition("ORDER BY")[0]
    same = " AND ".join(f"t.{name} = s.{name}" for name in KEY)
    for number in range(_MERGES):
        part = raw[len(raw) * number // _MERGES : len(raw) * (number + 1) // _MERGES]
        source = duckdb.connect().sql(latest, params={"raw": part}).to_arrow_table()
        if number == 0:
            write_deltalake(to, source)
            continue
        merge = DeltaTable(to).merge(source, same, source_alias="s", target_alias="t")
        merge.when_matched_update_all().when_not_matched_insert_all().execute()
    files = [Path(one) for one in DeltaTable(to).file_uris()]
    rows = duckdb.connect().sql(
        "SELECT count(*) FROM read_parquet($files)", params={"files": [str(one) for one in files]}
    )
    [(count,)] = rows.fetchall()
    return {"rows": int(count), "bytes": sum(one.stat().st_size for one in files)}


def _raw(lake: str) -> list[str]:
    """The day's fragments, in the order of their arrival."""
    folder = layout.day_folder(Path(lake), layout.RAW, DAY)
    paths = folder.rglob("*.parquet")
    named = [(name, str(path)) for path in paths if (name := FragmentName.parse(path.name))]
    return [path for _, path in sorted(named)]


def _by_duckdb(query: str, lake: str, folder: str) -> Found:
    import duckdb

    to = Path(folder) / "duckdb.parquet"
    with duckdb.connect() as connection:
        connection.execute(query.format(to=to, written=_WRITTEN), {"raw": _raw(lake)})
    return _written(to)


def _written(path: Path) -> Found:
    import pyarrow.parquet as pq

    return {"rows": pq.read_metadata(path).num_rows, "bytes": path.stat().st_size}
