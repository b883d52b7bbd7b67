from __future__ import annotations

import datetime as dt
import logging
import os
import subprocess
import sys
from collections.abc import Callable, Iterator
from typing import Any

import psutil
import pytest
import redis
from hypothesis import HealthCheck, given
from hypothesis import settings as examples
from hypothesis import strategies as st

from hb_assets.buffer import consumer as consumer_module
from hb_assets.buffer import keys
from hb_assets.buffer.consumer import Consumer, Entry, _is_dead, _new_name
from hb_assets.buffer.depth import depths, losses, scanned
from hb_assets.buffer.producer import Producer
from hb_assets.core.processes import Identity
from hb_assets.core.settings import Settings
from hb_assets_tests.servers import wait_for

LINE = b'{"user_id":"u1"}'
ALL = (10**9, 10**9)


@pytest.fixture
def opened(client: redis.Redis, settings: Settings) -> Callable[..., Consumer]:
    """Opens a consumer; by default one that is never taken for dead."""

    def open_one(name: str | None = None, **changes: Any) -> Consumer:
        consumer = Consumer(client, settings.model_copy(update=changes), name)
        consumer.open()
        return consumer

    return open_one


def ids(entries: list[Entry]) -> list[tuple[int, str]]:
    return sorted((entry.shard, entry.id) for entry in entries)


def balances(client: redis.Redis, settings: Settings) -> bool:
    """Whether appended = acknowledged + buffered, as the entries themselves say, in each shard."""
    buffered = scanned(client, settings)
    return all(
        depth.appended == depth.acknowledged + buffered[depth.shard]
        for depth in depths(client, settings).states
    )


def test_entries_come_with_all_that_the_drain_needs(
    client: redis.Redis, settings: Settings, opened: Callable[..., Consumer]
) -> None:
    Producer(client, settings).append({0: [b"1", b"2"]})
    external = client.xadd(keys.stream(3), {"data": "3\n4\n5", "source": "elsewhere"}, id="7-9")
    client.xadd(keys.stream(3), {"text": "6"})
    client.xadd(keys.stream(3), {"data": "8", "n": "many"})

    claimed = opened().claim(*ALL)
    own, other, empty, odd = sorted(claimed, key=lambda e: (e.shard, e.ms, e.seq))

    assert (own.data, own.own, own.rows, own.size, own.deliveries) == (b"1\n2", 2, 2, 3, 1)
    assert (other.data, other.own, other.rows) == (b"3\n4\n5", None, 3)
    assert (other.ms, other.seq, other.id) == (7, 9, external.decode())
    assert (empty.data, empty.own, empty.rows, empty.size) == (None, None, 0, 0)
    assert (odd.data, odd.own) == (b"8", None)


def test_acknowledged_entries_are_gone_and_in_the_ledger(
    client: redis.Redis, settings: Settings, opened: Callable[..., Consumer]
) -> None:
    consumer = opened()
    Producer(client, settings).append({0: [LINE] * 3, 1: [LINE]})
    client.xadd(keys.stream(0), {"data": "one\ntwo"})
    assert not consumer.empty()

    entries = consumer.claim(*ALL)
    assert not consumer.empty(), "pending is not empty"
    deleted = consumer.acknowledge([(entry, entry.rows) for entry in entries])

    assert deleted == 3
    assert consumer.empty()
    first, second, *_ = depths(client, settings).states
    assert (first.appended, first.acknowledged, first.bytes) == (5, 5, 0)
    assert (second.appended, second.acknowledged) == (1, 1)


def test_entries_that_a_failed_cycle_left_come_again(
    client: redis.Redis, settings: Settings, opened: Callable[..., Consumer]
) -> None:
    consumer = opened()
    Producer(client, settings).append({0: [LINE], 1: [LINE]})
    first = consumer.claim(*ALL)
    Producer(client, settings).append({0: [LINE]})

    second = consumer.claim(*ALL)

    assert len(second) == 3
    assert set(ids(first)) < set(ids(second))
    assert sorted(entry.deliveries for entry in second) == [1, 2, 2]


