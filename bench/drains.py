"""Benchmarks of the drain: speed against its parts, memory, and the size of the day.

The figures, their targets, and the functions that are measured; buffers are filled by `backlogs`.
"""

from __future__ import annotations

import contextlib
import statistics
import time
from collections.abc import Iterator
from pathlib import Path

from bench import backlogs, lakes
from bench.measure import Cost, FailedMeasurementError, Found, measured, needs
from bench.run import MILLION, Bench
from bench.table import Row, Study, Ways
from bench.traffic import Traffic
from bench.ways import settings_in
from hb_assets.buffer import connection, server
from hb_assets.buffer.consumer import Consumer
from hb_assets.core.settings import Settings
from hb_assets.lake.files import fragments
from hb_assets.lake.ingest.decode import pieces
from hb_assets.lake.storage.store import Lake
from hb_assets.pipeline.drain import drain

OURS = "hb drain, to fsynced fragments and acknowledgement"
FLOOR = "floor: XREADGROUP, data thrown away"
SINGLE = "hb drain"
PARTS = "its own parts, one after the other"
BARE = "its bare parts: read, JSON to columns, Parquet"
DLT = "dlt, from the same entries to Parquet"
PART_NAMES = ("read", "decode", "write")
_DLT_ROWS = 100_000
_SMALL = 10_000
_COLUMNS = """
SELECT unnest(from_json(line, $shape)) FROM (
    SELECT unnest(string_split(data, chr(10))) AS line FROM entries
)
"""
_SHAPE = (
    '{"user_id":"VARCHAR","device_id":"VARCHAR","timestamp_ms":"BIGINT","heart_rate":"SMALLINT"}'
)


@needs("pandas")  # pyarrow imports it with its first array where it is installed: for tests, here
def drained(home: str) -> Found:
    """Drain all that the buffer of `home` holds."""
    settings = settings_in(Path(home))
    consumer = Consumer(connection.connect(settings), settings)
    consumer.open()
    done = drain(consumer, Lake.open(settings), settings, until_empty=True)
    consumer.close()
    return {"rows": done.rows, "fragments": done.fragments, "cycles": done.cycles}


@needs("pandas")
def parts(home: str) -> Found:
    """Read, decode and write the same backlog, one after the other; nothing is acknowledged."""
    settings = settings_in(Path(home))
    lake = Lake.open(settings.model_copy(update={"lake": str(Path(home) / "parts")}))
    clock = dict.fromkeys(PART_NAMES, 0.0)
    rows, began = 0, time.perf_counter()
    for found in backlogs.read(settings, _step(settings)):
        entries = [backlogs.entry(raw) for raw in found]
        clock["read"] += (read := time.perf_counter()) - began
        for piece in pieces(entries, settings):
            clock["decode"] += (decoded := time.perf_counter()) - read
            fragments.publish(lake, piece.rows)
            clock["write"] += (read := time.perf_counter()) - decoded
            rows += piece.rows.num_rows
        began = time.perf_counter()
    return {"rows": rows, **clock}


@needs("duckdb", "pyarrow.parquet")
def bare_parts(home: str) -> Found:
    """The same without what makes a drain of it.

    The same entries read, to columns by DuckDB, and each batch into one Parquet file: nothing is
    judged, told apart by day and shard, sorted, identified, synced or acknowledged.
    """
    import duckdb
    import pyarrow as pa
    import pyarrow.parquet as pq

    settings = settings_in(Path(home))
    clock = dict.fromkeys(PART_NAMES, 0.0)
    rows, began = 0, time.perf_counter()
    with duckdb.connect() as connection:
        for found in backlogs.read(settings, _step(settings)):
            clock["read"] += (read := time.perf_counter()) - began
            data = pa.array([fields[b"data"].decode() for _, _, fields in found])
            connection.register("entries", pa.table({"data": data}))
            table = connection.sql(_COLUMNS, params={"shape": _SHAPE}).to_arrow_table()
            clock["decode"] += (decoded := time.perf_counter()) - read
            pq.write_table(table, Path(home) / "bare.parquet", compression="zstd")
            clock["write"] += (began := time.perf_counter()) - decoded
            rows += table.num_rows
    return {"rows": rows, **clock}


