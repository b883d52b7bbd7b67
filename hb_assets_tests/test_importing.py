"""Importing, on a real server: every line of a file is accepted, or refused with its number."""

from __future__ import annotations

import datetime as dt
import gzip
import json
import threading
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import pyarrow as pa
import pyarrow.parquet as pq
import pytest
import redis

from hb_assets import importing
from hb_assets.audit import audit
from hb_assets.buffer import depth
from hb_assets.buffer.consumer import Consumer
from hb_assets.buffer.producer import Producer
from hb_assets.drain import drain
from hb_assets.errors import BufferFullError, HbError, ImportFileError
from hb_assets.importing import Imported, Importer, RefusedLine, format_of
from hb_assets.lake.consolidation import consolidate
from hb_assets.lake.store import Lake
from hb_assets.settings import Settings
from hb_assets_tests.conftest import on_valkey
from hb_assets_tests.lake.deliveries import DAY, NOON, consolidated, line, survivors

redis_url = on_valkey

HEADER = b"user_id,device_id,timestamp,heart_rate\n"
MOMENT = dt.datetime(2025, 1, 15, 12, tzinfo=dt.UTC)


Run = Callable[..., tuple[Imported, list[RefusedLine]]]


@pytest.fixture
def run(client: redis.Redis, settings: Settings) -> Run:
    def run_import(path: Path, *form: Any, **options: Any) -> tuple[Imported, list[RefusedLine]]:
        refused: list[RefusedLine] = []
        own = options.pop("settings", settings)
        importer = Importer(Producer(client, own), own, on_refused=refused.append, **options)
        return importer.run(path, *form), refused

    return run_import


@pytest.fixture
def drained(consumer: Consumer, lake: Lake, settings: Settings) -> Callable[[], list[Any]]:
    """The rows that survive of all that was imported."""

    def rows() -> list[Any]:
        drain(consumer, lake, settings, until_empty=True)
        consolidate(lake, DAY, settings)
        return sorted(one[:4] for one in consolidated(lake))

    return rows


def stored(path: Path, content: bytes, zipped: bool) -> Path:
    if zipped:
        path = path.with_name(path.name + ".gz")
        content = gzip.compress(content)
    path.write_bytes(content)
    return path


def parquet(path: Path, zipped: bool = False, **columns: Any) -> Path:
    plain = path.with_suffix(".parquet")
    pq.write_table(pa.table(columns), plain)
    return stored(plain, plain.read_bytes(), zipped) if zipped else plain


# -- formats


@pytest.mark.parametrize("zipped", [False, True])
def test_ndjson(tmp_path: Path, run: Run, drained: Callable[[], list[Any]], zipped: bool) -> None:
    lines = [line(), b"", b"\xff", line(bpm=5), line("u2") + b"\r", b'{"user_id": 5}']
    done, refused = run(stored(tmp_path / "a.ndjson", b"\n".join(lines), zipped))
    assert (done.accepted, done.refused) == (2, 3)
    assert [(one.line, one.reason) for one in refused] == [
        (3, "record_not_json"),
        (4, "heart_rate_out_of_range"),
        (6, "user_id_wrong_type"),
    ]
    assert done.reasons == {one.reason: 1 for one in refused}
    assert drained() == [("u1", "device_a", NOON, 75), ("u2", "device_a", NOON, 75)]


@pytest.mark.parametrize("zipped", [False, True])
def test_csv(tmp_path: Path, run: Run, drained: Callable[[], list[Any]], zipped: bool) -> None:
    content = (
        b"\xef\xbb\xbf" + HEADER.replace(b"\n", b",note\n") + b"u1,d,2025-01-15T12:00:00Z,75,x\n"
        b'"u\n2",d,2025-01-15 12:00:00,76,\n'
        b"u3,d,2025-01-15T12:00:00Z,high,\n"
        b",d,2025-01-15T12:00:00Z,75,\n"
        b"u4,d\n"
        b"u5,d,2025-01-15T12:00:00Z,77,x,surplus\n"
    )
    done, refused = run(stored(tmp_path / "a.csv", content, zipped))
    assert (done.accepted, done.refused) == (3, 3)
    assert [(one.line, one.reason) for one in refused] == [
        (5, "heart_rate_wrong_type"),
        (6, "user_id_missing"),
        (7, "timestamp_missing"),
    ]
    assert drained() == [("u\n2", "d", NOON, 76), ("u1", "d", NOON, 75), ("u5", "d", NOON, 77)]


