"""The results of a bench: rows with their figures, medians, ratios and targets, and the machine."""

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

from bench.measure import Cost

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
class Ways:
    """What ways to do the same work cost, beside each other; the last one is the floor.

    `rows` is how many heartbeats each was given, but for one that says `rows_in` of what it found;
    what it made is as large as it found.
    """

    title: str
    rows: int
    costs: dict[str, list[Cost]]

    HEADS = ("seconds", "x floor", "CPU s", "x floor", "rows/s", "peak MB", "file MB")

    def median(self, way: str, figure: str) -> float:
        """Median of a figure of a way's costs: one that the cost has, or that was found."""
        costs = self.costs[way]
        return statistics.median(cost.number(figure) for cost in costs)

    def table(self) -> Table:
        """The ways as a table."""
        table = Table(box=box.MARKDOWN)
        table.add_column(self.title, no_wrap=True)
        sized = any("bytes" in costs[0].found for costs in self.costs.values())
        for head in self.HEADS if sized else self.HEADS[:-1]:
            table.add_column(head, justify="right", no_wrap=True)
        floor = list(self.costs)[-1]
        for way, costs in self.costs.items():
            seconds, cpu = self.median(way, "seconds"), self.median(way, "cpu")
            rows = self.median(way, "rows_in") if "rows_in" in costs[0].found else self.rows
            share = self.rows / rows
            size = self.median(way, "bytes") / 1e6 if "bytes" in costs[0].found else None
            table.add_row(
                way,
                f"{seconds:.2f}",
                f"{seconds * share / self.median(floor, 'seconds'):.2f}",
                f"{cpu:.2f}",
                f"{cpu * share / self.median(floor, 'cpu'):.2f}",
                f"{rows / seconds:,.0f}",
                f"{self.median(way, 'peak_mb'):,.0f}",
                *(["" if size is None else f"{size:,.1f}"] if sized else []),
            )
        return table


@dataclass(slots=True)
class Study:
    """A table of its own: something that has no target, with its first column's head."""

    heads: tuple[str, ...]
    lines: Sequence[tuple[str, ...]]

    def table(self) -> Table:
        """The study as a table."""
        table = Table(box=box.MARKDOWN)
        for number, head in enumerate(self.heads):
            table.add_column(head, justify="right" if number else "left", no_wrap=True)
        for line in self.lines:
            table.add_row(*line)
        return table


@dataclass(slots=True)
class Report:
    """The results of one run, the machine, and remarks on what the figures mean."""

    machine: list[str]
    notes: list[str]
    rows: list[Row] = field(default_factory=list)
    beside: list[Ways | Study] = field(default_factory=list)

    def add(self, one: Row | Ways | Study | str) -> None:
        """Add a row, a table or a remark (a text)."""
        if isinstance(one, Row):
            self.rows.append(one)
        elif isinstance(one, str):
            self.notes.append(one)
        else:
            self.beside.append(one)

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
            {
                "good": self.good,
                "machine": self.machine,
                "notes": self.notes,
                "rows": rows,
                "beside": [asdict(one) for one in self.beside],
            },
            indent=2,
        )

    def show(self, console: Console) -> None:
        """Print machine, table (Markdown, so that it can be kept as it is) and remarks."""
        console.print("\n".join(self.machine), highlight=False)
        table = Table(box=box.MARKDOWN)
        for name in ("what", "ours", "reference", "ratio", "must reach", "reached"):
            table.add_column(name, justify="left" if name == "what" else "right", no_wrap=True)
        for row in self.rows:
            table.add_row(*row.cells())
        console.print(table)
        for one in self.beside:
            console.print(one.table())
        for note in self.notes:
            console.print(f"- {note}", highlight=False, soft_wrap=True)


def machine(
    folder: Path,
    packages: Sequence[str] = PACKAGES,
    references: Sequence[str] = REFERENCE_PACKAGES,
) -> list[str]:
    """What it was measured on: cores, kernel, file system, versions of ours and of references."""
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
    versions = [f"{name} {importlib.metadata.version(name)}" for name in packages]
    others = [f"{name} {importlib.metadata.version(name)}" for name in references]
    busy = "" if os.getloadavg()[0] < 1 else ": others used the machine, so read the ratios only"
    return [
        (
            f"{os.cpu_count()} cores ({model}), {memory:.0f} GB, Linux {platform.release()}, "
            f"{file_system(folder)}; load average before: {load}{busy}"
        ),
        f"Python {platform.python_version()}; {', '.join(versions)}",
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
