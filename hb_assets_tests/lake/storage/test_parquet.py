"""How rows are written: what chooses an encoding, and where a row group ends."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest

from hb_assets.core.schema import ENCODED, HEARTBEATS, ORDER
from hb_assets.lake.files.consolidated import ConsolidatedMetadata
from hb_assets.lake.storage import parquet

DICTIONARY, DIFFERENCES, PLAIN = "RLE_DICTIONARY", "DELTA_BINARY_PACKED", "PLAIN"


def rows_of(arrival_ms: Sequence[int], arrival_pos: Sequence[int]) -> pa.Table:
    """Rows of one device, a second apart, that arrived so."""
    count = len(arrival_ms)
    columns = {
        "user_id": ["u"] * count,
        "device_id": ["d"] * count,
        "timestamp": np.arange(count, dtype=np.int64) * 1000,
        "heart_rate": 60 + np.arange(count) % 7,
        "arrival_ms": arrival_ms,
        "arrival_seq": [0] * count,
        "arrival_shard": [0] * count,
        "arrival_pos": arrival_pos,
    }
    arrays = [pa.array(columns[field.name]).cast(field.type) for field in HEARTBEATS]
    return pa.Table.from_arrays(arrays, schema=HEARTBEATS)


def written(folder: Path, rows: pa.Table) -> pq.FileMetaData:
    path = folder / "rows.parquet"
    path.touch()
    parquet.write(path, rows, ConsolidatedMetadata.nothing(), ORDER)
    assert pq.read_table(path, partitioning=None).equals(rows)
    return parquet.footer(path)


def encoding(found: pq.FileMetaData, name: str) -> str:
    """How the values of a column's first row group are encoded; no levels."""
    group = found.row_group(0)
    columns = {group.column(n).path_in_schema: group.column(n) for n in range(group.num_columns)}
    found_ones = set(columns[name].encodings) - {"RLE"}
    return DICTIONARY if DICTIONARY in found_ones else found_ones.pop()


BATCHES = 400
ROWS = 20 * BATCHES


@pytest.mark.parametrize(
    ("arrival_ms", "arrival_pos", "of_ids", "of_positions"),
    [
        pytest.param(
            [n // 20 * 977 for n in range(ROWS)],
            [n % 20 for n in range(ROWS)],
            PLAIN,
            PLAIN,
            id="batches of one device",
        ),
        pytest.param(
            [n // 40 * 977 for n in range(ROWS)],
            [n % 40 for n in range(ROWS)],
            DICTIONARY,
            PLAIN,
            id="few batches",
        ),
        pytest.param(
            [n * 1003 for n in range(ROWS)],
            [0] * ROWS,
            DIFFERENCES,
            DICTIONARY,
            id="each alone",
        ),
        pytest.param(
            [n // 20 * 977 for n in range(ROWS)],
            [n * 7919 % 500 for n in range(ROWS)],
            PLAIN,
            DICTIONARY,
            id="entries of many users",
        ),
    ],
)
def test_arrivals_are_encoded_by_how_rows_came(
    tmp_path: Path,
    arrival_ms: Sequence[int],
    arrival_pos: Sequence[int],
    of_ids: str,
    of_positions: str,
) -> None:
    found = written(tmp_path, rows_of(arrival_ms, arrival_pos))
    assert encoding(found, "arrival_ms") == of_ids
    assert encoding(found, "arrival_pos") == of_positions
    assert encoding(found, "timestamp") == encoding(found, "heart_rate") == DIFFERENCES
    assert encoding(found, "user_id") == encoding(found, "arrival_seq") == DICTIONARY


def test_batches_with_repeats_between_weigh_little(tmp_path: Path) -> None:
    """Plain ids and positions, 12 bytes a row, are left to zstd, which has to find them."""
    chance = np.random.default_rng(3)
    count = 60_000
    ms, pos = np.arange(count) // 160 * 90_001, np.arange(count) % 160
    again = chance.random(count) < 0.06
    ms[again] += 90_001 * chance.integers(1, 8, int(again.sum()))
    pos[again] = chance.integers(0, 500, int(again.sum()))
    group = written(tmp_path, rows_of(ms.tolist(), pos.tolist())).row_group(0)
    sizes = {
        column.path_in_schema: column.total_compressed_size / count
        for column in (group.column(n) for n in range(group.num_columns))
    }
    assert sizes["arrival_ms"] < 0.6
    assert sizes["arrival_pos"] < 0.6


@pytest.mark.parametrize("encoded", [False, True])
@pytest.mark.parametrize("at_once", [1, 370, 10_000])
@pytest.mark.parametrize(
    ("of_users", "groups"),
    [
        pytest.param([3700], [1000, 1000, 1000, 700], id="one user"),
        pytest.param([1499], [1499], id="not two halves"),
        pytest.param([700, 700, 1400, 300], [700, 700, 1400, 300], id="between users"),
        pytest.param([300] * 10, [900, 900, 1200], id="several users each"),
        pytest.param([480, 4000], [1000, 1000, 1000, 1480], id="a user who is too short"),
        pytest.param([1480, 20, 2000], [1480, 1000, 1020], id="as long as it may be"),
    ],
)
def test_row_groups_end_between_users(
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    of_users: Sequence[int],
    groups: Sequence[int],
    at_once: int,
    *,
    encoded: bool,
) -> None:
    monkeypatch.setattr(parquet, "ROW_GROUP", 1000)
    path = tmp_path / "rows.parquet"
    path.touch()
    count = sum(of_users)
    users = pa.array(np.repeat([f"user-{n:02}" for n in range(len(of_users))], of_users))
    rows = rows_of(list(range(count)), [0] * count).set_column(0, HEARTBEATS.field(0), users)
    given = rows.cast(ENCODED) if encoded else rows
    with parquet.writer(path, given.schema, ORDER) as out:
        for start in range(0, count, at_once):
            out.write(given.slice(start, at_once))
        out.close_with(ConsolidatedMetadata.nothing())
    found = parquet.footer(path)
    assert [found.row_group(n).num_rows for n in range(found.num_row_groups)] == groups
    assert pq.read_table(path, partitioning=None).equals(rows)
