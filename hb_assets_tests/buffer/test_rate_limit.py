"""Rate limits: the algorithm against its definition, and what processes learn from each other."""

from __future__ import annotations

import asyncio
import contextlib
from collections import Counter

import pytest
import redis
from hypothesis import given
from hypothesis import strategies as st

from hb_assets.buffer import rate_limit
from hb_assets.buffer.connection import connect_async
from hb_assets.buffer.producer import AsyncProducer
from hb_assets.buffer.rate_limit import Limiter, Policy, Subject
from hb_assets.core.settings import Settings
from hb_assets_tests.lake.deliveries import line

SECOND_US = 1_000_000


class Clock:
    seconds = 100.0

    def __call__(self) -> float:
        return self.seconds


def subject(quota: int, seconds: float, name: str = "user") -> Subject:
    """Somebody who was never seen, as one process knows him."""
    return Policy(name, quota, int(seconds * SECOND_US), shards=4).subject("u1")


# -- the algorithm


@given(
    quota=st.integers(1, 50),
    window=st.integers(1, 100),
    requests=st.lists(st.tuples(st.floats(0, 30), st.integers(1, 60)), max_size=60),
)
def test_never_more_than_the_quota_and_what_grew_back(
    quota: int, window: int, requests: list[tuple[float, int]]
) -> None:
    """In any span at most the quota and span x rate, unless one request alone was larger."""
    clock = Clock()
    limiter, whom = Limiter(clock), subject(quota, window)
    admitted: list[tuple[float, int]] = []
    for pause, cost in requests:
        clock.seconds += pause
        if limiter.admit([(whom, cost)]) is None:
            admitted.append((clock.seconds, cost))
    for first in range(len(admitted)):
        for last in range(first, len(admitted)):
            span = admitted[last][0] - admitted[first][0]
            cost = sum(cost for _, cost in admitted[first:last])
            assert cost + min(admitted[last][1], quota) <= quota + span * quota / window + 1e-6


@given(quota=st.integers(1, 50), window=st.integers(1, 100), cost=st.integers(1, 80))
def test_who_waits_as_long_as_told_is_admitted(quota: int, window: int, cost: int) -> None:
    clock = Clock()
    limiter, whom = Limiter(clock), subject(quota, window)
    while (denial := limiter.admit([(whom, cost)])) is None:
        pass
    clock.seconds += denial.seconds - 1e-3
    assert denial.seconds < 2e-3 or limiter.admit([(whom, cost)]) is not None
    clock.seconds += 2e-3
    assert limiter.admit([(whom, cost)]) is None


@given(
    batches=st.lists(
        st.tuples(
            st.floats(0, 5), st.dictionaries(st.sampled_from("abc"), st.integers(1, 30), min_size=1)
        ),
        max_size=20,
    )
)
def test_many_at_once_are_admitted_as_one_by_one(
    batches: list[tuple[float, dict[str, int]]],
) -> None:
    clock = Clock()
    at_once, by_one = Limiter(clock), Limiter(clock)
    same, alike = (Policy("user", 20, 10 * SECOND_US, shards=4) for _ in range(2))
    for pause, batch in batches:
        clock.seconds += pause
        found = at_once.admit_each(same, batch)
        each = {who: by_one.admit([(alike.subject(who), cost)]) for who, cost in batch.items()}
        assert {who: denial.seconds for who, denial in found.items()} == pytest.approx(
            {who: denial.seconds for who, denial in each.items() if denial is not None}
        )
    assert at_once.due == by_one.due
    assert at_once.states(same.subjects("abc")) == by_one.states(alike.subjects("abc"))


def test_all_admit_or_nobody_pays() -> None:
    limiter, wide, tight = Limiter(Clock()), subject(100, 60, "ip"), subject(2, 60)
    assert limiter.admit([(wide, 2), (tight, 2)]) is None
    denial = limiter.admit([(wide, 1), (tight, 1)])
    assert denial is not None
    assert denial.subject == tight
    assert limiter.states([wide]) == [("ip", 98, 2)]


def test_what_is_left_and_when_all_of_it_is_back() -> None:
    clock = Clock()
    limiter, whom = Limiter(clock), subject(10, 60)
    assert limiter.states([whom]) == [("user", 10, 0)]
    limiter.admit([(whom, 4)])
    assert limiter.states([whom]) == [("user", 6, 24)]
    clock.seconds += 12
    assert limiter.states([whom]) == [("user", 8, 12)]


