"""A small installation, ways to damage it, and what every command and endpoint shows of that."""

from __future__ import annotations

import contextlib
import datetime as dt
import errno
import json
import os
import shutil
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import dagster as dg
import msgspec
import pyarrow.parquet as pq
import pytest
from typer.testing import CliRunner

from hb_assets.buffer import keys
from hb_assets.buffer.connection import connect
from hb_assets.buffer.consumer import Consumer
from hb_assets.buffer.producer import Producer
from hb_assets.core.record import shard_of
from hb_assets.core.settings import Settings
from hb_assets.definitions import of
from hb_assets.defs import partitions
from hb_assets.defs.reports import Cursor
from hb_assets.gateway import backend
from hb_assets.lake import minutes
from hb_assets.lake.files import fragments
from hb_assets.lake.files.consolidated import ConsolidatedMetadata
from hb_assets.lake.storage import layout, parquet
from hb_assets.lake.storage.store import Lake
from hb_assets.pipeline import alarms
from hb_assets.pipeline.coordination import coordinated
from hb_assets.pipeline.drain import drain
from hb_assets.pipeline.maintenance import maintain
from hb_assets_tests.cli.commands import load_commands
from hb_assets_tests.defs.conftest import Ticks
from hb_assets_tests.faults import failing
from hb_assets_tests.gateway.conftest import PATH, running
from hb_assets_tests.gateway.observability.test_metrics import samples
from hb_assets_tests.lake.deliveries import DAY, NOON, line
from hb_assets_tests.servers import wait_for

SHARDS = 4
USER = "u1"
SHARD = shard_of(USER, SHARDS)
OTHER_SHARD = (SHARD + 1) % SHARDS
NEXT_DAY = DAY + dt.timedelta(days=1)
LATER = 86_400_000
NOBODY = 65534

Seen = dict[str, Any]
"""What was seen, by place."""
Names = tuple[str, ...]
"""What people have to read, one of these."""


def settings_of(home: Path, redis_url: str) -> Settings:
    return Settings(
        home=home,
        redis_url=redis_url,
        shards=SHARDS,
        duckdb_threads=1,
        raw_keep=dt.timedelta(0),
        drain_tick_seconds=1,
    )


def build(settings: Settings) -> Lake:
    """Two days of one user, consolidated, with minutes; a reading of the first day is pending."""
    lake = Lake.open(settings)
    partitions.keep_first_day(settings, DAY)
    with contextlib.closing(connect(settings)) as client:
        for lines in ([line(), line(at=NOON + LATER)], [line(at=NOON + 60_000)]):
            assert Producer(client, settings).append({SHARD: lines}) == {SHARD: None}
            with contextlib.closing(Consumer(client, settings)) as consumer:
                consumer.open()
                drain(consumer, lake, settings, until_empty=True)
            if len(lines) == 2:
                with coordinated(lake, settings, start_server=False) as known:
                    for day in (DAY, NEXT_DAY):
                        known.consolidate(lake, day, settings).require()
                        minutes.build(lake, day, settings)
    return lake


# -- damages: each returns what has to be named, in the middle of which people look


def pending(lake: Lake) -> Path:
    (one,) = [
        one.path
        for one in fragments.listed(lake, DAY, SHARD)
        if pq.read_table(one.path)["timestamp"].cast("int64").to_pylist() == [NOON + 60_000]
    ]
    return one


def published(lake: Lake) -> Path:
    return layout.consolidated_file(lake.root, DAY, SHARD)


@contextlib.contextmanager
def bit(lake: Lake, settings: Settings) -> Iterator[Names]:
    """The last bit of a page, which no footer tells of."""
    path = pending(lake)
    column = pq.read_metadata(path).row_group(0).column(3)
    last = column.data_page_offset + column.total_compressed_size - 1
    bytes_of = bytearray(path.read_bytes())
    bytes_of[last] ^= 1
    path.write_bytes(bytes_of)
    yield (str(path),)


