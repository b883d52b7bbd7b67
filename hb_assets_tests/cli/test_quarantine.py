"""`hb quarantine`: what is in it, and putting back what is valid by now."""

from __future__ import annotations

import json
import os
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest
import redis

from hb_assets.buffer import clock
from hb_assets.buffer.producer import Producer
from hb_assets.cli import quarantine as commands
from hb_assets.core import days
from hb_assets.core.settings import Settings
from hb_assets.lake.files import quarantine, tombstones
from hb_assets.lake.files.tombstones import Tombstone
from hb_assets.lake.storage.store import Lake
from hb_assets.pipeline.audit import audit
from hb_assets_tests.cli.commands import complaint, hb, told
from hb_assets_tests.conftest import on_valkey
from hb_assets_tests.lake.deliveries import line

redis_url = on_valkey

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


def test_empty(settings: Settings) -> None:
    Lake.open(settings)
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


def test_show(lake: Lake, settings: Settings) -> None:
    ids = [record.id for record in quarantine.records(lake, settings)]
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
    assert "name ids, or --reason or --day, or --all, or --from" in complaint(
        "quarantine", "replay", *arguments
    )


def test_replay(
    lake: Lake, settings: Settings, client: redis.Redis, monkeypatch: pytest.MonkeyPatch
) -> None:
    first, second, third, bad = (record.id for record in quarantine.records(lake, settings))
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


