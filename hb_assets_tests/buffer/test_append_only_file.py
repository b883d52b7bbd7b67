"""The server's own log: written anew on demand, and looked for in what is buffered."""

from __future__ import annotations

import pytest
import redis

from hb_assets.buffer import append_only_file, external, keys
from hb_assets.buffer.producer import Producer
from hb_assets.core.errors import BufferUnavailableError
from hb_assets.core.settings import Settings


def test_it_is_written_anew(client: redis.Redis, settings: Settings) -> None:
    Producer(client, settings).append({0: [b"somebody's heartbeat"]})
    client.xtrim(keys.stream(0), maxlen=0)
    rewritten = client.info("persistence")["aof_rewrites"] if _counts(client) else None
    assert append_only_file.rewrite(client)
    found = client.info("persistence")
    assert not found["aof_rewrite_in_progress"]
    assert found["aof_last_bgrewrite_status"] == "ok"
    if rewritten is not None:
        assert found["aof_rewrites"] > rewritten


def _counts(client: redis.Redis) -> bool:
    return "aof_rewrites" in client.info("persistence")


def test_a_server_that_keeps_none(client: redis.Redis) -> None:
    client.config_set("appendonly", "no")
    try:
        assert not append_only_file.rewrite(client)
    finally:
        client.config_set("appendonly", "yes")


def test_a_rewrite_that_takes_too_long_is_told(client: redis.Redis) -> None:
    with pytest.raises(BufferUnavailableError, match="still rewriting"):
        append_only_file._wait(_Busy(client), 0)  # type: ignore[arg-type]  # all that it asks of a client


class _Busy:
    """A real server's answers, but for one."""

    def __init__(self, client: redis.Redis) -> None:
        self._client = client

    def info(self, section: str) -> dict[str, object]:
        return {**self._client.info(section), "aof_rewrite_in_progress": 1}


def test_what_is_buffered_is_searched_page_by_page(
    client: redis.Redis, settings: Settings, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(append_only_file, "_PAGE", 2)
    for number in range(5):
        external.append(client, 3, b"number %d" % number)
    assert append_only_file.mentions(client, settings, [b"number 4", b"nobody"])
    assert not append_only_file.mentions(client, settings, [b"number 5"])
