"""Folders: looked at again only when they changed."""

from __future__ import annotations

import datetime as dt
import os
import time
from pathlib import Path

import pytest

from hb_assets.core.settings import Settings
from hb_assets.lake import inventory, minutes
from hb_assets.lake.compaction.consolidation import consolidate
from hb_assets.lake.storage import folders as module
from hb_assets.lake.storage import layout
from hb_assets.lake.storage.folders import Folders
from hb_assets.lake.storage.store import Lake
from hb_assets_tests.lake.deliveries import DAY, deliver, entry, line


def settle(folder: Path, seconds: float = 10) -> None:
    """Make every change of the folder as old as it has to be to be trusted."""
    before = time.time() - seconds
    for path in folder.rglob("*"):
        os.utime(path, (before, before))


def test_a_day_that_did_not_change_is_not_listed_again(lake: Lake, settings: Settings) -> None:
    deliver(lake, settings, entry([line()]))
    folders, looks = Folders(), []

    def look(lake: Lake, day: dt.date) -> str:
        looks.append(day)
        return inventory.raw_digest(lake, day)

    def remembered() -> str:
        return folders.remembered(lake, DAY, (layout.RAW,), look)

    remembered()
    remembered()
    assert len(looks) == 2  # it changed just now: not to be trusted
    settle(lake.root)
    first = remembered()
    assert remembered() == first
    assert len(looks) == 3
    deliver(lake, settings, entry([line()], 1))
    assert remembered() != first


def test_a_quiet_day_is_looked_at_again_after_two_minutes_at_most(
    lake: Lake, settings: Settings, monkeypatch: pytest.MonkeyPatch
) -> None:
    deliver(lake, settings, entry([line()]))
    settle(lake.root, 2 * 3600)
    folders, stats = Folders(), []
    original = module._look
    monkeypatch.setattr(module, "_look", lambda one: stats.append(one) or original(one))

    def remembered() -> str:
        return folders.remembered(lake, DAY, (layout.RAW,), inventory.raw_digest)

    first = remembered()
    remembered()
    stats.clear()
    deliver(lake, settings, entry([line()], 1))
    assert remembered() == first
    assert not stats
    later = time.monotonic() + 120
    monkeypatch.setattr(time, "monotonic", lambda: later)
    assert remembered() != first


@pytest.mark.parametrize("kind", [layout.HEARTBEATS, layout.MINUTES])
def test_a_file_that_is_changed_in_place_is_looked_at_again(
    lake: Lake, settings: Settings, kind: str
) -> None:
    """Its folder stays as it is."""
    deliver(lake, settings, entry([line()]))
    consolidate(lake, DAY, settings)
    minutes.build(lake, DAY, settings)
    settle(lake.root)
    folders, looks = Folders(), []

    def remembered() -> int:
        return folders.remembered(lake, DAY, (kind,), lambda *_: looks.append(1) or len(looks))

    assert (remembered(), remembered()) == (1, 1)
    (file,) = (lake.root / kind).rglob("*.parquet")
    before = file.stat()
    with file.open("r+b") as opened:
        opened.write(b"X")
    os.utime(file, ns=(before.st_atime_ns, before.st_mtime_ns))  # whoever hides it: ctime tells
    assert remembered() == 2
