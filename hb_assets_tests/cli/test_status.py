"""`hb status`: one bad thing is one line and exit code 1, and hides nothing else."""

from __future__ import annotations

import os
import shutil
import tempfile
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest
import redis

from hb_assets.buffer import keys
from hb_assets.core.record import shard_of
from hb_assets.core.settings import Settings
from hb_assets.gateway.auth import keyring
from hb_assets.lake import minutes
from hb_assets.lake.compaction.consolidation import consolidate
from hb_assets.lake.files import fragments
from hb_assets.lake.storage import layout
from hb_assets.lake.storage.store import Lake
from hb_assets_tests.cli.commands import told
from hb_assets_tests.conftest import on_valkey
from hb_assets_tests.damage import nobody
from hb_assets_tests.gateway.conftest import PATH, heartbeat, running
from hb_assets_tests.lake.deliveries import DAY, NOON, deliver, entry, line
from hb_assets_tests.servers import wait_for

redis_url = on_valkey

OTHER_DAY = NOON + 86_400_000
SHARD = shard_of("u1", 4)


@pytest.fixture(autouse=True)
def outside(settings: Settings, redis_url: str, monkeypatch: pytest.MonkeyPatch) -> None:
    """Commands of this process use the test's server and lake."""
    monkeypatch.setenv("HB_HOME", str(settings.home))
    monkeypatch.setenv("HB_SHARDS", "4")
    monkeypatch.setenv("HB_REDIS_URL", redis_url)


@pytest.fixture
def two_days(lake: Lake, settings: Settings) -> Lake:
    """Two days: consolidated, with minutes, and with a pending fragment each."""
    for number, at in enumerate((NOON, OTHER_DAY)):
        deliver(lake, settings, entry([line(at=at), line("u2", at=at)], number))
        consolidate(lake, DAY if at == NOON else OTHER, settings)
        minutes.build(lake, DAY if at == NOON else OTHER, settings)
        deliver(lake, settings, entry([line(at=at + 1)], 10 + number))
    return lake


OTHER = DAY.replace(day=DAY.day + 1)


