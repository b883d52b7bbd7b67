"""Maps the columns of a table to import to the fields of a heartbeat."""

from __future__ import annotations

from collections.abc import Sequence

import msgspec

from hb_assets.core.errors import ImportFileError
from hb_assets.core.record import WIRE_FIELDS, Wire

_REQUIRED = {field.name for field in msgspec.structs.fields(Wire) if field.required}
_TIMES = {"timestamp", "timestamp_ms"}


def fields_of(name: str, columns: Sequence[str], hint: str = "") -> list[str]:
    """What each column is called in a record: a heartbeat's field in any case, else as it is.

    Args:
        name: the file, for errors.
        columns: names as the file has them.
        hint: what to look at when columns are missing.

    Raises:
        ImportFileError: a column is there twice, or one that a heartbeat needs isn't.
    """
    known = [field_of(column) for column in columns]
    missing = sorted(_REQUIRED - set(known))
    if not _TIMES & set(known):
        missing.append("timestamp (or timestamp_ms)")
    if missing:
        # what it has instead isn't told: without a header these would be somebody's values
        raise ImportFileError(f"{name}: lacks the columns {', '.join(missing)}{hint}")
    fields = [
        field or column or f"column {number}"
        for number, (field, column) in enumerate(zip(known, columns, strict=True), start=1)
    ]
    twice = sorted({field for field in fields if fields.count(field) > 1})
    if twice:
        raise ImportFileError(
            f"{name}: has the column {twice[0]} more than once: which of them counts isn't known"
        )
    return fields


def field_of(column: str) -> str | None:
    """The heartbeat's field that a column holds, or None."""
    field = column.strip().lower()
    return field if field in WIRE_FIELDS else None
