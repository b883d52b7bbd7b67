from __future__ import annotations

import pytest
import redis

from hb_assets.buffer import durability
from hb_assets.errors import BufferUnavailableError
from hb_assets.settings import Settings


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
