"""Faults that stand: each is told as long as it is so, and hides no other."""

from __future__ import annotations

import datetime as dt
from pathlib import Path

import msgspec
import pyarrow.parquet as pq
import pytest

from hb_assets.core.errors import CheckFailedError, FencedError
from hb_assets.core.record import shard_of
from hb_assets.core.settings import Settings
from hb_assets.lake.compaction.consolidation import consolidate
from hb_assets.lake.files import consolidated, tombstones
from hb_assets.lake.files.consolidated import ConsolidatedMetadata
from hb_assets.lake.files.tombstones import Tombstone
from hb_assets.lake.integrity import damage, known_faults
from hb_assets.lake.integrity.known_faults import Fault
from hb_assets.lake.storage import layout, parquet
from hb_assets.lake.storage.store import Lake
from hb_assets_tests.lake.deliveries import DAY, NOON, deliver, entry, line, spoil_for_good


def published(lake: Lake) -> Path:
    return layout.consolidated_file(lake.root, DAY, shard_of("u1", lake.shards))


def kinds(lake: Lake) -> list[str]:
    return [fault.kind for fault in known_faults.faults(lake)]


def flip(path: Path, at: int) -> None:
    """One bit, in place; the file's time of change may not even tell."""
    with path.open("r+b") as file:
        file.seek(at)
        byte = file.read(1)[0]
        file.seek(at)
        file.write(bytes([byte ^ 1]))


def test_a_sound_lake_has_none(lake: Lake, settings: Settings) -> None:
    assert known_faults.faults(lake) == []
    deliver(lake, settings, entry([line(), line("u2")], 0))
    assert known_faults.faults(lake) == []
    consolidate(lake, DAY, settings)
    deliver(lake, settings, entry([line(at=NOON + 1)], 1))
    assert known_faults.faults(lake) == []


def test_a_fragment_cut_short_until_it_is_whole_again(lake: Lake, settings: Settings) -> None:
    [one] = deliver(lake, settings, entry([line()], 0))
    whole = one.path.read_bytes()
    assert kinds(lake) == []
    one.path.write_bytes(whole[:-1])
    [fault] = known_faults.faults(lake)
    assert (fault.kind, fault.day, fault.path) == ("damaged", DAY, one.path)
    assert str(lake.root) in fault.message
    assert str(lake.root) not in fault.summary
    assert "shard" in fault.summary
    damage.set_aside(lake, parquet.damaged(one.path, "cut short"), settings)
    [fault] = known_faults.faults(lake, [DAY])
    assert (fault.kind, fault.rows) == ("set_aside", None)
    assert known_faults.faults(lake, [DAY + dt.timedelta(days=1)]) == []
    one.path.write_bytes(whole)
    assert known_faults.faults(lake) == []


def test_rows_of_a_fragment_that_was_set_aside_by_its_footer(
    lake: Lake, settings: Settings
) -> None:
    [one] = deliver(lake, settings, entry([line(at=NOON + n) for n in range(3)], 0))
    flip(one.path, 10)
    consolidate(lake, DAY, settings)
    [fault] = known_faults.faults(lake)
    assert (fault.kind, fault.rows) == ("set_aside", 3)
    assert "3 heartbeats are missing" in fault.message


def test_each_file_and_shard_for_itself(lake: Lake, settings: Settings) -> None:
    users = {shard_of(f"u{n}", lake.shards): f"u{n}" for n in range(50)}
    sent = deliver(lake, settings, entry([line(user) for user in users.values()], 0))
    consolidate(lake, DAY, settings)
    pending = deliver(
        lake,
        settings,
        *(entry([line(users[0], at=NOON + n)], n) for n in range(1, 4)),
        entry([line(users[1], at=NOON + 9)], 9),
    )
    published = [layout.consolidated_file(lake.root, DAY, shard) for shard in range(4)]
    spoil_for_good(lake, published[2])
    published[3].unlink()
    consolidated.mark_incomplete(lake, DAY, 3)
    pending[0].path.write_bytes(b"PAR1")
    pending[-1].path.write_bytes(b"")
    assert [(one.kind, one.shard) for one in known_faults.faults(lake)] == [
        ("damaged", 0),
        ("damaged", 1),
        ("damaged", 2),
        ("missing", 3),
    ]
    assert len(sent) == 4


