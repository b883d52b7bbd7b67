from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import redis

from hb_assets.buffer.consumer import Consumer
from hb_assets.buffer.producer import Producer
from hb_assets.core.settings import Settings
from hb_assets.lake.compaction.consolidation import consolidate
from hb_assets.lake.storage.store import Lake
from hb_assets.pipeline.drain import drain
from hb_assets.pipeline.importing.importer import Imported, Importer, RefusedLine
from hb_assets_tests.lake.deliveries import DAY, consolidated

Run = Callable[..., tuple[Imported, list[RefusedLine]]]


@pytest.fixture
def redis_url(on_valkey: str) -> str:
    return on_valkey


@pytest.fixture
def run(client: redis.Redis, settings: Settings) -> Run:
    """Imports a file: what became of it, and its refused lines."""

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
