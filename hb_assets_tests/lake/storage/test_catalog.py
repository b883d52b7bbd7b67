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
from hb_assets.lake.storage import catalog, layout
from hb_assets.lake.storage.catalog import Folders
from hb_assets.lake.storage.durable_files import Fingerprint, fingerprint
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

    def found(lake: Lake, day: dt.date) -> str:
        looks.append(day)
        return inventory.raw_digest(lake, day)

    def remembered() -> str:
        return folders.remembered(lake, DAY, (layout.RAW,), found)

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
    original = catalog._look
    monkeypatch.setattr(catalog, "_look", lambda one: stats.append(one) or original(one))

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


def test_what_is_remembered_is_made_again_when_the_file_looks_changed(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(catalog, "SETTLED_NS", 0)
    (path := tmp_path / "file").write_bytes(b"one")

    @catalog.remembered(1)
    def made(path: Path, _seen: Fingerprint, more: str) -> bytes:
        asked.append(path)
        return path.read_bytes() + more.encode()

    asked: list[Path] = []
    for _ in range(2):
        assert made(path, fingerprint(path), "!") == b"one!"
    assert len(asked) == 1
    path.write_bytes(b"other")
    assert made(path, fingerprint(path), "!") == b"other!"
    assert made(path, fingerprint(path), "?") == b"other?", "what else it is made of counts as well"
    assert len(asked) == 3
    made(path, fingerprint(path), "!")
    assert len(asked) == 4, "it keeps as many as it may"


def test_nothing_is_kept_of_a_file_that_was_changed_just_now(tmp_path: Path) -> None:
    """Another change may have the same time."""
    (path := tmp_path / "file").write_bytes(b"one")

    @catalog.remembered(10)
    def made(path: Path, _seen: Fingerprint) -> None:
        asked.append(path)

    asked: list[Path] = []
    for _ in range(2):
        made(path, fingerprint(path))
    assert len(asked) == 2


def test_a_list_of_fragments_is_remembered_until_there_is_another(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Even one that comes in the same tick of the file system's clock as the one before it."""
    now = 100.0
    monkeypatch.setattr(catalog.time, "monotonic", lambda: now)
    scans = []
    scan = os.scandir
    monkeypatch.setattr(catalog.os, "scandir", lambda folder: scans.append(folder) or scan(folder))
    folder = tmp_path / "shard=00"
    assert catalog.names(folder) == frozenset()
    folder.mkdir()
    (folder / "a").touch()
    then = folder.stat()
    assert catalog.names(folder) == {"a"}
    (folder / "b").touch()
    os.utime(folder, ns=(then.st_atime_ns, then.st_mtime_ns))
    assert catalog.names(folder) == {"a", "b"}
    now += 2
    assert catalog.names(folder) == {"a", "b"}
    assert len(scans) == 3
    now += 2
    assert catalog.names(folder) == {"a", "b"}
    assert len(scans) == 3
    (folder / "c").touch()
    assert catalog.names(folder) == {"a", "b", "c"}
