"""Fixtures of the lake's tests: they need no server."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path

import pytest

from hb_assets.core.settings import Settings
from hb_assets.lake.storage.store import Lake
from hb_assets_tests.lake.deliveries import left_behind


@pytest.fixture
def settings(tmp_path: Path) -> Settings:
    """A home that doesn't exist yet; no test of the lake needs more than one core."""
    return Settings(home=tmp_path / "home", shards=4, duckdb_threads=1)


@pytest.fixture
def lake(settings: Settings) -> Iterator[Lake]:
    """An empty lake; no test may leave a temp file in it."""
    opened = Lake.open(settings)
    yield opened
    assert left_behind(opened.root) == []
