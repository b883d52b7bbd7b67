"""`hb damaged`: what it says, and what it does to the audit."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
import redis
from click.testing import Result
from typer.testing import CliRunner

from hb_assets.buffer.consumer import Consumer
from hb_assets.cli.app import load_commands
from hb_assets.core.record import shard_of
from hb_assets.core.settings import Settings, environment
from hb_assets.lake.compaction.consolidation import consolidate
from hb_assets.lake.files import fragments
from hb_assets.lake.storage.store import Lake
from hb_assets.pipeline.audit import audit
from hb_assets.pipeline.drain import drain
from hb_assets_tests.conftest import VALKEY
from hb_assets_tests.lake.deliveries import DAY, NOON, line
from hb_assets_tests.pipeline.test_audit import append

pytestmark = VALKEY
SHARD = shard_of("u1", 4)


@pytest.fixture(autouse=True)
def at_home(settings: Settings, monkeypatch: pytest.MonkeyPatch) -> None:
    for name, value in environment(settings).items():
        if name.startswith("HB_"):
            monkeypatch.setenv(name, value)


def hb(*arguments: str, code: int = 0, answer: str | None = None) -> Result:
    done = CliRunner().invoke(load_commands(), ["damaged", *arguments], input=answer)
    assert done.exit_code == code, done.output
    assert "Traceback" not in done.output
    return done


def told(*arguments: str, code: int = 0) -> Any:
    return json.loads(hb(*arguments, "--json", code=code).stdout)


@pytest.fixture
def bad(client: redis.Redis, consumer: Consumer, lake: Lake, settings: Settings) -> Path:
    """A fragment of two rows, cut short."""
    append(client, settings, [line()])
    drain(consumer, lake, settings)
    append(client, settings, [line(bpm=80), line(at=NOON + 1)])
    drain(consumer, lake, settings)
    return fragments.listed(lake, DAY, SHARD)[-1].path


def test_nothing_is_made_where_there_is_no_lake(settings: Settings) -> None:
    for arguments in (["list"], ["show", "x"], ["restore", "x"], ["accept", "x", "--yes"]):
        assert "there is no HB_HOME" in hb(*arguments, code=2).stderr
    assert not settings.home_dir.exists()


def test_a_sound_lake(lake: Lake) -> None:
    assert "nothing of" in hb("list").stdout
    assert told("list") == {"faults": [], "accepted": [], "kept": []}
    assert "is no file of" in hb("show", "nothing", code=2).stderr
    assert "is no file of" in hb("accept", "nothing", "--yes", code=2).stderr


def test_from_damage_to_its_end(
    client: redis.Redis, lake: Lake, settings: Settings, bad: Path, tmp_path: Path
) -> None:
    """Nobody can tell how many rows are lost: the ledger bounds it."""
    copy = tmp_path / bad.name
    copy.write_bytes(bad.read_bytes())
    bad.write_bytes(copy.read_bytes()[:-1])
    [fault] = told("list", code=1)["faults"]
    assert (fault["kind"], fault["path"]) == ("damaged", str(bad))
    assert bad.name in hb("list", code=1).stdout
    consolidate(lake, DAY, settings)
    [fault] = told("list", code=1)["faults"]
    assert (fault["kind"], fault["rows"]) == ("set_aside", None)
    before = audit(client, lake, settings)
    assert len(before.differences) == 2

    shown = told("show", bad.name)
    assert (shown["place"], shown["verifies"], shown["rows"]) == (str(bad), False, None)
    assert shown["first_entry"]
    assert "set aside" in hb("show", bad.name).stdout
    assert "nothing was put back" in hb("restore", bad.name, code=2).stderr
    hb("accept", bad.name, code=1, answer="n\n")
    done = told("accept", bad.name, "--reason", "disk 3", "--yes")
    assert (done["acceptance"]["rows"], done["acceptance"]["at_most"]) == (None, 2)
    after = audit(client, lake, settings)
    assert (after.differences, after.written_off) == ([], 2)
    found = told("list")
    assert [one["reason"] for one in found["accepted"]] == ["disk 3"]
    assert len(found["kept"]) == 1
    assert "disk 3" in hb("list").stdout
    assert "disk 3" in hb("show", bad.name).stdout

    assert told("restore", str(copy)) == {"path": str(bad), "rows": 2, "was_accepted": True}
    after = audit(client, lake, settings)
    assert (after.differences, after.written_off, after.rows) == ([], 0, 3)
    assert told("list") == {"faults": [], "accepted": [], "kept": []}


def test_the_bytes_go_as_well(lake: Lake, settings: Settings, bad: Path) -> None:
    content = bytearray(bad.read_bytes())
    content[10] ^= 1
    bad.write_bytes(content)
    assert "2 heartbeats are accepted as lost" in hb("accept", str(bad), "--delete", "--yes").stdout
    assert not list((lake.root / "damaged").rglob("*.parquet"))
    assert told("list")["kept"] == []


def test_a_damaged_file_that_nobody_misses(lake: Lake, settings: Settings, bad: Path) -> None:
    consolidate(lake, DAY, settings).require()
    bad.write_bytes(b"PAR1")
    assert "nothing is lost" in hb("accept", str(bad), "--yes", code=2).stderr
    [kept] = told("list")["kept"]
    assert "it may be deleted" in hb("list").stdout
    assert told("accept", kept, "--delete", "--yes") == {"acceptance": None, "kept": None}
    assert told("list")["kept"] == []