def test_a_crowd_of_subjects_takes_bounded_memory(monkeypatch: pytest.MonkeyPatch) -> None:
    """Who has used up most is remembered longest."""
    monkeypatch.setattr(rate_limit, "_MOST_KNOWN", 100)
    limiter, policy = Limiter(Clock()), Policy("user", 10, 60 * SECOND_US, shards=4)
    assert limiter.admit([(policy.subject("greedy"), 10)]) is None
    for number in range(1000):
        limiter.admit([(policy.subject(f"{number}"), 1)])
    assert len(policy._subjects) <= 100
    assert limiter.admit([(policy.subject("greedy"), 1)]) is not None


# -- several processes


async def rounds(settings: Settings, gateways: list[tuple[Limiter, Subject]]) -> Counter[int]:
    """How much each of several gateways admits of a flood that goes to them in turn."""
    admitted: Counter[int] = Counter()
    async with contextlib.AsyncExitStack() as stack:
        producers = []
        for limiter, _ in gateways:
            client = connect_async(settings)
            stack.push_async_callback(client.aclose)
            producer = AsyncProducer(client, settings, limiter)
            await producer.start()
            stack.push_async_callback(producer.close)
            producers.append(producer)
        for _ in range(60):
            for number, (limiter, whom) in enumerate(gateways):
                if limiter.admit([(whom, 1)]) is None:
                    admitted[number] += 1
                    assert await producers[number].append({0: [line()]}) == {0: None}
    return admitted


def test_gateways_of_one_redis_share_a_limit(settings: Settings) -> None:
    """All of them together: the quota, and one request that each didn't know better about."""
    gateways = [(Limiter(), subject(30, 3600)) for _ in range(3)]
    assert 30 <= sum(asyncio.run(rounds(settings, gateways)).values()) <= 30 + 2
    # one that starts later learns it with its first request
    late = [(Limiter(), subject(30, 3600))]
    assert sum(asyncio.run(rounds(settings, late)).values()) <= 1


def test_what_was_admitted_too_much_is_worked_off(settings: Settings, client: redis.Redis) -> None:
    first, second = Limiter(), Limiter()
    whom = subject(10, 100)
    assert first.admit([(subject(10, 100), 10)]) is None
    assert second.admit([(whom, 10)]) is None
    asyncio.run(flush(settings, first))
    asyncio.run(flush(settings, second))
    denial = second.admit([(whom, 1)])
    assert denial is not None
    assert 105 < denial.seconds <= 110


async def flush(settings: Settings, limiter: Limiter) -> None:
    client = connect_async(settings)
    producer = AsyncProducer(client, settings, limiter)
    await producer.start()
    assert await producer.append({0: [line()]}) == {0: None}
    await producer.close()
    await client.aclose()


def test_small_use_of_a_large_quota_costs_redis_nothing(
    settings: Settings, client: redis.Redis
) -> None:
    limiter, whom = Limiter(), subject(100_000, 600)
    limiter.admit([(whom, 999)])
    asyncio.run(flush(settings, limiter))
    assert not client.keys("*limit*")
    limiter.admit([(whom, 1)])
    asyncio.run(flush(settings, limiter))
    [key] = client.keys("*limit*")
    assert key == b"hb:{%02d}:limit:user:%s" % (whom.shard, whom.digest.encode())
    assert whom.digest != "u1"
    assert 0 < client.pttl(key) <= 6001


def test_what_is_due_leaves_without_an_append(settings: Settings, client: redis.Redis) -> None:
    """A gateway that only answers queries shares their limit, too."""

    async def ask() -> None:
        asked, limiter = subject(10, 3600, "ip-queries"), Limiter()
        connection = connect_async(settings)
        producer = AsyncProducer(connection, settings, limiter)
        await producer.start()
        assert limiter.admit([(asked, 1)]) is None
        async with asyncio.timeout(20):
            while not client.keys("*limit:ip-queries*"):  # noqa: ASYNC110  # Redis tells nobody
                await asyncio.sleep(0.01)
        await producer.close()
        await connection.aclose()

    asyncio.run(ask())


def test_without_redis_the_limit_holds_locally(settings: Settings) -> None:
    away = settings.model_copy(update={"redis_url": None})
    limiter, whom = Limiter(), subject(5, 60)
    assert away.embedded
    assert [limiter.admit([(whom, 1)]) is None for _ in range(7)] == [True] * 5 + [False] * 2
