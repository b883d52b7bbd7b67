"""Starts and ends the servers that are measured: buffers, gateways, the apps beside them."""

from __future__ import annotations

import contextlib
import dataclasses
import http.client
import os
import signal
import subprocess
import sys
import time
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path

import psutil
import redis

from hb_assets.buffer import keys, server
from hb_assets.core.settings import Settings
from hb_assets.gateway.auth import keyring

ROOT = Path(__file__).resolve().parent.parent
PATIENCE_SECONDS = 60.0
AMPLE = {
    "HB_BUFFER_MAX_HEARTBEATS": str(10**10),
    "HB_BUFFER_MAX_BYTES": "1TiB",
    **{f"HB_LIMIT_{of}": "1000000000/1s" for of in ("USER", "KEY", "IP", "QUERIES")},
}
"""Bounds and rate limits that are in force, but so high that nothing is ever refused."""


@dataclass(frozen=True, slots=True)
class Buffer:
    """An embedded server of our own: Valkey with appendfsync always, on a unix socket."""

    url: str
    client: redis.Redis
    shards: int

    def appended(self) -> int:
        """Heartbeats that the ledgers say were appended."""
        found = (self.client.hget(keys.ledger(shard), "appended") for shard in range(self.shards))
        return sum(int(count or 0) for count in found)

    def clear(self) -> None:
        """Empty the streams. The ledgers stay: gateways know what they have appended."""
        for shard in range(self.shards):
            self.client.xtrim(keys.stream(shard), maxlen=0, approximate=False)
        self.client.delete("heartbeats")


@contextlib.contextmanager
def buffer(folder: Path) -> Iterator[Buffer]:
    """A server for the time of the block, with its files in `folder`."""
    settings = Settings(home=folder)
    with server.borrowed(settings):
        url = server.url(settings)
        with contextlib.closing(redis.Redis.from_url(url)) as client:
            assert client.config_get("appendfsync") == {"appendfsync": "always"}
            yield Buffer(url, client, settings.shards)


@dataclass(frozen=True, slots=True)
class Served:
    """A process that answers HTTP on 127.0.0.1."""

    port: int
    process: psutil.Process
    api_key: str | None = None

    @property
    def url(self) -> str:
        """Its address."""
        return f"http://127.0.0.1:{self.port}"

    def resident_mb(self) -> float:
        """Memory it holds now, in MB (2**20 bytes)."""
        return float(self.process.memory_info().rss / 2**20)


@contextlib.contextmanager
def gateway(
    folder: Path,
    buffer: Buffer,
    *,
    by_granian: bool = False,
    proxied: bool = False,
    **more: str,
) -> Iterator[Served]:
    """A gateway behind an API key, its home in `folder`; `more` are settings of its own.

    As `hb serve` serves it, or the same application by granian, with one worker; `proxied`: behind
    a proxy on this machine.
    """
    port = server.free_port()
    _, api_key = keyring.create(Settings(home=folder), "bench", (keyring.INGEST, keyring.READ))
    environment = {
        "HB_HOME": str(folder),
        "HB_REDIS_URL": buffer.url,
        "HB_GATEWAY_PORT": str(port),
        **AMPLE,
        **more,
    }
    if proxied:
        environment["HB_TRUSTED_PROXIES"] = "127.0.0.1"
    argv = [sys.executable, "-m", "hb_assets", "serve"]
    if by_granian:
        argv = [sys.executable, "-m", "granian", "--interface", "asgi", "--port", str(port)]
        argv += ["--loop", "uvloop", "--no-ws", "--no-access-log", "--factory"]
        argv += ["bench.application:gateway"]
    with _serving(argv, environment, port, folder) as found:
        yield dataclasses.replace(found, api_key=api_key)


@contextlib.contextmanager
def app(
    module: str, folder: Path, *, proxied: bool = False, **environment: str
) -> Iterator[Served]:
    """An app of this package, on the same server as the gateway; `proxied` as there."""
    port = server.free_port()
    argv = [sys.executable, "-m", "bench.host", module, str(port)] + ["proxied"] * proxied
    with _serving(argv, environment, port, folder) as found:
        yield found


@contextlib.contextmanager
def _serving(
    argv: Sequence[str], environment: Mapping[str, str], port: int, folder: Path
) -> Iterator[Served]:
    inherited = {name: text for name, text in os.environ.items() if not name.startswith("HB_")}
    folder.mkdir(parents=True, exist_ok=True)
    log = folder / "served.log"
    with log.open("wb") as out:
        child = subprocess.Popen(
            argv,
            cwd=ROOT,
            env={**inherited, **environment},
            stdin=subprocess.DEVNULL,
            stdout=out,
            stderr=out,
            # The terminal's Ctrl-C is for us; we end it.
            start_new_session=True,
        )
    try:
        _await_answer(child, port, argv, log)
        yield Served(port, psutil.Process(child.pid))
    finally:
        child.send_signal(signal.SIGTERM)
        try:
            child.wait(PATIENCE_SECONDS)
        except subprocess.TimeoutExpired:
            child.kill()
            child.wait()


def _await_answer(
    child: subprocess.Popen[bytes], port: int, argv: Sequence[str], log: Path
) -> None:
    deadline = time.monotonic() + PATIENCE_SECONDS
    while True:
        connection = http.client.HTTPConnection("127.0.0.1", port, timeout=5)
        try:
            with contextlib.closing(connection):
                connection.request("GET", "/health")
                connection.getresponse().read()
            return
        except (OSError, http.client.HTTPException):
            if child.poll() is not None or time.monotonic() > deadline:
                raise SystemExit(
                    f"bench: {' '.join(argv[1:])} doesn't serve:\n"
                    f"{log.read_text(errors='replace')[-2000:]}"
                ) from None
            time.sleep(0.05)