def truncate(path: Path) -> None:
    os.truncate(path, path.stat().st_size // 2)


def forge(path: Path) -> None:
    """The last bytes of a Parquet file, and nothing of one before them."""
    path.write_bytes(b"PAR1" + bytes(100) + (50).to_bytes(4, "little") + b"PAR1")


@pytest.mark.parametrize("harm", [truncate, forge])
@pytest.mark.parametrize("kind", [layout.RAW, layout.HEARTBEATS])
def test_a_bad_file_is_one_line(
    two_days: Lake, settings: Settings, harm: Callable[[Path], None], kind: str
) -> None:
    assert told("status")["alarms"] == []
    if kind == layout.RAW:
        path = fragments.listed(two_days, DAY, SHARD)[-1].path
    else:
        path = layout.consolidated_file(two_days.root, DAY, SHARD)
    harm(path)
    found = told("status", code=1)
    (alarm,) = found["alarms"]
    assert str(path) in alarm
    assert [one["day"] for one in found["days"]] == [str(DAY), str(OTHER)]
    bad, good = found["days"]
    assert (good["unique"], good["pending_rows"], good["minutes_current"]) == (2, 1, False)
    assert not bad["minutes_current"]
    assert len(bad["faults"]) == 1
    assert len(found["buffer"]) == 4
    assert found["last_drain"]


@pytest.mark.parametrize("name", [keys.stream, keys.ledger])
def test_another_type_at_a_shards_key_is_one_line(
    two_days: Lake, client: redis.Redis, name: Callable[[int], str]
) -> None:
    client.xadd(keys.stream(1), {"data": line()})
    client.set(name(2), "something else")
    found = told("status", code=1)
    (alarm,) = found["alarms"]
    assert name(2) in alarm
    assert [(one["shard"], one["entries"]) for one in found["buffer"]] == [(0, 0), (1, 1), (3, 0)]
    assert len(found["days"]) == 2


@pytest.mark.parametrize("key", [keys.BEATS, keys.COUNTS])
def test_signs_of_life_that_cannot_be_read_are_one_line(
    two_days: Lake, client: redis.Redis, key: str
) -> None:
    client.set(key, "something else")
    found = told("status", code=1)
    (alarm,) = found["alarms"]
    assert key in alarm
    assert len(found["buffer"]) == 4
    assert len(found["days"]) == 2


def test_a_lake_json_that_is_gone_or_damaged_is_one_line(two_days: Lake) -> None:
    path = two_days.root / "lake.json"
    for harm in (lambda: path.write_bytes(b"{"), path.unlink):
        harm()
        found = told("status", code=1)
        assert len(found["buffer"]) == 4
        (alarm,) = found["alarms"]
        assert alarm.startswith(f"{path} can't be read; restore it from a copy")
    assert not path.exists()


def test_minutes_are_current_once_all_rows_are_in_them(two_days: Lake, settings: Settings) -> None:
    assert [one["minutes_current"] for one in told("status")["days"]] == [False, False]
    consolidate(two_days, DAY, settings)
    minutes.build(two_days, DAY, settings)
    assert [one["minutes_current"] for one in told("status")["days"]] == [True, False]


@pytest.mark.parametrize("harm", ["damaged", "gone"])
def test_a_file_of_api_keys_that_cannot_be_used(
    settings: Settings, monkeypatch: pytest.MonkeyPatch, harm: str
) -> None:
    """Nobody can revoke a key until it is mended."""
    _, token = keyring.create(settings, "a", ["ingest"])
    file = keyring.path(settings)
    with running(settings) as http:
        monkeypatch.setenv("HB_GATEWAY_PORT", str(http.base_url.port))
        assert told("status")["alarms"] == []
        if harm == "gone":
            file.unlink()
        else:
            file.write_bytes(b"{")
        wait_for(lambda: bool(http.get("/health").json()["alarms"]), "the gateway to notice")
        headers = {"Authorization": f"Bearer {token}"}
        assert http.post(PATH, json=heartbeat(), headers=headers).status_code == 200
        (alarm,) = told("status", code=1)["alarms"]
        assert f"{file} is {harm}" in alarm
    if harm == "gone":
        assert told("status")["alarms"] == [], "that gateway has ended: this is a way back"


# -- as a user who may not read everything


@pytest.fixture
def for_others(server_urls: Callable[[str], str]) -> Iterator[Settings]:
    """A home that another user can get at; pytest's own folders are closed to others."""
    home = Path(tempfile.mkdtemp(prefix="hb-others-"))
    try:
        yield Settings(home=home, redis_url=server_urls("valkey"), shards=4)
    finally:
        shutil.rmtree(home)


@pytest.mark.parametrize("where", ["raw", "raw/day", "raw/day/shard", "heartbeats/day/shard"])
def test_a_folder_that_cannot_be_read_is_one_line(
    for_others: Settings, monkeypatch: pytest.MonkeyPatch, where: str
) -> None:
    lake = Lake.open(for_others)
    for number, at in enumerate((NOON, OTHER_DAY)):
        deliver(lake, for_others, entry([line(at=at)], number))
        consolidate(lake, DAY if at == NOON else OTHER, for_others)
    for path in (lake.root.parent, *lake.root.parent.rglob("*")):
        path.chmod(0o755 if path.is_dir() else 0o644)
    folder = lake.root / where.replace("day", f"day={DAY}").replace("shard", f"shard={SHARD:02d}")
    monkeypatch.setenv("HB_HOME", str(for_others.home))
    told("status")  # loads all of our own code, which may be closed to nobody as well
    folder.chmod(0)
    with nobody():
        found = told("status", code=1)
    folder.chmod(0o755)
    (alarm,) = found["alarms"]
    assert alarm.startswith(f"{folder} can't be read (Permission denied)")
    days = {one["day"]: one for one in found["days"]}
    assert list(days) == [str(DAY), str(OTHER)]
    assert days[str(OTHER)]["unique"] == 1
    assert days[str(DAY)]["unique"] == (0 if "heartbeats" in where else 1)
    assert len(found["buffer"]) == 4
