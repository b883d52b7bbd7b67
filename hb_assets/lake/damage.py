"""Damage: files that aren't what was written, set aside under `damaged/`, out of everybody's way.

Belongs here: when a damaged file may be moved, and which were. Doesn't belong here: noticing that
one is damaged (`parquet.verify`, `fragments.verify`), and making it anew (`consolidation`).

Nothing is deleted: a file that is set aside keeps its place's name under `damaged/`, so that it can
be mended by hand and put back.
"""

from __future__ import annotations

from pathlib import Path

from hb_assets.errors import DamagedFileError
from hb_assets.lake import layout
from hb_assets.lake.files import make_folder, sync_folder
from hb_assets.lake.layout import DAMAGED, HEARTBEATS, RAW, FragmentName
from hb_assets.lake.store import Lake


def set_aside(lake: Lake, error: DamagedFileError) -> str | None:
    """Move a damaged file away, when its place is better empty; one line about it.

    A fragment always may: its rows can't be read anyway, and those of its neighbours are waiting
    behind it. A consolidated file may as long as no fragment that it included was pruned: raw has
    all of it then, and readers go on with raw. None where the file has to stay.

    Raises:
        OSError: it can't be moved.
    """
    path = error.path
    if path is None or not path.is_relative_to(lake.root):
        return None
    where = path.relative_to(lake.root)
    kind = where.parts[0]
    if kind == HEARTBEATS and not _raw_is_whole(lake, path):
        return None
    if kind not in (RAW, HEARTBEATS):
        return None
    target = layout.set_aside(lake.root, where)
    make_folder(target.parent, lake.root)
    try:
        path.rename(target)
    except FileNotFoundError:
        return f"{path} was damaged; another process has moved it away"
    sync_folder(target.parent)
    sync_folder(path.parent)
    rescue = (
        "its rows are missing until a whole copy is put in its place"
        if kind == RAW
        else "it is made anew from raw fragments"
    )
    return f"{path} was damaged and is now {target}: {rescue}"


def _raw_is_whole(lake: Lake, path: Path) -> bool:
    day, shard = path.parent.parent.name, path.parent.name
    return not (lake.root / layout.PRUNED / day / shard / "pruned.json").exists()


def listed(lake: Lake) -> list[str]:
    """One line for each file that was set aside and is missed: what it is, and what to do.

    A consolidated file is missed by nobody once it was made anew.
    """
    folder = lake.root / DAMAGED
    return [
        f"{path} is a damaged fragment that was set aside: put a whole copy of it in "
        f"{lake.root / RAW / path.parent.relative_to(folder / RAW)}, or remove it if its rows are "
        "given up"
        for path in sorted((folder / RAW).rglob("*.parquet"))
        if FragmentName.parse(path.name) is not None
    ]
