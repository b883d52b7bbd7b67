from __future__ import annotations

import asyncio
import contextlib
import os
import platform
import shutil
import signal
import socket
import stat
import subprocess
import sys
import tempfile
from collections.abc import Iterator
from pathlib import Path

import pytest
import redis
from redis.backoff import NoBackoff
from redis.retry import Retry

from hb_assets.buffer import launch, server
from hb_assets.buffer.connection import connect, connect_async, ping
from hb_assets.buffer.depth import scanned
from hb_assets.buffer.producer import AsyncProducer
from hb_assets.core.errors import AlreadyRunningError, BufferUnavailableError, SettingsError
from hb_assets.core.settings import Settings
from hb_assets_tests.servers import wait_for

COMMAND = """
import sys
from pathlib import Path
from hb_assets.buffer import server
from hb_assets.buffer.connection import connect, ping
from hb_assets.core.settings import Settings
settings = Settings(home=Path(sys.argv[1]))
with server.borrowed(settings):
    try:
        print("using", flush=True)
        sys.stdin.read()
    except KeyboardInterrupt:
        ping(connect(settings))
        print("interrupted, but served to the end", flush=True)
"""
"""A command that uses the embedded server until its input ends."""


@pytest.fixture
def home() -> Iterator[Path]:
    """A path short enough for a socket, as pytest's own may not be."""
    folder = Path(tempfile.mkdtemp(prefix="hb-"))
    yield folder
    pid = server._pid(Settings(home=folder))
    shutil.rmtree(folder)
    if pid is not None:
        os.kill(pid, signal.SIGKILL)
        pytest.fail("a server was left behind")


@pytest.fixture
def embedded(home: Path) -> Settings:
    return Settings(home=home)


@contextlib.contextmanager
def command(settings: Settings) -> Iterator[subprocess.Popen[str]]:
    """The command above, running, in a process group of its own."""
    process = begun(settings)
    try:
        assert process.stdout is not None
        assert process.stdout.readline() == "using\n"
        yield process
    finally:
        output, _ = process.communicate(timeout=30)
        assert not output


def begun(settings: Settings) -> subprocess.Popen[str]:
    return subprocess.Popen(
        [sys.executable, "-c", COMMAND, str(settings.home)],
        stdin=subprocess.PIPE,
        stdout=subprocess.PIPE,
        text=True,
        start_new_session=True,
    )


@contextlib.contextmanager
def member(settings: Settings) -> Iterator[subprocess.Popen[bytes]]:
    """The server as `hb up`'s supervisor runs it."""
    process = subprocess.Popen(server.prepare(settings).argv)
    try:
        wait_for(lambda: server.running(settings), "the server")
        yield process
    finally:
        process.terminate()
        process.wait(timeout=30)


def pid_of(settings: Settings) -> int:
    pid = server._pid(settings)
    assert pid is not None
    return pid


def test_a_borrowed_server_runs_for_the_time_of_the_block(embedded: Settings) -> None:
    assert not server.running(embedded)
    with server.borrowed(embedded):
        with contextlib.closing(connect(embedded)) as client:
            ping(client)
            client.set("kept", "yes")
            assert client.config_get("appendfsync") == {"appendfsync": "always"}
            assert client.config_get("maxmemory-policy") == {"maxmemory-policy": "noeviction"}
        assert os.getsid(pid_of(embedded)) == pid_of(embedded), "out of the terminal's reach"
        assert stat.S_IMODE(embedded.run_dir.stat().st_mode) == 0o700
        assert (embedded.log_dir / "redis.log").stat().st_size > 0
    assert not server.running(embedded)
    assert server._pid(embedded) is None

    with server.borrowed(embedded), contextlib.closing(connect(embedded)) as client:
        assert client.get("kept") == b"yes"


def test_blocks_may_be_nested(embedded: Settings) -> None:
    with server.borrowed(embedded):
        with server.borrowed(embedded):
            first = pid_of(embedded)
        assert server.running(embedded)
        assert pid_of(embedded) == first


