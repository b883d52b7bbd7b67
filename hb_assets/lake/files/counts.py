"""Counts of the rows that came into a file or a day, and of what became of them."""

from __future__ import annotations

from typing import Any, Self

import msgspec


class Counts(msgspec.Struct, kw_only=True):
    """Cumulative counts, which outlive pruning. This is where a count is defined and added.

    Attributes:
        rows: distinct rows that came in: `unique` + `superseded` + `erased`.
        unique: rows that survived, one of each key.
        superseded: rows that a later arrival of their key replaced: `repeats` + `corrections`.
        repeats: superseded rows with the value of the row that replaced them.
        corrections: superseded rows with another value.
        erased: rows of forgotten users.
        uncounted: rows that count elsewhere: they came again after theirs were pruned, or were
            erased before they came.
        replayed: rows that came again with an identity that was there already.
        rows_written: rows that all publications wrote.
    """

    rows: int = 0
    unique: int = 0
    superseded: int = 0
    repeats: int = 0
    corrections: int = 0
    erased: int = 0
    uncounted: int = 0
    replayed: int = 0
    rows_written: int = 0

    def __add__(self, other: Counts) -> Counts:
        """The sum, count by count."""
        return Counts(**{name: getattr(self, name) + getattr(other, name) for name in NAMES})

    def add(self, other: Counts) -> None:
        """Add another's counts to these."""
        for name, count in other.counts().items():
            setattr(self, name, getattr(self, name) + count)

    def counts(self) -> dict[str, int]:
        """Each count by its name."""
        return {name: getattr(self, name) for name in NAMES}

    @classmethod
    def of(cls, counts: Counts, **others: Any) -> Self:
        """With these counts, and whatever else a subclass has."""
        return cls(**counts.counts(), **others)


NAMES = Counts.__struct_fields__
