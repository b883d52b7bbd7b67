"""`hb up` as a user runs it: real processes, signals, kills; and what it refuses to begin."""

from __future__ import annotations

import json
import os
import shutil
import signal
import socket
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable, Iterator
from contextlib import closing
from pathlib import Path
from typing import Any

import httpx
import psutil
import pytest
from typer.testing import CliRunner, Result

from hb_assets.buffer.server import free_port
from hb_assets.cli.app import load_commands
from hb_assets.core.settings import Settings
from hb_assets.gateway.spool.queue import Spool

pytestmark = pytest.mark.system

START_SECONDS = 420


class Installation:
    """An HB_HOME of its own, and the command `hb` on it."""

    def __init__(self, home: Path) -> None:
        self.home = home
        self.variables = {
            "HB_HOME": str(home),
            "HB_GATEWAY_PORT": str(free_port()),
            "HB_DAGSTER_PORT": str(free_port()),
            "HB_DRAIN_SENSOR_INTERVAL": "1",
        }
        self.started: list[subprocess.Popen[bytes]] = []

    def hb(self, *arguments: str, **variables: str) -> Result:
        """What the command does, in this process: its start would take most of a second."""
        with pytest.MonkeyPatch.context() as patch:
            for name, value in (self.variables | variables).items():
                patch.setenv(name, value)
            return CliRunner().invoke(load_commands(), arguments)

    def up(self, *arguments: str) -> subprocess.Popen[bytes]:
        with (self.home.parent / "up.out").open("wb") as out, self.notes.open("wb") as err:
            process = subprocess.Popen(
                [sys.executable, "-m", "hb_assets", "up", *arguments],
                env=os.environ | self.variables,
                stdout=out,
                stderr=err,
                umask=0,  # which leaves nothing open
            )
        self.started.append(process)
        return process

    @property
    def notes(self) -> Path:
        return self.home.parent / "up.err"

    @property
    def answer(self) -> str:
        return (self.home.parent / "up.out").read_text()

    def await_note(self, text: str, process: subprocess.Popen[bytes]) -> None:
        def noted() -> bool:
            assert process.poll() is None or text in self.notes.read_text(), self.notes.read_text()
            return text in self.notes.read_text()

        wait_for(noted, START_SECONDS)

    def state(self) -> dict[str, Any]:
        found: dict[str, Any] = json.loads((self.home / "run" / "up.json").read_text())
        return found

    def processes(self) -> list[psutil.Process]:
        """Every process of this installation: its own environment tells."""
        found = []
        for process in psutil.process_iter():
            try:
                here = process.environ().get("HB_HOME") == str(self.home)
                if here and process.status() != psutil.STATUS_ZOMBIE:
                    found.append(process)
            except psutil.Error:
                continue
        return found

    def await_nothing_left(self) -> None:
        wait_for(lambda: not self.processes(), 40)


@pytest.fixture
def installation() -> Iterator[Installation]:
    folder = Path(tempfile.mkdtemp(prefix="hb-"))  # short: sockets lie below it
    made = Installation(folder / "home")
    yield made
    for process in made.processes():
        process.kill()
    for started in made.started:
        started.wait(30)
    shutil.rmtree(folder)


def wait_for(condition: Callable[[], object], seconds: float) -> None:
    deadline = time.monotonic() + seconds
    while not condition():
        assert time.monotonic() < deadline, "waited in vain"
        time.sleep(0.2)


def one_line(result: Result) -> str:
    assert result.exit_code == 2, result.output
    lines = [line for line in result.stderr.splitlines() if line.startswith("hb: ")]
    assert len(lines) == 1, result.stderr
    assert "Traceback" not in result.stderr
    return lines[0]


@pytest.mark.long
@pytest.mark.timeout(900)
def test_from_the_sample_to_the_end(installation: Installation) -> None:
    """Sample adds up, killed members come back, others are refused, one SIGINT ends all."""
    process = installation.up("--json")
    installation.await_note("until Ctrl-C", process)
    result = json.loads(installation.answer)
    assert result["adds_up"], result["differences"]
    assert len(result["days"]) == 3
    assert all(day["checks"] > 0 for day in result["days"])

    assert f"pid {process.pid}" in one_line(installation.hb("up"))
    assert "HB_SHARDS is 4 here and 16 there" in one_line(installation.hb("status", HB_SHARDS="4"))

    assert installation.hb("sensors", "stop", "drain").exit_code == 0
    remedy = "`hb sensors start drain`"
    wait_for(lambda: remedy in installation.hb("status").stderr, 60)
    sensors = json.loads(installation.hb("sensors", "list", "--json").stdout)
    assert [one["name"] for one in sensors if not one["running"]] == ["drain"]
    assert "no sensor is called 'drained'" in one_line(
        installation.hb("sensors", "stop", "drained")
    )
    assert installation.hb("sensors", "start", "drain").exit_code == 0
    wait_for(lambda: remedy not in installation.hb("status").stderr, 60)

    killed = {member["name"]: member["pid"] for member in installation.state()["members"]}
    assert set(killed) == {"redis", "gateway", "code", "webserver", "daemon"}
    for pid in killed.values():
        os.kill(pid, signal.SIGKILL)

    def all_back() -> bool:
        members = json.loads(installation.hb("status", "--json").stdout)["members"]
        return all(
            member["state"] == "running"
            and member["restarts"] >= 1
            and member["pid"] != killed[member["name"]]
            for member in members
        )

    wait_for(all_back, 60)
    health = f"{installation.state()['gateway']}/health"

    def healthy() -> bool:
        try:
            return httpx.get(health, trust_env=False, verify=False).is_success
        except httpx.HTTPError:
            return False

    wait_for(healthy, 60)
    process.send_signal(signal.SIGINT)
    assert process.wait(60) == 0
    installation.await_nothing_left()
    assert installation.hb("down").exit_code == 0
    every = (installation.home, *installation.home.rglob("*"))
    assert [path for path in every if path.lstat().st_mode & 0o077] == []


