"""`hb import` and `hb drain`, and the embedded server that they start for their own time."""

from __future__ import annotations

import fcntl
import json
import os
import signal
import subprocess
import sys
import termios
from pathlib import Path
from typing import IO, Any

import psutil
import pytest
import redis

from hb_assets.buffer import depth
from hb_assets.buffer.consumer import Consumer
from hb_assets.buffer.producer import Producer
from hb_assets.cli import drain
from hb_assets.core.settings import Settings
from hb_assets.lake.storage.store import Lake
from hb_assets_tests.cli.commands import complaint, hb, told
from hb_assets_tests.conftest import on_valkey
from hb_assets_tests.lake.deliveries import line, raw
from hb_assets_tests.servers import wait_for

redis_url = on_valkey

ROOT = Path(__file__).parent.parent.parent


@pytest.fixture
def outside(settings: Settings, redis_url: str, monkeypatch: pytest.MonkeyPatch) -> None:
    """Commands of this process use the test's server."""
    monkeypatch.setenv("HB_HOME", str(settings.home))
    monkeypatch.setenv("HB_SHARDS", "4")
    monkeypatch.setenv("HB_REDIS_URL", redis_url)


@pytest.fixture
def file(tmp_path: Path) -> Path:
    path = tmp_path / "some file.ndjson"
    path.write_bytes(b"\n".join([line("secret"), line("u2"), b"", line("secret", bpm=5), b"bad"]))
    return path


def test_import_then_drain(
    outside: None, file: Path, tmp_path: Path, client: redis.Redis, settings: Settings
) -> None:
    refused = tmp_path / "refused"
    found = told("import", file, file, "--refused", refused, code=1)
    assert [(one["accepted"], one["refused"]) for one in found["files"]] == [(2, 2)] * 2
    assert found["drained"] is None
    expected = [(4, "heart_rate_out_of_range"), (5, "record_not_json")] * 2
    assert [(one["line"], one["reason"]) for one in found["refused_lines"]] == expected
    written = [json.loads(text) for text in refused.read_bytes().splitlines()]
    assert written == found["refused_lines"]
    assert "secret" not in json.dumps(written)

    done = told("drain")
    assert (done["rows"], done["entries"], done["quarantined"]) == (4, 4, 0)
    assert told("drain", "--until-empty")["rows"] == 0
    assert sum(one.entries for one in depth.depths(client, settings).states) == 0


def test_shown_for_people(outside: None, file: Path) -> None:
    result = hb("import", file, code=1)
    assert "some file.ndjson:4: heart_rate_out_of_range: heart_rate must be" in result.stderr
    assert "secret" not in result.output
    assert "refused 1: record_not_json" in result.stdout
    assert "drained 2 entries: 2 rows" in hb("drain").stdout


@pytest.mark.parametrize(
    ("arguments", "why"),
    [
        (["import", "missing.ndjson"], "missing.ndjson"),
        (["import", "what.txt"], "--format"),
        (["import", "what.ndjson", "--format", "xml"], "must be one of ndjson"),
        (["import", "what.ndjson", "--refused", "/no/such/folder/x"], "/no/such/folder/x"),
        (["import"], "files"),
        (["drain", "--until-empty", "--follow"], "exclude"),
    ],
)
def test_what_cannot_be_done(outside: None, arguments: list[str], why: str) -> None:
    assert why in complaint(*arguments)


@pytest.mark.parametrize("command", [["drain"], ["import", "x.ndjson"]])
def test_lake_that_cannot_be_used(
    outside: None, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, command: list[str]
) -> None:
    (tmp_path / "file").write_bytes(b"")
    monkeypatch.setenv("HB_HOME", str(tmp_path / "file" / "home"))
    text = complaint(*command)
    assert text.startswith("hb: the lake ")
    assert text.count("\n") == 1


@pytest.mark.parametrize("command", [["drain"], ["import", "x.ndjson"], ["audit"]])
def test_redis_that_does_not_answer(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, command: list[str]
) -> None:
    monkeypatch.setenv("HB_HOME", str(tmp_path))
    monkeypatch.setenv("HB_REDIS_URL", "redis://:pass@127.0.0.1:1")
    Lake.open(Settings(home=tmp_path))
    text = complaint(*command)
    assert text.startswith("hb: ")
    assert "127.0.0.1:1" in text
    assert "pass@" not in text


def test_full_disk_is_one_line(
    outside: None, client: redis.Redis, settings: Settings, monkeypatch: pytest.MonkeyPatch
) -> None:
    Lake.open(settings)
    Producer(client, settings).append({0: [line()]})

    def full(_: int) -> None:
        raise OSError(28, os.strerror(28))

    monkeypatch.setattr(os, "fsync", full)
    assert complaint("drain") == "hb: No space left on device\n"
    monkeypatch.undo()
    assert sum(one.entries for one in depth.depths(client, settings).states) == 1


