"""The quarantine: records that can't be used, kept with their raw bytes and the reason.

Two kinds of file: the envelopes under `quarantine/` by arrival date, and markers for records that
were put back under `released/` (files of their own: only `erasure` rewrites a file). Both are read
a day at a time, never all of it into memory. `cli.quarantine` puts records back into the buffer.

An entry's arrival date is part of its id, so that everything written of one record lies in one
day's folder. The first record that was written of an identity counts; others are replays.
"""

from __future__ import annotations

import datetime as dt
import re
from collections import Counter
from collections.abc import Callable, Generator, Iterable, Iterator, Sequence
from contextlib import ExitStack, closing, contextmanager
from dataclasses import dataclass, field
from pathlib import Path

import duckdb
import msgspec
import pyarrow as pa

from hb_assets.core.days import day_of
from hb_assets.core.errors import DamagedFileError
from hb_assets.core.record import Arrival
from hb_assets.core.schema import ARRIVAL, IDENTITY, duckdb_columns
from hb_assets.core.schema import QUARANTINE as SCHEMA
from hb_assets.core.settings import Settings
from hb_assets.lake.storage import layout, parquet, verified
from hb_assets.lake.storage.durable_files import TempFile
from hb_assets.lake.storage.engine import engine
from hb_assets.lake.storage.layout import QUARANTINE, RELEASED, FragmentName
from hb_assets.lake.storage.store import FORMAT, Lake

_RELEASED = pa.schema([SCHEMA.field(name) for name in ARRIVAL])
_COLUMNS = duckdb_columns(_RELEASED)
_BATCH = 1000
"""Records that are made into Python objects at a time."""
_ID = re.compile(
    r"(?P<shard>\d{1,4})-(?P<ms>\d{1,20})-(?P<seq>\d{1,20})-(?P<pos>\d{1,10})", re.ASCII
)


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


@dataclass(frozen=True, slots=True)
class Summary:
    """Distinct records in quarantine by reason code, and how many of them were put back."""

    reasons: Counter[str] = field(default_factory=Counter)
    released: int = 0


@dataclass(frozen=True, slots=True)
class Choice:
    """A selection of records.

    Attributes:
        reason: only those with this reason code.
        day: only those that arrived on this day (UTC).
        after: only those that arrived after this one; its order is that of `records`.
        ids: only these.
        kept: only those that weren't put back.
    """

    reason: str | None = None
    day: dt.date | None = None
    after: Arrival | None = None
    ids: Sequence[Arrival] | None = None
    kept: bool = False


ALL = Choice()


def parse_id(text: str) -> Arrival | None:
    """Parse a record's id; None where it isn't one."""
    match = _ID.fullmatch(text)
    if match is None:
        return None
    found = Arrival(*(int(match[name]) for name in ("ms", "seq", "shard", "pos")))
    fits = max(found.arrival_ms, found.arrival_seq) < 2**64 and found.arrival_shard < 2**15
    return found if fits and found.arrival_pos < 2**31 else None


def publish(lake: Lake, rejected: pa.Table) -> list[Path]:
    """Write rejected records durably, one file per source shard and arrival date.

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
        name = name.sealed(temp.path)
        temp.publish_new(folder / str(name))
    return folder / str(name)


# -- reading

OnDamage = Callable[[DamagedFileError], None]
"""Called with the error of a file that can't be read and is left out."""


def refuse(error: DamagedFileError) -> None:
    """Raise the error of a file that can't be read."""
    raise error


def read(path: Path) -> pa.Table:
    """All records of one file.

    Raises:
        DamagedFileError: it can't be read.
        OSError: the disk can't be read.
    """
    with verified.opened(path) as file:
        return file.read()


_TABLES = f"""
CREATE TEMP TABLE marks ({", ".join(f"{name} {kind}" for name, kind in _COLUMNS.items())});
CREATE TEMP TABLE quarantined AS
    SELECT *, CAST(NULL AS VARCHAR) AS reason, false AS released,
        CAST(NULL AS TIMESTAMP WITH TIME ZONE) AS written
    FROM marks;
"""
_MARK = f"INSERT INTO marks SELECT DISTINCT {IDENTITY} FROM files"
_CHOOSE = f"""
INSERT INTO quarantined
SELECT {IDENTITY}, reason, marked IS NOT NULL AS released, written
FROM (
    SELECT {IDENTITY}, arg_min(reason, quarantined_at) AS reason, min(quarantined_at) AS written
    FROM files {{only}}
    WHERE $after_ms IS NULL
        OR ({IDENTITY}) > (CAST($after_ms AS UBIGINT), CAST($after_seq AS UBIGINT),
            CAST($after_shard AS SMALLINT), CAST($after_pos AS INTEGER))
    GROUP BY {IDENTITY}
) LEFT JOIN (SELECT DISTINCT {IDENTITY}, true AS marked FROM marks) USING ({IDENTITY})
WHERE ($reason IS NULL OR reason = $reason) AND NOT ($kept AND marked IS NOT NULL)
"""
_FIRST = f"ORDER BY {IDENTITY} LIMIT $most"
_ONLY_WANTED = f"SEMI JOIN wanted USING ({IDENTITY})"
_FETCH = f"""
SELECT found.raw, quarantined.reason, found.message, {IDENTITY}, found.attempts,
    epoch_ms(quarantined.written) AS quarantined_at, quarantined.released
FROM files AS found JOIN quarantined USING ({IDENTITY})
WHERE found.quarantined_at = quarantined.written
ORDER BY {IDENTITY}
"""
_COUNT = "SELECT reason, count(*), count(*) FILTER (released) FROM quarantined GROUP BY reason"