def test_the_last_of_overlapping_commands_ends_the_server(embedded: Settings) -> None:
    with contextlib.ExitStack() as stack:
        with command(embedded):
            first = pid_of(embedded)
            stack.enter_context(command(embedded))
            assert pid_of(embedded) == first
        assert server.running(embedded), "its starter has left, the other one uses it"
        assert pid_of(embedded) == first
    assert server._pid(embedded) is None


def test_commands_that_start_together_share_one_server(embedded: Settings) -> None:
    processes = [begun(embedded) for _ in range(4)]
    outputs = [process.communicate(timeout=60)[0] for process in processes]

    assert outputs == ["using\n"] * 4
    assert server._pid(embedded) is None


def test_a_server_whose_starter_was_killed_is_used_and_ended_by_the_next(
    embedded: Settings,
) -> None:
    with command(embedded) as killed:
        left = pid_of(embedded)
        killed.kill()
        killed.wait()
        with server.borrowed(embedded):
            assert pid_of(embedded) == left
            assert server.running(embedded)
    assert server._pid(embedded) is None


def test_ctrl_c_ends_the_command_first_and_the_server_with_it(embedded: Settings) -> None:
    process = begun(embedded)
    assert process.stdout is not None
    assert process.stdout.readline() == "using\n"
    os.killpg(process.pid, signal.SIGINT)

    assert process.communicate(timeout=30)[0] == "interrupted, but served to the end\n"
    assert server._pid(embedded) is None


def test_the_server_of_a_running_up_is_used_and_left_alone(embedded: Settings) -> None:
    with server.exclusive(embedded, timeout=0), member(embedded):
        first = pid_of(embedded)
        with server.borrowed(embedded):
            assert pid_of(embedded) == first
        with command(embedded):
            pass
        assert server.running(embedded)
        assert pid_of(embedded) == first


def test_a_killed_member_comes_back_on_the_same_address(embedded: Settings) -> None:
    with server.exclusive(embedded, timeout=0):
        files = server.prepare(embedded)
        with member(embedded) as killed:
            killed.kill()
            again = subprocess.Popen(files.argv)
            with contextlib.closing(connect(embedded)) as client:
                wait_for(lambda: server.running(embedded), "the server to come back")
                ping(client)
            again.terminate()
            again.wait(timeout=30)


def test_what_was_confirmed_survives_a_kill_of_the_server(embedded: Settings) -> None:
    async def append_while_it_is_killed() -> int:
        confirmed = 0
        async with connect_async(embedded) as client:
            producer = AsyncProducer(client, embedded)
            await producer.start()
            for number in range(200):
                if number == 100:
                    os.kill(pid_of(embedded), signal.SIGKILL)
                [outcome] = (await producer.append({0: [b"{}"]})).values()
                confirmed += outcome is None
                if outcome is not None:
                    assert str(embedded.run_dir / "redis.sock") in str(outcome)
                    break
            await producer.close()
        return confirmed

    with server.exclusive(embedded, timeout=0):
        with member(embedded):
            confirmed = asyncio.run(append_while_it_is_killed())
        with member(embedded), contextlib.closing(connect(embedded)) as client:
            assert confirmed >= 100
            assert scanned(client, embedded)[0] >= confirmed


def test_only_one_up_at_a_time(embedded: Settings) -> None:
    with (
        server.exclusive(embedded, timeout=0),
        pytest.raises(AlreadyRunningError, match=str(embedded.home)),
        server.exclusive(embedded, timeout=0),
    ):
        pass
    with server.exclusive(embedded, timeout=0):
        pass


def test_an_up_waits_for_a_command_to_end(embedded: Settings) -> None:
    with command(embedded):
        with (
            pytest.raises(AlreadyRunningError, match="still uses the embedded server"),
            server.exclusive(embedded, timeout=0.1),
        ):
            pass
        assert server.running(embedded)


def test_an_up_ends_what_a_killed_command_left(embedded: Settings) -> None:
    with command(embedded) as killed:
        killed.kill()
        killed.wait()
    assert server.running(embedded)

    with server.exclusive(embedded, timeout=5):
        assert server._pid(embedded) is None


