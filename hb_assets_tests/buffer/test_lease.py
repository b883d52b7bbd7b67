"""Leases: held by one at a time, and never a reason to wait for ever."""

from __future__ import annotations

import contextlib
from datetime import date, timedelta

import redis

from hb_assets.buffer import keys
from hb_assets.buffer.connection import connect
from hb_assets.buffer.lease import SECONDS, Leases
from hb_assets.core.settings import Settings

DAY = date(2025, 1, 15)


def impatient(settings: Settings) -> Settings:
    return settings.model_copy(update={"lock_wait": timedelta(milliseconds=50)})


def test_held_by_one_at_a_time(client: redis.Redis, settings: Settings) -> None:
    ours, theirs = (Leases(client, impatient(settings)) for _ in range(2))
    with ours(DAY, 0) as held:
        assert held
        with theirs(DAY, 0) as held_too:
            assert not held_too, "it goes on without"
        with theirs(DAY, 1) as another:
            assert another
        assert 0 < client.ttl(keys.lease(0, DAY)) <= SECONDS
    assert not client.exists(keys.lease(0, DAY))


def test_a_lease_that_ended_meanwhile_is_not_taken_from_its_next_holder(
    client: redis.Redis, settings: Settings
) -> None:
    leases = Leases(client, impatient(settings))
    with leases(DAY, 0) as held:
        assert held
        client.delete(keys.lease(0, DAY))
        client.set(keys.lease(0, DAY), "another's")
    assert client.get(keys.lease(0, DAY)) == b"another's"


def test_without_redis_the_work_goes_on(settings: Settings) -> None:
    away = settings.model_copy(
        update={"redis_url": type(settings.redis_url)("redis://127.0.0.1:1")}  # type: ignore[misc]  # a SecretStr
    )
    with contextlib.closing(connect(away)) as client, Leases(client, away)(DAY, 0) as held:
        assert not held
