"""A server that comes back with less than it had on disk.

What was never confirmed may be gone; of what was, the audit misses every heartbeat.
"""

from __future__ import annotations

import os
import random
import signal
import threading
from collections.abc import Iterator
from contextlib import closing
from pathlib import Path

import pytest

from chaos.buffer_server import BufferServer
from chaos.proxy import Proxy
from hb_assets.buffer import depth
from hb_assets.buffer.connection import connect
from hb_assets.buffer.producer import Producer
from hb_assets.core.settings import Settings
from hb_assets.lake.storage.store import Lake
from hb_assets.pipeline.audit import audit
from hb_assets.pipeline.drain import drain
from hb_assets_tests import victims
from hb_assets_tests.pipeline.test_drain import MIDNIGHT, consuming, heartbeat
from hb_assets_tests.servers import wait_for


class Everything(random.Random):
    """Chance that always takes the lower bound."""

    def randint(self, a: int, b: int) -> int:
        return min(a, b)


class Torn:
    """A server, a proxy before it, and clients' settings."""

    def __init__(self, home: Path, proxy: Proxy) -> None:
        own = Settings(home=home, shards=2)
        self.proxy = proxy
        self.server = BufferServer(own, proxy)
        self.server.start()
        url = f"redis://127.0.0.1:{proxy.port}"
        self.settings = Settings(home=home, shards=2, redis_url=url, redis_timeout="1s")  # type: ignore[arg-type]  # as a variable says it
        self.lake = Lake.open(self.settings)
        self.size = 0

    def append(self, *batches: str) -> None:
        """Batches of ten; each one has its own user."""
        with closing(connect(self.settings)) as client:
            for batch in batches:
                lines = [heartbeat(batch, at=MIDNIGHT + n) for n in range(10)]
                assert Producer(client, self.settings).append({0: lines}) == {0: None}
                self.size = self.server.append_only_file().stat().st_size

    def drain(self) -> None:
        with consuming(self.settings) as consumer:
            drain(consumer, self.lake, self.settings, until_empty=True)

    def lose(self, size: int) -> None:
        """Kill the server, cut its file to this size, start it."""
        self.server.signal(signal.SIGKILL)
        os.truncate(self.server.append_only_file(), size)
        self.server.start()

    def missing(self) -> list[str]:
        with closing(connect(self.settings)) as client:
            return audit(client, self.lake, self.settings).differences


@pytest.fixture
def torn(tmp_path: Path) -> Iterator[Torn]:
    home = tmp_path / "home"
    with closing(Proxy(str(Settings(home=home).run_dir / "redis.sock"))) as proxy:
        made = Torn(home, proxy)
        try:
            yield made
        finally:
            made.server.end()


def test_what_no_answer_had_confirmed_may_be_cut_off(torn: Torn) -> None:
    torn.append("u1", "u2")
    outcomes: list[object] = []

    with closing(connect(torn.settings)) as client:
        producer = Producer(client, torn.settings)
        producer.append({0: [heartbeat("u2")]})

        def send() -> None:
            wait_for(lambda: torn.proxy._held, "answers to be held")
            outcomes.extend(producer.append({0: [heartbeat("u3")] * 7}).values())

        sending = threading.Thread(target=send)
        sending.start()
        torn.server.kill_cut(Everything())
        sending.join(timeout=30)
        # It may have tried once more, and succeeded. The copy that was cut off is no loss.
        copies = 1 if outcomes == [None] else 0
        assert torn.server.cut_bytes > 0
        assert torn.missing() == []
        assert depth.depths(client, torn.settings).states[0].heartbeats == 21 + 7 * copies
    torn.drain()
    assert torn.missing() == []


def test_half_a_command_at_the_end_is_no_loss(torn: Torn) -> None:
    torn.append("u1", "u2")
    torn.server.kill_torn()
    torn.append("u3")
    torn.drain()
    assert torn.missing() == []


def test_what_was_confirmed_and_never_drained_is_missed(torn: Torn) -> None:
    torn.append("u1")
    torn.drain()
    torn.append("u2")
    confirmed = torn.size
    torn.append("u3", "u4")
    torn.lose(confirmed)
    lost = "20 heartbeats are missing"
    assert any(lost in found and "set back by 20" in found for found in torn.missing())
    torn.drain()
    assert any(lost in found for found in torn.missing())
    torn.append("u5", "u6", "u7")  # more than what is gone: the loss must not be covered by it
    assert any(lost in found for found in torn.missing())
    torn.drain()
    assert any(lost in found for found in torn.missing())


def test_what_was_drained_before_is_not_missed(torn: Torn) -> None:
    """The cut takes appends and acknowledgements of what lies in the lake, and one batch more."""
    torn.append("u1")
    confirmed = torn.size
    torn.append("u2", "u3")
    torn.drain()
    torn.append("u4")
    torn.lose(confirmed)
    torn.drain()
    assert any("10 heartbeats are missing" in found for found in torn.missing())
    torn.append("u4")  # its client has kept it: sent again, it is there, and yet was lost once
    torn.drain()
    assert any("10 heartbeats are missing" in found for found in torn.missing())


def test_the_command_says_so(torn: Torn) -> None:
    torn.append("u1")
    confirmed = torn.size
    torn.append("u2")
    with victims.running(torn.settings, "audit") as process:
        assert process.wait(timeout=60) == 0
    torn.lose(confirmed)
    with victims.running(torn.settings, "audit") as process:
        assert process.wait(timeout=60) == 1
    assert "10 heartbeats are missing" in victims.said(torn.settings)