def test_a_footer_whose_counts_lie(lake: Lake, settings: Settings) -> None:
    """Its own checksum is right."""
    deliver(lake, settings, entry([line()], 0))
    consolidate(lake, DAY, settings)
    path = published(lake)
    metadata = parquet.metadata(path, ConsolidatedMetadata)
    rows = pq.read_table(path, partitioning=None)
    for changes in ({"rows": 2}, {"repeats": 1}, {"unique": 2, "rows": 2}):
        parquet.write(path, rows, msgspec.structs.replace(metadata, **changes))
        [fault] = known_faults.faults(lake)
        assert (fault.kind, fault.path) == ("not_adding_up", path)
    parquet.write(path, rows, metadata)
    assert known_faults.faults(lake) == []


def test_what_only_a_reader_could_notice(lake: Lake, settings: Settings) -> None:
    """It stands in every process until what lies there verifies."""
    deliver(lake, settings, entry([line()], 0))
    consolidate(lake, DAY, settings)
    path, shard = published(lake), shard_of("u1", lake.shards)
    whole = path.read_bytes()
    error = parquet.damaged(path, "a page isn't what was written")
    known_faults.notice(lake, error, day=DAY, shard=shard)
    assert known_faults.faults(lake) == [], "it was sound when it was looked at again"
    flip(path, 10)
    assert known_faults.faults(lake) == []
    known_faults.notice(lake, error, day=DAY, shard=shard)
    expected = [Fault("damaged", DAY, shard, None, path, str(error))]
    assert known_faults.faults(lake) == expected
    [before] = (lake.root / layout.FAULTS).rglob("*.json")
    changed = before.stat().st_mtime_ns
    known_faults.notice(lake, error, day=DAY, shard=shard)
    assert known_faults.faults(lake) == expected
    assert before.stat().st_mtime_ns == changed, "it isn't written again and again"
    path.touch()
    assert known_faults.faults(lake) == expected
    path.write_bytes(whole)
    assert known_faults.faults(lake) == []


def test_a_damaged_fragment_that_somebody_deletes_is_missing(
    lake: Lake, settings: Settings
) -> None:
    [one] = deliver(lake, settings, entry([line()], 0))
    whole = one.path.read_bytes()
    flip(one.path, 10)
    known_faults.notice(lake, parquet.damaged(one.path, "a page"), day=DAY, shard=1)
    one.path.unlink()
    assert kinds(lake) == ["missing"]
    one.path.write_bytes(whole)
    assert kinds(lake) == []


def test_a_failure_stands_until_a_consolidation_succeeds(lake: Lake, settings: Settings) -> None:
    deliver(lake, settings, entry([line()], 0))
    shard = shard_of("u1", lake.shards)
    known_faults.notice(lake, CheckFailedError("it failed its checks"), day=DAY, shard=shard)
    known_faults.notice(lake, OSError(28, "No space left on device", "x"), day=DAY, shard=shard)
    known_faults.notice(lake, FencedError("start again"), day=DAY, shard=shard)
    assert sorted(kinds(lake)) == ["check_failed", "consolidation_failed"]
    known_faults.resolved(lake, DAY, shard)
    assert kinds(lake) == []


def test_a_note_that_cannot_be_read_is_a_fault_itself(lake: Lake) -> None:
    known_faults.notice(lake, CheckFailedError("it failed"), day=DAY, shard=0)
    [path] = (lake.root / layout.FAULTS).rglob("*.json")
    path.write_bytes(b"{")
    assert kinds(lake) == ["damaged"]


def test_a_disk_that_takes_no_note_stops_nobody(
    lake: Lake, settings: Settings, monkeypatch: pytest.MonkeyPatch
) -> None:
    def full(*_: object) -> None:
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(known_faults, "TempFile", full)
    known_faults.notice(lake, CheckFailedError("it failed"), day=DAY, shard=0)
    assert kinds(lake) == []


def test_files_beside_the_days(lake: Lake, settings: Settings) -> None:
    deliver(lake, settings, entry([b"bad", line()], 0))
    tombstones.put(lake, Tombstone(user="00", shard=0, cutoffs={}, asked_ms=0))
    assert known_faults.faults(lake) == []
    [record] = (lake.root / layout.QUARANTINE).rglob("*.parquet")
    record.write_bytes(record.read_bytes()[:-1])
    [stone] = (lake.root / layout.TOMBSTONES).glob("*.json")
    flip(stone, 12)
    assert {(one.kind, one.day, one.path) for one in known_faults.faults(lake)} == {
        ("damaged", None, record),
        ("damaged", None, stone),
    }
