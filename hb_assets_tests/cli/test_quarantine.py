"""`hb quarantine`: what is in it, and putting back what is valid by now."""

from __future__ import annotations

import pytest
import redis

from hb_assets.audit import audit
from hb_assets.buffer.producer import Producer
from hb_assets.cli import quarantine as commands
from hb_assets.lake import quarantine
from hb_assets.lake.store import Lake
from hb_assets.settings import Settings
from hb_assets_tests.cli.commands import complaint, hb, told
from hb_assets_tests.lake.deliveries import line

OLD = [line("secret", at=f"2015-01-0{n}T00:00:00Z") for n in range(1, 4)]


@pytest.fixture(autouse=True)
def environment(settings: Settings, redis_url: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("HB_HOME", str(settings.home))
    monkeypatch.setenv("HB_SHARDS", "4")
    monkeypatch.setenv("HB_REDIS_URL", redis_url)


@pytest.fixture
def lake(settings: Settings, client: redis.Redis) -> Lake:
    Producer(client, settings).append({0: [*OLD, b"[bold]bad\xff"]})
    hb("drain")
    return Lake.open(settings)


def test_empty() -> None:
    assert told("quarantine", "list") == {"count": 0, "reasons": {}, "records": []}
    hb("quarantine", "list")
    assert told("quarantine", "replay", "--all") == {"replayed": 0, "still_refused": 0}


def test_list_shows_no_content(lake: Lake) -> None:
    found = told("quarantine", "list", "--limit", 2)
    assert found["count"] == 4
    assert found["reasons"] == {"timestamp_too_old": 3, "record_not_json": 1}
    assert len(found["records"]) == 2
    assert told("quarantine", "list", "--reason", "record_not_json")["count"] == 1
    for shown in (hb("quarantine", "list").output, str(found)):
        assert "secret" not in shown
        assert "bold" not in shown


def test_show(lake: Lake) -> None:
    ids = [record.id for record in quarantine.records(lake)]
    found = told("quarantine", "show", *ids)
    assert [one["raw"] for one in found][:3] == [text.decode() for text in OLD]
    assert found[3]["raw"] == "[bold]bad\\xff"
    assert "[bold]bad" in hb("quarantine", "show", ids[3]).stdout


@pytest.mark.parametrize("command", ["show", "replay"])
def test_unknown_id(lake: Lake, command: str) -> None:
    text = complaint("quarantine", command, "00-1-2-3")
    assert text == "hb: not in quarantine: 00-1-2-3; see `hb quarantine list`\n"


@pytest.mark.parametrize("arguments", [[], ["--all", "--reason", "x"], ["00-1-2-3", "--all"]])
def test_replay_of_what(lake: Lake, arguments: list[str]) -> None:
    assert "name ids, or --reason, or --all" in complaint("quarantine", "replay", *arguments)


def test_replay(
    lake: Lake, settings: Settings, client: redis.Redis, monkeypatch: pytest.MonkeyPatch
) -> None:
    first, second, third, bad = (record.id for record in quarantine.records(lake))
    nothing = {"replayed": 0, "still_refused": 4}
    assert told("quarantine", "replay", "--all", code=1) == nothing
    monkeypatch.setenv("HB_START_DATE", "2010-01-01")
    assert told("quarantine", "replay", first) == {"replayed": 1, "still_refused": 0}
    assert told("quarantine", "replay", first) == {"replayed": 0, "still_refused": 0}
    assert told("quarantine", "replay", second, third, second)["still_refused"] == 0
    assert told("quarantine", "replay", "--all", code=1) == {"replayed": 0, "still_refused": 1}
    assert told("quarantine", "replay", bad, code=1)["still_refused"] == 1
    hb("drain", "--until-empty")
    verdict = audit(client, lake, settings)
    assert verdict.differences == []
    assert verdict.released == 3
    hb("consolidate", "--pending")
    assert sum(day["unique"] for day in told("consolidate", "--all")["days"]) == 3


def test_replay_of_more_than_the_buffer_takes_at_once(
    settings: Settings, client: redis.Redis, monkeypatch: pytest.MonkeyPatch
) -> None:
    """What was put back before the buffer was full is marked; the rest waits for the next call."""
    Producer(client, settings).append(
        {0: [line("u1", at=f"2015-01-01T00:00:{n:02}Z") for n in range(20)]}
    )
    hb("drain")
    monkeypatch.setattr(commands, "_CHUNK", 5)
    monkeypatch.setenv("HB_START_DATE", "2015-01-01")
    monkeypatch.setenv("HB_BUFFER_MAX_HEARTBEATS", "48")  # 12 a shard
    assert "full" in complaint("quarantine", "replay", "--all")
    lake = Lake.open(settings)
    assert sum(one.released for one in quarantine.records(lake)) == 10
    hb("drain")
    assert told("quarantine", "replay", "--all") == {"replayed": 10, "still_refused": 0}
