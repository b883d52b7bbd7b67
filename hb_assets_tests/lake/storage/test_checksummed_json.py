"""JSON files of the lake: no flipped bit and no cut end of one is read as something else."""

from __future__ import annotations

from pathlib import Path

import msgspec
import pytest

from hb_assets.core.errors import DamagedFileError
from hb_assets.core.settings import Settings
from hb_assets.lake.storage import checksummed_json
from hb_assets.lake.storage.store import Lake


class Content(msgspec.Struct, frozen=True):
    number: int
    cutoffs: dict[int, tuple[int, int]]
    text: str = ""


WRITTEN = Content(16, {0: (1736899200000, 7)}, "a user's \U0001f9e1")


def test_every_flipped_bit_is_noticed_or_harmless(tmp_path: Path) -> None:
    path = tmp_path / "file.json"
    checksummed_json.write(path, WRITTEN)
    whole = path.read_bytes()
    noticed = 0
    for place in range(len(whole)):
        for bit in range(8):
            flipped = bytearray(whole)
            flipped[place] ^= 1 << bit
            path.write_bytes(flipped)
            try:
                assert checksummed_json.read(path, Content) == WRITTEN
            except DamagedFileError:
                noticed += 1
    assert noticed > 7 * (len(whole) - len('"crc32":"'))


def test_every_cut_end_is_noticed(tmp_path: Path) -> None:
    path = tmp_path / "file.json"
    checksummed_json.write(path, WRITTEN)
    whole = path.read_bytes()
    assert checksummed_json.read(path, Content) == WRITTEN
    for length in range(len(whole)):
        path.write_bytes(whole[:length])
        with pytest.raises(DamagedFileError):
            checksummed_json.read(path, Content)


def test_one_without_a_checksum_is_read(tmp_path: Path) -> None:
    path = tmp_path / "file.json"
    path.write_bytes(msgspec.json.encode(WRITTEN))
    assert checksummed_json.read(path, Content) == WRITTEN


def test_a_release_before_the_checksum_reads_it(tmp_path: Path) -> None:
    path = tmp_path / "file.json"
    checksummed_json.write(path, WRITTEN)
    assert msgspec.json.decode(path.read_bytes(), type=Content) == WRITTEN


def test_another_shard_count_is_not_taken_from_a_flipped_bit(
    settings: Settings, lake: Lake
) -> None:
    path = lake.root / "lake.json"
    path.write_bytes(path.read_bytes().replace(b'"shards":4', b'"shards":5'))
    with pytest.raises(DamagedFileError, match=r"lake\.json can't be read"):
        Lake.open(settings.model_copy(update={"shards": 5}))
