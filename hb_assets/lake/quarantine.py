"""The quarantine: records that can't be used, kept with their bytes and the reason.

Belongs here: the envelope files under `quarantine/` by arrival date, and the marks of records that
were put back (`released/`, files of their own: a quarantine file is never rewritten). Doesn't
belong here: why a record can't be used (`record`), and putting it back into the buffer.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path

import msgspec
import pyarrow as pa
import pyarrow.parquet as pq

from hb_assets.days import day_of, ms_of
from hb_assets.lake import layout, parquet
from hb_assets.lake.files import TempFile
from hb_assets.lake.layout import QUARANTINE, RELEASED, FragmentName
from hb_assets.lake.store import FORMAT, Lake
from hb_assets.record import Arrival
from hb_assets.schema import ARRIVAL
from hb_assets.schema import QUARANTINE as SCHEMA

_RELEASED = pa.schema([SCHEMA.field(name) for name in ARRIVAL])


class _Note(msgspec.Struct, frozen=True):
    format: int


@dataclass(frozen=True, slots=True)
class Quarantined:
    """One record in quarantine."""

    raw: bytes
    reason: str
    message: str
    arrival: Arrival
    attempts: int
    quarantined_at: int
    released: bool

    @property
    def id(self) -> str:
        """What commands name it by: `<shard>-<ms>-<seq>-<position>`."""
        at = self.arrival
        return f"{at.arrival_shard:02d}-{at.arrival_ms}-{at.arrival_seq}-{at.arrival_pos}"


def publish(lake: Lake, rejected: pa.Table) -> list[Path]:
    """Make rejected records durable, one file per source shard and arrival date.

    Raises:
        OSError: a write failed; acknowledge nothing.
    """
    if rejected.num_rows == 0:
        return []
    arrived = [day_of(ms).toordinal() for ms in rejected["arrival_ms"].to_pylist()]
    where = list(zip(arrived, rejected["arrival_shard"].to_pylist(), strict=True))
    return [
        _publish(lake, QUARANTINE, rejected.filter(pa.array([one == key for one in where])))
        for key in sorted(set(where))
    ]


def release(lake: Lake, records: Sequence[Quarantined]) -> Path | None:
    """Mark records as put back into the buffer (durable when this returns)."""
    if not records:
        return None
    rows = [msgspec.structs.asdict(record.arrival) for record in records]
    return _publish(lake, RELEASED, pa.Table.from_pylist(rows, schema=_RELEASED))


def _publish(lake: Lake, kind: str, rows: pa.Table) -> Path:
    name = FragmentName.covering(rows)
    folder = layout.day_folder(lake.root, kind, day_of(name.first[0]))
    with TempFile(lake.root, folder) as temp:
        parquet.write(temp.path, rows, _Note(FORMAT))
        temp.publish_new(folder / str(name))
    return folder / str(name)


def _files(lake: Lake, kind: str) -> Iterator[Path]:
    for day in layout.days_of(lake.root, kind):
        yield from sorted(layout.day_folder(lake.root, kind, day).glob("*.parquet"))


def _arrivals(rows: pa.Table) -> Iterable[Arrival]:
    columns = [rows[name].to_pylist() for name in ARRIVAL]
    return (Arrival(*values) for values in zip(*columns, strict=True))


def read(path: Path) -> pa.Table:
    """All records of one file. Raises DamagedFileError."""
    try:
        return pq.read_table(path, partitioning=None)
    except (pa.ArrowException, OSError) as error:
        raise parquet.damaged(path, str(error)) from None


def released(lake: Lake) -> set[Arrival]:
    """Identities of the records that were put back."""
    return {arrival for path in _files(lake, RELEASED) for arrival in _arrivals(read(path))}


def records(lake: Lake, *, reason: str | None = None) -> Iterator[Quarantined]:
    """All records in quarantine by arrival date; each identity once (a replay isn't a second).

    Args:
        lake: where from.
        reason: only those with this reason code.
    """
    gone = released(lake)
    seen: set[Arrival] = set()
    for path in _files(lake, QUARANTINE):
        rows = read(path)
        for arrival, row in zip(_arrivals(rows), rows.to_pylist(), strict=True):
            if arrival in seen:
                continue
            seen.add(arrival)
            if reason is None or row["reason"] == reason:
                yield Quarantined(
                    raw=row["raw"],
                    reason=row["reason"],
                    message=row["message"],
                    arrival=arrival,
                    attempts=row["attempts"],
                    quarantined_at=ms_of(row["quarantined_at"]),
                    released=arrival in gone,
                )


def counts(lake: Lake) -> Counter[str]:
    """Records in quarantine by reason code, those that were put back included."""
    return Counter(record.reason for record in records(lake))
