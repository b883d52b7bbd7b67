"""The harness itself: a checker that finds no fault, a point that isn't there, prove nothing."""

from __future__ import annotations

import dataclasses
import importlib
import os
from pathlib import Path

import numpy as np
import pyarrow as pa
import pyarrow.compute as pc
import pyarrow.parquet as pq
import pytest

from chaos import checker, load, members, points, surprises
from chaos.checker import Verdict
from chaos.load import BATCH, Sent
from hb_assets.core.days import MS_PER_DAY

START = 20_000 * MS_PER_DAY
BATCHES = 8


@pytest.mark.parametrize("point", points.POINTS, ids=lambda point: point.key)
def test_every_point_is_there(point: points.Point) -> None:
    module, _, path = point.target.partition(":")
    found = importlib.import_module(module)
    for name in path.split("."):
        found = getattr(found, name)
    assert callable(found)
    assert points.named(point.key) is point


FORESEEN = """\
hb: nothing can be drained: No space left on device
2025-01-15 10:00:00,000 WARN exited: gateway (terminated by SIGKILL; not expected)
2025-01-15 10:00:00,000 WARN exited: daemon (exit status 1; not expected)
Traceback (most recent call last):
  File "x.py", line 1, in <module>
    raise DagsterUserCodeUnreachableError(
dagster._core.errors.DagsterUserCodeUnreachableError: Could not reach user code server.
"""


@pytest.mark.parametrize(
    "line",
    [
        "Traceback (most recent call last):\n  File 'x.py', line 1\n\nValueError: secret",
        "Traceback (most recent call last):\n  File 'x.py', line 1",
        "hb: unexpected ArrowInvalid in x.py:1; this is a bug",
        "2025-01-15 10:00:00,000 WARN exited: code (terminated by SIGSEGV; not expected)",
        "2025-01-15 10:00:00,000 WARN exited: gateway (exit status 3; not expected)",
    ],
)
def test_surprises_in_logs_of_every_process(tmp_path: Path, line: str) -> None:
    (tmp_path / "gateway.log").write_text(FORESEEN)
    assert surprises.of_logs(tmp_path) == []
    (tmp_path / "daemon.log").write_text(f"{FORESEEN}{line}\n{FORESEEN if ': ' in line else ''}")
    [found] = surprises.of_logs(tmp_path)
    assert found.startswith("daemon.log: ")


@pytest.mark.parametrize(
    ("end", "surprise"),
    [
        ("sys.exit(2)", None),
        ("os.kill(os.getpid(), signal.SIGKILL)", None),
        ("os.kill(os.getpid(), signal.SIGSEGV)", "by signal 11"),
        ("os.abort()", "by signal 6"),
        ("sys.exit(3)", "with exit code 3"),
    ],
)
def test_an_end_that_nobody_brought_about(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, end: str, surprise: str | None
) -> None:
    package = tmp_path / "chaos"
    package.mkdir()
    (package / "__init__.py").touch()  # or the real one, farther on in the path, would be taken
    (package / "victim.py").write_text(f"import os, signal, sys; {end}")
    monkeypatch.setattr(members, "ROOT", tmp_path)
    log, faults = tmp_path / "log", members.Faults()
    member = members.Member("drain", ("drain",), os.environ, log, lambda _: None, faults, 1.0)
    member.look()
    child = member._child
    assert child is not None
    child.wait(timeout=60)
    member.look()
    assert member.surprises == ([f"hb drain ended {surprise}"] if surprise else [])


def test_a_few_of_the_load_are_repeats_and_corrections() -> None:
    sent = load.heartbeats(3, np.arange(BATCHES * BATCH, dtype=np.int64), START)
    keys: dict[tuple[int, int, int], list[int]] = {}
    columns = (sent.user, sent.device, sent.timestamp_ms, sent.heart_rate)
    for user, device, at, bpm in zip(*(one.tolist() for one in columns), strict=True):
        keys.setdefault((user, device, at), []).append(bpm)
    written = list(keys.values())
    assert len([values for values in written if len(values) == 1]) > 0.6 * len(written)
    assert any(len(values) == 2 and values[0] == values[1] for values in written)
    assert any(len(values) == 2 and values[0] != values[1] for values in written)
    assert any(len(set(values)) == 3 for values in written)
    assert all(30 <= bpm <= 220 for values in written for bpm in values)
    assert all(START <= at < START + 2 * MS_PER_DAY for _, _, at in keys)


@pytest.fixture
def sent() -> Sent:
    made = Sent(1)
    for _ in range(BATCHES):
        made.extend()
    made.acknowledged[:] = True
    return made


