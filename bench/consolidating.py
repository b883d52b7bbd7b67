"""Benchmarks of consolidation: speed, scale, late rows, write amplification, size.

The figures and their targets. The implementations that are compared are in `ways`, file layouts in
`layouts`, the data in `traffic` and `lakes`.
"""

from __future__ import annotations

import shutil
import statistics
from collections.abc import Callable, Iterator
from pathlib import Path

from bench import lakes, layouts, steady, ways
from bench.measure import Cost, FailedMeasurementError, Found, measured
from bench.run import MILLION, Bench
from bench.table import Row, Study, Ways
from bench.traffic import DAY, Traffic
from hb_assets.lake.files import fragments
from hb_assets.lake.storage.store import Lake

GIGABYTE = 2**30
OURS = "hb consolidate, checks and fsync included"
FLOOR = "floor: DuckDB copies the rows, no dedup, no sort"
OTHERS: dict[str, Callable[..., Found]] = {
    "DuckDB, one query with row_number()": ways.ranked,
    "DuckDB, one query with arg_max()": ways.grouped,
    "Polars, streaming group_by": ways.polars_streaming,
    "pandas, drop_duplicates": ways.pandas_in_memory,
    "delta-rs, four merges, not sorted": ways.delta_merge,
}


def consolidate(bench: Bench) -> Iterator[Row | Ways]:
    """A day anew: ours against the floor and against what others do, on the same fragments."""
    traffic = bench.traffic()
    lake = lakes.raw_of(traffic, bench.cache, bench.say)
    costs: dict[str, list[Cost]] = {name: [] for name in (OURS, *OTHERS, FLOOR)}
    for run in range(bench.repeats):
        for name, found in costs.items():
            bench.say(f"consolidating {bench.named()}, run {run + 1} of {bench.repeats}: {name}")
            if name == OURS:
                found.append(_ours(bench, lake, traffic))
            elif name == FLOOR:
                found.append(_other(bench, ways.copied, lake))
            elif run < bench.others:
                found.append(_other(bench, OTHERS[name], lake, traffic))
    beside = Ways(f"consolidate {bench.named()}", traffic.rows, costs)
    yield beside
    fastest = min(OTHERS, key=lambda name: beside.median(name, "seconds"))
    seconds = {name: [cost.seconds for cost in found] for name, found in costs.items()}
    what = f"consolidate {bench.named()}"
    yield Row(
        f"{what}, against the plain copy", "s", seconds[OURS], seconds[FLOOR], 2.5, at_most=True
    )
    yield Row(
        f"{what}, against the fastest alternative ({fastest.partition(',')[0]})",
        "s",
        seconds[OURS],
        seconds[fastest],
        1.0,
        at_most=True,
    )
    peaks = [cost.peak_mb for cost in costs[OURS]]
    yield Row("its peak memory", "MB", peaks, target=400, at_most=True)


def scale(bench: Bench) -> Iterator[Row | Study]:
    """Ten times as many rows under a memory limit, and late rows into that day."""
    small, large = bench.traffic(), bench.traffic(10)
    few = lakes.raw_of(small, bench.cache, bench.say)
    many = lakes.raw_of(large, bench.cache, bench.say)
    costs: dict[int, list[Cost]] = {small.rows: [], large.rows: []}
    for run in range(bench.repeats):
        bench.say(f"consolidating under 1 GB, run {run + 1} of {bench.repeats}")
        costs[small.rows].append(_ours(bench, few, small))
        if run < bench.large:
            home = bench.fresh("large")
            costs[large.rows].append(_ours(bench, many, large, home))
    each = {
        rows: [cost.seconds / rows * MILLION for cost in found] for rows, found in costs.items()
    }
    what = f"consolidate {bench.named(10)} under HB_DUCKDB_MEMORY=1GB"
    peaks = [cost.peak_mb for cost in costs[large.rows]]
    yield Row(f"{what}, peak memory", "MB", peaks, target=1536, at_most=True)
    yield Row(
        f"its time per million rows, against {bench.named()}",
        "s",
        each[large.rows],
        each[small.rows],
        1.3,
        at_most=True,
    )
    anew = [cost.seconds for cost in costs[large.rows]]
    rows = large.rows // 1000
    beside = {bench.named(): costs[small.rows], bench.named(10): costs[large.rows]}
    for where, shard, target in (("all shards", None, 0.5), ("one shard", 3, 0.1)):
        found = beside.setdefault(f"{rows:,} late rows, {where}", [])
        for run in range(bench.others):
            bench.say(f"late rows, {where}, run {run + 1} of {bench.others}")
            late = bench.fresh("late")
            lakes.copy_of(home / "lake", late)
            fragments.publish(Lake.open(ways.settings_in(late)), large.late(rows, shard))
            cost = measured(ways.ours, late, GIGABYTE)
            if cost.number("shards") != (large.shards if shard is None else 1):
                raise FailedMeasurementError(f"{cost.number('shards')} shards were written")
            found.append(cost)
        yield Row(
            f"{rows:,} late rows into that day, {where}, against consolidating it anew",
            "s",
            [cost.seconds for cost in found],
            anew,
            target,
            at_most=True,
        )
    shutil.rmtree(home)
    heads = ("consolidate under HB_DUCKDB_MEMORY=1GB", "seconds", "CPU s", "peak MB")
    yield Study(heads, [(name, *_medians(found)) for name, found in beside.items()])


