"""Durable files: whole or not there, never in the way of a reader, fenced when overtaken."""

from __future__ import annotations

import os
import stat
from pathlib import Path

import duckdb
import pandas as pd
import polars as pl
import pytest

from hb_assets.core.errors import FencedError
from hb_assets.lake.storage import durable_files, layout
from hb_assets.lake.storage.durable_files import TempFile, make_folder
from hb_assets_tests.lake.deliveries import left_behind

PARQUET = {"a": [1, 2]}


def seen(folder: Path) -> list[Path]:
    """What readers of the folder see; nothing may be left where temp files lie."""
    assert left_behind(folder) == []
    return [path for path in folder.iterdir() if path.name != layout.TEMP]


def test_publish_new(tmp_path: Path) -> None:
    final = tmp_path / "folder" / "final"
    with TempFile(tmp_path, final.parent) as temp:
        temp.path.write_bytes(b"new")
        assert not final.exists()
        temp.publish_new(final)
    assert final.read_bytes() == b"new"
    assert seen(final.parent) == [final]


def test_publish_new_refuses_a_taken_name(tmp_path: Path) -> None:
    final = tmp_path / "final"
    final.write_bytes(b"old")
    with TempFile(tmp_path, tmp_path) as temp:
        temp.path.write_bytes(b"new")
        with pytest.raises(FileExistsError):
            temp.publish_new(final)
    assert final.read_bytes() == b"old"
    assert seen(tmp_path) == [final]


@pytest.mark.parametrize("taken", [True, False])
def test_publish_new_without_hard_links(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, taken: bool
) -> None:
    def no_links(*_: object) -> None:
        raise PermissionError(1, "no hard links here")

    monkeypatch.setattr(os, "link", no_links)
    final = tmp_path / "final"
    if taken:
        final.write_bytes(b"old")
    with TempFile(tmp_path, tmp_path) as temp:
        temp.path.write_bytes(b"new")
        if taken:
            with pytest.raises(PermissionError):
                temp.publish_new(final)
        else:
            temp.publish_new(final)
    assert final.read_bytes() == (b"old" if taken else b"new")
    assert seen(tmp_path) == [final]


def test_publish_replacing(tmp_path: Path) -> None:
    final = tmp_path / "final"
    final.write_bytes(b"old")
    with TempFile(tmp_path, tmp_path) as temp:
        temp.path.write_bytes(b"new")
        temp.publish_replacing(final)
    assert final.read_bytes() == b"new"
    assert seen(tmp_path) == [final]


@pytest.mark.parametrize("publish", ["publish_new", "publish_replacing"])
@pytest.mark.parametrize("moment", ["before", "after the fsync"])
def test_fenced(tmp_path: Path, publish: str, moment: str, monkeypatch: pytest.MonkeyPatch) -> None:
    final = tmp_path / "final"
    if publish == "publish_replacing":
        final.write_bytes(b"old")
    before = seen(tmp_path)
    with TempFile(tmp_path, tmp_path) as temp:
        if moment == "before":
            temp.path.unlink()
        else:
            fsync = os.fsync

            def fsync_then_pruner(handle: int) -> None:
                fsync(handle)
                temp.path.unlink(missing_ok=True)

            monkeypatch.setattr(os, "fsync", fsync_then_pruner)
        with pytest.raises(FencedError, match="start again"):
            getattr(temp, publish)(final)
    assert seen(tmp_path) == before
    assert not before or final.read_bytes() == b"old"


def test_unlinked_after_an_error(tmp_path: Path) -> None:
    def write_half() -> None:
        with TempFile(tmp_path, tmp_path) as temp:
            temp.path.write_bytes(b"half")
            raise RuntimeError

    with pytest.raises(RuntimeError):
        write_half()
    assert seen(tmp_path) == []


@pytest.mark.parametrize("publish", ["publish_new", "publish_replacing"])
def test_order_of_system_calls(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, publish: str
) -> None:
    """The file is durable before it has its name, and the name before anyone acknowledges."""
    folder = tmp_path / "day" / "shard"
    calls: list[str] = []
    real = {name: getattr(os, name) for name in ("fsync", "link", "replace", "rename")}

    def fsync(handle: int) -> None:
        is_folder = stat.S_ISDIR(os.fstat(handle).st_mode)
        where = Path(f"/proc/self/fd/{handle}").readlink()
        calls.append(f"fsync {where.name if is_folder else 'file'}")
        real["fsync"](handle)

    def naming(name: str) -> object:
        def call(*arguments: object, **named: object) -> None:
            calls.append("name")
            real[name](*arguments, **named)

        return call

    monkeypatch.setattr(os, "fsync", fsync)
    for name in ("link", "replace", "rename"):
        monkeypatch.setattr(os, name, naming(name))
    with TempFile(tmp_path, folder) as temp:
        temp.path.write_bytes(b"content")
        getattr(temp, publish)(folder / "final")
    assert calls == [f"fsync {tmp_path.name}", "fsync day", "fsync file", "name", "fsync shard"]


def test_a_folder_of_somebody_else_is_synced_once(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Its maker may not have got so far: rows in it would be lost with it."""
    folder = tmp_path / "day"
    folder.mkdir()
    synced: list[Path] = []
    monkeypatch.setattr(durable_files, "sync_folder", synced.append)
    make_folder(folder, tmp_path)
    make_folder(folder, tmp_path)
    assert synced == [tmp_path]


def test_folders_in_the_way_of_a_file(tmp_path: Path) -> None:
    (tmp_path / "file").write_bytes(b"")
    with pytest.raises(OSError, match="file"):
        make_folder(tmp_path / "file" / "folder")


def test_readers_see_no_temp_file(tmp_path: Path) -> None:
    data = tmp_path / "heartbeats"
    folder = data / "day=2025-01-15" / "shard=00"
    with TempFile(tmp_path, folder) as temp:
        pl.DataFrame(PARQUET).write_parquet(temp.path)
        temp.publish_new(folder / "final.parquet")
    with TempFile(tmp_path, folder) as temp:
        temp.path.write_bytes(b"half a file")
        glob = str(data / "**" / "*.parquet")
        assert duckdb.execute("SELECT a FROM read_parquet($1)", [glob]).fetchall() == [(1,), (2,)]
        assert pl.scan_parquet(glob).collect()["a"].to_list() == PARQUET["a"]
        assert pl.scan_parquet(data).collect()["a"].to_list() == PARQUET["a"]
        assert pd.read_parquet(data)["a"].to_list() == PARQUET["a"]
