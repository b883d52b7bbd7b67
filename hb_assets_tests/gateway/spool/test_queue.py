from __future__ import annotations

import contextlib
import logging
import os
import random
import resource
import signal
import sqlite3
import subprocess
import sys
import tempfile
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
from hypothesis import given
from hypothesis import settings as example_settings
from hypothesis import strategies as st

from hb_assets.buffer.producer import Lines
from hb_assets.core.errors import SettingsError, SpoolFullError, SpoolUnavailableError
from hb_assets.core.settings import Settings, environment
from hb_assets.gateway.spool import database
from hb_assets.gateway.spool.database import Record
from hb_assets.gateway.spool.queue import CLOSING, FREE, QUEUED, Holdings, Spool, holdings

SHARDS = 4
NOBODY: frozenset[int] = frozenset()


@pytest.fixture
def home(tmp_path: Path) -> Settings:
    return Settings(home=tmp_path / "home", shards=SHARDS)


@pytest.fixture
def spool(home: Settings) -> Iterator[Spool]:
    with contextlib.closing(Spool(home)) as opened:
        opened.open()
        yield opened


def everything(spool: Spool) -> list[Record]:
    """All records, as a replay reads them."""
    found: list[Record] = []
    while step := spool.read(found[-1].id if found else 0, NOBODY):
        found += step
    return found


def lines_of(spool: Spool) -> dict[int, list[bytes]]:
    by_shard: dict[int, list[bytes]] = {}
    for record in everything(spool):
        by_shard.setdefault(record.shard, []).extend(record.lines)
    return by_shard


def file_of(settings: Settings) -> Path:
    return max(settings.spool_dir.glob("spool-*.sqlite"))


def sql(settings: Settings, statement: str, *values: object) -> None:
    with contextlib.closing(sqlite3.connect(file_of(settings))) as db, db:
        assert db.execute(statement, values).rowcount


def contents(settings: Settings) -> bytes:
    """Every byte that lies in the spool's folder."""
    return b"".join(path.read_bytes() for path in settings.spool_dir.iterdir())


# -- what goes in comes out, in order

calls = st.lists(
    st.dictionaries(
        st.integers(0, SHARDS - 1),
        st.lists(st.binary(min_size=1, max_size=20).filter(lambda b: b"\n" not in b), min_size=1),
        max_size=3,
    ),
    max_size=4,
)


@given(batches=st.lists(calls, max_size=5), most=st.integers(1, 5), reopened=st.booleans())
@example_settings(max_examples=40, deadline=None)
def test_every_shard_keeps_its_order(batches: list[list[Lines]], most: int, reopened: bool) -> None:
    with tempfile.TemporaryDirectory() as folder:
        settings = Settings(home=Path(folder), shards=SHARDS, entry_max_heartbeats=most)
        spool = Spool(settings)
        expected: dict[int, list[bytes]] = {}
        for batch in batches:
            for outcome in spool.put(batch):
                assert set(outcome.values()) <= {None}
            for call in batch:
                for shard, lines in call.items():
                    expected.setdefault(shard, []).extend(lines)
        if reopened:
            spool.close()
            spool = Spool(settings)
            spool.open()
        assert {s for s, mark in enumerate(spool.queued()) if mark} == set(expected)
        assert lines_of(spool) == expected
        found = everything(spool)
        assert all(len(record.lines) <= most for record in found)
        held = spool.holdings()
        assert held.heartbeats == sum(map(len, expected.values()))
        spool.remove(found)
        assert spool.queued() == bytes(100)
        assert spool.holdings().heartbeats == spool.holdings().bytes == 0
        assert spool.holdings().replayed == held.heartbeats
        spool.close()


def test_what_is_stored_is_on_the_disk_before_it_is_answered(
    spool: Spool, monkeypatch: pytest.MonkeyPatch
) -> None:
    """As the transaction that stores it runs: SQLite fsyncs its log before it says committed."""
    found: list[object] = []
    add = database.add

    def stored(db: sqlite3.Connection, *arguments: Any) -> None:
        add(db, *arguments)
        found.extend(db.execute("PRAGMA synchronous").fetchone())
        found.extend(db.execute("PRAGMA journal_mode").fetchone())

    monkeypatch.setattr(database, "add", stored)
    spool.put([{0: [b"line"]}])
    full = 2
    assert found == [full, "wal"]


