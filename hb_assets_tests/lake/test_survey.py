"""The survey: sums over all days, that cost nothing where nothing changed."""

from __future__ import annotations

import datetime as dt
import os
import time
from pathlib import Path

import pytest

from hb_assets.core.settings import Settings
from hb_assets.lake import survey
from hb_assets.lake.compaction.consolidation import consolidate
from hb_assets.lake.storage import layout
from hb_assets.lake.storage.store import Lake
from hb_assets.lake.survey import Survey, Surveyor
from hb_assets_tests.lake.deliveries import DAY, NOON, deliver, entry, line

DAY_MS = 86_400_000


def settle(root: Path, seconds: float = 3600) -> None:
    """Make every change old enough to be trusted."""
    before = time.time() - seconds
    for path in root.rglob("*"):
        os.utime(path, (before, before))


def test_sums(lake: Lake, settings: Settings) -> None:
    surveyor = Surveyor(lake, settings)
    assert surveyor.survey() == Survey()
    deliver(lake, settings, entry([line(), line(), line(bpm=80)], 0))
    consolidate(lake, DAY, settings)
    deliver(lake, settings, entry([line(at=NOON + 1)], 1))
    consolidate(lake, DAY, settings)
    deliver(lake, settings, entry([line(at=NOON - DAY_MS)], 2))
    found = surveyor.survey()
    assert (found.days, found.fragments, found.pending_fragments) == (2, 3, 1)
    assert 100 < found.pending_bytes < 10_000
    assert (found.rows, found.unique, found.repeats, found.corrections) == (4, 2, 1, 1)
    assert (found.rows_written, found.write_amplification) == (3, 0.75)
    assert found.overdue is None


def test_only_days_that_changed_are_read_again(
    lake: Lake, settings: Settings, monkeypatch: pytest.MonkeyPatch
) -> None:
    read: list[str] = []
    real = survey._read

    def counted(lake: Lake, day: dt.date) -> survey._Day:
        read.append(str(day))
        return real(lake, day)

    monkeypatch.setattr(survey, "_read", counted)
    for days_back in range(5):
        deliver(lake, settings, entry([line(at=NOON - days_back * DAY_MS)], days_back))
    settle(lake.root, 60)
    surveyor = Surveyor(lake, settings)
    surveyor.survey()
    assert len(read) == 5
    read.clear()
    surveyor.survey()
    assert read == []
    deliver(lake, settings, entry([line(at=NOON + 1)], 9))
    assert surveyor.survey().fragments == 6
    assert read == [str(DAY)]


def test_what_is_overdue_and_what_is_damaged(lake: Lake, settings: Settings) -> None:
    deliver(lake, settings, entry([line()], 0))
    deliver(lake, settings, entry([line(at=NOON - DAY_MS)], 1))
    settle(lake.root)
    found = Surveyor(lake, settings).survey()
    assert found.overdue == DAY  # both are as late; the later day is named
    assert 2600 < found.overdue_seconds < 2900  # an hour, less HB_CONSOLIDATE_MAX_AGE
    consolidate(lake, DAY, settings)
    (file,) = (lake.root / layout.HEARTBEATS).rglob("*.parquet")
    file.write_bytes(b"no parquet")
    found = Surveyor(lake, settings).survey()
    assert found.days == 2
    assert [fault.path for fault in found.faults] == [file]


def test_a_file_that_is_changed_in_place_is_noticed(lake: Lake, settings: Settings) -> None:
    deliver(lake, settings, entry([line()]))
    consolidate(lake, DAY, settings)
    settle(lake.root, 60)
    surveyor = Surveyor(lake, settings)
    assert surveyor.survey().faults == surveyor.survey().faults == ()
    (file,) = (lake.root / layout.HEARTBEATS).rglob("*.parquet")
    with file.open("r+b") as opened:
        opened.seek(-1, os.SEEK_END)
        opened.write(b"X")
    found = surveyor.survey()
    assert (found.days, found.fragments) == (1, 1)
    [fault] = found.faults
    assert (fault.kind, fault.path) == ("damaged", file)