def test_two_servers_never_share_a_folder(embedded: Settings) -> None:
    with server.borrowed(embedded):
        lock = embedded.run_dir / "redis.lock"
        second = subprocess.run(
            [sys.executable, "-I", "-S", launch.__file__, str(lock), "0", "/bin/true"],
            capture_output=True,
            text=True,
            check=False,
        )
        assert second.returncode == launch.HELD
        assert str(lock) in second.stderr
        assert server.running(embedded)


def test_a_long_path_falls_back_to_a_port_with_a_password(tmp_path: Path) -> None:
    settings = Settings(home=tmp_path / ("long" * 30) / 'with "quotes" and spaces')
    with pytest.raises(BufferUnavailableError, match="hb up"):
        connect(settings)

    with server.borrowed(settings):
        with contextlib.closing(connect(settings)) as client:
            ping(client)
            where = client.connection_pool.connection_kwargs
        assert where["host"] == "127.0.0.1"
        with (
            contextlib.closing(
                redis.Redis("127.0.0.1", where["port"], retry=Retry(NoBackoff(), 0))
            ) as stranger,
            pytest.raises(redis.AuthenticationError),
        ):
            stranger.ping()
        for name in ("redis.url", "redis.conf"):
            assert stat.S_IMODE((settings.run_dir / name).stat().st_mode) == 0o600
    assert server._pid(settings) is None


def test_a_home_that_is_no_folder_is_one_line(tmp_path: Path) -> None:
    (tmp_path / "home").write_text("a file")

    with (
        pytest.raises(SettingsError, match="HB_HOME: can't write to"),
        server.borrowed(Settings(home=tmp_path / "home")),
    ):
        pass


def test_a_socket_that_something_else_listens_at_is_named(embedded: Settings) -> None:
    embedded.run_dir.mkdir(parents=True)
    with socket.socket(socket.AF_UNIX) as other:
        other.bind(str(embedded.run_dir / "redis.sock"))
        other.listen()
        with (
            pytest.raises(BufferUnavailableError, match=r"redis\.sock"),
            server.borrowed(embedded),
        ):
            pass


def test_a_socket_that_a_killed_server_left_is_no_obstacle(embedded: Settings) -> None:
    with server.borrowed(embedded):
        os.kill(pid_of(embedded), signal.SIGKILL)
        wait_for(lambda: server._pid(embedded) is None, "the server to be gone")
    with server.borrowed(embedded):
        assert server.running(embedded)


def test_a_platform_without_a_server_is_told_what_to_do(
    embedded: Settings, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(platform, "machine", lambda: "riscv64")

    with pytest.raises(BufferUnavailableError, match="HB_REDIS_URL"), server.borrowed(embedded):
        pass


def test_a_server_that_does_not_come_up_shows_its_last_words(embedded: Settings) -> None:
    append_only = embedded.redis_dir / "appendonlydir"
    append_only.mkdir(parents=True)
    (append_only / "appendonly.aof.manifest").write_text("nonsense\n")

    with pytest.raises(BufferUnavailableError) as caught, server.borrowed(embedded):
        pass

    message = str(caught.value)
    assert "manifest" in message
    assert str(embedded.log_dir / "redis.log") in message
    assert "\n" not in message


def test_a_torn_tail_costs_only_what_was_never_confirmed(embedded: Settings) -> None:
    with server.borrowed(embedded), contextlib.closing(connect(embedded)) as client:
        client.set("confirmed", "1")
    [increments] = (embedded.redis_dir / "appendonlydir").glob("*.incr.aof")
    with increments.open("ab") as file:
        file.write(b"*3\r\n$3\r\nSET\r\n$4\r\nto")

    with server.borrowed(embedded), contextlib.closing(connect(embedded)) as client:
        assert client.keys() == [b"confirmed"]


def test_a_redis_of_ones_own_needs_no_server(tmp_path: Path) -> None:
    settings = Settings(home=tmp_path / "home", redis_url="redis://127.0.0.1:1")

    with server.borrowed(settings):
        assert not settings.home.exists()
