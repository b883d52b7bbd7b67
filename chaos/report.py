"""The report of a run: the faults that were injected, the outcome, and whether it is good."""

from __future__ import annotations

import json
from collections.abc import Sequence
from dataclasses import asdict, dataclass, field

from rich import box
from rich.console import Console
from rich.table import Table

from chaos.checker import Verdict


@dataclass(slots=True)
class Report:
    """One run. `faults` by process and by what was done to it; `demanded` names what fell short."""

    seed: int
    seconds: float = 0.0
    faults: dict[str, dict[str, int]] = field(default_factory=dict)
    kills: int = 0
    dropped_answers: int = 0
    cut_bytes: int = 0
    attempts: dict[str, int] = field(default_factory=dict)
    sent: int = 0
    refused: dict[str, int] = field(default_factory=dict)
    quarantined: int = 0
    replayed: int = 0
    lake: Verdict | None = None
    adds_up: bool = False
    differences: list[str] = field(default_factory=list)
    surprises: list[str] = field(default_factory=list)
    shortfalls: list[str] = field(default_factory=list)

    @property
    def good(self) -> bool:
        """Nothing lost, nothing twice, everything adds up, and as many faults as were demanded."""
        return bool(
            self.lake
            and self.lake.clean
            and self.adds_up
            and not (self.refused or self.quarantined or self.surprises or self.shortfalls)
        )

    def json(self) -> str:
        """The report as JSON."""
        return json.dumps({"good": self.good, **asdict(self)}, indent=2)

    def show(self, console: Console) -> None:
        """Print the report."""
        table = _table(f"Faults (seed {self.seed})", "process", "what was done to it", "times")
        for process, done in sorted(self.faults.items()):
            for number, (what, count) in enumerate(sorted(done.items())):
                table.add_row("" if number else process, what, f"{count:,}")
        table.add_section()
        table.add_row("all", "killed with SIGKILL", f"{self.kills:,}")
        table.add_row("", "answers lost between server and client", f"{self.dropped_answers:,}")
        table.add_row("", "bytes cut off the AOF", f"{self.cut_bytes:,}")
        console.print(table)
        outcome = _table("What came of it", "", "count")
        for name, count in self._figures():
            outcome.add_row(name, f"{count:,}")
        console.print(outcome)
        attempts = ", ".join(f"{name} {count:,}" for name, count in sorted(self.attempts.items()))
        console.print(f"requests: {attempts}")
        console.print(f"hb audit --deep: {'it adds up' if self.adds_up else 'it does NOT add up'}")
        for line in (*self.differences, *self.surprises, *self.shortfalls):
            console.print(line, style="red", markup=False)
        verdict = "nothing lost, nothing twice" if self.good else "NOT as it should be"
        console.print(
            f"{verdict} ({self.seconds / 60:.1f} min)", style="green" if self.good else "bold red"
        )

    def _figures(self) -> Sequence[tuple[str, int]]:
        lake = self.lake or Verdict(0, 0, 0, 0, 0, 0, 0, 0)
        return (
            ("heartbeats sent (again and again until answered)", self.sent),
            ("acknowledged with 2xx", lake.acknowledged),
            ("  their distinct keys", lake.keys),
            ("  found in the lake", lake.found),
            ("  missing", lake.missing),
            ("  twice", lake.twice),
            ("keys whose latest write is certain", lake.ordered),
            ("keys with a value they can't have", lake.wrong),
            ("rows that nobody sent", lake.invented),
            ("refused for good (all are valid)", sum(self.refused.values())),
            ("quarantined", self.quarantined),
            ("rows delivered again, and known as such", self.replayed),
        )


def _table(title: str, *columns: str) -> Table:
    made = Table(title=title, title_justify="left", title_style="bold", box=box.SIMPLE_HEAD)
    for number, column in enumerate(columns):
        made.add_column(column, justify="right" if number == len(columns) - 1 else "left")
    return made
