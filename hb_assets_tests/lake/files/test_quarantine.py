"""The quarantine: each record once, with its bytes, and marked when it was put back."""

from __future__ import annotations

import datetime as dt
import time
from collections.abc import Generator

import pytest

from hb_assets.core import days
from hb_assets.core.errors import DamagedFileError
from hb_assets.core.record import Arrival
from hb_assets.core.settings import Settings
from hb_assets.lake.files import quarantine
from hb_assets.lake.files.quarantine import Choice
from hb_assets.lake.ingest.decode import decode
from hb_assets.lake.storage import layout
from hb_assets.lake.storage.layout import QUARANTINE
from hb_assets.lake.storage.store import Lake
from hb_assets_tests.lake.deliveries import DAY, Delivered, deliver, entry, line

MS = days.end_ms(DAY)


def test_a_record_comes_back_as_it_was(lake: Lake, settings: Settings) -> None:
    before = time.time_ns() // 1_000_000
    deliver(lake, settings, Delivered(3, MS, 7, line() + b"\n\xff\x00 bad", deliveries=2))
    [record] = quarantine.records(lake, settings)
    assert record.raw == b"\xff\x00 bad"
    assert record.arrival == Arrival(MS, 7, 3, 1)
    assert (record.reason, record.attempts, record.released) == ("record_not_json", 2, False)
    assert before <= record.quarantined_at <= time.time_ns() // 1_000_000
    assert record.id == f"03-{MS}-7-1"


@pytest.mark.parametrize("now_ms", [1_736_935_200_123, 1_736_935_200_999, 1_736_935_200_001])
def test_time_to_the_millisecond(
    lake: Lake, settings: Settings, now_ms: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(time, "time_ns", lambda: now_ms * 1_000_000)
    deliver(lake, settings, entry([b"bad"]))
    assert [one.quarantined_at for one in quarantine.records(lake, settings)] == [now_ms]


def test_filed_by_arrival_date_and_source(lake: Lake, settings: Settings) -> None:
    midnight = MS + days.MS_PER_DAY
    published = quarantine.publish(
        lake,
        decode(
            [
                entry([b"bad"], shard=shard, ms=ms)
                for shard in (0, 1)
                for ms in (midnight - 1, midnight)
            ],
            settings,
        ).rejected,
    )
    assert len(published) == 4
    first = DAY + dt.timedelta(days=1)
    assert layout.days_of(lake.root, QUARANTINE) == [first, first + dt.timedelta(days=1)]
    assert quarantine.publish(lake, decode([], settings).rejected) == []


def test_each_identity_once(lake: Lake, settings: Settings) -> None:
    for _ in range(3):
        deliver(lake, settings, entry([b"bad", line(bpm=5)]))
    assert len(list(quarantine.records(lake, settings))) == 2
    assert quarantine.summary(lake, settings).reasons == {
        "record_not_json": 1,
        "heart_rate_out_of_range": 1,
    }
    assert [
        one.raw for one in quarantine.records(lake, settings, Choice(reason="record_not_json"))
    ] == [b"bad"]
    assert list(quarantine.records(lake, settings, Choice(reason="other"))) == []


@pytest.mark.parametrize("batch", [1, 100])
def test_whoever_wants_no_more_leaves_the_engine_as_it_was(
    lake: Lake, settings: Settings, monkeypatch: pytest.MonkeyPatch, batch: int
) -> None:
    monkeypatch.setattr(quarantine, "_BATCH", batch)
    deliver(lake, settings, entry([b"bad"] * 5000))
    for _ in range(3):
        found = quarantine.records(lake, settings)
        assert isinstance(found, Generator)
        next(found)
        found.close()
    assert len(list(quarantine.records(lake, settings, limit=7))) == 7


def test_released(lake: Lake, settings: Settings) -> None:
    deliver(lake, settings, entry([b"one", b"two"]))
    first, _ = quarantine.records(lake, settings)
    assert quarantine.release(lake, []) is None
    quarantine.release(lake, [first])
    quarantine.release(lake, [first])
    deliver(lake, settings, entry([b"one", b"two"]))
    assert {one.raw: one.released for one in quarantine.records(lake, settings)} == {
        b"one": True,
        b"two": False,
    }
    assert quarantine.summary(lake, settings).released == 1


def test_damaged(lake: Lake, settings: Settings) -> None:
    deliver(lake, settings, entry([b"secret"]))
    [path] = (lake.root / QUARANTINE).rglob("*.parquet")
    path.write_bytes(path.read_bytes()[:40])
    with pytest.raises(DamagedFileError) as raised:
        list(quarantine.records(lake, settings))
    assert str(path) in str(raised.value)
    assert "secret" not in str(raised.value)