def survivors(sent: Sent) -> pa.Table:
    """What a lake has to hold: of each key the latest write."""
    made = load.heartbeats(sent.client, np.arange(len(sent.acknowledged), dtype=np.int64), START)
    rows = {}
    columns = (made.user, made.device, made.timestamp_ms, made.heart_rate)
    for user, device, at, bpm in zip(*(one.tolist() for one in columns), strict=True):
        rows[load.user_id(sent.client, user), load.DEVICES[device], at] = bpm
    users, devices, instants = zip(*rows, strict=True)
    return pa.table(
        {
            "user_id": users,
            "device_id": devices,
            "timestamp": pa.array(instants, pa.timestamp("ms", "UTC")),
            "heart_rate": pa.array(rows.values(), pa.int16()),
        }
    )


def write(lake: Path, rows: pa.Table, kind: str = "heartbeats", shard: int = 0) -> None:
    folder = lake / kind / "day=2024-10-04" / f"shard={shard:02d}"
    folder.mkdir(parents=True, exist_ok=True)
    pq.write_table(rows, folder / f"{kind}.parquet")


def checked(lake: Path, sent: Sent) -> Verdict:
    return checker.check(lake, [sent], START)


def test_a_lake_as_it_should_be(tmp_path: Path, sent: Sent) -> None:
    rows = survivors(sent)
    write(tmp_path, rows)
    found = checked(tmp_path, sent)
    keys = rows.num_rows
    assert found == Verdict(BATCHES * BATCH, keys, keys, 0, 0, keys, 0, 0)
    assert found.clean


def test_an_empty_lake(tmp_path: Path, sent: Sent) -> None:
    found = checked(tmp_path, sent)
    assert (found.found, found.missing) == (0, found.keys)


@pytest.mark.parametrize(
    ("fault", "how"), [("missing", 0), ("twice", 1), ("wrong", 2), ("invented", 3)]
)
def test_a_fault_is_found(tmp_path: Path, sent: Sent, fault: str, how: int) -> None:
    rows = survivors(sent)
    first, rest = rows.slice(0, 1), rows.slice(1)
    other = first.set_column(3, "heart_rate", pc.add(first["heart_rate"], pa.scalar(1, pa.int16())))
    stranger = first.set_column(0, "user_id", pa.array(["somebody"]))
    spoilt = [rest, *([], [first, first], [other], [first, stranger])[how]]
    write(tmp_path, pa.concat_tables(spoilt))
    found = checked(tmp_path, sent)
    assert not found.clean
    faults = {name: getattr(found, name) for name in ("missing", "twice", "wrong", "invented")}
    assert faults == dict.fromkeys(faults, 0) | {fault: 1}


def test_only_an_unsure_earlier_write_may_win(tmp_path: Path, sent: Sent) -> None:
    """A key that was corrected: with its first value only if that write may have come again."""
    place = 0
    correction = place + 50 * 20 + 19
    made = load.heartbeats(1, np.array([place, correction]), START)
    assert made.timestamp_ms[0] == made.timestamp_ms[1]
    sent = Sent(1, sent.acknowledged[: 3 * BATCH], sent.unsure[: 3 * BATCH])
    rows = survivors(sent)
    at = pc.equal(pc.cast(rows["timestamp"], pa.int64()), int(made.timestamp_ms[0]))
    values = pc.if_else(at, pa.scalar(int(made.heart_rate[0]), pa.int16()), rows["heart_rate"])
    write(tmp_path, rows.set_column(3, "heart_rate", values))
    assert checked(tmp_path, sent).wrong == 1
    sent.unsure[place] = True
    found = checked(tmp_path, sent)
    assert (found.wrong, found.keys - found.ordered) == (0, 1)


def test_raw_counts_where_a_shard_has_no_consolidated_file(tmp_path: Path, sent: Sent) -> None:
    rows = survivors(sent)
    half = rows.num_rows // 2
    write(tmp_path, rows.slice(0, half))
    write(tmp_path, rows, "raw")
    assert checked(tmp_path, sent).missing == rows.num_rows - half
    arrivals = pa.table({name: pa.array([7] * rows.num_rows) for name in ("ms", "seq", "pos")})
    raw = rows
    for name in arrivals.column_names:
        raw = raw.append_column(f"arrival_{name}", arrivals[name])
    raw = raw.append_column("arrival_shard", arrivals["ms"])
    earlier = raw.set_column(
        3, "heart_rate", pa.array([30] * rows.num_rows, pa.int16())
    ).set_column(4, "arrival_ms", pa.array([6] * rows.num_rows))
    write(tmp_path, pa.concat_tables([raw, earlier]).slice(0), "raw", shard=1)
    assert checked(tmp_path, sent) == dataclasses.replace(
        checked(tmp_path, sent), missing=0, found=rows.num_rows
    )