def test_csv_with_epoch_milliseconds(tmp_path: Path, run: Run) -> None:
    content = f"heart_rate,timestamp_ms,device_id,user_id\n75,{NOON},d,u1\n75,x,d,u1\n".encode()
    done, refused = run(stored(tmp_path / "a.csv", content, False))
    assert done.accepted == 1
    assert [(one.line, one.reason) for one in refused] == [(3, "timestamp_wrong_type")]


@pytest.mark.parametrize(
    ("text", "accepted"),
    [("75", 1), ("75.0", 1), ("75.5", 0), ("7_5", 0), ("+75", 0), ("7e1", 0), ("nan", 0)],
)
def test_csv_numbers_are_what_json_takes(
    tmp_path: Path, run: Run, text: str, accepted: int
) -> None:
    content = HEADER + f"u1,d,2025-01-15T12:00:00Z,{text}\n".encode()
    done, _ = run(stored(tmp_path / "a.csv", content, False))
    assert (done.accepted, done.refused) == (accepted, 1 - accepted)


@pytest.mark.parametrize("zipped", [False, True])
@pytest.mark.parametrize(
    "timestamps",
    [
        pa.array([MOMENT, None], pa.timestamp("ms", tz="UTC")),
        pa.array([MOMENT.replace(tzinfo=None), None], pa.timestamp("us")),
        pa.array([MOMENT, None], pa.timestamp("ns", tz="Europe/Berlin")),
        pa.array([MOMENT, None], pa.timestamp("s", tz="America/New_York")),
        pa.array([MOMENT.isoformat(), None], pa.string()),
    ],
    ids=lambda array: str(array.type),
)
def test_parquet(
    tmp_path: Path, run: Run, drained: Callable[[], list[Any]], timestamps: pa.Array, zipped: bool
) -> None:
    path = parquet(
        tmp_path / "a",
        zipped,
        user_id=["u1", "u2"],
        device_id=["d", "d"],
        timestamp=timestamps,
        heart_rate=pa.array([75, 75], pa.uint8()),
        other=[1, 2],
    )
    done, refused = run(path)
    assert done.accepted == 1
    assert [(one.line, one.reason) for one in refused] == [(2, "timestamp_missing")]
    assert drained() == [("u1", "d", NOON, 75)]


def test_format_by_name(settings: Settings) -> None:
    names = {
        "a.ndjson": "ndjson",
        "b.JSONL.gz": "ndjson",
        "c.csv": "csv",
        "d.parquet.gz": "parquet",
    }
    assert {name: format_of(Path(name)) for name in names} == names
    with pytest.raises(ImportFileError, match="--format"):
        format_of(Path("activities.txt.gz"))


def test_format_that_is_told(tmp_path: Path, run: Run) -> None:
    done, _ = run(stored(tmp_path / "export.txt", line(), False), "ndjson")
    assert done.accepted == 1


def test_empty_file(tmp_path: Path, run: Run) -> None:
    assert run(stored(tmp_path / "a.ndjson", b"", False))[0].accepted == 0
    with pytest.raises(ImportFileError, match="lacks the columns"):
        run(stored(tmp_path / "a.csv", b"", False))


# -- files that aren't what they should be


def flipped(content: bytes) -> bytes:
    return content[:30] + bytes([content[30] ^ 0xFF, content[31] ^ 0xFF]) + content[32:]


