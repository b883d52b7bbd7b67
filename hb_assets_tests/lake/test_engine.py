"""Engines: what they spill lies under HB_HOME, closed to others, and goes with its process."""

from __future__ import annotations

import signal
import stat
import subprocess
import sys
from pathlib import Path

from hb_assets.lake.engine import engine, spill_folder, sweep
from hb_assets.settings import Settings, environment

HOLD = """
import sys
from hb_assets.lake.engine import engine
from hb_assets.settings import load
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
