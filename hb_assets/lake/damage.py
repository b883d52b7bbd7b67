"""Damage: files that aren't what was written, set aside under `damaged/`, out of everybody's way.

Belongs here: when a damaged file may be moved, and which were. Doesn't belong here: noticing that
one is damaged (`parquet.verify`, `fragments.verify`), and making it anew (`consolidation`).

Nothing is deleted: a file that is set aside keeps its place's name under `damaged/`, so that it can
be mended by hand and put back.
"""

from __future__ import annotations

import datetime as dt
import logging
from pathlib import Path

from hb_assets.errors import DamagedFileError
from hb_assets.lake import layout, parquet
from hb_assets.lake.consolidated import current, mark_incomplete
from hb_assets.lake.files import make_folder, sync_folder
from hb_assets.lake.layout import DAMAGED, HEARTBEATS, RAW, FragmentName
from hb_assets.lake.store import Lake

_log = logging.getLogger(__name__)


def set_aside(lake: Lake, error: DamagedFileError) -> str | None:
    """Move a damaged file away, when its place is better empty; one line about it.

    A fragment always may: its rows can't be read anyway, and those of its neighbours are waiting
    behind it. A consolidated file may as long as every fragment that it includes is there: raw has
    all of it then, and readers go on with raw. None where the file has to stay, or is sound (what
    failed while it was read was something else).

    Raises:
        OSError: it can't be read or moved.
    """
    path = error.path
    if path is None or not path.is_relative_to(lake.root):
        return None
    where = path.relative_to(lake.root)
    kind, day = where.parts[0], layout.day_of_folder(path.parent.parent.name)
    shard = path.parent.name.removeprefix("shard=")
    if kind not in (RAW, HEARTBEATS) or day is None or not shard.isdigit() or _is_sound(path):
        return None
    if kind == HEARTBEATS:
        if layout.pruned_mark(lake.root, day, int(shard)).exists():
            return None
        rescue = "it is made anew from raw fragments"
    elif _is_included(lake, path, day, int(shard)):
        mark_incomplete(lake, day, int(shard))  # before it goes: a rebuild would lack its rows
        rescue = "its rows are in the consolidated file, which can't be made anew from raw any more"
    else:
        rescue = "its rows are missing until a whole copy is put in its place"
    target = layout.set_aside(lake.root, where)
    make_folder(target.parent, lake.root)
    try:
        path.rename(target)
    except FileNotFoundError:
        return f"{path} was damaged; another process has moved it away"
    sync_folder(target.parent)
    sync_folder(path.parent)
    said = f"{path} was damaged and is now {target}: {rescue}"
    _log.error("%s", said)
    return said


def _is_sound(path: Path) -> bool:
    try:
        parquet.verify(path)
    except FileNotFoundError:
        return False
    except DamagedFileError:
        return False
    return True


def _is_included(lake: Lake, path: Path, day: dt.date, shard: int) -> bool:
    name = FragmentName.parse(path.name)
    try:
        published = current(lake, day, shard)
    except DamagedFileError:
        return False
    return published is not None and name is not None and str(name) in published.names


def sources(lake: Lake, day: dt.date, shard: int) -> set[int]:
    """Source shards of a (day, shard)'s fragments that were set aside."""
    folder = layout.shard_folder(lake.root / DAMAGED, RAW, day, shard)
    names = (FragmentName.parse(path.name) for path in folder.glob("*.parquet"))
    return {name.source for name in names if name is not None}


def listed(lake: Lake) -> list[str]:
    """One line for each fragment that was set aside and whose rows are missed, and what to do.

    A consolidated file is missed by nobody once it was made anew.
    """
    folder = lake.root / DAMAGED / RAW
    return [
        f"{path} is a damaged fragment that was set aside: put a whole copy of it in "
        f"{lake.root / RAW / path.parent.relative_to(folder)}, or remove it if its rows are "
        "given up"
        for path in sorted(folder.rglob("*.parquet"))
        if _is_missed(lake, path)
    ]


def _is_missed(lake: Lake, path: Path) -> bool:
    name, day = FragmentName.parse(path.name), layout.day_of_folder(path.parent.parent.name)
    shard = path.parent.name.removeprefix("shard=")
    if name is None or day is None or not shard.isdigit():
        return False
    try:
        published = current(lake, day, int(shard))
    except DamagedFileError:
        return True
    return published is None or not published.note.includes(name)