def test_what_is_put_back_is_judged_by_the_servers_clock(
    settings: Settings, client: redis.Redis, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Ours is two days behind, where what arrives now would be too far ahead."""
    now_ms = time.time_ns() // 1_000_000
    Producer(client, settings).append({0: [line(at=now_ms + 3_600_000)]})
    monkeypatch.setenv("HB_MAX_FUTURE", "1m")
    assert told("drain")["quarantined"] == 1
    monkeypatch.delenv("HB_MAX_FUTURE")
    monkeypatch.setattr(clock, "_own_ms", lambda: now_ms - 2 * days.MS_PER_DAY)
    assert told("quarantine", "replay", "--all") == {"replayed": 1, "still_refused": 0}


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
    assert sum(one.released for one in quarantine.records(lake, settings)) == 10
    hb("drain")
    assert told("quarantine", "replay", "--all") == {"replayed": 10, "still_refused": 0}


# -- repairing


def exported(path: Path, *arguments: object) -> list[dict[str, str]]:
    path.write_text(hb("quarantine", "show", "--raw", *arguments).stdout, encoding="utf-8")
    return [json.loads(text) for text in path.read_text(encoding="utf-8").splitlines()]


def rewrite(path: Path, lines: list[dict[str, str]]) -> None:
    path.write_text("\n".join(map(json.dumps, lines)), encoding="utf-8")


def test_mended_records(
    lake: Lake, settings: Settings, client: redis.Redis, tmp_path: Path
) -> None:
    """Bytes that aren't UTF-8 travel as base64; what still isn't valid stays; twice is once."""
    path = tmp_path / "records.ndjson"
    lines = exported(path)
    assert [one.get("raw") for one in lines] == [*(text.decode() for text in OLD), None]
    assert lines[3]["raw_base64"] == "W2JvbGRdYmFk/w=="
    refused = told("quarantine", "replay", "--from", path, code=1)
    assert (refused["replayed"], refused["still_refused"]) == (0, 4)
    reason = "timestamp_too_old: timestamp lies before HB_START_DATE"
    assert {"id": lines[0]["id"], "reason": reason} in refused["refused_lines"]

    for one in lines[:2]:
        one["raw"] = one["raw"].replace("2015", "2025")
    lines[3] = {"id": lines[3]["id"], "raw": line("u2").decode()}
    rewrite(path, lines)
    path.write_bytes(b"\xef\xbb\xbf" + path.read_bytes())  # as some editors do
    done = told("quarantine", "replay", "--from", path, code=1)
    assert (done["replayed"], done["still_refused"], done["already_back"]) == (3, 1, 0)
    done = told("quarantine", "replay", "--from", path, code=1)
    assert (done["replayed"], done["still_refused"], done["already_back"]) == (0, 1, 3)
    assert "secret" not in hb("quarantine", "replay", "--from", path, code=1).output

    hb("drain", "--until-empty")
    assert audit(client, lake, settings).differences == []
    assert sum(day["unique"] for day in told("consolidate", "--all")["days"]) == 3


def test_lines_that_are_no_records(lake: Lake, tmp_path: Path) -> None:
    path = tmp_path / "records.ndjson"
    [good, *_] = exported(path, "--limit", 1)
    good["raw"] = line().decode()
    unknown = {"id": "00-1-2-3", "raw": "x"}
    rewrite(path, [unknown, {"id": "x", "raw": "x"}, {"id": good["id"]}, good])
    path.write_bytes(path.read_bytes() + b"\n\n\xff\n[]\n")
    done = told("quarantine", "replay", "--from", path, code=1)
    assert (done["replayed"], done["still_refused"]) == (1, 5)
    assert {"line": "1", "reason": "not in quarantine"} in done["refused_lines"]
    assert {one["line"] for one in done["refused_lines"]} == {"1", "2", "3", "6", "7"}
    assert "missing.ndjson" in complaint(
        "quarantine", "replay", "--from", tmp_path / "missing.ndjson"
    )


KILLED = """
import os, signal
from hb_assets.cli.app import load_commands
from hb_assets.lake.files import quarantine; from hb_assets.lake.files import tombstones
quarantine.release = lambda *_: os.kill(os.getpid(), signal.SIGKILL)
load_commands()()
"""


def test_killed_between_append_and_mark(
    lake: Lake, settings: Settings, client: redis.Redis, tmp_path: Path
) -> None:
    path = tmp_path / "records.ndjson"
    lines = exported(path, "--reason", "timestamp_too_old")
    rewrite(path, [{**one, "raw": one["raw"].replace("2015", "2025")} for one in lines])
    killed = subprocess.run(
        [sys.executable, "-c", KILLED, "quarantine", "replay", "--from", path],
        env=os.environ,
        capture_output=True,
        check=False,
    )
    assert killed.returncode == -signal.SIGKILL, killed.stderr.decode()
    hb("drain")
    assert told("quarantine", "replay", "--from", path)["replayed"] == 3
    hb("drain", "--until-empty")
    verdict = audit(client, lake, settings)
    assert verdict.differences == []
    assert (verdict.rows, verdict.released) == (6, 3)
    assert sum(day["unique"] for day in told("consolidate", "--all")["days"]) == 3


# -- at scale


def test_pages(lake: Lake, settings: Settings) -> None:
    ids = [record.id for record in quarantine.records(lake, settings)]
    seen: list[str] = []
    while page := told(
        "quarantine", "list", "--limit", 3, *(["--after", seen[-1]] if seen else [])
    )["records"]:
        seen += [one["id"] for one in page]
    assert seen == ids
    assert len(told("quarantine", "show", "--limit", 2)) == 2
    assert [one["id"] for one in told("quarantine", "show", "--after", ids[1])] == ids[2:]
    today = told("quarantine", "list")["records"][0]["arrived"][:10]
    assert told("quarantine", "list", "--day", today)["count"] == 4
    assert told("quarantine", "list", "--day", "2020-02-02")["count"] == 0
    for wrong in (["--day", "today"], ["--after", "x"]):
        assert wrong[0] in complaint("quarantine", "list", *wrong)


def test_a_damaged_file_is_named_and_the_others_go_on(
    lake: Lake, settings: Settings, client: redis.Redis, tmp_path: Path
) -> None:
    Producer(client, settings).append({1: [b"also bad"]})
    hb("drain")
    damaged = next(path for path in lake.root.glob("quarantine/*/part-00-*.parquet"))
    kept = damaged.read_bytes()
    damaged.write_bytes(kept[:50])
    for arguments in (["list"], ["show"], ["show", "--raw"], ["replay", "--all"]):
        result = hb("quarantine", *arguments, code=1)
        [complained] = [text for text in result.stderr.splitlines() if text.startswith("hb:")]
        assert str(damaged) in complained
        assert "restore it from a copy" in complained
    assert told("quarantine", "list", code=1)["reasons"] == {"record_not_json": 1}
    differences = told("audit", code=1)["audit"]["differences"]
    assert any(str(damaged) in text for text in differences)
    assert any("4 heartbeats are missing" in text for text in differences)
    damaged.write_bytes(kept)
    assert told("audit")["adds_up"]


def test_a_forgotten_users_records_are_not_put_back(
    lake: Lake, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Though a crash left them in quarantine after the tombstone stood."""
    monkeypatch.setenv("HB_START_DATE", "2010-01-01")
    tombstones.put(
        lake,
        Tombstone(
            user=tombstones.hashed(lake, "secret"),
            shard=0,
            cutoffs={0: (2**64 - 1, 2**64 - 1)},
            asked_ms=0,
        ),
    )
    found = told("quarantine", "replay", "--reason", "timestamp_too_old", code=1)
    assert (found["replayed"], found["still_refused"]) == (0, 3)