def records(
    lake: Lake,
    settings: Settings,
    choice: Choice = ALL,
    *,
    limit: int | None = None,
    on_damage: OnDamage = refuse,
) -> Iterator[Quarantined]:
    """Records in quarantine by arrival; each identity once (a replay isn't a second).

    Args:
        lake: where from.
        settings: memory and threads; what doesn't fit into memory spills.
        choice: which ones.
        limit: at most so many.
        on_damage: told of files that can't be read; by default the first one ends it.

    Raises:
        DamagedFileError: as `on_damage` says.
        HbError: there isn't enough memory or disk space.
    """
    left = limit
    with engine(settings) as connection:
        reader = _Reader(lake, connection, choice, on_damage)
        for day in reader.days():
            # before the engine goes to somebody else, whenever our caller stops
            with closing(reader.records(day, left)) as found:
                for record in found:
                    left = None if left is None else left - 1
                    yield record
            if left == 0:
                return


@contextmanager
def gathered(
    lake: Lake, settings: Settings, choice: Choice = ALL, *, on_damage: OnDamage = refuse
) -> Iterator[duckdb.DuckDBPyConnection]:
    """An engine whose table `quarantined` has identity, reason and `released` of each record.

    Arguments and errors as of `records`.
    """
    with engine(settings) as connection:
        reader = _Reader(lake, connection, choice, on_damage)
        for day in reader.days():
            reader.choose(day)
        yield connection


def summary(
    lake: Lake, settings: Settings, choice: Choice = ALL, *, on_damage: OnDamage = refuse
) -> Summary:
    """Count records in quarantine. Arguments and errors as of `records`."""
    with gathered(lake, settings, choice, on_damage=on_damage) as connection:
        counted = connection.sql(_COUNT).fetchall()
    reasons = Counter({reason: count for reason, count, _ in counted})
    return Summary(reasons, sum(released for *_, released in counted))


class _Reader:
    """Fills the tables of an engine from the files of a choice of records."""

    def __init__(
        self,
        lake: Lake,
        connection: duckdb.DuckDBPyConnection,
        choice: Choice,
        on_damage: OnDamage,
    ) -> None:
        self._lake = lake
        self._connection = connection
        self._choice = choice
        self._on_damage = on_damage
        self._left_out: set[Path] = set()
        connection.execute(_TABLES)
        if choice.ids is not None:
            rows = [msgspec.structs.asdict(one) for one in choice.ids]
            connection.register("wanted", pa.Table.from_pylist(rows, schema=_RELEASED))
        days = layout.days_of(lake.root, RELEASED)
        marked = [path for day in days for path in _files(lake, RELEASED, day) if self._may(path)]
        with self._reading(marked) as readable:
            if readable:
                connection.execute(_MARK)

    def days(self) -> list[dt.date]:
        """Arrival dates that may have chosen records."""
        choice = self._choice
        found = layout.days_of(self._lake.root, QUARANTINE)
        if choice.day is not None:
            found = [day for day in found if day == choice.day]
        if choice.after is not None:
            found = [day for day in found if day >= day_of(choice.after.arrival_ms)]
        if choice.ids is not None:
            named = {day_of(one.arrival_ms) for one in choice.ids}
            found = [day for day in found if day in named]
        return found

    def choose(self, day: dt.date, most: int | None = None) -> None:
        """Add a day's chosen records to the table `quarantined`, the first ones of so many."""
        choice = self._choice
        names = ("after_ms", "after_seq", "after_shard", "after_pos")
        after = msgspec.structs.astuple(choice.after) if choice.after else (None,) * 4
        parameters: dict[str, object] = {
            "reason": choice.reason,
            "kept": choice.kept,
            **dict(zip(names, after, strict=True)),
        }
        query = _CHOOSE.format(only="" if choice.ids is None else _ONLY_WANTED)
        if most is not None:
            query, parameters["most"] = query + _FIRST, most
        with self._reading(self._files(day)) as readable:
            if readable:
                self._connection.execute(query, parameters)

    def records(self, day: dt.date, most: int | None) -> Generator[Quarantined]:
        """A day's chosen records."""
        self._connection.execute("DELETE FROM quarantined")
        self.choose(day, most)

        before = None
        with self._reading(self._files(day)) as readable, ExitStack() as stack:
            found: Iterable[pa.RecordBatch] = ()
            if readable:
                rows = self._connection.sql(_FETCH)
                found = stack.enter_context(rows.to_arrow_reader(_BATCH))
            for batch in found:
                for fields in batch.to_pylist():
                    arrival = Arrival(*(fields.pop(name) for name in ARRIVAL))
                    if arrival != before:  # written twice in one millisecond
                        yield Quarantined(arrival=arrival, **fields)
                    before = arrival

    def _files(self, day: dt.date) -> list[Path]:
        return [path for path in _files(self._lake, QUARANTINE, day) if self._may(path)]

    def _may(self, path: Path) -> bool:
        """Whether a file, by its name, may hold one of the wanted ids."""
        ids = self._choice.ids
        name = FragmentName.parse(path.name)
        if ids is None or name is None:
            return True
        return any(name.first <= (one.arrival_ms, one.arrival_seq) <= name.last for one in ids)

    @contextmanager
    def _reading(self, files: list[Path]) -> Iterator[bool]:
        """Make the relation `files` of those that can be read; whether there is any."""
        readable = [path for path in files if path not in self._left_out]

        def leave_out(error: DamagedFileError) -> None:
            self._on_damage(error)
            self._left_out |= {error.path} if error.path else set()

        try:
            with verified.relations(self._connection, {"files": readable}, leave_out) as sound:
                yield bool(sound)
        except duckdb.Error as error:
            raise parquet.explained(error, readable) from None


def _files(lake: Lake, kind: str, day: dt.date) -> list[Path]:
    return sorted(layout.day_folder(lake.root, kind, day).glob("*.parquet"))