@contextlib.contextmanager
def cut(lake: Lake, settings: Settings) -> Iterator[Names]:
    path = pending(lake)
    os.truncate(path, path.stat().st_size // 2)
    yield (str(path),)


@contextlib.contextmanager
def published_is_gone(lake: Lake, settings: Settings) -> Iterator[Names]:
    with coordinated(lake, settings, start_server=False) as known:
        maintain(lake, settings, known)
    assert len(fragments.listed(lake, DAY, SHARD)) == 1
    published(lake).unlink()
    yield (str(published(lake)),)


@contextlib.contextmanager
def pending_is_gone(lake: Lake, settings: Settings) -> Iterator[Names]:
    pending(lake).unlink()
    yield ("1 heartbeats are missing",)


@contextlib.contextmanager
def forged(lake: Lake, settings: Settings) -> Iterator[Names]:
    """A footer whose checksums are right, and its counts aren't."""
    path = published(lake)
    metadata = parquet.metadata(path, ConsolidatedMetadata)
    rows = pq.read_table(path, partitioning=None)
    parquet.write(path, rows, msgspec.structs.replace(metadata, rows=metadata.rows + 1))
    yield str(path), f"day {DAY}, shard {SHARD:02d}"


@contextlib.contextmanager
def wrong_type(lake: Lake, settings: Settings) -> Iterator[Names]:
    with contextlib.closing(connect(settings)) as client:
        client.set(keys.stream(OTHER_SHARD), "something else")
    yield (keys.stream(OTHER_SHARD),)


@contextlib.contextmanager
def full_disk(lake: Lake, settings: Settings) -> Iterator[Names]:
    """With a heartbeat in the buffer, that can't be drained."""
    with contextlib.closing(connect(settings)) as client:
        assert Producer(client, settings).append({SHARD: [line(at=NOON + 120_000)]}) == {
            SHARD: None
        }
    usage = shutil.disk_usage(lake.root)
    with pytest.MonkeyPatch.context() as patch, failing("create", errno.ENOSPC, str(lake.root)):
        patch.setattr(shutil, "disk_usage", lambda _: usage._replace(free=0))
        yield ("the lake's disk has 0 MiB free",)


@contextlib.contextmanager
def closed_folder(lake: Lake, settings: Settings) -> Iterator[Names]:
    with dg.DagsterInstance.ephemeral() as instance:
        seen(settings, instance)  # loads all code, which may be closed to nobody as well
        _nothing.execute_in_process(instance=instance)
    folder = pending(lake).parent
    if os.geteuid() == 0:
        for path in (settings.home_dir, *settings.home_dir.rglob("*")):
            os.chown(path, NOBODY, NOBODY)
        os.chown(folder, 0, 0)
    folder.chmod(0)
    with nobody():
        yield (str(folder),)
    folder.chmod(0o755)


@contextlib.contextmanager
def nobody() -> Iterator[None]:
    """Nothing is closed to root: be the user `nobody` for the time of the block."""
    if os.geteuid() != 0:
        yield
        return
    os.setegid(NOBODY)
    os.seteuid(NOBODY)
    try:
        yield
    finally:
        os.seteuid(0)
        os.setegid(0)


Damage = Callable[[Lake, Settings], contextlib.AbstractContextManager[Names]]

# -- places


def seen(settings: Settings, instance: dg.DagsterInstance) -> Seen:
    """What people see wherever they look, in the order in which a table in the docs names it.

    The instance was made before: Dagster reads files of its own for that, and whom the damage has
    made nobody may have no way to them.
    """
    given = {
        "HB_HOME": str(settings.home),
        "HB_SHARDS": str(SHARDS),
        "HB_REDIS_URL": settings.redis_url.get_secret_value() if settings.redis_url else "",
    }
    with pytest.MonkeyPatch.context() as patch:
        for name, value in given.items():
            patch.setenv(name, value)
        patch.setattr(backend, "SURVEY_SECONDS", 0)
        patch.setattr(backend, "SURVEY_SHARE", 1)
        found: Seen = {"query": [_query(DAY), _query(NEXT_DAY)]}
        with running(settings) as http:
            found["GET"] = [_get(http, DAY), _get(http, NEXT_DAY)]
            wait_for(
                lambda: http.get("/health").json()["parts"]["consolidation"] != "not seen yet",
                "the lake to be looked at",
            )
            health = http.get("/health/ready")
            found["/health"] = {"code": health.status_code} | health.json()
            found["/metrics"] = {
                name + ",".join(f'{{{label}="{value}"}}' for label, value in labels): value_of
                for (name, labels), value_of in samples(http).items()
            }
        found["`hb status`"] = _told("status")
        found["Dagster"] = _dagster(settings, instance)
        found["`hb audit`"] = _told("audit")
    return found


def _told(*arguments: str) -> Seen:
    result = CliRunner().invoke(load_commands(), [*arguments, "--json"])
    assert "Traceback" not in result.output
    said = json.loads(result.stdout) if result.stdout.startswith("{") else None
    return {"code": result.exit_code, "said": said, "complaint": result.stderr}


def _query(day: dt.date) -> Seen:
    begins = dt.datetime.combine(day, dt.time(), dt.UTC)
    ends = begins + dt.timedelta(days=1)
    return _told("query", USER, "--start", begins.isoformat(), "--end", ends.isoformat())


def _get(http: Any, day: dt.date) -> Seen:
    begins = dt.datetime.combine(day, dt.time())
    span = {"start": begins.isoformat(), "end": (begins + dt.timedelta(days=1)).isoformat()}
    answer = http.get(PATH, params={"user_id": USER, **span})
    return {"code": answer.status_code, "said": answer.json()}


@dg.job
def _nothing() -> None:
    """What Dagster loads to run it, any job needs."""


def _dagster(settings: Settings, instance: dg.DagsterInstance) -> Seen:
    """Names of the alarms that the sensors raise, and days whose check `complete` is red."""
    found: set[str] = set()
    red: list[str] = []
    for sensor in ("drain", "buffer", "consolidation", "damage"):
        data = Ticks(settings, instance, sensor).tick()
        raised = Cursor.parse(data.cursor).alarms if sensor == "drain" else alarms.load(data.cursor)
        found |= raised.keys()
        if sensor == "damage" and data.run_requests:
            [request] = data.run_requests
            job = of(settings).resolve_job_def("known_damage")
            done = job.execute_in_process(instance=instance, run_config=request.run_config)
            told = done.get_asset_check_evaluations()
            red += [str(one.partition) for one in told if not one.passed]
    return {"alarms": sorted(found), "red": red}