def test_an_error_of_ours_is_told_by_its_kind_alone(
    client: redis.Redis, settings: Settings, caplog: pytest.LogCaptureFixture
) -> None:
    faults = drain._Faults(settings, Consumer(client, settings))
    faults.add(ValueError("secret 177"))
    [told_line] = caplog.messages
    assert "unexpected ValueError" in told_line
    assert "secret" not in told_line


def test_follow_goes_on_after_a_fault_with_one_line(
    outside: None, client: redis.Redis, settings: Settings
) -> None:
    lake = Lake.open(settings)
    blocked = lake.root / "quarantine"
    blocked.write_bytes(b"a file in the way")
    Producer(client, settings).append({0: [line(), b"bad"]})
    process = subprocess.Popen(
        [sys.executable, "-m", "hb_assets", "drain", "--follow"],
        cwd=ROOT,
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
    )
    try:
        assert process.stderr is not None
        first = process.stderr.readline()
        assert "nothing can be drained" in first
        assert str(blocked) in first
        blocked.unlink()
        wait_for(
            lambda: not any(one.entries for one in depth.depths(client, settings).states),
            "the drain",
        )
        process.send_signal(signal.SIGTERM)
        out, err = process.communicate(timeout=60)
    finally:
        process.kill()
    assert process.returncode == 0, err
    assert out.startswith("drained 1 entries: 1 rows")
    assert err.startswith("over: nothing can be drained")
    assert err.count("\n") == 1


def test_a_shard_that_cannot_be_used(
    outside: None, client: redis.Redis, settings: Settings
) -> None:
    Producer(client, settings).append({0: [line()]})
    client.set("hb:{02}:stream", "something else")
    result = hb("drain", "--until-empty", code=1)
    assert "drained 1 entries" in result.stdout
    client.delete("hb:{02}:stream")
    hb("drain", "--until-empty")


# -- the embedded server


def run(home: Path, *arguments: object, **more: str) -> subprocess.CompletedProcess[str]:
    return subprocess.run(
        [sys.executable, "-m", "hb_assets", *map(str, arguments)],
        env={**os.environ, "HB_HOME": str(home), "HB_SHARDS": "4", **more},
        cwd=ROOT,
        capture_output=True,
        text=True,
        timeout=100,
        check=False,
    )


def left_running(home: Path) -> list[list[str]]:
    """Processes that have to do with this home."""
    found = []
    for process in psutil.process_iter(["cmdline", "cwd"]):
        about = [*(process.info["cmdline"] or []), process.info["cwd"] or ""]
        if any(str(home) in part for part in about):
            found.append(about)
    return found


def test_embedded_server_for_the_time_of_a_command(tmp_path: Path) -> None:
    """A file that is larger than the buffer's bound ends, and leaves only the lake behind."""
    home = tmp_path / "home"
    path = tmp_path / "file.ndjson"
    path.write_bytes(b"\n".join([*(line(f"u{n}") for n in range(200)), b"bad"]))
    done = run(home, "import", path, "--json", HB_BUFFER_MAX_HEARTBEATS="100")
    assert done.returncode == 1, done.stderr
    found: dict[str, Any] = json.loads(done.stdout)
    assert (found["files"][0]["accepted"], found["drained"]["rows"]) == (200, 200)
    assert left_running(home) == []
    assert len(raw(Lake.open(Settings(home=home, shards=4)))) == 200
    audited = run(home, "audit", "--json")
    assert audited.returncode == 0, audited.stdout + audited.stderr
    assert json.loads(audited.stdout)["audit"]["buffer"]["acknowledged"] == 200
    assert left_running(home) == []


def test_error_without_a_trace_and_without_anything_left(tmp_path: Path) -> None:
    (tmp_path / "file").write_bytes(b"")
    home = tmp_path / "file" / "home"
    done = run(home, "drain")
    assert done.returncode == 2
    assert done.stderr.startswith("hb: the lake ")
    assert done.stderr.count("\n") == 1
    assert left_running(home) == []


@pytest.mark.parametrize("number", [signal.SIGINT, signal.SIGTERM])
def test_follow_ends_on_a_signal(tmp_path: Path, number: signal.Signals) -> None:
    home = tmp_path / "home"
    process = subprocess.Popen(
        [sys.executable, "-m", "hb_assets", "drain", "--follow"],
        env={**os.environ, "HB_HOME": str(home), "HB_SHARDS": "4"},
        cwd=ROOT,
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
    )
    try:
        wait_for(lambda: handles(process.pid, number), "the drain to listen to signals")
        process.send_signal(number)
        out, err = process.communicate(timeout=60)
    finally:
        process.kill()
    assert process.returncode == 0, err
    assert "Traceback" not in err
    assert out.startswith("drained 0 entries")
    wait_for(lambda: left_running(home) == [], "the server to end")


