"""Importing, on a real server: every record of a file is accepted, or refused with its number."""

from __future__ import annotations

import gzip
import json
import threading
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import pytest
import redis

from hb_assets.buffer import depth
from hb_assets.buffer.consumer import Consumer
from hb_assets.core.errors import BufferFullError, HbError
from hb_assets.core.settings import Settings
from hb_assets.lake.storage.store import Lake
from hb_assets.pipeline.audit import audit
from hb_assets.pipeline.drain import drain
from hb_assets.pipeline.importing import importer
from hb_assets_tests.lake.deliveries import NOON, consolidated, line, survivors
from hb_assets_tests.pipeline.importing.conftest import Run


def stored(path: Path, content: bytes) -> Path:
    path.write_bytes(content)
    return path


def tiny(settings: Settings, **bounds: int) -> Settings:
    """A buffer that is far smaller than the file."""
    return settings.model_copy(
        update={"buffer_max_heartbeats": 40, "drain_sensor_interval": 1, **bounds}
    )


USERS = b"\n".join(line(f"u{n % 7}", at=NOON + n) for n in range(300))


@pytest.mark.parametrize("bounds", [{}, {"buffer_max_heartbeats": 12}, {"buffer_max_bytes": 2048}])
def test_make_room(
    tmp_path: Path,
    run: Run,
    consumer: Consumer,
    lake: Lake,
    settings: Settings,
    drained: Callable[[], list[Any]],
    bounds: dict[str, int],
) -> None:
    small = tiny(settings, **bounds)
    rooms = [0]

    def make_room() -> None:
        rooms[0] += 1
        drain(consumer, lake, small)

    path = stored(tmp_path / "a.ndjson", USERS)
    done, _ = run(path, settings=small, make_room=make_room)
    assert done.accepted == 300
    assert rooms[0] > 1
    assert len(drained()) == 300


def test_waits_while_somebody_else_drains(
    tmp_path: Path,
    run: Run,
    consumer: Consumer,
    lake: Lake,
    settings: Settings,
    drained: Callable[[], list[Any]],
) -> None:
    small = tiny(settings)
    stop = threading.Event()
    path = stored(tmp_path / "a.ndjson", b"\n".join(USERS.split(b"\n")[:60]))
    with ThreadPoolExecutor(1) as pool:
        drainer = pool.submit(drain, consumer, lake, small, follow=True, stop=stop.is_set)
        try:
            done, _ = run(path, settings=small)
        finally:
            stop.set()
        drainer.result()
    assert done.accepted == 60
    assert len(drained()) == 60


def test_gives_up_in_the_end(
    tmp_path: Path, run: Run, settings: Settings, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(importer, "_PATIENCE", -1.0)
    with pytest.raises(BufferFullError, match="buffer full: shard"):
        run(stored(tmp_path / "a.ndjson", USERS), settings=tiny(settings))


def test_room_that_cannot_be_made(tmp_path: Path, run: Run, settings: Settings) -> None:
    """An error of the lake isn't taken for one of the file."""

    def make_room() -> None:
        raise OSError(28, "No space left on device")

    with pytest.raises(OSError, match="No space left") as raised:
        run(
            stored(tmp_path / "a.ndjson", USERS),
            settings=tiny(settings),
            make_room=make_room,
        )
    assert not isinstance(raised.value, HbError)


def test_order_of_a_user_is_kept(
    tmp_path: Path,
    run: Run,
    consumer: Consumer,
    lake: Lake,
    settings: Settings,
    drained: Callable[[], list[Any]],
) -> None:
    """The last line of a key wins, even when the buffer was full in between."""
    lines = b"\n".join(line(f"u{n % 5}", bpm=60 + n // 5) for n in range(100))
    small = tiny(settings)
    run(
        stored(tmp_path / "a.ndjson", lines),
        settings=small,
        make_room=lambda: drain(consumer, lake, small),
    )
    assert [(one[0], one[3]) for one in drained()] == [(f"u{n}", 79) for n in range(5)]


def test_twice_changes_nothing(
    tmp_path: Path,
    run: Run,
    client: redis.Redis,
    lake: Lake,
    settings: Settings,
    drained: Callable[[], list[Any]],
) -> None:
    path = stored(tmp_path / "a.ndjson.gz", gzip.compress(USERS))
    run(path)
    before = drained()
    run(path)
    assert drained() == before
    assert len(before) == 300 == len(survivors(consolidated(lake)))
    assert audit(client, lake, settings).differences == []
    assert sum(one.acknowledged for one in depth.depths(client, settings).states) == 600


def test_progress_and_unknown_fields(tmp_path: Path, run: Run) -> None:
    told: list[int] = []
    content = json.dumps(json.loads(line()) | {"extra": 1}).encode() + b"\n" + line()
    path = stored(tmp_path / "a.ndjson", content)
    done, _ = run(path, on_progress=told.append)
    assert told == [len(content)]
    assert done.ignored == {"extra": 1}
