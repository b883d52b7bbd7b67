"""Drain and consolidation, measured against the floor and the alternative, in one run.

    make bench                      1 million heartbeats, medians of 3
    make bench ARGS="--rows 10000000 --repeats 5"

It starts an embedded server and a lake of its own in a temporary folder. Floor: DuckDB copies the
same raw rows to Parquet, without dedup and sort. Alternative: dedup and sort in one DuckDB query
(row_number). Each measurement runs in a process of its own, so that its peak memory is its own.
"""

from __future__ import annotations

import argparse
import json
import random
import resource
import statistics
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable
from pathlib import Path

import duckdb
from rich.console import Console
from rich.table import Table

from hb_assets.buffer import connection, server
from hb_assets.buffer.consumer import Consumer
from hb_assets.buffer.producer import Producer
from hb_assets.days import day_of, start_ms
from hb_assets.drain import drain
from hb_assets.lake import consolidation, layout
from hb_assets.lake.store import Lake
from hb_assets.record import Heartbeat, encode, shard_of
from hb_assets.settings import Settings

DAY = day_of(1_736_899_200_000)  # 2025-01-15
USERS = 1000
ONE_QUERY = """
COPY (
    SELECT user_id, device_id, timestamp, heart_rate FROM (
        SELECT *, row_number() OVER (
            PARTITION BY user_id, device_id, timestamp
            ORDER BY arrival_ms DESC, arrival_seq DESC, arrival_pos DESC
        ) AS rank FROM read_parquet($raw, hive_partitioning = false)
    ) WHERE rank = 1 ORDER BY user_id, timestamp, device_id
) TO '{to}' (FORMAT parquet, COMPRESSION zstd)
"""
COPY = "COPY (FROM read_parquet($raw, hive_partitioning = false)) TO '{to}' (FORMAT parquet, COMPRESSION zstd)"


def settings_in(home: Path) -> Settings:
    """Settings of the benchmark: embedded server and lake under `home`, room for everything."""
    return Settings(home=home, buffer_max_heartbeats=10**9, buffer_max_bytes=2**36)


def fill(home: Path, rows: int) -> None:
    """Append `rows` heartbeats of one day: 5 % repeats, arrival shuffled within a minute."""
    settings = settings_in(home)
    producer = Producer(connection.connect(settings), settings)
    chance = random.Random(7)
    start, step = start_ms(DAY), 86_400_000 // max(1, rows // USERS)
    for first in range(0, rows, 50_000):
        by_shard: dict[int, list[bytes]] = {}
        for number in range(first, min(first + 50_000, rows)):
            source = number - chance.randrange(1, 1000) if chance.random() < 0.05 else number
            user = f"user-{source % USERS:04}"
            instant = start + max(0, source // USERS) * step
            beat = Heartbeat(user, "device_a", min(instant, start + 86_399_999), 60 + source % 60)
            by_shard.setdefault(shard_of(user, settings.shards), []).append(encode(beat))
        failed = [error for error in producer.append(by_shard).values() if error]
        if failed:
            raise failed[0]


def drain_all(home: Path) -> int:
    """Drain everything; returns rows."""
    settings = settings_in(home)
    consumer = Consumer(connection.connect(settings), settings)
    consumer.open()
    try:
        return drain(consumer, Lake.open(settings), settings, until_empty=True).rows
    finally:
        consumer.close()


def consolidate(home: Path) -> int:
    """Consolidate the day from raw; returns unique rows."""
    settings = settings_in(home)
    return consolidation.consolidate(Lake.open(settings), DAY, settings, rebuild=True).unique


def by_query(home: Path, query: str) -> int:
    """Run a COPY over the raw fragments in DuckDB's defaults; returns rows."""
    raw = [
        str(path)
        for path in layout.day_folder(settings_in(home).lake_dir, "raw", DAY).rglob("*.parquet")
    ]
    to = home / "copy.parquet"
    duckdb.connect().execute(query.format(to=to), {"raw": raw}).fetchall()
    return int(duckdb.connect().sql(f"SELECT count(*) FROM '{to}'").fetchall()[0][0])


STEPS: dict[str, Callable[[Path], int]] = {
    "drain": drain_all,
    "consolidate": consolidate,
    "floor": lambda home: by_query(home, COPY),
    "one query": lambda home: by_query(home, ONE_QUERY),
}


def measured(step: str, home: Path) -> tuple[float, float, int]:
    """Seconds, peak MB and rows of one step in a process of its own."""
    argv = [sys.executable, __file__, "--step", step, "--home", str(home)]
    found = json.loads(subprocess.run(argv, check=True, capture_output=True, text=True).stdout)
    return found["seconds"], found["peak_mb"], found["rows"]


def main() -> None:
    """Measure and print the table, or run one step (internal)."""
    arguments = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawTextHelpFormatter
    )
    arguments.add_argument("--rows", type=int, default=1_000_000)
    arguments.add_argument("--repeats", type=int, default=3)
    arguments.add_argument("--step", choices=STEPS, help=argparse.SUPPRESS)
    arguments.add_argument("--home", type=Path, help=argparse.SUPPRESS)
    chosen = arguments.parse_args()
    if chosen.step:
        began = time.perf_counter()
        rows = STEPS[chosen.step](chosen.home)
        seconds = time.perf_counter() - began
        peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 1024
        print(json.dumps({"seconds": seconds, "peak_mb": peak, "rows": rows}))
        return
    console = Console()
    runs: dict[str, list[tuple[float, float, int]]] = {step: [] for step in STEPS}
    for repeat in range(chosen.repeats):
        with tempfile.TemporaryDirectory(prefix="hb-bench-") as folder:
            home = Path(folder)
            with (
                console.status(f"run {repeat + 1} of {chosen.repeats}"),
                server.borrowed(settings_in(home)),
            ):
                fill(home, chosen.rows)
                for step, found in runs.items():
                    found.append(measured(step, home))
    table = Table(
        title=f"{chosen.rows:,} heartbeats, 5 % repeats, medians of {chosen.repeats}",
        title_justify="left",
    )
    for column in ("step", "seconds", "x floor", "rows in/s", "peak MB"):
        table.add_column(column, justify="left" if column == "step" else "right")
    floor = statistics.median(seconds for seconds, _, _ in runs["floor"])
    names = {
        "drain": "hb drain, entries of 500, to fsynced fragments",
        "consolidate": "hb consolidate --rebuild, checks included",
        "floor": "floor: DuckDB copies raw, no dedup, no sort",
        "one query": "alternative: dedup and sort in one DuckDB query",
    }
    for step, found in runs.items():
        seconds = statistics.median(one[0] for one in found)
        peak = statistics.median(one[1] for one in found)
        table.add_row(
            names[step],
            f"{seconds:.2f}",
            f"{seconds / floor:.1f}",
            f"{chosen.rows / seconds:,.0f}",
            f"{peak:,.0f}",
        )
    console.print(table)


if __name__ == "__main__":
    main()