def test_marks_are_seen_by_other_processes_and_survive_a_restart(
    home: Settings, spool: Spool
) -> None:
    with contextlib.closing(Spool(home)) as other:
        other.open()
        assert not any(other.queued())
        spool.put([{2: [b"x"]}])
        assert other.queued()[2] == QUEUED
        (record,) = other.read(0, NOBODY)
        assert spool.queued()[2] == CLOSING
        spool.put([{2: [b"y"]}])
        other.remove([record])
        assert spool.queued()[2] == CLOSING  # y is still there
        other.reopen([2])
        assert spool.queued()[2] == QUEUED
        other.remove(other.read(record.id, NOBODY))
        assert spool.queued()[2] == FREE
        spool.put([{1: [b"z"]}])
    (home.spool_dir / "queued").write_bytes(bytes(100))  # what a power cut may leave of it
    with contextlib.closing(Spool(home)) as again:
        again.open()
        assert list(again.queued()[:SHARDS]) == [FREE, QUEUED, FREE, FREE]


def test_a_shard_can_be_skipped(spool: Spool) -> None:
    spool.put([{0: [b"a"], 1: [b"b"]}])
    spool.put([{0: [b"c"], 1: [b"d"]}])
    assert [record.lines for record in spool.read(0, frozenset({0}))] == [(b"b",), (b"d",)]


def test_the_folder_is_private(home: Settings, spool: Spool) -> None:
    spool.put([{0: [b"x"]}])
    assert home.spool_dir.stat().st_mode & 0o777 == 0o700
    modes = {path.name: path.stat().st_mode & 0o777 for path in home.spool_dir.iterdir()}
    assert len(modes) >= 5
    assert set(modes.values()) == {0o600}, modes


# -- bounds


def test_a_full_spool_refuses_what_does_not_fit(home: Settings) -> None:
    small = home.model_copy(update={"spool_max_bytes": 4096})
    with contextlib.closing(Spool(small)) as spool:
        fits, too_large, fits_too = [b"x" * 2040], [b"y" * 3000], [b"z" * 10]
        first, second, third = spool.put([{0: fits}, {0: fits_too, 1: too_large}, {2: fits_too}])
        assert first == {0: None}
        assert second[0] is None
        assert isinstance(second[1], SpoolFullError)
        assert second[1].retry_after >= 1
        assert third == {2: None}
        assert spool.holdings().full
        (outcome,) = spool.put([{0: [b"x" * 2500]}])
        assert isinstance(outcome[0], SpoolFullError)
        assert lines_of(spool) == {0: fits + fits_too, 2: fits_too}
        spool.remove(everything(spool))
        assert not spool.holdings().full
        assert spool.put([{0: too_large}]) == [{0: None}]


def test_a_full_disk_stores_nothing_and_keeps_what_is_there(spool: Spool) -> None:
    spool.put([{0: [b"before"]}])
    assert spool._db is not None
    (pages,) = spool._db.execute("PRAGMA page_count").fetchone()
    spool._db.execute(f"PRAGMA max_page_count = {pages}")
    with pytest.raises(SpoolUnavailableError, match="full"):
        spool.put([{0: [b"x" * 100_000]}, {1: [b"y"]}])
    assert lines_of(spool) == {0: [b"before"]}
    spool._db.execute("PRAGMA max_page_count = 100000")
    assert spool.put([{0: [b"after"]}]) == [{0: None}]
    assert lines_of(spool) == {0: [b"before", b"after"]}


def test_a_disk_that_stops_writing_stores_nothing_and_keeps_what_is_there(spool: Spool) -> None:
    """By the kernel: beyond its limit a write is cut short, then fails, as on a broken disk."""
    spool.put([{0: [b"before"]}])
    limits = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (100_000, limits[1]))
    try:
        with pytest.raises(SpoolUnavailableError):
            spool.put([{0: [b"x" * 300_000]}])
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, limits)
    assert lines_of(spool) == {0: [b"before"]}
    assert spool.put([{0: [b"after"]}]) == [{0: None}]
    assert lines_of(spool) == {0: [b"before", b"after"]}


def test_a_folder_that_cannot_be_used_is_one_clear_line(home: Settings) -> None:
    home.home_dir.mkdir()
    home.spool_dir.touch()
    with pytest.raises(SpoolUnavailableError, match="spool") as caught:
        Spool(home).put([{0: [b"x"]}])
    assert "\n" not in str(caught.value)


def test_what_is_deleted_is_overwritten_and_its_room_given_back(
    home: Settings, spool: Spool
) -> None:
    for number in range(20):
        spool.put([{0: [b"secret-heart-rate-%d" % number + b"x" * 100_000]}])
    assert b"secret-heart-rate" in contents(home)
    found = everything(spool)
    spool.remove(found[:10])
    spool.compact()
    assert b"secret-heart-rate-9x" not in contents(home)
    assert b"secret-heart-rate-10x" in contents(home)
    spool.remove(found[10:])
    spool.compact()
    assert b"secret" not in contents(home)
    assert sum(path.stat().st_size for path in home.spool_dir.iterdir()) < 200_000


