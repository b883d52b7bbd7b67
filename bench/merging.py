"""CPU cost of the parts of a consolidation, on the fragments of one shard.

    python -m bench.merging

For docs/decisions/0031-one-merge-in-duckdb.md. CPU time of this process, Polars' and DuckDB's
threads included; the best of three. The whole is compared with others in `consolidating`.
"""

from __future__ import annotations

import tempfile
import time
from collections.abc import Callable, Sequence
from pathlib import Path

from rich.console import Console
from rich.table import Table

from bench import lakes
from bench.engines import HOME
from bench.traffic import DAY, Traffic
from bench.ways import settings_in
from hb_assets.core.schema import ENCODED, ORDER
from hb_assets.core.schema import HEARTBEATS as SCHEMA
from hb_assets.core.settings import Settings
from hb_assets.lake.compaction import merge
from hb_assets.lake.compaction.inputs import Inputs
from hb_assets.lake.compaction.merge import Tally
from hb_assets.lake.files import fragments
from hb_assets.lake.files.consolidated import ConsolidatedMetadata
from hb_assets.lake.integrity import checks
from hb_assets.lake.storage import parquet, verified
from hb_assets.lake.storage.engine import engine
from hb_assets.lake.storage.store import Lake

_ROWS = 10_000_000


def main() -> None:
    """Measure and print the table."""
    console = Console(width=100)
    root = lakes.raw_of(Traffic(_ROWS), HOME, console.print)
    with tempfile.TemporaryDirectory(dir=HOME) as folder:
        settings = settings_in(Path(folder), lake=str(root))
        found = fragments.listed(Lake.open(settings), DAY, 0)
        rows = sum(fragment.rows for fragment in found)
        table = Table(title=f"one shard of {_ROWS:,} rows: {rows:,} in {len(found)} fragments")
        table.add_column("part")
        table.add_column("ns a row", justify="right")
        for name, work in _parts(found, settings, Path(folder) / "merged").items():
            table.add_row(name, f"{_cpu(work) / rows * 1e9:.0f}")
        console.print(table)


def _parts(
    found: Sequence[fragments.Fragment], settings: Settings, to: Path
) -> dict[str, Callable[[], object]]:
    """The parts in order; each works with what the ones before it left."""
    inputs = Inputs(None, [fragment.path for fragment in found])
    sorted_rows = list(merge.merged(inputs, Tally(), settings))

    def write() -> None:
        to.touch()
        with parquet.writer(to, ENCODED, ORDER) as out:
            for part in sorted_rows:
                out.write(part)
            out.close_with(ConsolidatedMetadata.nothing())

    def verify() -> None:
        for fragment in found:
            parquet.verify(fragment.path)

    def asked(query: str) -> None:
        with (
            engine(settings) as connection,
            verified.relations(connection, {"new": inputs.new}),
        ):
            connection.register("base", SCHEMA.empty_table())
            merge.make_types(connection)
            for _ in connection.sql(query).to_arrow_reader(merge.BATCH):
                pass

    return {
        "verify the fragments' checksums": verify,
        "read them, by DuckDB": lambda: asked("SELECT * FROM new"),
        "the query: read, sort, fates": lambda: asked(merge.FATES[True]),
        "the whole merge": lambda: list(merge.merged(inputs, Tally(), settings)),
        "write": write,
        "check": lambda: checks.heartbeats(to, DAY, settings),
        "check where all values were checked before": lambda: checks.heartbeats(
            to, DAY, settings, []
        ),
    }


def _cpu(work: Callable[[], object]) -> float:
    best = float("inf")
    for _ in range(3):
        began = time.process_time()
        work()
        best = min(best, time.process_time() - began)
    return best


if __name__ == "__main__":
    main()