def test_claims_ahead_return_nothing_that_is_in_hand(
    client: redis.Redis, settings: Settings, opened: Callable[..., Consumer]
) -> None:
    """What was read beyond a bound comes next, without being handed out once more."""
    consumer = opened()
    Producer(client, settings.model_copy(update={"entry_max_heartbeats": 2})).append(
        {0: [LINE] * 6, 1: [LINE] * 4}
    )
    parts = [consumer.claim(3, 10**6)]
    while parts[-1]:
        parts.append(consumer.claim_ahead(3, 10**6) if len(parts) % 2 else consumer.claim_more())
    assert consumer.claim_more() == []
    taken = [entry for part in parts for entry in part]
    assert len(ids(taken)) == len(set(ids(taken))) < 5, "claim_more keeps to the bounds"

    taken += consumer.claim_ahead(*ALL)
    assert len(set(ids(taken))) == 5
    assert [entry.deliveries for entry in taken] == [1] * 5
    assert not consumer.behind
    assert ids(consumer.claim(*ALL)) == ids(taken)


def test_more_is_claimed_within_the_same_bounds(
    client: redis.Redis, settings: Settings, opened: Callable[..., Consumer]
) -> None:
    consumer = opened()
    Producer(client, settings).append({0: [LINE] * 3})
    assert [entry.rows for entry in consumer.claim(5, 10**6)] == [3]
    assert (consumer.ended, consumer.claim_more()) == ("all", [])
    Producer(client, settings).append({1: [LINE] * 2})
    Producer(client, settings).append({1: [LINE] * 2})
    assert [entry.rows for entry in consumer.claim_more()] == [2]
    assert (consumer.ended, consumer.claim_more()) == ("rows", [])
    assert [entry.rows for entry in consumer.claim_ahead(5, 10**6)] == [2]


