from __future__ import annotations

import asyncio
import contextlib
from pathlib import Path

import pytest
import redis

from hb_assets.buffer import durability
from hb_assets.buffer.connection import connect, connect_async
from hb_assets.buffer.producer import AsyncProducer, Outcomes, Producer
from hb_assets.core.errors import BufferUnavailableError
from hb_assets.core.settings import Settings
from hb_assets_tests.conftest import SERVERS
from hb_assets_tests.servers import running_server, server_program


def test_a_server_that_fsyncs_every_write_is_durable(
    client: redis.Redis, settings: Settings
) -> None:
    durability.require(client, settings)
    assert durability.standing(client, settings) == durability.Standing("fsync")


@pytest.mark.parametrize(
    ("name", "value", "safe"),
    [
        ("appendfsync", "everysec", "always"),
        ("appendonly", "no", "yes"),
        ("no-appendfsync-on-rewrite", "yes", "no"),
    ],
)
def test_a_server_that_may_forget_is_refused(
    client: redis.Redis, settings: Settings, name: str, value: str, safe: str
) -> None:
    client.config_set(name, value)
    try:
        with pytest.raises(BufferUnavailableError, match=f"has .*{name}={value}") as refused:
            durability.require(client, settings)
        assert durability.standing(client, settings).fault == str(refused.value)
        durability.require(client, settings.model_copy(update={"durability": "memory"}))
        durability.require(client, settings.model_copy(update={"assume_fsync": True}))
    finally:
        client.config_set(name, safe)
    assert "HB_DURABILITY=memory" in str(refused.value)
    assert "\n" not in str(refused.value)


def test_a_server_that_evicts_is_refused_in_any_mode(
    client: redis.Redis, settings: Settings
) -> None:
    client.config_set("maxmemory-policy", "allkeys-lru")
    try:
        for mode in ("fsync", "memory"):
            with pytest.raises(BufferUnavailableError, match="set it to noeviction"):
                durability.require(client, settings.model_copy(update={"durability": mode}))
    finally:
        client.config_set("maxmemory-policy", "noeviction")


def test_a_server_whose_configuration_is_forbidden_has_to_be_trusted(
    client: redis.Redis, settings: Settings
) -> None:
    client.acl_setuser(
        "shy", enabled=True, passwords=["+pass"], categories=["+@all"], commands=["-config"]
    )
    try:
        shy = redis.Redis.from_url(
            settings.redis_url.get_secret_value() if settings.redis_url else "",
            username="shy",
            password="pass",
            protocol=2,
        )
        with shy, pytest.raises(BufferUnavailableError, match="HB_ASSUME_FSYNC=1"):
            durability.require(shy, settings)
    finally:
        client.acl_deluser("shy")


@pytest.mark.parametrize("kind", SERVERS)
@pytest.mark.parametrize("in_a_loop", [False, True])
def test_a_server_that_was_set_back_is_verified_anew(
    kind: str, in_a_loop: bool, tmp_path: Path
) -> None:
    with running_server(server_program(kind), tmp_path) as url:
        settings = Settings(home=tmp_path / "home", redis_url=url, shards=2)
        with contextlib.closing(connect(settings)) as client:

            def set_back() -> None:
                client.flushall()
                client.config_set("appendfsync", "everysec")

            async def appended() -> Outcomes:
                async with connect_async(settings) as other:
                    producer = AsyncProducer(other, settings)
                    await producer.start()
                    try:
                        assert await producer.append({0: [b"{}"]}) == {0: None}
                        set_back()
                        return await producer.append({0: [b"{}"]})
                    finally:
                        await producer.close()

            if in_a_loop:
                outcomes = asyncio.run(appended())
            else:
                producer = Producer(client, settings)
                assert producer.append({0: [b"{}"]}) == {0: None}
                set_back()
                outcomes = producer.append({0: [b"{}"]})
    assert "has appendonly=yes, appendfsync=everysec" in str(outcomes[0])