def _step(settings: Settings) -> int:
    """Entries of one drain cycle."""
    return settings.drain_max_rows // settings.entry_max_heartbeats


@needs("dlt", "dlt.destinations", "msgspec", "pyarrow.parquet")
def by_dlt(home: str, rows: int) -> Found:
    """Read as many rows and let dlt make Parquet of them: extract, normalize, load."""
    import itertools
    import os

    import dlt
    import msgspec

    os.environ |= {"RUNTIME__DLTHUB_TELEMETRY": "false", "RUNTIME__LOG_LEVEL": "ERROR"}
    where = Path(home) / "dlt"
    lines = (
        line
        for found in backlogs.read(settings_in(Path(home)), 10)
        for _, _, fields in found
        for line in fields[b"data"].split(b"\n")
    )
    records = map(msgspec.json.decode, itertools.islice(lines, rows))
    pipeline = dlt.pipeline(
        "heartbeats",
        destination=dlt.destinations.filesystem(where.as_uri()),
        dataset_name="raw",
        pipelines_dir=str(where / "pipelines"),
    )
    pipeline.run(records, table_name="heartbeats", loader_file_format="parquet")
    return {"rows_in": rows}


def small_drains(home: str, repeats: int, *places: str) -> Found:
    """Milliseconds of a drain of 10,000 late heartbeats into each of these lakes, by turns."""
    settings = settings_in(Path(home))
    times: dict[str, list[float]] = {place: [] for place in places}
    late = Traffic(MILLION).late(_SMALL)
    client = connection.connect(settings)
    for run in range(-1, repeats):
        for place, found in times.items():
            here = settings.model_copy(update={"lake": place})
            lake = Lake.open(here)
            backlogs.fill(here, [late])
            consumer = Consumer(client, here)
            consumer.open()
            began = time.perf_counter()
            done = drain(consumer, lake, here)
            taken = (time.perf_counter() - began) * 1000
            consumer.close()
            if done.rows != _SMALL:
                raise FailedMeasurementError(f"{done.rows} of {_SMALL} rows were drained")
            if run >= 0:  # the first one is the warm-up
                found.append(taken)
    return times


def speed(bench: Bench) -> Iterator[Row | Ways | Study]:
    """Entries of 500 and of one heartbeat, against reading alone and the sum of the parts."""
    about = (1 if bench.quick else 4) * MILLION
    costs: dict[str, list[Cost]] = {name: [] for name in (OURS, PARTS, BARE, DLT, FLOOR)}
    for run in range(bench.repeats):
        bench.say(f"drain, entries of 500, run {run + 1} of {bench.repeats}")
        with _filled(bench, about) as (home, rows):
            costs[FLOOR].append(measured(backlogs.bare, home, 400))
            costs[PARTS].append(measured(parts, home))
            costs[BARE].append(measured(bare_parts, home))
            if run < bench.others:
                costs[DLT].append(measured(by_dlt, home, _DLT_ROWS))
            costs[OURS].append(_drained(home, rows))
    beside = Ways(f"drain {about / MILLION:g} M rows in entries of 500", rows, costs)
    yield beside
    yield Row(
        "drain, entries of 500, through fsynced fragments and acknowledgement",
        "heartbeats/s",
        [rows / cost.seconds for cost in costs[OURS]],
        target=MILLION,
    )
    mine = [rows / cost.seconds for cost in costs[OURS]]
    for way, of, target in ((BARE, "bare parts", 0.5), (PARTS, "own parts", None)):
        summed = [rows / sum(cost.number(part) for part in PART_NAMES) for cost in costs[way]]
        yield Row(
            f"the same, against the serial sum of its {of}", "heartbeats/s", mine, summed, target
        )
    for part in PART_NAMES:
        yield Row(
            f"{part}, ours and bare",
            "heartbeats/s",
            [rows / cost.number(part) for cost in costs[PARTS]],
            [rows / cost.number(part) for cost in costs[BARE]],
        )
    yield from _single(bench)


