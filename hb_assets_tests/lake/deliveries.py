"""Entries for tests of the lake as a buffer hands them out, without a buffer."""

from __future__ import annotations

import datetime as dt
import json
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, NamedTuple

import pyarrow as pa
import pyarrow.parquet as pq

from hb_assets.core import days
from hb_assets.core.schema import ARRIVAL
from hb_assets.core.settings import Settings
from hb_assets.lake.files import fragments, quarantine
from hb_assets.lake.files.fragments import Fragment
from hb_assets.lake.ingest.decode import decode
from hb_assets.lake.query import series
from hb_assets.lake.query.series import Query
from hb_assets.lake.storage import layout
from hb_assets.lake.storage.store import Lake

DAY = dt.date(2025, 1, 15)
NOON = days.start_ms(DAY) + 12 * 3_600_000
Row = tuple[str, str, int, int, tuple[int, ...]]
"""user_id, device_id, timestamp (epoch ms), heart_rate, identity."""


@dataclass(frozen=True, slots=True)
class Delivered:
    """An entry. Ids count from the end of DAY, so that any instant of it lies in the past."""

    shard: int = 0
    ms: int = days.end_ms(DAY)
    seq: int = 0
    data: bytes | None = None
    deliveries: int = 1
    own: int | None = None


def line(
    user: object = "u1", device: object = "device_a", at: object = NOON, bpm: object = 75
) -> bytes:
    time = "timestamp" if isinstance(at, str) else "timestamp_ms"
    fields = {"user_id": user, "device_id": device, time: at, "heart_rate": bpm}
    return json.dumps(fields).encode()


def entry(
    lines: Iterable[bytes], seq: int = 0, *, shard: int = 0, ms: int = days.end_ms(DAY)
) -> Delivered:
    return Delivered(shard, ms, seq, b"\n".join(lines))


def deliver(lake: Lake, settings: Settings, *entries: Delivered) -> list[Fragment]:
    """What a drain does with a batch, short of acknowledging it."""
    decoded = decode(entries, settings)
    published = fragments.publish(lake, decoded.rows)
    quarantine.publish(lake, decoded.rejected)
    return published


def row(fields: dict[str, Any]) -> Row:
    identity = tuple(fields[name] for name in ARRIVAL)
    at = days.ms_of(fields["timestamp"])
    return fields["user_id"], fields["device_id"], at, fields["heart_rate"], identity


def rows_of(path: Path) -> list[Row]:
    return [row(fields) for fields in pq.read_table(path, partitioning=None).to_pylist()]


def consolidated(lake: Lake, day: dt.date = DAY) -> list[Row]:
    """Rows of all consolidated files of a day, as they stand there, shard by shard."""
    found: list[Row] = []
    for shard in range(lake.shards):
        path = layout.consolidated_file(lake.root, day, shard)
        if path.exists():
            found += rows_of(path)
    return found


def raw(lake: Lake, day: dt.date = DAY) -> list[Row]:
    return [row for one in fragments.all_listed(lake, day) for row in rows_of(one.path)]


def survivors(rows: Sequence[Row]) -> dict[tuple[str, str, int], Row]:
    """The model: of each key the latest arrival."""
    found: dict[tuple[str, str, int], Row] = {}
    for one in sorted(rows, key=lambda row: row[4]):
        found[one[:3]] = one
    return found


class Point(NamedTuple):
    """Start of the bucket (epoch ms), mean heart rate, device."""

    start_ms: int
    heart_rate: int
    device_id: str


def points_of(points: pa.Table) -> list[Point]:
    starts = points["timestamp"].cast(pa.int64()).to_pylist()
    names = points["device_id"].to_pylist()
    return list(map(Point, starts, points["heart_rate"].to_pylist(), names))


def minute_points(
    lake: Lake, user: str, start_ms: int, end_ms: int, device: str | None, settings: Settings
) -> list[Point]:
    """Every point of a query at the default granularity."""
    asked = Query(user, start_ms, end_ms, device)
    return points_of(series.answer(lake, asked, settings).points)


def left_behind(root: Path) -> list[Path]:
    """Temp files."""
    return [path for path in root.rglob(f"{layout.TEMP}/*") if path.is_file()]


def spoil_for_good(lake: Lake, path: Path) -> None:
    """Damage a consolidated file that can't be made anew: raw, it is said, was pruned."""
    path.write_bytes(b"PAR1 no more")
    mark = lake.root / layout.PRUNED / path.parent.relative_to(lake.root / layout.HEARTBEATS)
    mark.mkdir(parents=True)
    (mark / "pruned.json").write_bytes(b"{}")