# -- damage


@pytest.mark.parametrize(
    "change",
    [
        "lines = CAST(replace(CAST(lines AS TEXT), 'secret', 'sacred') AS BLOB)",
        "lines = substr(lines, 1, 3)",
        "lines = 7",
        "n = n + 1",
        "n = 'many'",
        "shard = 3",
        "shard = 12345",
        "shard = 'x'",
        "checksum = zeroblob(16)",
    ],
)
def test_a_torn_record_is_set_aside_and_not_served(
    home: Settings, spool: Spool, caplog: pytest.LogCaptureFixture, change: str
) -> None:
    spool.put([{0: [b"before"]}])
    spool.put([{0: [b"secret", b"secret too"]}])
    spool.put([{0: [b"after"]}])
    spool.close()
    if "shard = 'x'" in change:  # what SQL refuses, a disk can do: the type isn't checked there
        sql(home, "UPDATE records SET id = id, shard = x'00' WHERE id = 2")
    else:
        sql(home, f"UPDATE records SET {change} WHERE id = 2")
    with contextlib.closing(Spool(home)) as again:
        again.open()
        assert any(again.queued())
        assert lines_of(again) == {0: [b"before", b"after"]}
        held = again.holdings()
        assert (held.heartbeats, held.damaged_records) == (2, 1)
        (_, damaged) = held.alarms()
        assert "1 records" in damaged
        again.remove(everything(again))
        assert not any(again.queued())
    (line,) = [r.message for r in caplog.records if r.levelno >= logging.ERROR]
    assert "alarm spool" in line
    assert "secret" not in line


def test_a_database_that_sqlite_cannot_read_is_left_and_a_new_one_begun(
    home: Settings, spool: Spool, caplog: pytest.LogCaptureFixture
) -> None:
    with contextlib.closing(Spool(home)) as other:
        spool.put([{0: [b"lost"]}])
        other.open()
        spool.close()
        other.close()
        before = file_of(home)
        before.write_bytes(random.Random(7).randbytes(before.stat().st_size))
        assert other.put([{1: [b"one"]}]) == [{1: None}]
        assert spool.put([{1: [b"two"]}]) == [{1: None}]
        assert lines_of(other) == {1: [b"one", b"two"]}
        assert spool.holdings().damaged_files == 1
        assert before.exists()
        before.unlink()  # what an operator does, once it has been looked at
        assert spool.holdings().damaged_files == 0
        assert lines_of(spool) == {1: [b"one", b"two"]}
    assert "can't read" in caplog.text


def test_what_can_be_read_of_a_damaged_database_is_saved(home: Settings, spool: Spool) -> None:
    for number in range(400):
        spool.put([{number % SHARDS: [b"%03d" % number * 70]}])
    spool.remember("a", "fact")
    spool.close()  # out of the journal, into the file
    path = file_of(home)
    pages = [path.read_bytes()[at : at + 4096] for at in range(0, path.stat().st_size, 4096)]
    leaves = [n for n, page in enumerate(pages) if page[0] == 13 and page.count(b"200" * 70)]
    with path.open("r+b") as file:
        file.seek(leaves[0] * 4096)
        file.write(b"\xff" * 4096)
    with contextlib.closing(Spool(home)) as other:
        other.open()
        spool.put([{0: [b"new"]}])
        found = everything(other)
        assert other.holdings().damaged_files == 1
        assert other.fact("a") == "fact"
    numbers = [int(record.lines[0][:3]) for record in found[:-1]]
    assert numbers == sorted(numbers)
    assert 350 < len(numbers) < 400
    assert (numbers[0], numbers[-1]) == (0, 399)
    assert found[-1].lines == (b"new",)


def test_counts_that_the_disk_has_damaged_mend_themselves(home: Settings, spool: Spool) -> None:
    spool.put([{0: [b"x"]}])
    sql(home, "UPDATE held SET records = 9, heartbeats = 9, bytes = 9")
    spool.remove(everything(spool))
    assert any(spool.queued())
    spool.recount()
    assert not any(spool.queued())


# -- other homes, other versions


def test_another_number_of_shards_is_refused_while_it_holds_something(
    home: Settings, spool: Spool
) -> None:
    spool.put([{3: [b"x"]}])
    fewer = home.model_copy(update={"shards": 2})
    with pytest.raises(SettingsError, match="HB_SHARDS=4"):
        Spool(fewer).open()
    spool.remove(everything(spool))
    with contextlib.closing(Spool(fewer)) as other:
        other.open()