def memory(bench: Bench) -> Iterator[Row]:
    """Peak memory with a large backlog."""
    about = (2 if bench.quick else 20) * MILLION
    bench.say(f"drain, a backlog of {about // MILLION} M")
    with _filled(bench, about) as (home, rows):
        cost = _drained(home, rows)
    yield Row(
        f"drain, peak memory with a backlog of {about // MILLION} M",
        "MB",
        [cost.peak_mb],
        target=400,
        at_most=True,
    )


def day(bench: Bench) -> Iterator[Row]:
    """Ten thousand heartbeats into days that hold very few rows and very many."""
    sizes = (1000, MILLION, (10 if bench.quick else 100) * MILLION)
    home = bench.fresh("day")
    for size in sizes:
        made = lakes.raw_of(Traffic(size), bench.cache, bench.say)
        (home / str(size)).mkdir()
        lakes.copy_of(made, home / str(size))
    bench.say("drains into days of all sizes, by turns")
    places = [home / str(size) / "lake" for size in sizes]
    with server.borrowed(settings_in(home)):
        found = measured(small_drains, home, 3 * bench.repeats, *places).found
    times = {size: found[str(place)] for size, place in zip(sizes, places, strict=True)}
    lists = {size: one for size, one in times.items() if isinstance(one, list)}
    for size, one in lists.items():
        yield Row(f"drain of {_SMALL:,} into a day of {size:,} rows", "ms", one)
    slow = max(lists.values(), key=statistics.median)
    fast = min(lists.values(), key=statistics.median)
    yield Row("the largest of these against the smallest", "ms", slow, fast, 1.1, at_most=True)


def _single(bench: Bench) -> Iterator[Row | Study]:
    """One heartbeat per entry, and what an entry costs on both sides."""
    about = MILLION // (10 if bench.quick else 2)
    each: dict[str, list[tuple[float, ...]]] = {SINGLE: [], FLOOR: []}
    for run in range(bench.repeats):
        bench.say(f"drain, one heartbeat per entry, run {run + 1} of {bench.repeats}")
        with _filled(bench, about, entry_rows=1) as (home, rows):
            redis = connection.connect(settings_in(home))
            for name in (FLOOR, SINGLE):
                before = _server_cpu(redis)
                cost = _drained(home, rows) if name == SINGLE else _bare(home)
                spent = (cost.seconds, cost.cpu, _server_cpu(redis) - before)
                each[name].append(tuple(seconds / rows * 1e6 for seconds in spent))
            redis.close()
    yield Row(
        "drain, one heartbeat per entry, against a bare XREADGROUP",
        "heartbeats/s",
        [1e6 / clock for clock, *_ in each[SINGLE]],
        [1e6 / clock for clock, *_ in each[FLOOR]],
        0.75,
    )
    heads = ("one heartbeat per entry, us each", "by the clock", "reader's CPU", "Redis' CPU")
    yield Study(
        heads,
        [
            (name, *(f"{statistics.median(column):.1f}" for column in zip(*found, strict=True)))
            for name, found in each.items()
        ],
    )


def _bare(home: Path) -> Cost:
    return measured(backlogs.bare, home, 10_000)


def _server_cpu(redis: connection.Client) -> float:
    """Seconds of CPU time of the server so far."""
    found = redis.info("cpu")
    return float(found["used_cpu_user"]) + float(found["used_cpu_sys"])


@contextlib.contextmanager
def _filled(bench: Bench, rows: int, entry_rows: int = 500) -> Iterator[tuple[Path, int]]:
    """A home whose embedded server holds about so many heartbeats, and how many they are."""
    home = bench.fresh("drain")
    settings = settings_in(home)
    with server.borrowed(settings):
        yield home, backlogs.fill(settings, Traffic(rows).tables(), entry_rows)


def _drained(home: Path, rows: int) -> Cost:
    cost = measured(drained, home)
    if cost.number("rows") != rows:
        raise FailedMeasurementError(f"{cost.number('rows'):,.0f} of {rows:,} rows were drained")
    return cost
