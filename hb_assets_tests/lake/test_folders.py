"""Folders: looked at again only when they changed."""

from __future__ import annotations

import datetime as dt
import os
import time
from pathlib import Path

import pytest

from hb_assets.lake import folders as module
from hb_assets.lake import inventory, layout
from hb_assets.lake.folders import Folders
from hb_assets.lake.store import Lake
from hb_assets.settings import Settings
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
    original = module._changed_ns
    monkeypatch.setattr(module, "_changed_ns", lambda one: stats.append(one) or original(one))

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
