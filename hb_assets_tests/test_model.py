"""The whole way of a heartbeat against a small model in memory, in any order of events.

The model is a list of what was appended, each row with the identity that Redis gave it: the
survivor of a key is the latest arrival, whatever drains, crashes, replays, prunes and erasures
happened meanwhile. It knows nothing of files.
"""

from __future__ import annotations

import contextlib
import time
from collections.abc import Callable, Sequence
from datetime import timedelta
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any

import duckdb
import pytest
from hypothesis import HealthCheck
from hypothesis import settings as example_settings
from hypothesis import strategies as st
from hypothesis.stateful import (
    RuleBasedStateMachine,
    initialize,
    precondition,
    rule,
    run_state_machine_as_test,
)

from hb_assets.buffer import consumer as consumer_module
from hb_assets.buffer import external, keys
from hb_assets.buffer.connection import connect
from hb_assets.buffer.consumer import Consumer, Entry
from hb_assets.buffer.producer import Producer
from hb_assets.core.record import shard_of
from hb_assets.core.settings import Settings
from hb_assets.lake import inventory, minutes
from hb_assets.lake.compaction.consolidation import consolidate
from hb_assets.lake.files import erased, fragments, quarantine
from hb_assets.lake.ingest.decode import decode
from hb_assets.lake.storage import layout
from hb_assets.lake.storage.durable_files import TempFile
from hb_assets.lake.storage.store import Lake
from hb_assets.pipeline import drain as drain_module
from hb_assets.pipeline import erasure
from hb_assets.pipeline.audit import audit
from hb_assets.pipeline.coordination import coordinated
from hb_assets.pipeline.maintenance import maintain
from hb_assets_tests.examples import examples
from hb_assets_tests.lake.deliveries import NOON, line

SHARDS = 2
USERS = ("u1", "u2", "u3")
DAY_MS = 86_400_000
Key = tuple[str, str, int]

readings = st.tuples(
    st.sampled_from(USERS),
    st.sampled_from(["device_a", "device_b"]),
    st.sampled_from([NOON, NOON + 1, NOON + DAY_MS]),
    st.sampled_from([60, 61, 62]),
)
CYCLE: tuple[tuple[Any, str], ...] = (
    (fragments, "publish"),
    (quarantine, "publish"),
    (erased, "publish"),
    (Consumer, "acknowledge"),
)
"""Steps of a drain cycle that a crash may come before or after."""


class _Died(BaseException):
    """A process was killed here."""


@contextlib.contextmanager
def dying(where: Any, name: str, *, after: bool) -> Any:
    """Whoever calls `where.name` dies, before it or right after it."""
    original = getattr(where, name)

    def die(*arguments: Any, **named: Any) -> None:
        if after:
            original(*arguments, **named)
        raise _Died

    setattr(where, name, die)
    try:
        yield
    except _Died:
        pass
    finally:
        setattr(where, name, original)


