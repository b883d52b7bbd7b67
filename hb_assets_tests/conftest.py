"""Fixtures that all tests share: settings on an empty home, and real servers behind them."""

from __future__ import annotations

import contextlib
import os
import shutil
import signal
import tempfile
from collections.abc import Callable, Iterator
from pathlib import Path

import hypothesis
import pytest
import redis

from hb_assets.buffer.connection import connect
from hb_assets.buffer.consumer import Consumer
from hb_assets.core.settings import Settings
from hb_assets.lake.storage.store import Lake
from hb_assets_tests.servers import running_server, server_program

SERVERS = ("valkey", "redis")
"""The newest server that has to work, and Debian's."""

VALKEY = pytest.mark.parametrize("redis_url", ["valkey"], indirect=True)
"""For a test where one kind of server is enough, in a module where others need both."""


# the same checks as in a usual run, with more examples, and others each time
hypothesis.settings.register_profile(
    "long", hypothesis.settings.get_profile("ci"), max_examples=1000, derandomize=False
)

CHILDREN = Path(__file__).with_name("children")
"""Its sitecustomize.py runs first in each Python process that a test starts."""

IN_MEMORY = Path("/dev/shm")
"""Where Linux keeps files in memory."""
ROOM = 2 * 2**30
"""Bytes that have to be free there."""


def pytest_configure() -> None:
    """Files of tests lie in memory where there is room, unless TMPDIR says where.

    Thousands of fsyncs of servers and lakes would wait for a disk. What a failing one does is shown
    by making it fail; no test can show what a disk still has after a power cut.
    """
    with contextlib.suppress(OSError):
        if "TMPDIR" not in os.environ and shutil.disk_usage(IN_MEMORY).free >= ROOM:
            os.environ["TMPDIR"] = str(IN_MEMORY)
            tempfile.tempdir = None  # it may have been asked for already


def pytest_addoption(parser: pytest.Parser) -> None:
    parser.addoption(
        "--fast", action="store_true", help="leave out what another Python can't change"
    )


@pytest.hookimpl(trylast=True)  # after they were shuffled
def pytest_collection_modifyitems(config: pytest.Config, items: list[pytest.Item]) -> None:
    items.sort(key=lambda item: item.get_closest_marker("long") is None)
    left_out = [
        item
        for item in items
        if (config.getoption("--fast") and _is_slow(item))
        or (config.getoption("--hypothesis-profile") != "long" and _is_thorough(item))
    ]
    config.hook.pytest_deselected(items=left_out)
    gone = set(left_out)
    items[:] = [item for item in items if item not in gone]


def _is_slow(item: pytest.Item) -> bool:
    """Whether a test is slow, starts a whole system, or does again what it does on Valkey."""
    again = getattr(item, "callspec", None)
    return any(item.get_closest_marker(name) for name in ("long", "slow", "system")) or (
        again is not None and again.params.get("redis_url") == "redis"
    )


def _is_thorough(item: pytest.Item) -> bool:
    return item.get_closest_marker("thorough") is not None


@pytest.fixture(autouse=True, scope="session")
def no_settings_of_the_developer() -> Iterator[None]:
    """Tests see the defaults, whatever HB_ variables the shell exports."""
    with pytest.MonkeyPatch.context() as patch:
        for name in [name for name in os.environ if name.startswith("HB_")]:
            patch.delenv(name)
        yield


@pytest.fixture(autouse=True, scope="session")
def ignored_by_children(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Path]:
    """Where the Python processes that tests start note exceptions that Python ignores."""
    log = tmp_path_factory.mktemp("children") / "unraisable.log"
    log.touch()
    own = [str(CHILDREN), str(CHILDREN.parents[1])]  # they import this tree, wherever they run
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("PYTHONPATH", os.pathsep.join(own), prepend=os.pathsep)
        patch.setenv("TEST_UNRAISABLE_LOG", str(log))
        yield log
    assert not log.read_text()


@pytest.fixture(autouse=True)
def children_raise_nothing_unseen(ignored_by_children: Path) -> Iterator[None]:
    """Fails a test whose processes print "Exception ignored in", or leave a file unclosed."""
    yield
    noted = ignored_by_children.read_text()
    ignored_by_children.write_text("")
    assert not noted, noted


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
    """A server with nothing in it; each test runs on both kinds."""
    return emptied(server_urls(request.param))


@pytest.fixture
def on_valkey(server_urls: Callable[[str], str]) -> str:
    """A Valkey with nothing in it: `redis_url = on_valkey` in a module where one kind is enough.

    That is so where the buffer is used and its commands are not what is tested: `buffer/` and what
    is left on both kinds do that.
    """
    return emptied(server_urls("valkey"))


def emptied(url: str) -> str:
    """The server at this URL, without what other tests have left there."""
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
