"""The lake's ledger: counted from the files themselves, and finding what doesn't add up."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import msgspec
import pyarrow.parquet as pq
import pytest

from hb_assets.core.record import shard_of
from hb_assets.core.settings import Settings
from hb_assets.lake import ledger
from hb_assets.lake.compaction.consolidation import consolidate
from hb_assets.lake.files import fragments
from hb_assets.lake.files.consolidated import ConsolidatedMetadata
from hb_assets.lake.files.fragments import Fragment
from hb_assets.lake.storage import layout, parquet
from hb_assets.lake.storage.store import Lake
from hb_assets_tests.lake.deliveries import DAY, NOON, deliver, entry, line


def faults(lake: Lake, settings: Settings, *, deep: bool = False) -> list[str]:
    return [fault for day in ledger.of_days(lake, settings, deep=deep) for fault in day.faults]


@pytest.fixture
def published(lake: Lake, settings: Settings) -> Path:
    deliver(lake, settings, entry([line(), line(bpm=80), line(bpm=80), line(at=NOON + 1)], 0))
    deliver(lake, settings, entry([line(bpm=90)], 1))
    consolidate(lake, DAY, settings)
    return layout.consolidated_file(lake.root, DAY, shard_of("u1", lake.shards))


def test_adds_up(lake: Lake, settings: Settings, published: Path) -> None:
    deliver(lake, settings, entry([line(at=NOON + 2)], 2))
    deliver(lake, settings, entry([line(at=NOON + 2)], 2))
    deliver(lake, settings, entry([line(bpm=90)], 1))
    [day] = ledger.of_days(lake, settings, deep=True)
    assert (day.rows, day.unique, day.superseded, day.pending) == (6, 2, 3, 1)
    assert (day.repeats, day.corrections) == (1, 2)
    assert day.faults == []
    consolidate(lake, DAY, settings)
    [day] = ledger.of_days(lake, settings, deep=True)
    assert (day.rows, day.unique, day.superseded, day.pending) == (6, 3, 3, 0)
    assert (day.replayed, day.faults) == (2, [])


def tamper(path: Path, **counts: Any) -> None:
    rows = pq.read_table(path, partitioning=None)
    metadata = msgspec.structs.replace(parquet.metadata(path, ConsolidatedMetadata), **counts)
    parquet.write(path, rows, metadata)


@pytest.mark.parametrize(
    ("counts", "fault"),
    [
        ({"rows": 6, "superseded": 4, "repeats": 2}, "5 distinct rows lie in the listed fragments"),
        ({"superseded": 2}, "5 rows came in, 2 unique + 2 superseded"),
        ({"repeats": 2}, "3 superseded, 2 repeats + 2 corrections"),
        ({"unique": 3, "superseded": 2, "repeats": 0}, "the file has 2 rows, 3 are unique"),
    ],
)
def test_tampered_counts(
    lake: Lake, settings: Settings, published: Path, counts: dict[str, int], fault: str
) -> None:
    tamper(published, **counts)
    assert any(fault in found for found in faults(lake, settings))


def test_row_that_is_gone(lake: Lake, settings: Settings, published: Path) -> None:
    rows = pq.read_table(published, partitioning=None)
    parquet.write(published, rows.slice(1), parquet.metadata(published, ConsolidatedMetadata))
    assert any("the file has 1 rows, 2 are unique" in found for found in faults(lake, settings))


def test_deep_counts_keys_from_raw(lake: Lake, settings: Settings, published: Path) -> None:
    """Counts may lie and still agree with one another."""
    rows = pq.read_table(published, partitioning=None)
    parquet.write(
        published,
        rows.slice(1),
        msgspec.structs.replace(
            parquet.metadata(published, ConsolidatedMetadata), unique=1, superseded=4, repeats=2
        ),
    )
    assert faults(lake, settings) == []
    assert any("raw has 2 distinct keys" in found for found in faults(lake, settings, deep=True))


def cut(fragment: Fragment) -> None:
    fragment.path.write_bytes(b"PAR1")


def remove(fragment: Fragment) -> None:
    fragment.path.unlink()


@pytest.mark.parametrize(("spoil", "fault"), [(cut, "is damaged"), (remove, "")])
def test_fragment_that_is_damaged_or_gone(
    lake: Lake,
    settings: Settings,
    published: Path,
    spoil: Callable[[Fragment], None],
    fault: str,
) -> None:
    """A listed fragment that is gone may have been pruned: its counts live on in the footer."""
    spoil(fragments.all_listed(lake, DAY)[0])
    found = ledger.of_days(lake, settings)
    if fault:
        assert any(fault in text and "\n" not in text for day in found for text in day.faults)
    else:
        assert [(day.rows, day.faults) for day in found] == [(5, [])]


def test_quarantine(lake: Lake, settings: Settings) -> None:
    """A record that lies in a fragment as well is the fragment's (START_DATE was changed, say)."""
    early = settings.model_copy(update={"start_date": DAY.replace(year=2010)})
    one = entry([line(at="2015-01-01T00:00:00Z"), line(at=1_420_000_000_000), b"bad"])
    deliver(lake, settings, one)
    assert ledger.of_quarantine(lake, settings) == ledger.QuarantineLedger(3, 0, 0)
    deliver(lake, early, one)
    found = ledger.of_quarantine(lake, settings)
    assert (found.records, found.in_fragments) == (3, 2)
    deliver(lake, settings, entry([line(), b"bad"], 5))
    assert ledger.of_quarantine(lake, settings) == ledger.QuarantineLedger(4, 0, 2)


def test_empty(lake: Lake, settings: Settings) -> None:
    assert ledger.of_days(lake, settings) == []
    assert ledger.of_quarantine(lake, settings) == ledger.QuarantineLedger(0, 0, 0)
