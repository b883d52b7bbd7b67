"""DuckDB engines: in memory, bounded, offline, in UTC.

How an engine is made and reused, and the folders under HB_HOME that it spills to. DuckDB is
imported with the first engine: most consolidations need none.
"""

from __future__ import annotations

import fcntl
import os
import secrets
import shutil
import threading
from collections.abc import Iterator, Mapping
from contextlib import ExitStack, contextmanager
from pathlib import Path
from typing import TYPE_CHECKING

from hb_assets.core import private_files
from hb_assets.core.settings import Settings

if TYPE_CHECKING:
    import duckdb


def connect(settings: Settings) -> duckdb.DuckDBPyConnection:
    """A new engine with the settings' bounds."""
    import duckdb

    config: dict[str, str | bool | int | float | list[str]] = {
        "memory_limit": f"{settings.duckdb_memory // 2**20}MiB",
        "autoinstall_known_extensions": False,
        "autoload_known_extensions": False,
    }
    if settings.duckdb_threads:
        config["threads"] = settings.duckdb_threads
    connection = duckdb.connect(":memory:", config=config)
    connection.execute("SET TimeZone = 'UTC'")
    return connection


@contextmanager
def engine(settings: Settings) -> Iterator[duckdb.DuckDBPyConnection]:
    """Context with an engine for one piece of work, and a spill folder of its own.

    Nobody else uses it meanwhile, and nothing of the work stays in it. Where no folder can be made
    (a full disk), what fits into memory is done all the same.
    """
    with ExitStack() as stack:
        try:
            spill = str(stack.enter_context(spill_folder(settings)))
        except OSError:
            spill = ""
        whole = stack.enter_context(_one_to_oneself(settings))
        connection = stack.enter_context(whole.cursor())
        connection.execute("SET TimeZone = 'UTC'")
        connection.execute("SET temp_directory = $spill", {"spill": spill})
        yield connection


@contextmanager
def _one_to_oneself(settings: Settings) -> Iterator[duckdb.DuckDBPyConnection]:
    """An idle engine with these bounds, or a new one: that takes as long as many a query.

    One whose work failed, or that spilled (it can have no other folder), is closed.
    """
    # An engine's threads don't come along into a forked process.
    bounds = (os.getpid(), settings.duckdb_memory, settings.duckdb_threads)
    with _turn:
        found = next((one for one in _resting if one[0] == bounds), None)
        if found is not None:
            _resting.remove(found)
    whole = connect(settings) if found is None else found[1]
    try:
        yield whole
        spilled = _has_spilled(whole)
    except BaseException:
        whole.close()
        raise
    if spilled:
        whole.close()
        return
    with _turn:
        _resting.append((bounds, whole))
        surplus = _resting.pop(0)[1] if len(_resting) > _MOST_RESTING else None
    if surplus is not None:
        surplus.close()


def _has_spilled(whole: duckdb.DuckDBPyConnection) -> bool:
    import duckdb

    try:
        whole.execute("SET temp_directory = ''")
    except duckdb.NotImplementedException:
        return True
    return False


_MOST_RESTING = 4
"""Engines that a process keeps for its next pieces of work, whatever their bounds."""
_resting: list[tuple[tuple[int, int, int], duckdb.DuckDBPyConnection]] = []
_turn = threading.Lock()


@contextmanager
def spill_folder(settings: Settings) -> Iterator[Path]:
    """Context with a private folder under HB_HOME for what doesn't fit into memory.

    What killed processes left is removed before a process makes its first one: health data must
    not lie about.

    Raises:
        OSError: it can't be made.
    """
    root = _spill_root(settings)
    if root not in _swept:
        sweep(settings)
        _swept.add(root)
    private_files.make_folder(root)
    folder, held = _new_folder(root)
    try:
        yield folder
    finally:
        shutil.rmtree(folder, ignore_errors=True)
        os.close(held)


def sweep(settings: Settings) -> None:
    """Remove spill folders of processes that are gone: nobody holds a lock on them any more."""
    root = _spill_root(settings)
    for folder in root.iterdir() if root.is_dir() else ():
        try:
            held = os.open(folder, os.O_RDONLY | os.O_DIRECTORY)
        except OSError:
            continue  # another sweep was faster
        try:
            if _locked(held):
                shutil.rmtree(folder, ignore_errors=True)
        finally:
            os.close(held)


_swept: set[Path] = set()
"""Roots that this process has swept."""


def _spill_root(settings: Settings) -> Path:
    return settings.run_dir / "spill"


def _new_folder(root: Path) -> tuple[Path, int]:
    """A new folder, and the handle whose lock says that we live."""
    while True:
        folder = root / f"{os.getpid()}-{secrets.token_hex(8)}"
        folder.mkdir(mode=0o700)
        try:
            held = os.open(folder, os.O_RDONLY | os.O_DIRECTORY)
        except FileNotFoundError:
            continue  # a sweep came between
        # A lock of the handle, not of the process: it ends with us however we end, and one thread's
        # doesn't end with another's.
        if _locked(held) and folder.is_dir():
            return folder, held
        os.close(held)


def _locked(handle: int) -> bool:
    try:
        fcntl.flock(handle, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except BlockingIOError:
        return False
    return True


def figures(
    connection: duckdb.DuckDBPyConnection, query: str, params: Mapping[str, object] | None = None
) -> tuple[int, ...]:
    """The single row of counts that a query returns."""
    (row,) = connection.sql(query, params=dict(params or {})).fetchall()
    return tuple(int(value) for value in row)
