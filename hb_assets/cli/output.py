"""Output of the commands: results on stdout, progress and complaints on stderr.

The two consoles, JSON output, progress bars, and the format of numbers.
"""

from __future__ import annotations

import sys
from pathlib import Path

import msgspec
from rich import box
from rich.console import Console
from rich.progress import (
    BarColumn,
    MofNCompleteColumn,
    Progress,
    SpinnerColumn,
    TextColumn,
    TimeElapsedColumn,
)
from rich.table import Table
from rich.text import Text

results = Console(highlight=False)
"""Console of results: stdout."""
notes = Console(stderr=True, highlight=False)
"""Console of progress and messages: stderr."""


def complain(message: str) -> None:
    """One red line `hb: ...` on stderr, never wrapped, never read as markup."""
    notes.print(Text(f"hb: {' '.join(message.split())}", style="red"), soft_wrap=True)


def line(error: Exception) -> str:
    """One line for an error that a user can mend: an HbError, or a disk's."""
    if not isinstance(error, OSError):
        return str(error)
    where = f" ({error.filename})" if error.filename else ""
    return f"{error.strerror or type(error).__name__}{where}"


def note(message: str, *, style: str = "") -> None:
    """One line on stderr, never wrapped, never read as markup."""
    notes.print(Text(message, style=style), soft_wrap=True)


def print_json(result: object) -> None:
    """A result as indented JSON on stdout: dataclasses, msgspec structs, dicts, dates, paths."""
    text = msgspec.json.format(msgspec.json.encode(result, enc_hook=_plain), indent=2)
    sys.stdout.write(text.decode() + "\n")
    sys.stdout.flush()


def _plain(value: object) -> object:
    if isinstance(value, Path):
        return str(value)
    raise NotImplementedError(f"no JSON form of {type(value).__name__}")


def progress() -> Progress:
    """A progress bar on stderr (use as a context manager); silent when that is no terminal."""
    return Progress(
        SpinnerColumn(),
        TextColumn("{task.description}"),
        BarColumn(),
        MofNCompleteColumn(),
        TimeElapsedColumn(),
        console=notes,
        transient=True,
        disable=not notes.is_terminal,
    )


def table(title: str, *columns: str) -> Table:
    """An empty table; columns after the first are right-aligned (figures)."""
    roomy = results.width >= 120
    made = Table(
        title=title,
        title_justify="left",
        title_style="bold",
        caption_justify="left",
        box=box.SIMPLE_HEAD,
        show_edge=False,
        padding=(0, 1) if roomy else 0,
    )
    for number, column in enumerate(columns):
        made.add_column(column, justify="right" if number else "left", no_wrap=True)
    return made


def duration(seconds: float) -> str:
    """`42 s`, `7 min`, `3 h 5 min`, `2 d 4 h`."""
    whole = int(seconds)
    if whole < 120:
        return f"{whole} s"
    if whole < 2 * 3600:
        return f"{whole // 60} min"
    if whole < 2 * 86400:
        return f"{whole // 3600} h {whole % 3600 // 60} min"
    return f"{whole // 86400} d {whole % 86400 // 3600} h"