def _medians(costs: list[Cost]) -> tuple[str, str, str]:
    """Seconds, CPU seconds and peak MB, as a study shows them."""
    seconds, cpu, peak = (
        statistics.median(cost.number(name) for cost in costs)
        for name in ("seconds", "cpu", "peak_mb")
    )
    return f"{seconds:.2f}", f"{cpu:.2f}", f"{peak:,.0f}"


def amplification(bench: Bench) -> Iterator[Row]:
    """Rows written for each row that comes in, over a day that is consolidated as it is due."""
    bench.say("a simulated day of steady traffic")
    cost = measured(steady.day, bench.fresh("steady"), bench.rows, 10)
    found, written = cost.number("consolidations"), cost.number("amplification")
    yield Row(
        f"rows written per row of a steady day, 10 users, {bench.named()}, {found:.0f} "
        "consolidations",
        "rows",
        [written],
        target=4,
        at_most=True,
    )


def size(bench: Bench) -> Iterator[Row | Study]:
    """The size of a consolidated file and the cost of a query, in several layouts."""
    traffic = bench.traffic()
    lake = lakes.raw_of(traffic, bench.cache, bench.say)
    home = bench.fresh("size")
    cost = _ours(bench, lake, traffic, home)
    floor = _other(bench, ways.copied, lake)
    lines = []
    for name in layouts.VARIANTS:
        bench.say(f"laid out anew: {name}")
        again = bench.fresh("layout")
        found = measured(layouts.asked, home / "lake", again, name)
        lines.append(
            (
                name,
                f"{found.number('bytes') / floor.number('bytes'):.2f}",
                f"{found.number('write_seconds'):.2f}",
                f"{found.number('hour_ms'):.2f}",
                f"{found.number('day_ms'):.2f}",
                f"{found.number('duckdb_hour_ms'):.1f}",
                f"{found.number('duckdb_scan_ms'):.0f}",
            )
        )
    shutil.rmtree(home)
    yield Row(
        "size of the consolidated files, against the floor's",
        "MB",
        [cost.number("bytes") / 1e6],
        [floor.number("bytes") / 1e6],
        0.8,
        at_most=True,
    )
    yield Study(
        (
            f"layout of {bench.named()} in {traffic.shards} files",
            "size / floor",
            "write, CPU s",
            "hour, ms",
            "day, ms",
            "hour by DuckDB, ms",
            "scan by DuckDB, ms",
        ),
        lines,
    )


def _ours(bench: Bench, lake: Path, traffic: Traffic, home: Path | None = None) -> Cost:
    """Consolidate a copy of the lake; the result stays in `home`, if there is one."""
    where = home or bench.fresh("ours")
    lakes.copy_of(lake, where)
    cost = measured(ways.ours, where, GIGABYTE)
    _require(ways.ours, cost, traffic)
    if home is None:
        shutil.rmtree(where)
    return cost


def _other(
    bench: Bench, way: Callable[..., Found], lake: Path, traffic: Traffic | None = None
) -> Cost:
    folder = bench.fresh("other")
    cost = measured(way, lake, folder)
    _require(way, cost, traffic)
    shutil.rmtree(folder)
    return cost


def _require(way: Callable[..., Found], cost: Cost, traffic: Traffic | None) -> None:
    """Verify that an implementation dropped all duplicates, and nothing else."""
    if traffic is not None and cost.number("rows") != traffic.unique:
        raise FailedMeasurementError(
            f"{way.__name__} left {cost.number('rows'):,.0f} rows of {traffic.unique:,} on {DAY}"
        )
