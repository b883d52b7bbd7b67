"""Makes old installations fast: a lake of many days, a Dagster instance after many ticks.

One day goes the whole way: buffer, drain, consolidation, minutes. The others are links to its
files under other dates: sensors look at names, times and footers. Ticks, events and runs are copies
of rows that Dagster wrote itself, as many as its daemon would have left. `control_room` measures
them.
"""

from __future__ import annotations

import contextlib
import datetime as dt
import os
import sqlite3
import time
import uuid
from collections.abc import Iterator, Mapping
from pathlib import Path

import dagster as dg

from hb_assets.buffer import connection
from hb_assets.buffer.consumer import Consumer
from hb_assets.buffer.producer import Producer
from hb_assets.core import days
from hb_assets.core.record import Heartbeat, encode, shard_of
from hb_assets.core.settings import Settings
from hb_assets.defs.reports import PAUSE_SECONDS
from hb_assets.lake import minutes
from hb_assets.lake.compaction import consolidation
from hb_assets.lake.storage import layout
from hb_assets.lake.storage.store import Lake
from hb_assets.pipeline.drain import drain

TODAY = days.day_of(time.time_ns() // 1_000_000)
KINDS = (layout.RAW, layout.HEARTBEATS, layout.MINUTES)
EVENTS_A_DAY = 86_400 // PAUSE_SECONDS
"""A day that changes at every tick of the drain sensor."""
TICKS_KEPT = {
    "drain": 86_400 // 5,
    "consolidation": 5_760,
    "buffer": 5_760,
    "failed_runs": 5_760,
    "damage": 1_440,
}
"""Ticks without a run are kept for a day (dagster.yaml)."""
RUNS_A_DAY = 40
_USERS = 64
_DAYS_AT_ONCE = 50
"""Drained together: more of them fill the buffer."""


def append(settings: Settings, day: dt.date, readings: int, *, first: int = 0) -> None:
    """Put some readings of each of 64 users into the buffer, one a second."""
    start = days.start_ms(day) + first * 1000
    by_shard: dict[int, list[bytes]] = {}
    for number in range(_USERS):
        user = f"user-{number:02}"
        by_shard.setdefault(shard_of(user, settings.shards), []).extend(
            encode(Heartbeat(user, "device_a", start + second * 1000, 60 + second % 60))
            for second in range(readings)
        )
    with contextlib.closing(connection.connect(settings)) as client:
        failed = [error for error in Producer(client, settings).append(by_shard).values() if error]
    if failed:
        raise failed[0]


def drained(settings: Settings) -> None:
    """Drain everything into fragments."""
    with contextlib.closing(connection.connect(settings)) as client:
        consumer = Consumer(client, settings)
        consumer.open()
        try:
            drain(consumer, Lake.open(settings), settings, until_empty=True)
        finally:
            consumer.close()


def lake_of(settings: Settings, number: int) -> Lake:
    """A lake of so many days up to today, each drained, consolidated, and with its minutes.

    It needs a running server.
    """
    lake = Lake.open(settings)
    made = [TODAY - dt.timedelta(days=back) for back in range(number)]
    for at, day in enumerate(made, start=1):
        append(settings, day, 10)
        if at % _DAYS_AT_ONCE == 0 or at == number:
            drained(settings)
    long_ago = time.time() - 30 * 86_400
    for day in made:
        consolidation.consolidate(lake, day, settings)
        minutes.build(lake, day, settings)
        if day == TODAY:
            continue
        for kind in KINDS:
            for path in layout.day_folder(lake.root, kind, day).rglob("*"):
                os.utime(path, (long_ago, long_ago))
    return lake


def past_of(home: Path, number: int) -> None:
    """Let an instance look as if it had reported, and run, for so many days.

    Args:
        home: its DAGSTER_HOME; it has reported a day and run once, and nothing runs on it now.
        number: days.
    """
    with _database(home / "history" / "runs" / "index.db") as events:
        reported = "dagster_event_type = 'ASSET_MATERIALIZATION' AND asset_key LIKE '%raw%'"
        _multiply(events, "event_logs", reported, EVENTS_A_DAY * number, 86_400 * number)
    with _database(home / "history" / "runs.db") as runs:
        [(run_id, body)] = runs.execute("SELECT run_id, run_body FROM runs LIMIT 1")
        columns = _columns(runs, "runs", "run_id", "run_body")
        for _ in range(RUNS_A_DAY * number):
            new = str(uuid.uuid4())
            runs.execute(
                f"INSERT INTO runs (run_id, run_body, {columns}) "
                f"SELECT ?, ?, {columns} FROM runs WHERE run_id = ?",
                (new, body.replace(run_id, new), run_id),
            )
            runs.execute(
                "INSERT INTO run_tags (run_id, key, value) "
                "SELECT ?, key, value FROM run_tags WHERE run_id = ?",
                (new, run_id),
            )


def ticks_of(home: Path, cursors: Mapping[str, str | None]) -> None:
    """Let an instance look as if its sensors had ticked for as long as ticks are kept.

    Args:
        home: its DAGSTER_HOME; each sensor has ticked there, and nothing runs on it now.
        cursors: what the sensors know by now; each tick is stored with it.
    """
    with dg.DagsterInstance.from_config(str(home)) as instance:
        for state in instance.all_instigator_state():
            cursor, data = cursors.get(state.instigator_name), state.sensor_instigator_data
            if cursor and data:
                instance.update_instigator_state(state.with_data(data._replace(cursor=cursor)))
                ticks = instance.get_ticks(state.instigator_origin_id, state.selector_id, limit=1)
                instance.update_tick(ticks[0].with_cursor(cursor))
    with _database(home / "schedules" / "schedules.db") as rows:
        query = "SELECT selector_id, max(tick_body) FROM job_ticks WHERE type = 'SENSOR' GROUP BY 1"
        for selector, body in rows.execute(query).fetchall():
            kept = next(n for sensor, n in TICKS_KEPT.items() if f'"{sensor}"' in body)
            _multiply(rows, "job_ticks", f"selector_id = '{selector}'", kept, 86_400)


@contextlib.contextmanager
def _database(path: Path) -> Iterator[sqlite3.Connection]:
    with contextlib.closing(sqlite3.connect(path)) as connection, connection:
        yield connection


def _multiply(
    rows: sqlite3.Connection, table: str, where: str, number: int, seconds: float
) -> None:
    """Copy the latest row that fits so many times, spread over the seconds before it."""
    columns = _columns(rows, table, "timestamp")
    step = seconds / number
    rows.execute(
        f"""
        WITH RECURSIVE n(i) AS (SELECT 1 UNION ALL SELECT i + 1 FROM n WHERE i < {number})
        INSERT INTO {table} (timestamp, {columns})
        SELECT strftime('%Y-%m-%d %H:%M:%f', timestamp, '-' || (({number} - i) * {step}) || ' seconds')
            || '000', {columns}
        FROM n, (SELECT * FROM {table} WHERE {where} ORDER BY id DESC LIMIT 1)
        """
    )


def _columns(rows: sqlite3.Connection, table: str, *but: str) -> str:
    found = [row[1] for row in rows.execute(f"PRAGMA table_info({table})")]
    return ", ".join(name for name in found if name not in ("id", *but))
