"""`hb consolidate`, `hb query` and `hb audit`: results, exit codes, and one line when it fails."""

from __future__ import annotations

import datetime as dt
from pathlib import Path

import pytest
import redis

from hb_assets.buffer import keys
from hb_assets.core.record import shard_of
from hb_assets.core.settings import Settings
from hb_assets.lake import minutes
from hb_assets.lake.compaction import consolidation
from hb_assets.lake.storage import layout
from hb_assets.lake.storage.store import Lake
from hb_assets_tests.cli.commands import complaint, hb, told
from hb_assets_tests.conftest import on_valkey
from hb_assets_tests.lake.deliveries import (
    DAY,
    NOON,
    consolidated,
    deliver,
    entry,
    line,
    spoil_for_good,
)

redis_url = on_valkey

START, END = "2025-01-15T12:00:00Z", "2025-01-15T12:01:00Z"


@pytest.fixture(autouse=True)
def environment(settings: Settings, redis_url: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("HB_HOME", str(settings.home))
    monkeypatch.setenv("HB_SHARDS", "4")
    monkeypatch.setenv("HB_REDIS_URL", redis_url)


@pytest.fixture
def lake(settings: Settings) -> Lake:
    opened = Lake.open(settings)
    deliver(opened, settings, entry([line(), line(bpm=80), line("u2", bpm=61)]))
    return opened


# -- consolidate


@pytest.mark.parametrize("choice", ["2025-01-15", "--pending", "--all"])
def test_consolidate(lake: Lake, settings: Settings, choice: str) -> None:
    found = told("consolidate", choice)
    [day] = found["days"]
    assert found["failed"] == {}
    assert (day["day"], day["rows"], day["unique"], day["corrections"]) == ("2025-01-15", 3, 2, 1)
    assert all(figure["passed"] for figure in day["figures"])
    assert len(consolidated(lake)) == 2
    assert minutes.is_current(lake, DAY, shard_of("u1", 4), settings.device_priority)


def test_nothing_pending(lake: Lake) -> None:
    assert "2025-01-15" in hb("consolidate", "--pending").stdout
    assert hb("consolidate", "--pending").stdout == "nothing is pending\n"
    assert told("consolidate", "--pending") == {"days": [], "failed": {}}


def test_rebuild(lake: Lake) -> None:
    hb("consolidate", DAY)
    [day] = told("consolidate", DAY, "--rebuild")["days"]
    assert (day["written"], day["unique"]) == (2, 2)


@pytest.mark.parametrize(
    "arguments",
    [
        [],
        ["--pending", "--all"],
        ["2025-01-15", "--all"],
        ["2025-1-5"],
        ["today"],
        ["../../etc"],
        ["2025-01-15", "2025-02-30"],
    ],
)
def test_days_that_are_none(lake: Lake, arguments: list[str]) -> None:
    complaint("consolidate", *arguments)
    assert consolidated(lake) == []


@pytest.mark.parametrize("choice", ["--pending", "--all"])
def test_damaged_day_does_not_stop_the_others(lake: Lake, settings: Settings, choice: str) -> None:
    hb("consolidate", "--all")
    next_day = NOON + 86_400_000
    deliver(lake, settings, entry([line(at=next_day), line(bpm=90)], ms=next_day))
    path = layout.consolidated_file(lake.root, DAY, shard_of("u1", 4))
    spoil_for_good(lake, path)
    result = hb("consolidate", choice, code=1)
    assert str(path) in result.stderr
    assert result.stderr.count("hb: ") == 1
    found = told("consolidate", "--all", code=1)
    assert list(found["failed"]) == ["2025-01-15"]
    assert [day["unique"] for day in found["days"]] == [0, 1]
    assert [len(day["failed"]) for day in found["days"]] == [1, 0]


def test_nothing_is_pending_only_where_nothing_failed(
    lake: Lake, settings: Settings, monkeypatch: pytest.MonkeyPatch
) -> None:
    def full(*_: object, **__: object) -> None:
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(consolidation, "consolidate", full)
    result = hb("consolidate", "--pending", code=1)
    assert result.stdout == ""
    assert result.stderr == "hb: No space left on device\n"


# -- query


def test_query(lake: Lake) -> None:
    assert told("query", "u1", "--start", START, "--end", END) == {
        "user_id": "u1",
        "data": [{"timestamp": START, "heart_rate": 80, "device_id": "device_a"}],
        "count": 1,
    }
    shown = hb("query", "u1", "--start", START, "--end", END, "--device", "device_a").stdout
    assert "80" in shown
    assert told("query", "u1", "--start", START, "--end", END, "--device", "other")["count"] == 0
    of_the_day = told("query", "u1", "--start", START, "--end", END, "--granularity", "1d")
    assert [point["timestamp"] for point in of_the_day["data"]] == ["2025-01-15T00:00:00Z"]
    complaint("query", "u1", "--start", START, "--end", END, "--granularity", "2m")
    assert told("query", "nobody", "--start", START, "--end", END)["data"] == []


def test_a_query_says_where_there_is_something(lake: Lake, settings: Settings) -> None:
    """On the same day, on others, of another device; a day that can't be read is passed over."""
    days_later = NOON + 2 * 86_400_000
    later = entry([line(at=days_later), line(at=days_later + 60_000)], ms=days_later)
    deliver(lake, settings, later)

    def note(*arguments: str, user: str = "u1") -> str:
        result = hb("query", user, "--start", arguments[0], "--end", arguments[1], *arguments[2:])
        assert "0 points" in result.stdout
        return " ".join(result.stderr.split())

    before, after = "2025-01-15T12:00:00Z", "2025-01-17T12:00:00Z"
    for start in ("2025-01-15T12:01Z", "2025-01-16"):
        assert note(start, "2025-01-17") == (
            "no reading of this user in this range: the last one before it is at "
            f"{before}; the first one after it is at {after}"
        )
    assert note("2025-01-15T11:00Z", before).endswith(f"the first one after it is at {before}")
    assert note("2025-01-18", "2025-02-18").endswith("before it is at 2025-01-17T12:01:00Z")
    assert "nor any other in the lake" in note("2025-01-18", "2025-01-19", user="nobody")
    assert "user and device" in note("2025-01-15", "2025-01-16", "--device", "other")
    hb("consolidate", "2025-01-17")
    spoil_for_good(
        lake, layout.consolidated_file(lake.root, dt.date(2025, 1, 17), shard_of("u1", 4))
    )
    assert note("2025-01-18", "2025-02-18").endswith(f"before it is at {before}")


@pytest.mark.parametrize(
    ("start", "end"),
    [
        (START, START),
        (END, START),
        ("noon", END),
        (START, "2025-01-15"),
        ("", END),
        ("2025-01-15 10.30", END),
    ],
)
def test_times_that_are_none(lake: Lake, start: str, end: str) -> None:
    complaint("query", "u1", "--start", start, "--end", end)


def test_query_of_a_damaged_lake(lake: Lake) -> None:
    hb("consolidate", "--all")
    path = layout.consolidated_file(lake.root, DAY, shard_of("u1", 4))
    path.write_bytes(b"PAR1")
    query = ("query", "u1", "--start", START, "--end", END)
    result = hb(*query)
    assert "1 points" in result.stdout
    assert result.stderr.startswith(f"hb: raw fragments stood in for the consolidated file: {path}")
    assert str(path) in told(*query)["warnings"][0]
    spoil_for_good(lake, path)
    assert complaint(*query).startswith(f"hb: {path} is damaged")
    ended = hb("query", "u1", "--start", "2025-01-14", "--end", END, code=1)
    assert "0 points" in ended.stdout
    assert f"from 2025-01-15T00:00:00Z on nothing can be answered: {path} is" in ended.stderr


# -- audit


def test_audit(client: redis.Redis, lake: Lake, settings: Settings) -> None:
    """The fixture's rows came by no buffer: the audit says so."""
    found = told("audit", code=1)
    assert not found["adds_up"]
    assert "the lake holds 3 heartbeats more" in found["audit"]["differences"][0]
    assert "it does NOT add up" in hb("audit", "--deep", code=1).stdout
    client.hset(keys.ledger(0), mapping={"appended": 3, "acknowledged": 3})
    assert told("audit")["adds_up"]
    assert "it adds up" in hb("audit").stdout
    hb("consolidate", "--all")
    [day] = told("audit", "--deep")["audit"]["days"]
    assert (day["day"], day["unique"], day["superseded"], day["pending"]) == ("2025-01-15", 2, 1, 0)


# -- what can't be used


@pytest.mark.parametrize(
    "command", [["consolidate", "--all"], ["query", "u", "--start", START, "--end", END], ["audit"]]
)
def test_lake_that_cannot_be_used(
    lake: Lake, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, command: list[str]
) -> None:
    monkeypatch.setenv("HB_SHARDS", "5")
    assert "HB_SHARDS=4" in complaint(*command)
    (tmp_path / "file").write_bytes(b"")
    monkeypatch.setenv("HB_HOME", str(tmp_path / "file" / "home"))
    text = complaint(*command)
    assert text.startswith("hb: ")
    assert text.count("\n") == 1


def test_a_day_that_the_lake_does_not_hold(lake: Lake) -> None:
    assert "holds nothing of 2019-01-01" in complaint("consolidate", "2019-01-01")


def test_a_query_takes_days(lake: Lake) -> None:
    found = told("query", "nobody", "--start", "2025-01-15", "--end", "2025-01-16")
    assert found["count"] == 0


def test_audit_verifies_the_files_of_the_days_that_are_named(
    client: redis.Redis, lake: Lake, settings: Settings
) -> None:
    client.hset(keys.ledger(0), mapping={"appended": 3, "acknowledged": 3})
    hb("consolidate", "--all")
    path = layout.minutes_file(lake.root, DAY, shard_of("u1", 4))
    with path.open("r+b") as file:
        file.seek(20)
        file.write(b"\0" if file.read(1) != b"\0" else b"\1")
    assert told("audit")["adds_up"]
    assert told("audit", "--deep", "2025-01-14")["adds_up"]
    for days in ([], ["2025-01-14", "2025-01-15"]):
        found = told("audit", "--deep", *days, code=1)
        assert [str(path) in line for line in found["audit"]["differences"]] == [True]
    assert "--deep" in complaint("audit", "2025-01-15")
