"""Parameters that the parts of one run of `make bench` share."""

from __future__ import annotations

import shutil
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

from bench.traffic import Traffic

MILLION = 1_000_000


@dataclass(frozen=True, slots=True)
class Bench:
    """One run.

    Attributes:
        folder: for what is measured; gone at the end.
        cache: for data that is kept until the next run.
        rows: of the day that is consolidated; what has to be large is ten times as large.
        repeats: measurements of each figure.
        quick: less of everything that takes long.
        skewed: users send as Zipf has it.
        shuffled: rows arrive in no order.
        say: what goes on.
    """

    folder: Path
    cache: Path
    rows: int
    repeats: int
    quick: bool
    skewed: bool
    shuffled: bool
    say: Callable[[str], None]

    @property
    def others(self) -> int:
        """Measurements of what takes several times as long as ours."""
        return min(self.repeats, 3)

    @property
    def large(self) -> int:
        """Measurements of what takes minutes."""
        return max(1, self.repeats // 3)

    def traffic(self, times: int = 1) -> Traffic:
        """A day's traffic, so many times as large as `rows`."""
        return Traffic(self.rows * times, skewed=self.skewed, shuffled=self.shuffled)

    def named(self, times: int = 1) -> str:
        """`10 M rows`: how many rows that traffic has."""
        return f"{self.rows * times / MILLION:g} M rows"

    def fresh(self, name: str) -> Path:
        """An empty folder; what one of that name held is gone."""
        folder = self.folder / name
        shutil.rmtree(folder, ignore_errors=True)
        folder.mkdir()
        return folder