LINES = b"\n".join(line(f"secret{n}", bpm=177) for n in range(2000))
ZIPPED = gzip.compress(LINES)
BROKEN: dict[str, bytes] = {
    "cut.ndjson.gz": ZIPPED[: len(ZIPPED) // 2],
    "flipped.ndjson.gz": flipped(ZIPPED),
    "cut.csv.gz": gzip.compress(HEADER + b"secret,d,2025-01-15T12:00:00Z,177\n" * 99)[:60],
    "cut.parquet.gz": ZIPPED[:50],
    "flipped.parquet.gz": flipped(ZIPPED),
    "not.parquet": LINES,
    "empty.parquet": b"",
    "headerless.csv": b"secret,d,2025-01-15T12:00:00Z,177\n",
    "missing.csv": b"user_id,heart_rate\nsecret,177\n",
    "latin.csv": HEADER + b"secret\xe9,d,2025-01-15T12:00:00Z,177\n",
    "wide.csv": HEADER + b"s" * 70 * 2**20 + b",d,2025-01-15T12:00:00Z,177\n",
}


@pytest.mark.parametrize("name", BROKEN)
def test_broken_file(tmp_path: Path, run: Run, name: str) -> None:
    path = tmp_path / name
    path.write_bytes(BROKEN[name])
    with pytest.raises(ImportFileError) as raised:
        run(path)
    assert_one_line_without_values(str(raised.value), path)


def assert_one_line_without_values(message: str, path: Path) -> None:
    assert message.startswith(f"{path}: ")
    assert "\n" not in message
    assert "secret" not in message.removeprefix(str(path))
    assert "177" not in message.removeprefix(str(path))


def test_parquet_without_a_column(tmp_path: Path, run: Run) -> None:
    path = parquet(tmp_path / "a", user_id=["u1"], timestamp=[MOMENT])
    with pytest.raises(ImportFileError, match="lacks the columns device_id, heart_rate"):
        run(path)


def test_parquet_with_a_date_beyond_the_calendar(tmp_path: Path, run: Run) -> None:
    far = pa.array([2**62], pa.timestamp("ms"))
    path = parquet(tmp_path / "a", user_id=["u"], device_id=["d"], timestamp=far, heart_rate=[177])
    with pytest.raises(ImportFileError) as raised:
        run(path)
    assert_one_line_without_values(str(raised.value), path)


@pytest.mark.parametrize(
    ("column", "values", "reason"),
    [
        ("heart_rate", [75.5], "heart_rate_wrong_type"),
        ("heart_rate", ["75"], "heart_rate_wrong_type"),
        ("user_id", [b"u1"], "user_id_wrong_type"),
        ("user_id", [[1]], "user_id_wrong_type"),
        ("timestamp", [dt.date(2025, 1, 15)], "timestamp_wrong_type"),
    ],
)
def test_parquet_with_other_types(
    tmp_path: Path, run: Run, column: str, values: list[object], reason: str
) -> None:
    columns: dict[str, Any] = {
        "user_id": ["u1"],
        "device_id": ["d"],
        "timestamp": [MOMENT],
        "heart_rate": [75],
    }
    done, refused = run(parquet(tmp_path / "a", **(columns | {column: values})))
    assert [(one.line, one.reason) for one in refused] == [(1, reason)]
    assert done.accepted == 0


@pytest.mark.parametrize("what", ["missing", "folder"])
def test_no_file(tmp_path: Path, run: Run, what: str) -> None:
    path = tmp_path / "a.ndjson"
    if what == "folder":
        path.mkdir()
    with pytest.raises(ImportFileError, match=r"a\.ndjson: "):
        run(path)


def test_refusals_hold_no_values(tmp_path: Path, run: Run) -> None:
    lines = [line("secret" * 30), line("secret", bpm=999), line("secret", at="secret"), b"secret"]
    _, refused = run(stored(tmp_path / "a.ndjson", b"\n".join(lines), False))
    assert len(refused) == 4
    for one in refused:
        assert "secret" not in one.message + one.reason
        assert "999" not in one.message


# -- the buffer


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

    path = stored(tmp_path / "a.ndjson", USERS, False)
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
    path = stored(tmp_path / "a.ndjson", b"\n".join(USERS.split(b"\n")[:60]), False)
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
    monkeypatch.setattr(importing, "_PATIENCE", -1.0)
    with pytest.raises(BufferFullError, match="buffer full: shard"):
        run(stored(tmp_path / "a.ndjson", USERS, False), settings=tiny(settings))


def test_room_that_cannot_be_made(tmp_path: Path, run: Run, settings: Settings) -> None:
    """An error of the lake isn't taken for one of the file."""

    def make_room() -> None:
        raise OSError(28, "No space left on device")

    with pytest.raises(OSError, match="No space left") as raised:
        run(
            stored(tmp_path / "a.ndjson", USERS, False),
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
        stored(tmp_path / "a.ndjson", lines, False),
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
    path = stored(tmp_path / "a.ndjson", USERS, True)
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
    path = stored(tmp_path / "a.ndjson", content, False)
    done, _ = run(path, on_progress=told.append)
    assert told == [len(content)]
    assert done.unknown_fields == 1


def test_ndjson_with_a_byte_order_mark(tmp_path: Path, run: Run) -> None:
    done, refused = run(stored(tmp_path / "a.ndjson", b"\xef\xbb\xbf" + line() + b"\n", False))
    assert (done.accepted, refused) == (1, [])


def test_a_long_csv_field_ends_no_file(tmp_path: Path, run: Run) -> None:
    content = (
        HEADER + b"x" * 300_000 + b",d,2025-01-15T12:00:00Z,75\nu1,d,2025-01-15T12:00:00Z,75\n"
    )
    done, refused = run(stored(tmp_path / "a.csv", content, False))
    assert done.accepted == 1
    assert [(one.line, one.reason) for one in refused] == [(2, "user_id_wrong_length")]


def test_an_array_is_told_how_to_be_written(tmp_path: Path, run: Run) -> None:
    _, refused = run(stored(tmp_path / "a.json", b"[" + line() + b"]", False))
    assert [one.message for one in refused] == ["a heartbeat is a JSON object, one on each line"]
