"""Engines: what they spill lies under HB_HOME, closed to others, and goes with its process."""

from __future__ import annotations

import contextlib
import signal
import stat
import subprocess
import sys
import threading
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import duckdb
import pytest

from hb_assets.core.settings import Settings, environment
from hb_assets.lake.storage import engine as engine_module
from hb_assets.lake.storage.engine import engine, spill_folder, sweep

HOLD = """
import sys
from hb_assets.lake.storage.engine import engine
from hb_assets.core.settings import load
with engine(load()) as connection:
    connection.execute("SET memory_limit = '64MiB'")
    connection.execute("CREATE TABLE t AS SELECT i, repeat('x', 100) || i AS s FROM range(2000000) t(i)")
    print("spilled", flush=True)
    sys.stdin.read()
"""


def spilled(settings: Settings) -> list[Path]:
    return sorted((settings.run_dir / "spill").iterdir())


def test_spill_folder(settings: Settings) -> None:
    with spill_folder(settings) as folder, spill_folder(settings) as other:
        assert spilled(settings) == sorted([folder, other])
        for one in (folder, folder.parent):
            assert stat.S_IMODE(one.stat().st_mode) == 0o700
        (folder / "file").write_bytes(b"x")
        sweep(settings)
        assert spilled(settings) == sorted([folder, other])
    assert spilled(settings) == []


def test_what_a_killed_process_left_goes_and_what_a_living_one_has_stays(
    settings: Settings,
) -> None:
    def start() -> subprocess.Popen[str]:
        process = subprocess.Popen(
            [sys.executable, "-c", HOLD],
            env=environment(settings),
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            text=True,
        )
        assert process.stdout is not None
        assert process.stdout.readline() == "spilled\n"
        return process

    with start() as dead, start() as living:
        dead.send_signal(signal.SIGKILL)
        dead.wait()
        left, other = spilled(settings)
        assert all(any(one.iterdir()) for one in (left, other))
        with engine(settings):
            found = spilled(settings)
        assert str(dead.pid) not in " ".join(one.name.split("-")[0] for one in found)
        assert [one for one in found if one.name.startswith(f"{living.pid}-")]
        living.communicate()
    assert spilled(settings) == []


def test_without_a_folder_what_fits_into_memory_is_done(tmp_path: Path) -> None:
    (tmp_path / "file").write_bytes(b"")
    with engine(Settings(home=tmp_path / "file" / "home")) as connection:
        assert connection.sql("SELECT sum(i) FROM range(1000) t(i)").fetchall() == [(499500,)]


@pytest.fixture
def made(monkeypatch: pytest.MonkeyPatch) -> list[duckdb.DuckDBPyConnection]:
    """Every engine that is made from now on; none rests yet."""
    monkeypatch.setattr(engine_module, "_resting", [])
    engines: list[duckdb.DuckDBPyConnection] = []
    connect = engine_module.connect

    def noted(settings: Settings) -> duckdb.DuckDBPyConnection:
        engines.append(connect(settings))
        return engines[-1]

    monkeypatch.setattr(engine_module, "connect", noted)
    return engines


def test_an_engine_is_used_again_and_nothing_is_left_in_it(
    settings: Settings, made: list[duckdb.DuckDBPyConnection]
) -> None:
    for _ in range(2):
        with engine(settings) as connection:
            assert connection.sql("SHOW TABLES").fetchall() == []
            zone = connection.sql("SELECT current_setting('TimeZone')").fetchall()
            assert zone == [("UTC",)]
            connection.execute("SET TimeZone = 'Europe/Zurich'")
            connection.execute("CREATE TEMP TABLE t AS SELECT 1")
            rows = connection.sql("SELECT 2 AS i").to_arrow_table()
            connection.register("registered", rows)
        assert spilled(settings) == []
    assert len(made) == 1
    with engine(settings.model_copy(update={"duckdb_memory": 2**27})) as connection:
        limit = connection.sql("SELECT current_setting('memory_limit')").fetchall()
    assert limit == [("128.0 MiB",)]
    assert len(made) == 2


def test_several_pieces_of_work_at_once_share_no_engine(
    settings: Settings, made: list[duckdb.DuckDBPyConnection]
) -> None:
    with engine(settings), engine(settings), engine(settings):
        assert len(made) == 3

    def work(_: int) -> int:
        with engine(settings) as connection:
            together.wait()
            return connection.sql("SELECT 1").fetchall()[0][0]

    together = threading.Barrier(3)
    with ThreadPoolExecutor(3) as pool:
        assert list(pool.map(work, range(3))) == [1, 1, 1]
    assert len(made) == 3, "those that rested serve again"


@pytest.mark.parametrize("how", ["it failed", "it spilled"])
def test_an_engine_that_may_not_be_sound_is_not_used_again(
    settings: Settings, made: list[duckdb.DuckDBPyConnection], how: str
) -> None:
    small = settings.model_copy(update={"duckdb_memory": 2**26})
    with contextlib.suppress(ZeroDivisionError), engine(small) as connection:
        if how == "it failed":
            raise ZeroDivisionError
        connection.execute(
            "CREATE TEMP TABLE t AS SELECT i, repeat('x', 100) || i FROM range(1000000) t(i)"
        )
        assert any(any(one.iterdir()) for one in spilled(settings))
    assert spilled(settings) == []
    with engine(small) as connection:
        assert connection.sql("SELECT 1").fetchall() == [(1,)]
    assert len(made) == 2
