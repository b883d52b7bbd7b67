"""`hb prune`: what goes, what would go, and one line when it can't."""

from __future__ import annotations

import pytest

from hb_assets.core.record import shard_of
from hb_assets.core.settings import Settings
from hb_assets.lake.files import fragments
from hb_assets.lake.storage import layout
from hb_assets.lake.storage.store import Lake
from hb_assets_tests.cli.commands import complaint, hb, told
from hb_assets_tests.conftest import on_valkey
from hb_assets_tests.lake.deliveries import DAY, line

redis_url = on_valkey


@pytest.fixture(autouse=True)
def environment(settings: Settings, redis_url: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("HB_HOME", str(settings.home))
    monkeypatch.setenv("HB_SHARDS", "4")
    monkeypatch.setenv("HB_REDIS_URL", redis_url)
    monkeypatch.setenv("HB_RAW_KEEP", "0s")


@pytest.fixture
def lake(settings: Settings, tmp_path_factory: pytest.TempPathFactory) -> Lake:
    file = tmp_path_factory.mktemp("import") / "beats.ndjson"
    file.write_bytes(line() + b"\n" + line("u2"))
    hb("import", file)
    hb("drain", "--until-empty")
    hb("consolidate", "--all")
    return Lake.open(settings)


def test_prune(lake: Lake) -> None:
    before = len(fragments.all_listed(lake, DAY))
    assert told("prune", "--dry-run")["fragments"] == before > 0
    assert told("prune", "2025-01-16")["fragments"] == 0
    assert "would be pruned" in hb("prune", "--dry-run").stdout
    assert f"{before} fragments" in hb("prune").stdout
    assert fragments.all_listed(lake, DAY) == []
    assert "it adds up" in hb("audit", "--deep").stdout


def test_what_cant_be_pruned_is_named(lake: Lake) -> None:
    path = layout.consolidated_file(lake.root, DAY, shard_of("u1", lake.shards))
    path.write_bytes(b"")
    result = hb("prune", code=1)
    assert str(path) in result.stderr.replace("\n", "")


def test_without_a_lake_none_is_made(settings: Settings) -> None:
    assert "there is no HB_HOME" in complaint("prune")
    assert "there is no HB_HOME" in complaint("forget", "u1", "--yes")
    assert not settings.lake_dir.exists()


def test_not_a_day() -> None:
    assert "not a day like 2025-01-15" in complaint("prune", "yesterday")


def test_damage_is_told_once_by_consolidate_and_by_the_audit_until_it_is_mended(
    lake: Lake, tmp_path_factory: pytest.TempPathFactory
) -> None:
    known = {one.path for one in fragments.all_listed(lake, DAY)}
    file = tmp_path_factory.mktemp("import") / "more.ndjson"
    file.write_bytes(line(bpm=90))
    hb("import", file)
    hb("drain", "--until-empty")
    [path] = {one.path for one in fragments.all_listed(lake, DAY)} - known
    whole = path.read_bytes()
    path.write_bytes(whole[:-9])
    assert str(path) in hb("audit", "--deep", code=1).stderr.replace("\n", "")
    hb("consolidate", DAY, code=1)
    assert "set aside" in hb("audit", code=1).stderr.replace("\n", " ")
    path.write_bytes(whole)
    [aside] = (lake.root / layout.DAMAGED).rglob("*.parquet")
    aside.unlink()
    hb("consolidate", DAY)
    assert "it adds up" in hb("audit", "--deep").stdout


def test_forget(lake: Lake) -> None:
    done = told("forget", "u1", "--yes")
    assert (done["rows"], done["left"]) == (1, [])
    assert told("query", "u1", "--start", "2025-01-15", "--end", "2025-01-16")["count"] == 0
    assert told("query", "u2", "--start", "2025-01-15", "--end", "2025-01-16")["count"] == 1
    assert "it adds up" in hb("audit", "--deep").stdout
    assert "finds nothing of them" in hb("forget", "u1", "--yes").stdout


def test_forget_asks_first(lake: Lake) -> None:
    assert "for good?" in hb("forget", "u1", code=1).stdout
    assert told("query", "u1", "--start", "2025-01-15", "--end", "2025-01-16")["count"] == 1


def test_what_is_left_is_named(lake: Lake) -> None:
    path = lake.root / layout.DAMAGED / "raw" / "part.parquet"
    path.parent.mkdir(parents=True)
    path.write_bytes(b"?")
    assert str(path) in hb("forget", "u1", "--yes", code=1).stderr
