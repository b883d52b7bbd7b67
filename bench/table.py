"""What came out: rows with their figures, the machine, and how both are shown.

Belongs here: medians, ratios, whether a target was reached. Doesn't belong here: measuring.
"""

from __future__ import annotations

import importlib.metadata
import json
import os
import platform
import statistics
import subprocess
from collections.abc import Sequence
from dataclasses import asdict, dataclass, field
from pathlib import Path

import psutil
from rich import box
from rich.console import Console
from rich.table import Table

PACKAGES = ("hb-assets", "uvicorn", "uvloop", "httptools", "msgspec", "duckdb", "pyarrow")
REFERENCE_PACKAGES = ("fastapi", "pydantic", "redis")


@dataclass(slots=True)
class Row:
    """One line: medians of what we and the reference reached, and what has to be reached.

    `target` bounds the ratio when there is a reference, else our figure itself: from below, or
    from above when `at_most`. Without a target the line is there to be read.
    """

    what: str
    unit: str
    ours: list[float]
    reference: list[float] = field(default_factory=list)
    target: float | None = None
    at_most: bool = False

    @property
    def mine(self) -> float:
        """Our median."""
        return statistics.median(self.ours)

    @property
    def theirs(self) -> float | None:
        """The reference's median."""
        return statistics.median(self.reference) if self.reference else None

    @property
    def ratio(self) -> float | None:
        """Ours to the reference's, of the medians."""
        return self.mine / self.theirs if self.theirs else None

    @property
    def reached(self) -> bool | None:
        """Whether the target was reached; None without one."""
        if self.target is None:
            return None
        figure = self.mine if self.ratio is None else self.ratio
        return figure <= self.target if self.at_most else figure >= self.target

    def cells(self) -> list[str]:
        """The line's cells, as `show` heads them."""
        sign = "<=" if self.at_most else ">="
        bound = ""
        if self.target is not None:
            per = f"{self.target:g} x" if self.ratio is not None else _figure(self.target)
            bound = f"{sign} {per}"
        return [
            f"{self.what}, {self.unit}",
            _figure(self.mine),
            "" if self.theirs is None else _figure(self.theirs),
            "" if self.ratio is None else f"{self.ratio:.2f}",
            bound,
            {True: "yes", False: "no", None: ""}[self.reached],
        ]


def _figure(value: float) -> str:
    return f"{value:,.0f}" if value >= 100 else f"{value:,.2f}"


@dataclass(slots=True)
class Report:
    """All rows of one run, the machine, and notes on what the figures mean."""

    machine: list[str]
    notes: list[str]
    rows: list[Row] = field(default_factory=list)

    @property
    def good(self) -> bool:
        """Whether every target was reached."""
        return all(row.reached is not False for row in self.rows)

    def json(self) -> str:
        """The report as JSON, with the figures of every run."""
        rows = [
            {
                **asdict(row),
                "ratio": row.ratio,
                "reached": row.reached,
                "medians": [row.mine, row.theirs],
            }
            for row in self.rows
        ]
        return json.dumps(
            {"good": self.good, "machine": self.machine, "notes": self.notes, "rows": rows},
            indent=2,
        )

    def show(self, console: Console) -> None:
        """Print machine, table (Markdown, so that it can be kept as it is) and notes."""
        console.print("\n".join(self.machine), highlight=False)
        table = Table(box=box.MARKDOWN)
        for name in ("what", "ours", "reference", "ratio", "must reach", "reached"):
            table.add_column(name, justify="left" if name == "what" else "right", no_wrap=True)
        for row in self.rows:
            table.add_row(*row.cells())
        console.print(table)
        for note in self.notes:
            console.print(f"- {note}", highlight=False, soft_wrap=True)


def machine(folder: Path, programs: Sequence[str] = ()) -> list[str]:
    """What it was measured on: cores, kernel, file system, versions. `programs` say their own."""
    model = next(
        (
            line.partition(":")[2].strip()
            for line in Path("/proc/cpuinfo").read_text(encoding="utf-8").splitlines()
            if line.startswith("model name")
        ),
        platform.machine(),
    )
    memory = psutil.virtual_memory().total / 2**30
    load = ", ".join(f"{one:.1f}" for one in os.getloadavg())
    versions = [f"{name} {importlib.metadata.version(name)}" for name in PACKAGES]
    others = [f"{name} {importlib.metadata.version(name)}" for name in REFERENCE_PACKAGES]
    busy = "" if os.getloadavg()[0] < 1 else ": others used the machine, so read the ratios only"
    return [
        (
            f"{os.cpu_count()} cores ({model}), {memory:.0f} GB, Linux {platform.release()}, "
            f"{file_system(folder)}; load average before: {load}{busy}"
        ),
        f"Python {platform.python_version()}; {', '.join([*versions, *programs])}",
        f"reference: {', '.join(others)}; commit {_commit()}",
    ]


def file_system(folder: Path) -> str:
    """Kind of file system that the folder lies on, such as ext4 or tmpfs."""
    mounts = {part.mountpoint: part.fstype for part in psutil.disk_partitions(all=True)}
    parents = [folder.resolve(), *folder.resolve().parents]
    return next((mounts[str(one)] for one in parents if str(one) in mounts), "unknown")


def _commit() -> str:
    argv = ["git", "-C", str(Path(__file__).parent), "describe", "--always", "--dirty"]
    return subprocess.run(argv, check=False, capture_output=True, text=True).stdout.strip() or "?"
