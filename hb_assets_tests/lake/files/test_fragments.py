"""Fragments: durable or not there, listed by name, counted by identity."""

from __future__ import annotations

import errno
import os
from pathlib import Path

import pytest
from hypothesis import given
from hypothesis import strategies as st

from hb_assets.core import days
from hb_assets.core.record import shard_of
from hb_assets.core.settings import Settings
from hb_assets.lake.files import fragments
from hb_assets.lake.files.fragments import Fragment, FragmentMetadata
from hb_assets.lake.ingest.decode import decode
from hb_assets.lake.storage import layout
from hb_assets.lake.storage.layout import RAW, FragmentName
from hb_assets.lake.storage.parquet import metadata
from hb_assets.lake.storage.store import Lake
from hb_assets_tests.lake.deliveries import DAY, NOON, deliver, entry, left_behind, line, raw


def test_published_is_listed_by_arrival(lake: Lake, settings: Settings) -> None:
    for seq in (10, 9, 2**64 - 1):
        deliver(lake, settings, entry([line()], seq))
    shard = shard_of("u1", lake.shards)
    listed = fragments.listed(lake, DAY, shard)
    assert [one.name.first[1] for one in listed] == [9, 10, 2**64 - 1]
    assert fragments.all_listed(lake, DAY) == listed
    assert fragments.listed(lake, DAY, (shard + 1) % lake.shards) == []
    assert metadata(listed[0].path, FragmentMetadata) == FragmentMetadata(1, "2025-01-15", shard, 0)
    assert listed[0].rows == 1
    assert listed[0].bytes == listed[0].path.stat().st_size


def test_other_files_are_not_listed(lake: Lake, settings: Settings) -> None:
    [fragment] = deliver(lake, settings, entry([line()]))
    (fragment.path.parent / "notes.txt").write_bytes(b"")
    assert fragments.all_listed(lake, DAY) == [fragment]


def test_the_same_batch_twice_is_two_fragments(lake: Lake, settings: Settings) -> None:
    """A name made of ids alone would let a replay overwrite what others rely on."""
    [one] = deliver(lake, settings, entry([line()]))
    [two] = deliver(lake, settings, entry([line()]))
    assert one.path != two.path
    assert fragments.distinct_rows([one, two], settings) == 1


def test_digest_is_of_the_set(lake: Lake, settings: Settings) -> None:
    empty = fragments.digest([])
    [one] = deliver(lake, settings, entry([line()], 0))
    [two] = deliver(lake, settings, entry([line()], 1))
    assert fragments.digest([one, two]) == fragments.digest([two, one])
    assert len({empty, fragments.digest([one]), fragments.digest([one, two])}) == 3


@pytest.mark.parametrize("number", [1, 2, 3])
def test_disk_that_is_full(
    lake: Lake, settings: Settings, monkeypatch: pytest.MonkeyPatch, number: int
) -> None:
    """The failing one raises; no half fragment is seen, no temp file stays."""
    fsync, calls = os.fsync, [0]

    def full(handle: int) -> None:
        calls[0] += 1
        if calls[0] > 2 * number:
            raise OSError(errno.ENOSPC, "No space left on device")
        fsync(handle)

    decoded = decode([entry([line(f"u{n}") for n in range(20)])], settings)
    monkeypatch.setattr(os, "fsync", full)
    with pytest.raises(OSError, match="No space left"):
        fragments.publish(lake, decoded.rows)
    monkeypatch.undo()
    assert left_behind(lake.root) == []
    fragments.publish(lake, decoded.rows)
    assert len({one[4] for one in raw(lake)}) == 20


def test_nothing_to_publish(lake: Lake, settings: Settings) -> None:
    assert fragments.publish(lake, decode([], settings).rows) == []


ranges = st.tuples(st.integers(0, 1), st.integers(0, 9), st.integers(0, 9))


@given(st.lists(ranges, max_size=8))
def test_overlapping_groups(found: list[tuple[int, int, int]]) -> None:
    """Fragments of different groups hold no common row; every fragment is in one group."""
    members = []
    for source, one, two in found:
        name = FragmentName.new(source, (min(one, two), 0), (max(one, two), 0))
        members.append(Fragment(name, layout.shard_folder(Path("/"), RAW, DAY, 0) / str(name)))
    groups = fragments.overlapping(members)
    assert sorted(one for group in groups for one in group) == sorted(members)
    for number, group in enumerate(groups):
        for other in groups[number + 1 :]:
            assert not any(a.name.overlaps(b.name) for a in group for b in other)


def test_rows_of_two_days_and_of_the_year_9999(lake: Lake, settings: Settings) -> None:
    far = days.LAST_MS
    deliver(lake, settings, entry([line(at=far), line(at=NOON)], ms=far))
    assert layout.days_of(lake.root, RAW) == [DAY, days.day_of(far)]
    assert len(raw(lake, days.day_of(far))) == 1