@pytest.mark.skipif(sys.platform != "linux", reason="the kernel's parent-death signal")
def test_members_end_when_up_is_killed(installation: Installation) -> None:
    process = installation.up("--no-sample")
    installation.await_note("redis is ready", process)
    process.kill()
    installation.await_nothing_left()


@pytest.mark.long
def test_next_up_ends_what_a_killed_one_left_and_is_ended_by_down(
    installation: Installation,
) -> None:
    process = installation.up("--no-sample")
    installation.await_note("redis is ready", process)

    def recorded() -> set[int]:
        return {one["pid"] for one in installation.state()["processes"]}

    wait_for(
        lambda: recorded() >= {one.pid for one in installation.processes()} - {process.pid}, 20
    )
    supervisord = int((installation.home / "run" / "supervisord.pid").read_text())
    process.kill()
    os.kill(supervisord, signal.SIGKILL)
    process.wait()
    left = installation.processes()
    assert left
    again = installation.up("--no-sample")
    installation.await_note("redis is ready", again)
    assert not [one for one in left if one.is_running()]
    assert installation.hb("down").exit_code == 0  # while it starts
    assert again.wait(10) == 130
    assert installation.processes() == []
    assert "Traceback" not in installation.notes.read_text()


def test_home_that_cannot_be_written(installation: Installation) -> None:
    installation.home.touch()
    assert str(installation.home) in one_line(installation.hb("up"))


@pytest.mark.parametrize("name", ["50%41", "a ;b"])
def test_home_that_its_members_cannot_use(installation: Installation, name: str) -> None:
    home = installation.home / name
    assert name in one_line(installation.hb("up", HB_HOME=str(home)))
    assert not home.exists()


@pytest.mark.parametrize("variable", ["HB_GATEWAY_PORT", "HB_DAGSTER_PORT"])
def test_port_that_is_taken(installation: Installation, variable: str) -> None:
    with socket.create_server(("127.0.0.1", 0)) as taken:
        port = str(taken.getsockname()[1])
        line = one_line(installation.hb("up", **{variable: port}))
    assert port in line
    assert variable in line
    assert installation.processes() == []


def test_redis_that_does_not_answer(installation: Installation) -> None:
    url = f"redis://:secret@127.0.0.1:{free_port()}"
    line = one_line(installation.hb("up", HB_REDIS_URL=url))
    assert "127.0.0.1" in line
    assert "secret" not in line
    assert installation.processes() == []


def test_lake_of_another_shard_count(installation: Installation) -> None:
    lake = installation.home / "lake"
    lake.mkdir(parents=True)
    (lake / "lake.json").write_text('{"format": 1, "shards": 4, "mask_key": ""}')
    assert "HB_SHARDS" in one_line(installation.hb("up"))


def test_setting_that_cannot_be_used(installation: Installation) -> None:
    assert "HB_SHARDS" in one_line(installation.hb("status", HB_SHARDS="many"))


def test_status_shows_what_the_spool_holds(installation: Installation) -> None:
    with closing(Spool(Settings(home=installation.home))) as spool:
        spool.put([{0: [b"{}", b"{}"]}])
    result = installation.hb("status", "--json")
    assert result.exit_code == 1
    found = json.loads(result.stdout)
    assert found["spool"]["heartbeats"] == 2
    (alarm,) = found["alarms"]
    assert "2 heartbeats" in alarm
    assert "the spool holds 2 heartbeats, 5 bytes" in installation.hb("status").stdout


def test_status_when_nothing_runs(installation: Installation) -> None:
    result = installation.hb("status", "--json")
    assert result.exit_code == 0
    found = json.loads(result.stdout)
    assert found["pid"] is None
    assert found["days"] == []
    assert not installation.home.exists()
    shown = installation.hb("status").stdout
    assert "doesn't run" in shown
    assert "durability of what is accepted: fsync" in shown