class Pipeline(RuleBasedStateMachine):
    """Events, and what has to hold whenever everything was drained and consolidated."""

    url: str

    @initialize()
    def begin(self) -> None:
        self.folder = TemporaryDirectory()
        self.settings = Settings(
            home=Path(self.folder.name),
            redis_url=self.url,
            shards=SHARDS,
            duckdb_threads=1,
            raw_keep=timedelta(0),
            drain_poll=timedelta(milliseconds=5),
        )
        self.client = connect(self.settings)
        self.client.flushall()
        self.lake = Lake.open(self.settings)
        self.came: list[tuple[tuple[int, int, int, int], Key, int]] = []
        self.refused = 0
        self.forgotten: dict[str, int] = {}
        self.asleep: list[tuple[Consumer, list[Entry], Any]] = []
        self.names = 0

    def teardown(self) -> None:
        if hasattr(self, "folder"):
            self.settle()
            self.client.close()
            self.folder.cleanup()

    # -- appending

    @rule(beats=st.lists(readings, min_size=1, max_size=5))
    def append(self, beats: Sequence[tuple[str, str, int, int]]) -> None:
        by_shard: dict[int, list[tuple[str, str, int, int]]] = {}
        for beat in beats:
            by_shard.setdefault(shard_of(beat[0], SHARDS), []).append(beat)
        for shard, members in by_shard.items():
            self._append(shard, members)

    def _append(self, shard: int, beats: Sequence[tuple[str, str, int, int]]) -> None:
        producer = Producer(self.client, self.settings)
        assert producer.append({shard: [line(*beat) for beat in beats]}) == {shard: None}
        self._note(shard, beats)

    def _note(self, shard: int, beats: Sequence[tuple[str, str, int, int]]) -> None:
        [(last, _)] = self.client.xrevrange(keys.stream(shard), count=1)
        ms, _, seq = last.decode().partition("-")
        for pos, (user, device, at, bpm) in enumerate(beats):
            self.came.append(((int(ms), int(seq), shard, pos), (user, device, at), bpm))

    @rule(beat=readings, shard=st.integers(0, SHARDS - 1))
    def append_as_a_stranger(self, beat: tuple[str, str, int, int], shard: int) -> None:
        """Without our library, by any stream; never in one millisecond with another entry."""
        self._tick()
        external.append(self.client, shard, line(*beat))
        self._note(shard, [beat])
        self._tick()

    def _tick(self) -> None:
        """Let the server's clock move on, so that arrival in two streams has an order."""
        before = self.client.time()
        while self.client.time()[1] // 1000 == before[1] // 1000:
            time.sleep(0.0002)

    @rule(beat=readings)
    def append_twice(self, beat: tuple[str, str, int, int]) -> None:
        """A retry after a connection that dropped between request and answer."""
        for _ in range(2):
            self._append(shard_of(beat[0], SHARDS), [beat])

    @rule(raw=st.sampled_from([b"not json", b"{}", line(bpm=0), b'{"user_id": "u1"']))
    def append_something_unusable(self, raw: bytes) -> None:
        assert Producer(self.client, self.settings).append({0: [raw]}) == {0: None}
        self.refused += 1

    # -- draining

    def _consumer(self) -> Consumer:
        """Of a process of this host: a name that isn't open here any more is a dead one's."""
        consumer = Consumer(self.client, self.settings)
        consumer.open()
        return consumer

    @rule()
    def drain(self) -> None:
        with contextlib.closing(self._consumer()) as consumer:
            drain_module.drain(consumer, self.lake, self.settings)

    @rule(step=st.sampled_from(CYCLE), after=st.booleans())
    def drain_and_die(self, step: tuple[Any, str], after: bool) -> None:
        consumer = self._consumer()
        with dying(*step, after=after):
            drain_module.drain(consumer, self.lake, self.settings)
        # Its entries are pending; the next one inherits them, whatever still refers to this one:
        # the exception does, in a cycle that the collector finds at some time.
        consumer_module._open.pop(consumer.name)

    @precondition(lambda self: len(self.asleep) < 2)
    @rule()
    def drain_and_fall_asleep(self) -> None:
        """On another host, after it has decoded what it claimed."""
        self.names += 1
        consumer = Consumer(self.client, self.settings, name=f"elsewhere:1:1:{self.names}")
        consumer.open()
        entries = consumer.claim(1000, 10**6)
        if entries:
            decoded = decode(entries, self.settings)
            self.asleep.append((consumer, entries, decoded))

    @precondition(lambda self: self.asleep)
    @rule(taken_over=st.booleans())
    def wake_up(self, taken_over: bool) -> None:
        """And go on, as if nothing had happened meanwhile."""
        consumer, entries, decoded = self.asleep.pop(0)
        if taken_over:
            with contextlib.closing(self._consumer()) as other:
                other._min_idle_ms = 0
                drain_module.drain(other, self.lake, self.settings)
        fragments.publish(self.lake, decoded.rows)
        quarantine.publish(self.lake, decoded.rejected)
        consumer.acknowledge(list(zip(entries, decoded.counts, strict=True)))

    # -- the lake

    @rule(known=st.booleans(), rewrite=st.booleans())
    def consolidate(self, known: bool, rewrite: bool) -> None:
        with coordinated(self.lake, self.settings, start_server=False) as found:
            for day in inventory.days(self.lake):
                consolidate(
                    self.lake,
                    day,
                    self.settings,
                    rewrite=rewrite,
                    watermarks=found.watermarks if known else {},
                )

    @rule(after=st.booleans())
    def consolidate_and_die(self, after: bool) -> None:
        with dying(TempFile, "publish_replacing", after=after):
            self.consolidate(known=True, rewrite=False)
        for path in (self.lake.root / layout.TEMP).glob("*"):
            path.unlink()

    @rule()
    def prune(self) -> None:
        with coordinated(self.lake, self.settings, start_server=False) as known:
            assert maintain(self.lake, self.settings, known).faults == ()

    @precondition(lambda self: not self.asleep)
    @rule(user=st.sampled_from(USERS))
    def forget(self, user: str) -> None:
        self._tick()
        with (
            contextlib.closing(self._consumer()) as consumer,
            coordinated(self.lake, self.settings, start_server=False) as known,
        ):
            done = erasure.forget(
                user, self.client, consumer, self.lake, self.settings, known, lambda _: 0
            )
        assert done.left == []
        self.forgotten[user] = len(self.came)
        self._tick()

    # -- what has to hold

    @rule()
    def settle(self) -> None:
        """Everything drained and consolidated: the files hold the model's survivors, once."""
        while self.asleep:
            self.wake_up(taken_over=False)
        with contextlib.closing(self._consumer()) as consumer:
            drain_module.drain(consumer, self.lake, self.settings, until_empty=True)
        self.consolidate(known=True, rewrite=False)
        for day in inventory.days(self.lake):
            minutes.build(self.lake, day, self.settings)
        assert self._consolidated() == self._survivors()
        verdict = audit(self.client, self.lake, self.settings, deep=True)
        assert verdict.differences == []
        days = [day for day in verdict.days if day.pending]
        assert days == []
        if not self.forgotten:
            assert (verdict.quarantined, verdict.erased) == (self.refused, 0)

    def _survivors(self) -> dict[Key, tuple[int, tuple[int, ...]]]:
        found: dict[Key, tuple[int, tuple[int, ...]]] = {}
        kept = (one for at, one in enumerate(self.came) if at >= self.forgotten.get(one[1][0], 0))
        for arrival, key, bpm in sorted(kept):
            found[key] = (bpm, arrival)
        return found

    def _consolidated(self) -> dict[Key, tuple[int, tuple[int, ...]]]:
        files = list((self.lake.root / layout.HEARTBEATS).rglob("*.parquet"))
        if not files:
            return {}
        rows = duckdb.execute(
            "SELECT user_id, device_id, epoch_ms(timestamp), heart_rate, "
            "arrival_ms, arrival_seq, arrival_shard, arrival_pos "
            "FROM read_parquet($files, hive_partitioning = false)",
            {"files": [str(path) for path in files]},
        ).fetchall()
        found = {(user, device, at): (bpm, tuple(rest)) for user, device, at, bpm, *rest in rows}
        assert len(found) == len(rows), "a key stands twice"
        return found


@pytest.mark.long
@pytest.mark.parametrize(("kind", "usual"), [("valkey", 8), ("redis", 4)])
def test_any_interleaving(server_urls: Callable[[str], str], kind: str, usual: int) -> None:
    class OnServer(Pipeline):
        url = server_urls(kind)

    run_state_machine_as_test(
        OnServer,
        settings=example_settings(
            max_examples=examples(usual),
            stateful_step_count=20,
            deadline=None,
            suppress_health_check=list(HealthCheck),
        ),
    )