def test_a_newer_format_is_refused(home: Settings, spool: Spool) -> None:
    spool.close()
    with contextlib.closing(sqlite3.connect(file_of(home))) as db:
        db.execute("PRAGMA user_version = 99")
    with pytest.raises(SettingsError, match="99"):
        spool.open()


def test_a_look_makes_nothing(home: Settings) -> None:
    assert holdings(home) is None
    assert not home.home_dir.exists()
    with contextlib.closing(Spool(home)) as spool:
        spool.put([{0: [b"xyz", b"z"]}])
        assert holdings(home) == Holdings(2, 5, home.spool_max_bytes)


# -- erasing


def test_rewrite_deletes_lines_for_good(home: Settings, spool: Spool) -> None:
    for number in range(30):
        user = b"u%d" % (number % 3)
        spool.put([{0: [user + b" secret-%d " % number + b"x" * 5000, b"other %d" % number]}])
    sql(
        home, "UPDATE records SET lines = CAST(replace(lines, 'u1 s', 'u1 S') AS BLOB) WHERE id = 2"
    )
    with contextlib.closing(Spool(home)) as gateway:
        gateway.open()
        assert spool.rewrite(lambda line: not line.startswith(b"u1")) == 10
        found = lines_of(gateway)[0]
        assert gateway.holdings().damaged_records == 1
    assert not any(line.startswith(b"u1") for line in found)
    assert sum(line.startswith(b"other") for line in found) == 29  # the 30th is set aside
    assert next(line for line in found if line.startswith(b"u2")).startswith(b"u2 secret-2 ")
    assert b"u1 " not in contents(home)
    assert spool.rewrite(lambda _: False) == 50
    assert not any(spool.queued())
    assert contents(home).count(b"other") == 0


def test_rewrite_waits_for_a_replay(
    home: Settings, spool: Spool, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("hb_assets.gateway.spool.queue._LOCK_SECONDS", 0.05)
    spool.put([{0: [b"x"]}])
    with contextlib.closing(Spool(home)) as gateway, gateway.replaying() as ours:
        assert ours
        with pytest.raises(SpoolUnavailableError, match="replaying"):
            spool.rewrite(lambda _: False)
    assert spool.rewrite(lambda _: False) == 1


# -- processes that die

WRITER = """
import itertools, sys
from hb_assets.core import settings
from hb_assets.gateway.spool.queue import Spool
spool = Spool(settings.load())
for number in itertools.count():
    spool.put([{number % 4: [b"%s %d" % (sys.argv[1].encode(), number)]}])
    print(number, flush=True)
"""


def test_kill_9_loses_nothing_that_was_committed(home: Settings) -> None:
    def start(name: str) -> subprocess.Popen[str]:
        argv = [sys.executable, "-c", WRITER, name]
        return subprocess.Popen(argv, env=environment(home), stdout=subprocess.PIPE, text=True)

    committed: dict[str, int] = {}
    for turn in range(2):
        names = [f"{turn}-{n}" for n in range(2)]
        writers = [start(name) for name in names]
        for writer in writers:
            assert writer.stdout is not None
            for _ in range(30):
                writer.stdout.readline()
        for name, writer in zip(names, writers, strict=True):
            writer.kill()
            rest = writer.communicate(timeout=30)[0].splitlines()
            committed[name] = int(rest[-1]) if rest else 29
    with contextlib.closing(Spool(home)) as spool:
        found: dict[str, list[int]] = {}
        for record in everything(spool):
            for line in record.lines:
                name, number = line.split()
                assert int(number) % 4 == record.shard
                found.setdefault(name.decode(), []).append(int(number))
    for name, last in committed.items():
        # in its order, without a gap; what the kill cut off may be there or not
        assert found[name] == list(range(len(found[name])))
        assert len(found[name]) > last


OWNER = """
import sys, time
from hb_assets.core import settings
from hb_assets.gateway.spool.queue import Spool
with Spool(settings.load()).replaying() as ours:
    print(ours, flush=True)
    time.sleep(600)
"""


def test_a_replay_is_taken_over_when_its_owner_dies(home: Settings, spool: Spool) -> None:
    argv = [sys.executable, "-c", OWNER]
    with subprocess.Popen(argv, env=environment(home), stdout=subprocess.PIPE, text=True) as owner:
        try:
            assert owner.stdout is not None
            assert owner.stdout.readline() == "True\n"
            with spool.replaying() as ours:
                assert not ours
            os.kill(owner.pid, signal.SIGKILL)
            owner.wait(timeout=30)
            with spool.replaying() as ours:
                assert ours
                with spool.replaying() as twice:
                    assert not twice
        finally:
            owner.kill()
