"""Questions: against a model in Python, in pages, and without reading what isn't asked for."""

from __future__ import annotations

import datetime as dt
from collections import defaultdict
from collections.abc import Iterator, Sequence
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any

import pyarrow as pa
import pyarrow.compute as pc
import pyarrow.parquet as pq
import pytest
from hypothesis import given
from hypothesis import settings as example_settings
from hypothesis import strategies as st

from hb_assets.core import days
from hb_assets.core.record import shard_of
from hb_assets.core.settings import Settings
from hb_assets.lake import inventory
from hb_assets.lake.compaction.consolidation import consolidate
from hb_assets.lake.files import consolidated, fragments, tombstones
from hb_assets.lake.ingest.decode import decode
from hb_assets.lake.query import series, user_scan
from hb_assets.lake.query.aggregate import GRANULARITIES
from hb_assets.lake.query.series import Query
from hb_assets.lake.storage import catalog, layout, parquet
from hb_assets.lake.storage.store import Lake
from hb_assets_tests.lake.deliveries import (
    DAY,
    NOON,
    Point,
    deliver,
    entry,
    line,
    points_of,
    rows_of,
)

MIDNIGHT = days.start_ms(DAY)
NEXT = DAY + dt.timedelta(days=1)
ARRIVED = days.end_ms(NEXT)
DEVICES = ("device_b", "device_a", "aa")
Came = tuple[str, str, int, int]
"""user_id, device_id, timestamp (epoch ms), heart_rate; their order is that of arrival."""


