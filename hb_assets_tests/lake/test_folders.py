"""Folders: looked at again only when they changed."""

from __future__ import annotations

import datetime as dt
import os
import time
from pathlib import Path

from hb_assets.lake import inventory, layout
from hb_assets.lake.folders import Folders
from hb_assets.lake.store import Lake
from hb_assets.settings import Settings
from hb_assets_tests.lake.deliveries import DAY, deliver, entry, line


def settle(folder: Path) -> None:
    """Make every change of the folder as old as it has to be to be trusted."""
    before = time.time() - 10
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
