"""Folders: looked at again only when they changed."""

from __future__ import annotations

import datetime as dt
import os
import time

from hb_assets.defs.folders import Folders
from hb_assets.lake import inventory, layout

DAY = dt.date(2025, 1, 15)


def settle(folder) -> None:
    """Make every change of the folder as old as it has to be to be trusted."""
    before = time.time() - 10
    for path in folder.rglob("*"):
        os.utime(path, (before, before))


def test_a_day_that_did_not_change_is_not_listed_again(append, ticks, installation) -> None:
    append(DAY.isoformat())
    ticks("drain").tick()
    lake, folders, looks = installation.lake(), Folders(), []

    def look(lake, day):
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
    append(DAY.isoformat())
    ticks("drain").tick()
    assert remembered() != first
