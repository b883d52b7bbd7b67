"""Opening a lake: it remembers how it was made, and says in one line why it can't be used."""

from __future__ import annotations

import threading
from concurrent.futures import ThreadPoolExecutor
from multiprocessing import get_context
from pathlib import Path

import pytest

from hb_assets.core.errors import DamagedFileError, HbError, LakeMismatchError, SettingsError
from hb_assets.core.settings import Settings
from hb_assets.lake.storage.store import Lake
from hb_assets_tests.lake.deliveries import left_behind


def open_lake(home: Path) -> bytes:
    return Lake.open(Settings(home=home, shards=4)).mask_key


def test_opened_again_it_is_the_same(settings: Settings, lake: Lake) -> None:
    assert Lake.open(settings) == lake
    assert lake.root == settings.lake_dir


@pytest.mark.parametrize("url", [True, False])
def test_lake_elsewhere(tmp_path: Path, url: bool) -> None:
    where = tmp_path / "else where" / "lake"
    settings = Settings(home=tmp_path, lake=f"file://{where}" if url else str(where))
    assert Lake.open(settings).root == where
    assert (where / "lake.json").exists()


def test_other_shards(settings: Settings, lake: Lake) -> None:
    other = settings.model_copy(update={"shards": 5})
    with pytest.raises(LakeMismatchError, match="has 4 shards, HB_SHARDS says 5; set HB_SHARDS=4"):
        Lake.open(other)


def test_other_format(settings: Settings, lake: Lake) -> None:
    (lake.root / "lake.json").write_text('{"format": 99, "shards": 4, "mask_key": ""}')
    with pytest.raises(LakeMismatchError, match="format 99, this version reads 1"):
        Lake.open(settings)


@pytest.mark.parametrize(
    "content", [b"", b"{", b"[]", b'{"format": 1}', b"\xff", b'{"shards": "4"}']
)
def test_damaged_identity(settings: Settings, lake: Lake, content: bytes) -> None:
    path = lake.root / "lake.json"
    path.write_bytes(content)
    with pytest.raises(DamagedFileError, match=r"lake\.json can't be read") as raised:
        Lake.open(settings)
    assert str(path) in str(raised.value)
    assert path.read_bytes() == content


def test_folder_that_cannot_be_made(tmp_path: Path) -> None:
    (tmp_path / "file").write_bytes(b"")
    with pytest.raises(SettingsError, match=r"can't be used: .*HB_LAKE") as raised:
        Lake.open(Settings(home=tmp_path / "file" / "home"))
    assert "\n" not in str(raised.value)


def test_lake_json_is_a_folder(settings: Settings, lake: Lake) -> None:
    (lake.root / "lake.json").unlink()
    (lake.root / "lake.json").mkdir()
    with pytest.raises(HbError, match="can't be used"):
        Lake.open(settings)


def test_made_by_many_threads_at_once(tmp_path: Path) -> None:
    together = threading.Barrier(8)

    def race(_: int) -> bytes:
        together.wait()
        return open_lake(tmp_path)

    with ThreadPoolExecutor(8) as pool:
        assert len(set(pool.map(race, range(8)))) == 1
    assert left_behind(tmp_path) == []


def test_made_by_several_processes_at_once(tmp_path: Path) -> None:
    with get_context("spawn").Pool(2) as pool:
        assert len(set(pool.map(open_lake, [tmp_path] * 4, chunksize=1))) == 1
    assert left_behind(tmp_path) == []


def test_masks(settings: Settings, lake: Lake, tmp_path: Path) -> None:
    assert lake.mask("u1") == Lake.open(settings).mask("u1") != lake.mask("u2")
    assert "u1" not in lake.mask("u1")
    elsewhere = Lake.open(settings.model_copy(update={"lake": str(tmp_path / "other")}))
    assert elsewhere.mask("u1") != lake.mask("u1")


def test_a_lake_that_holds_data_is_not_made_anew(settings: Settings, lake: Lake) -> None:
    """Its mask_key is what those who were forgotten are known by."""
    (lake.root / "lake.json").unlink()
    Lake.open(settings)  # it was empty
    (lake.root / "lake.json").unlink()
    (lake.root / "raw").mkdir()
    for create in (True, False):
        with pytest.raises(DamagedFileError, match=r"lake\.json can't be read; restore it"):
            Lake.open(settings, create=create)
    assert not (lake.root / "lake.json").exists()