def handles(pid: int, number: signal.Signals) -> bool:
    """Whether the process has a handler of its own for this signal and for SIGTERM."""
    status = Path(f"/proc/{pid}/status").read_text(encoding="ascii")
    caught = int(
        next(text for text in status.splitlines() if text.startswith("SigCgt")).split()[1], 16
    )
    return all(caught >> (one - 1) & 1 for one in (number, signal.SIGTERM))


def test_refused_lines_never_replace_a_file_to_import(outside: None, file: Path) -> None:
    before = file.read_bytes()
    hb("import", file, "--refused", file, code=2)
    assert file.read_bytes() == before


def test_an_unreadable_file_stops_no_other(outside: None, file: Path, tmp_path: Path) -> None:
    result = hb("import", tmp_path / "missing.csv", file, "--allow-refused", code=1)
    assert "some file.ndjson" in result.stdout
    assert "missing.csv" not in result.stdout
    assert "missing.csv: can't be read: No such file" in result.stderr.splitlines()[-1]
    assert told("drain")["rows"] == 2


def test_exit_codes_of_an_import(outside: None, file: Path, tmp_path: Path) -> None:
    missing, good = tmp_path / "missing.csv", tmp_path / "good.ndjson"
    good.write_bytes(line())
    hb("import", good)
    hb("import", file, code=1)
    hb("import", file, "--allow-refused")
    bad = tmp_path / "bad.ndjson"
    bad.write_bytes(b"bad")
    hb("import", bad, code=1)
    hb("import", bad, "--allow-refused")
    hb("import", missing, good, code=1)
    hb("import", missing, code=2)
    found = told("import", missing, missing, "--allow-refused", code=2)
    assert [one["fault"] for one in found["files"]] == [
        f"{missing}: can't be read: No such file or directory"
    ] * 2


def test_importing_what_a_pipe_brings(tmp_path: Path) -> None:
    """`-` and `/dev/stdin` alike; what isn't known by its name is asked for."""
    for name in ("-", "/dev/stdin"):
        script = f'echo "$LINE" | "{sys.executable}" -m hb_assets import {name} --json "$@"'
        home = tmp_path / "home"
        done = piped(home, script, "--format", "ndjson")
        assert done.returncode == 0, done.stderr
        assert json.loads(done.stdout)["drained"]["rows"] == 1
    assert "pass --format" in piped(home, script).stderr


def piped(home: Path, script: str, *arguments: str) -> subprocess.CompletedProcess[str]:
    return subprocess.run(
        ["sh", "-c", script, "sh", *arguments],
        env={**os.environ, "HB_HOME": str(home), "HB_SHARDS": "4", "LINE": line().decode()},
        cwd=ROOT,
        capture_output=True,
        text=True,
        timeout=100,
        check=False,
    )


def waiting_in(pipe: IO[bytes]) -> int:
    """Bytes that nobody has read yet."""
    return int.from_bytes(fcntl.ioctl(pipe, termios.FIONREAD, bytes(4)), sys.byteorder)


def test_ctrl_c_says_what_was_taken(
    outside: None, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The first file was, and Ctrl-C comes while the second one is a pipe that brings nothing."""
    good, pipe = tmp_path / "good.ndjson", tmp_path / "pipe"
    good.write_bytes(line() + b"\n" + line("u2"))
    os.mkfifo(pipe)
    process = subprocess.Popen(
        [sys.executable, "-m", "hb_assets", "import", good, pipe, "--format", "ndjson"],
        cwd=ROOT,
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
    )
    try:
        with pipe.open("wb", buffering=0) as end:  # it was opened at the other end
            end.write(b"\n")
            wait_for(lambda: waiting_in(end) == 0, "the import to read it")
            process.send_signal(signal.SIGINT)
            out, err = process.communicate(timeout=60)
    finally:
        process.kill()
    assert process.returncode == 130, err
    assert out == ""
    assert "2 heartbeats were taken" in err
    assert "is safe" in err
    assert "Traceback" not in err
    assert told("drain")["rows"] == 2


def test_status_misses_a_drain(outside: None, file: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("HB_HEALTH_DRAIN_AGE", "1ms")
    assert told("status")["alarms"] == []
    hb("import", file, "--allow-refused")
    (alarm,) = told("status", code=1)["alarms"]
    assert "no drain for" in alarm
    hb("drain")
    assert told("status")["alarms"] == []
