"""Fixtures that all tests share: settings on an empty home, and real servers behind them."""

from __future__ import annotations

import contextlib
import os
import signal
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest
import redis

from hb_assets.buffer.connection import connect
from hb_assets.buffer.consumer import Consumer
from hb_assets.lake.store import Lake
from hb_assets.settings import Settings
from hb_assets_tests.servers import running_server, server_program

SERVERS = ("valkey", "redis")
"""The newest server that has to work, and Debian's."""


@pytest.fixture(autouse=True, scope="session")
def no_settings_of_the_developer() -> Iterator[None]:
    """Tests see the defaults, whatever HB_ variables the shell exports."""
    with pytest.MonkeyPatch.context() as patch:
        for name in [name for name in os.environ if name.startswith("HB_")]:
            patch.delenv(name)
        yield


@pytest.fixture(autouse=True, scope="session")
def signals_as_in_the_foreground() -> None:
    """A shell has SIGINT ignored in its background jobs, and every process that they start.

    Dagster, run in this process, sets SIGTERM to what SIGINT is: then no child of a test would end
    on a SIGTERM any more, neither those that have to nor a pool's.
    """
    if signal.getsignal(signal.SIGINT) is signal.SIG_IGN:
        signal.signal(signal.SIGINT, signal.default_int_handler)


@pytest.fixture(scope="session")
def server_urls(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Callable[[str], str]]:
    """Starts each kind of server when it is first asked for, once per worker."""
    started: dict[str, str] = {}
    with contextlib.ExitStack() as stack:

        def url_of(kind: str) -> str:
            if kind not in started:
                folder = tmp_path_factory.mktemp(kind)
                started[kind] = stack.enter_context(running_server(server_program(kind), folder))
            return started[kind]

        yield url_of


@pytest.fixture(params=SERVERS)
def redis_url(request: pytest.FixtureRequest, server_urls: Callable[[str], str]) -> str:
    """A server with nothing in it."""
    url = server_urls(request.param)
    with contextlib.closing(redis.Redis.from_url(url)) as client:
        client.flushall()
    return url


@pytest.fixture
def settings(redis_url: str, tmp_path: Path) -> Settings:
    """A home and a lake that don't exist yet, four shards, an empty server."""
    return Settings(home=tmp_path / "home", redis_url=redis_url, shards=4)


@pytest.fixture
def client(settings: Settings) -> Iterator[redis.Redis]:
    with contextlib.closing(connect(settings)) as connected:
        yield connected


@pytest.fixture
def lake(settings: Settings) -> Lake:
    return Lake.open(settings)


@pytest.fixture
def consumer(client: redis.Redis, settings: Settings) -> Iterator[Consumer]:
    with contextlib.closing(Consumer(client, settings)) as opened:
        opened.open()
        yield opened