def model(came: Sequence[Came], query: Query, priority: tuple[str, ...]) -> list[Point]:
    """What a query about everything that came has to be answered with."""
    latest = {one[:3]: one[3] for one in came if one[0] == query.user_id}
    by_instant: dict[int, dict[str, int]] = defaultdict(dict)
    for (_, device, at), bpm in latest.items():
        by_instant[at][device] = bpm

    def rank(device: str) -> tuple[int, str]:
        return (priority.index(device) if device in priority else len(priority), device)

    cells: dict[tuple[int, str], list[int]] = defaultdict(list)
    first, last = query.whole_buckets()
    for at, readings in by_instant.items():
        kept = min(readings, key=rank) if query.device_id is None else query.device_id
        if first <= at < last and kept in readings:
            cells[at // query.size_ms * query.size_ms, kept].append(readings[kept])
    return [
        Point(start, int(sum(values) / len(values) + 0.5), device)
        for (start, device), values in sorted(cells.items())
    ]


def pages(
    lake: Lake, query: Query, settings: Settings, buffered: pa.Table | None
) -> Iterator[list[Point]]:
    start: int | None = query.start_ms
    while start is not None:
        asked = Query(
            query.user_id,
            start,
            query.end_ms,
            query.device_id,
            query.granularity,
            query.limit,
        )
        page = series.answer(lake, asked, settings, buffered)
        yield points_of(page.points)
        assert page.next_ms is None or page.next_ms > start
        start = page.next_ms


instants = st.builds(
    lambda base, off: base + off,
    st.sampled_from([MIDNIGHT, MIDNIGHT + 3_600_000, days.end_ms(DAY)]),
    st.sampled_from([-60_000, -1, 0, 1, 999, 1000, 59_999, 60_000, 300_000]),
)
readings = st.tuples(
    st.sampled_from(["u1", "u1", "u2"]),
    st.sampled_from(DEVICES),
    instants,
    st.integers(60, 63),
)
PLACES = ("consolidated", "pending", "buffered")


@given(
    st.lists(st.lists(readings, min_size=1, max_size=8), min_size=1, max_size=5),
    st.lists(st.sampled_from(PLACES), min_size=5, max_size=5).map(
        lambda found: sorted(found, key=PLACES.index)
    ),
    st.permutations(DEVICES).map(lambda found: tuple(found[:2])),
    st.sampled_from(list(GRANULARITIES)),
    st.tuples(instants, st.integers(1, 2 * days.MS_PER_DAY)),
    st.sampled_from([None, *DEVICES]),
    st.integers(1, 4),
)
@example_settings(max_examples=15)
def test_wherever_readings_lie_the_answer_is_the_same(
    batches: list[list[Came]],
    places: list[str],
    priority: tuple[str, ...],
    granularity: str,
    span: tuple[int, int],
    device: str | None,
    limit: int,
) -> None:
    with TemporaryDirectory() as home:
        settings = Settings(home=Path(home), shards=1, duckdb_threads=1, device_priority=priority)
        lake = Lake.open(settings)
        entries = [
            entry([line(*reading) for reading in batch], seq, ms=ARRIVED)
            for seq, batch in enumerate(batches)
        ]
        decoded = decode(entries, settings).rows

        def lying_in(place: str) -> list[pa.Table]:
            return [
                decoded.filter(pc.equal(decoded["arrival_seq"], seq))
                for seq, _ in enumerate(batches)
                if places[seq] == place
            ]

        for part in lying_in("consolidated"):
            fragments.publish(lake, part)
        for day in inventory.days(lake):
            consolidate(lake, day, settings)
        for part in lying_in("pending"):
            fragments.publish(lake, part)
        buffered = lying_in("buffered")
        held = pa.concat_tables(buffered) if buffered else None
        asked = Query("u1", span[0], span[0] + span[1], device, granularity)
        came = [reading for batch in batches for reading in batch]
        expected = model(came, asked, priority)
        found = series.answer(lake, asked, settings, held)
        assert points_of(found.points) == expected
        assert found.next_ms is None
        limited = Query("u1", span[0], span[0] + span[1], device, granularity, limit)
        in_pages = list(pages(lake, limited, settings, held))
        assert [point for page in in_pages for point in page] == expected
        for page in in_pages:
            assert len(page) <= limit or len({point.start_ms for point in page}) == 1


def test_a_page_ends_with_a_whole_bucket(lake: Lake, settings: Settings) -> None:
    lines = [line(device=f"d{n}", at=NOON + n + 60_000 * (n // 3)) for n in range(6)]
    deliver(lake, settings, entry(lines))
    sizes = [
        [
            len(page)
            for page in pages(lake, Query("u1", NOON, NOON + 180_000, limit=n), settings, None)
        ]
        for n in (2, 3, 4, 5, 6)
    ]
    assert sizes == [[3, 3], [3, 3], [3, 3], [3, 3], [6]]


def test_what_waits_in_the_buffer_of_a_forgotten_user(lake: Lake, settings: Settings) -> None:
    held = decode([entry([line(bpm=60)], 0), entry([line(at=NOON + 1, bpm=70)], 1)], settings).rows
    forgotten = tombstones.Tombstone(
        user=tombstones.hashed(lake, "u1"),
        shard=shard_of("u1", lake.shards),
        cutoffs={0: (days.end_ms(DAY), 0)},
        asked_ms=0,
    )
    tombstones.put(lake, forgotten)
    found = series.answer(lake, Query("u1", NOON, NOON + 1), settings, held)
    assert points_of(found.points) == [Point(NOON, 70, "device_a")]


# -- the cost


@pytest.mark.parametrize("first", ["consolidated", "pending"])
def test_a_correction_that_is_pending_is_answered(
    lake: Lake, settings: Settings, first: str
) -> None:
    deliver(lake, settings, entry([line(bpm=60), line(at=NOON + 60_000)], 0))
    if first == "consolidated":
        consolidate(lake, DAY, settings)
    deliver(lake, settings, entry([line(bpm=90)], 1))
    found = series.answer(lake, Query("u1", NOON, NOON + 1), settings)
    assert points_of(found.points) == [Point(NOON, 90, "device_a")]


def test_of_two_devices_at_one_instant_the_trusted_one_is_answered(
    lake: Lake, settings: Settings
) -> None:
    lines = [line(device=name, bpm=bpm) for name, bpm in (("device_b", 60), ("device_a", 70))]
    deliver(lake, settings, entry(lines, 0))
    found = series.answer(lake, Query("u1", NOON, NOON + 1), settings)
    assert points_of(found.points) == [Point(NOON, 70, "device_a")]


class Reads:
    """Files that were verified whole, files of which rows were read, and row groups."""

    def __init__(self, patch: pytest.MonkeyPatch) -> None:
        self.verified: list[Path] = []
        self.files: list[Path] = []
        self.groups = 0
        verify, read_group, open_file = (
            parquet.verify_open,
            pq.ParquetFile.read_row_group,
            pa.OSFile,
        )

        def counted_verify(file: Any, path: Path) -> Any:
            self.verified.append(path)
            return verify(file, path)

        def counted_group(file: Any, *arguments: Any, **named: Any) -> pa.Table:
            self.groups += 1
            return read_group(file, *arguments, **named)

        def counted_file(path: str) -> Any:
            self.files.append(Path(path))
            return open_file(path)

        patch.setattr(parquet, "verify_open", counted_verify)
        patch.setattr(catalog, "SETTLED_NS", 0)
        patch.setattr(pq.ParquetFile, "read_row_group", counted_group)
        patch.setattr(user_scan.pa, "OSFile", counted_file)

    def taken(self) -> tuple[int, int, int]:
        """How many of each since the last time."""
        found = len(self.verified), len(self.files), self.groups
        self.verified, self.files, self.groups = [], [], 0
        return found


def test_only_what_is_asked_for_is_read(
    lake: Lake, settings: Settings, monkeypatch: pytest.MonkeyPatch
) -> None:
    """However many users, days and hours there are: one minute is in one row group.

    Up to three more may hold it by what their footers say: those that two users share.
    """
    monkeypatch.setattr(parquet, "ROW_GROUP", 30)
    hour = 3_600_000
    users = [f"u{n}" for n in range(16)]
    lines = [
        line(user, at=day + h * hour + s * 1000)
        for user in users
        for day in (MIDNIGHT, days.end_ms(DAY))
        for h in range(24)
        for s in range(5)
    ]
    deliver(lake, settings, entry(lines, ms=ARRIVED))
    for day in (DAY, NEXT):
        consolidate(lake, day, settings)
    for seq, h in enumerate((1, 2, 3), 1):  # pending, each of another hour
        lines = [line(user, at=MIDNIGHT + h * hour + 30_000, bpm=80) for user in users]
        deliver(lake, settings, entry(lines, seq, ms=ARRIVED))
    shard = shard_of("u1", lake.shards)
    path = layout.consolidated_file(lake.root, DAY, shard)
    assert pq.read_metadata(path).num_row_groups > 12

    def ask(start: int, end: int, user: str = "u1") -> int:
        found = series.answer(lake, Query(user, start, end, granularity="1s"), settings)
        return found.points.num_rows

    reads = Reads(monkeypatch)
    # the day's file and its pending fragments are verified once; rows are read of the file alone
    assert ask(MIDNIGHT + 10 * hour, MIDNIGHT + 10 * hour + 60_000) == 5
    whole, files, groups = reads.taken()
    assert (whole, files) == (4, 1)
    assert groups <= 4
    assert ask(MIDNIGHT + 20 * hour, MIDNIGHT + 20 * hour + 60_000) == 5
    whole, files, groups = reads.taken()
    assert (whole, files) == (0, 1)
    assert groups <= 4
    # and of the one fragment that has rows of the time
    assert ask(MIDNIGHT + 2 * hour, MIDNIGHT + 2 * hour + 60_000) == 6
    whole, files, groups = reads.taken()
    assert (whole, files) == (0, 2)
    assert groups <= 5
    stranger = next(f"x{n}" for n in range(99) if shard_of(f"x{n}", lake.shards) == shard)
    assert ask(MIDNIGHT, days.end_ms(DAY), stranger) == 0
    assert reads.taken() == (0, 0, 0)


def test_a_file_replaced_between_footer_and_rows_is_noticed(
    lake: Lake, settings: Settings, monkeypatch: pytest.MonkeyPatch
) -> None:
    deliver(lake, settings, entry([line(bpm=60)], 0))
    consolidate(lake, DAY, settings)
    original = user_scan._read
    editions = []

    def overtaken(*arguments: Any, **named: Any) -> Any:
        if not editions:
            deliver(lake, settings, entry([line(at=NOON + n, bpm=70) for n in (1, 2)], 1))
            consolidate(lake, DAY, settings)
        editions.append(named.get("edition"))
        return original(*arguments, **named)

    monkeypatch.setattr(user_scan, "_read", overtaken)
    found = series.answer(lake, Query("u1", NOON, NOON + 1), settings)
    assert points_of(found.points) == [Point(NOON, 67, "device_a")]
    assert len(editions) == 2
    [row] = {len(rows_of(path)) for path in lake.root.glob("heartbeats/*/*/*")}
    assert row == 3
    assert consolidated.current(lake, DAY, shard_of("u1", lake.shards)) is not None