def test_a_claim_is_bounded_in_entries(
    client: redis.Redis, opened: Callable[..., Consumer], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(consumer_module, "_MOST_ENTRIES", 5)
    for number in range(12):
        client.xadd(keys.stream(number % 4), {"data": LINE})
    consumer = opened()
    found = [len(consumer.claim(*ALL)), *(len(consumer.claim_ahead(*ALL)) for _ in range(2))]
    assert found == [5, 5, 2]
    assert consumer.ended == "all"


def test_entries_that_are_alike_are_acknowledged_together(
    client: redis.Redis,
    settings: Settings,
    opened: Callable[..., Consumer],
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    """In calls of few ids; what somebody else has deleted isn't counted, whatever is alike."""
    monkeypatch.setattr(consumer_module, "_ACKNOWLEDGE_ENTRIES", 3)
    one = settings.model_copy(update={"entry_max_heartbeats": 1})
    Producer(client, one).append({0: [LINE] * 8, 1: [LINE, LINE + b" "]})
    for _ in range(4):
        client.xadd(keys.stream(0), {"data": "one\ntwo"})
    consumer = opened()
    entries = consumer.claim(*ALL)
    gone = [entry for entry in entries if entry.shard == 0 and entry.own][2:4]
    assert consumer.acknowledge([(entry, entry.rows) for entry in gone]) == 2

    assert consumer.acknowledge([(entry, entry.rows) for entry in entries]) == 12
    assert consumer.empty()
    first, second, *_ = depths(client, settings).states
    assert (first.acknowledged, second.acknowledged) == (16, 2)
    assert balances(client, settings)


def test_consumers_share_the_work(
    client: redis.Redis, settings: Settings, opened: Callable[..., Consumer]
) -> None:
    one, other = opened(), opened()
    Producer(client, settings).append({shard: [LINE] for shard in range(4)})

    first, second = one.claim(2, 10**6), other.claim(*ALL)

    assert len(first) == len(second) == 2
    assert len({*ids(first), *ids(second)}) == 4


def test_only_the_shards_that_are_asked_for_are_read(
    client: redis.Redis, settings: Settings, opened: Callable[..., Consumer]
) -> None:
    Producer(client, settings).append({shard: [LINE] for shard in range(4)})

    assert {entry.shard for entry in opened().claim(*ALL, shards=[1, 3])} == {1, 3}


def test_no_shard_starves_under_a_small_budget(
    client: redis.Redis, settings: Settings, opened: Callable[..., Consumer]
) -> None:
    consumer = opened()
    Producer(client, settings.model_copy(update={"entry_max_heartbeats": 1})).append(
        {shard: [LINE] * 20 for shard in range(4)}
    )
    seen = set()
    for _ in range(4):
        entries = consumer.claim(1, 10**6)
        seen |= {entry.shard for entry in entries}
        consumer.acknowledge([(entry, 1) for entry in entries])

    assert seen == {0, 1, 2, 3}


@given(
    sizes=st.lists(st.integers(1, 40), min_size=1, max_size=40),
    max_rows=st.integers(1, 60),
    max_bytes=st.integers(1, 600),
)
@examples(max_examples=25, suppress_health_check=[HealthCheck.function_scoped_fixture])
def test_a_claim_keeps_its_bounds_and_everything_is_handed_out(
    client: redis.Redis,
    settings: Settings,
    opened: Callable[..., Consumer],
    sizes: list[int],
    max_rows: int,
    max_bytes: int,
) -> None:
    client.flushdb()
    consumer = opened()
    for number, size in enumerate(sizes):
        assert Producer(client, settings).append({number % 4: [LINE] * size})[number % 4] is None
    rows = 0
    while entries := consumer.claim(max_rows, max_bytes):
        if len(entries) > 1:
            assert sum(entry.rows for entry in entries) <= max_rows
            assert sum(entry.size for entry in entries) <= max_bytes
        rows += sum(entry.rows for entry in entries)
        consumer.acknowledge([(entry, entry.rows) for entry in entries])

    assert rows == sum(sizes)
    assert consumer.empty()
    assert consumer.lost == 0
    consumer.close()


STEPS = st.one_of(
    st.tuples(st.just("append"), st.integers(0, 3), st.integers(1, 5)),
    st.tuples(st.just("external"), st.integers(0, 3), st.integers(1, 5)),
    st.tuples(st.just("claim"), st.integers(0, 2), st.integers(1, 8)),
    st.tuples(st.just("acknowledge"), st.integers(0, 2), st.integers(0, 3)),
    st.tuples(st.just("die"), st.integers(0, 2), st.just(0)),
    st.tuples(st.just("delete consumer"), st.integers(0, 2), st.just(0)),
)


@given(steps=st.lists(STEPS, max_size=25))
@examples(max_examples=40, suppress_health_check=[HealthCheck.function_scoped_fixture])
def test_the_ledger_adds_up_and_nothing_is_lost_whatever_happens(
    client: redis.Redis,
    settings: Settings,
    opened: Callable[..., Consumer],
    steps: list[tuple[str, int, int]],
) -> None:
    client.flushdb()
    (settings.home_dir / "receipts").unlink(missing_ok=True)  # else the flush is a loss
    producer = Producer(client, settings)
    consumers = [opened() for _ in range(3)]
    held: list[list[Entry]] = [[], [], []]
    appended: set[tuple[int, str]] = set()
    done: set[tuple[int, str]] = set()
    heartbeats = 0
    for action, which, size in steps:
        if action == "append":
            producer.append({which: [LINE] * size})
            heartbeats += size
            appended.add((which, client.xrevrange(keys.stream(which), count=1)[0][0].decode()))
        elif action == "external":
            id_ = client.xadd(keys.stream(which), {"data": b"\n".join([LINE] * size)})
            heartbeats += size
            appended.add((which, id_.decode()))
        elif action == "claim":
            held[which] = consumers[which].claim(size, 10**6)
        elif action == "acknowledge":
            # Even what others have taken over and acknowledged meanwhile, even twice.
            counts = [(entry, entry.rows) for entry in held[which][size:]]
            consumers[which].acknowledge(counts)
            done |= set(ids([entry for entry, _ in counts]))
        elif action == "die":
            consumers[which].close()
            consumers[which] = opened()
        else:
            client.xgroup_delconsumer(keys.stream(1), keys.GROUP, consumers[which].name)
        assert balances(client, settings)

    rescuer = consumers[0]
    for consumer in consumers[1:]:
        consumer.close()
    rescuer.open()
    last = rescuer.claim(*ALL)
    assert {*done, *ids(last)} == appended
    assert not done & set(ids(last)), "what was acknowledged is not handed out again"
    rescuer.acknowledge([(entry, entry.rows) for entry in last])

    assert rescuer.empty()
    assert balances(client, settings)
    assert sum(depth.acknowledged for depth in depths(client, settings).states) == heartbeats
    assert sum(consumer.lost for consumer in consumers) == 0
    rescuer.close()


CLAIM_AND_DIE = """
import os, signal, sys
from hb_assets.buffer.connection import connect
from hb_assets.buffer.consumer import Consumer
from hb_assets.core.settings import Settings
settings = Settings(redis_url=sys.argv[1], shards=4)
consumer = Consumer(connect(settings), settings)
consumer.open()
assert consumer.claim(10**9, 10**9)
os.kill(os.getpid(), signal.SIGKILL)
"""


def test_what_a_killed_process_held_is_taken_over_at_once(
    client: redis.Redis, settings: Settings, redis_url: str, opened: Callable[..., Consumer]
) -> None:
    Producer(client, settings).append({shard: [LINE] for shard in range(4)})
    subprocess.run([sys.executable, "-c", CLAIM_AND_DIE, redis_url], check=False)
    assert [depth.pending for depth in depths(client, settings).states] == [1, 1, 1, 1]

    consumer = opened()
    entries = consumer.claim(*ALL)

    assert len(entries) == 4
    assert all(entry.deliveries == 2 for entry in entries)
    assert [depth.consumers for depth in depths(client, settings).states] == [1, 1, 1, 1]


def test_what_a_closed_or_forgotten_consumer_of_this_process_held_is_taken_over_at_once(
    client: redis.Redis, settings: Settings, opened: Callable[..., Consumer]
) -> None:
    Producer(client, settings).append({0: [LINE]})
    assert opened().claim(*ALL), "and forgotten without close, as after an exception"

    assert len(opened().claim(*ALL)) == 1


def test_what_a_silent_consumer_elsewhere_held_is_taken_over_in_time(
    client: redis.Redis, settings: Settings, opened: Callable[..., Consumer]
) -> None:
    Producer(client, settings).append({0: [LINE]})
    elsewhere = opened("far-away:1:2:3")
    [held] = elsewhere.claim(*ALL)
    assert opened().claim(*ALL) == [], "not before HB_CLAIM_MIN_IDLE is over"

    hasty = opened(claim_min_idle=settings.claim_min_idle / 1000)
    found: list[Entry] = []
    wait_for(lambda: bool(found.extend(hasty.claim(*ALL)) or found), "the entry to be idle")

    assert [entry.id for entry in found] == [held.id]


def test_a_zombies_acknowledgement_counts_once(
    client: redis.Redis, settings: Settings, opened: Callable[..., Consumer]
) -> None:
    Producer(client, settings).append({0: [LINE] * 5})
    client.xadd(keys.stream(0), {"data": LINE})
    zombie = opened()
    held = zombie.claim(*ALL)
    zombie.close()
    heir = opened()
    counts = [(entry, entry.rows) for entry in heir.claim(*ALL)]

    assert heir.acknowledge(counts) == 2
    assert zombie.acknowledge([(entry, entry.rows) for entry in held]) == 0
    assert depths(client, settings).states[0].acknowledged == 6
    assert balances(client, settings)


def test_a_zombies_acknowledgement_counts_what_it_deletes(
    client: redis.Redis, settings: Settings, opened: Callable[..., Consumer]
) -> None:
    """Of entries that are alike some are gone: another one has acknowledged them."""
    producer = Producer(client, settings)
    for _ in range(3):
        producer.append({0: [LINE]})
    zombie = opened()
    held = [(entry, 1) for entry in zombie.claim(*ALL)]
    assert len(held) == 3
    assert zombie.acknowledge(held[:1]) == 1
    assert zombie.acknowledge(held) == 2
    assert depths(client, settings).states[0].acknowledged == 3
    assert balances(client, settings)


def test_entries_that_nobody_would_hand_out_are_adopted(
    client: redis.Redis, settings: Settings, opened: Callable[..., Consumer]
) -> None:
    single = settings.model_copy(update={"entry_max_heartbeats": 1})
    Producer(client, single).append({2: [LINE] * 250})
    first = opened("careless")
    held = first.claim(*ALL)
    client.xgroup_delconsumer(keys.stream(2), keys.GROUP, first.name)

    assert ids(opened().claim(*ALL)) == ids(held)


def test_entries_that_were_acknowledged_without_being_deleted_are_adopted_while_we_run(
    client: redis.Redis, settings: Settings, opened: Callable[..., Consumer]
) -> None:
    consumer = opened()
    Producer(client, settings).append({2: [LINE]})
    [held] = consumer.claim(*ALL)
    client.xack(keys.stream(2), keys.GROUP, held.id)
    assert consumer.claim(*ALL) == []

    assert not consumer.empty()
    assert ids(consumer.claim(*ALL)) == ids([held])


@pytest.mark.parametrize("left", ["own", "dead", "idle"])
def test_entries_deleted_while_pending_are_counted_as_lost(
    left: str,
    client: redis.Redis,
    settings: Settings,
    opened: Callable[..., Consumer],
    caplog: pytest.LogCaptureFixture,
) -> None:
    Producer(client, settings).append({0: [LINE]})
    holder = opened("far-away:1:2:3" if left == "idle" else None)
    [held] = holder.claim(*ALL)
    client.xdel(keys.stream(0), held.id)
    if left == "dead":
        holder.close()
    finder = holder if left == "own" else opened(claim_min_idle=settings.claim_min_idle / 1000)

    with caplog.at_level(logging.ERROR):
        wait_for(lambda: finder.claim(*ALL) == [] and finder.lost > 0, "the loss to be seen")

    assert finder.lost == 1
    assert "data loss" in caplog.text
    assert client.hget(keys.ledger(0), "lost") == b"1", "known even if the finder dies now"
    assert len(losses(depths(client, settings).states)) == 1
    assert finder.empty()


def test_groups_are_made_anew_after_everything_was_flushed(
    client: redis.Redis, settings: Settings, opened: Callable[..., Consumer]
) -> None:
    consumer = opened()
    assert consumer.claim(*ALL) == []
    client.flushall()
    Producer(client, settings).append({0: [LINE], 3: [LINE]})

    assert len(consumer.claim(*ALL)) == 2


def test_a_group_that_somebody_destroyed_starts_at_the_first_entry_again(
    client: redis.Redis, settings: Settings, opened: Callable[..., Consumer]
) -> None:
    consumer = opened()
    Producer(client, settings).append({0: [LINE]})
    held = consumer.claim(*ALL)
    client.xgroup_destroy(keys.stream(0), keys.GROUP)

    assert ids(consumer.claim(*ALL)) == ids(held)


@pytest.mark.parametrize("name", [keys.stream, keys.ledger])
@pytest.mark.parametrize("at", ["before it is opened", "while it works"])
def test_another_type_at_a_shards_key_leaves_out_that_shard_alone(
    client: redis.Redis,
    settings: Settings,
    opened: Callable[..., Consumer],
    name: Callable[[int], str],
    at: str,
) -> None:
    """And it is taken up again when the key is right again."""
    often = {"claim_min_idle": dt.timedelta(milliseconds=1)}  # it looks again all the time
    consumer = opened(**often) if at == "while it works" else None
    client.xadd(keys.stream(1), {"data": LINE})
    kept = client.exists(name(1)) and client.rename(name(1), "kept")
    client.set(name(1), "something else")
    Producer(client, settings).append({0: [LINE], 3: [LINE]})
    consumer = consumer or opened(**often)

    claimed = consumer.claim(*ALL)
    found = {entry.shard for entry in claimed}
    assert {0, 3} <= found
    deleted = consumer.acknowledge([(entry, 1) for entry in claimed])
    assert deleted == 2
    assert consumer.empty()
    assert list(consumer.unusable) == [1]
    assert name(1) in consumer.unusable[1]
    found_depths = depths(client, settings)
    assert [one.shard for one in found_depths.states] == [0, 2, 3]
    assert list(found_depths.faults) == [1]
    assert name(1) in found_depths.faults[1]
    assert {entry.shard for entry in consumer.claim(*ALL)} == set()

    client.delete(name(1))
    if kept:
        client.rename("kept", name(1))
    wait_for(lambda: [entry.shard for entry in consumer.claim(*ALL)] == [1], "the shard")
    assert not consumer.unusable


def test_acknowledging_works_when_the_server_is_full(
    client: redis.Redis, settings: Settings, opened: Callable[..., Consumer]
) -> None:
    consumer = opened()
    Producer(client, settings).append({0: [LINE]})
    client.config_set("maxmemory", "1")
    try:
        entries = consumer.claim(*ALL)
        assert consumer.acknowledge([(entry, 1) for entry in entries]) == 1
    finally:
        client.config_set("maxmemory", "0")

    assert balances(client, settings)


def test_a_closed_consumer_leaves_its_name_only_where_something_is_pending(
    client: redis.Redis, settings: Settings, opened: Callable[..., Consumer]
) -> None:
    consumer = opened()
    Producer(client, settings).append({0: [LINE], 1: [LINE]})
    entries = consumer.claim(*ALL)
    consumer.acknowledge([(entry, 1) for entry in entries if entry.shard == 0])

    consumer.close()

    assert [depth.consumers for depth in depths(client, settings).states] == [0, 1, 0, 0]


def test_a_name_tells_process_and_host(opened: Callable[..., Consumer]) -> None:
    host, pid, started, _ = opened().name.rsplit(":", 3)

    assert host
    assert int(pid) == os.getpid()
    boot, _, ticks = started.partition("-")
    assert len(boot) == 32
    assert int(ticks) > 0


def named_elsewhere(process: subprocess.Popen[bytes]) -> str:
    host, pid, _, word = _new_name().rsplit(":", 3)
    assert int(pid) == os.getpid()
    return f"{host}:{process.pid}:{Identity.of(process.pid).started}:{word}"


@pytest.fixture
def sleeper() -> Iterator[subprocess.Popen[bytes]]:
    process = subprocess.Popen(["sleep", "600"])
    yield process
    process.kill()
    process.wait()


def test_the_living_are_not_dead_whatever_the_clock_says(
    sleeper: subprocess.Popen[bytes], monkeypatch: pytest.MonkeyPatch
) -> None:
    """psutil reckons start times from the wall clock: they move when it is set."""
    name = named_elsewhere(sleeper)
    created = psutil.Process.create_time
    monkeypatch.setattr(psutil.Process, "create_time", lambda self: created(self) + 30)
    assert not _is_dead(name)
    sleeper.kill()
    wait_for(lambda: _is_dead(name), "its death to be seen, a zombie as it is")
    sleeper.wait()
    assert _is_dead(name)


def test_a_pid_that_was_given_away_is_not_the_one_that_had_it(
    sleeper: subprocess.Popen[bytes],
) -> None:
    host, pid, started, word = named_elsewhere(sleeper).rsplit(":", 3)
    boot, _, ticks = started.partition("-")
    assert _is_dead(f"{host}:{pid}:{boot}-{int(ticks) - 1}:{word}")
    assert _is_dead(f"{host}:{pid}:{'0' * 32}-{ticks}:{word}"), "of another boot"


@pytest.mark.parametrize("started", ["1763990000", "", "soon", "x-y-z:1"])
def test_a_name_of_another_form_is_taken_over_by_idle_time(
    sleeper: subprocess.Popen[bytes], started: str
) -> None:
    """Seconds by the clock are what earlier releases wrote."""
    host, pid, _, word = named_elsewhere(sleeper).rsplit(":", 3)
    assert not _is_dead(f"{host}:{pid}:{started}:{word}")
