"""The lake's side of the ledger: what came in, what survived and what is pending, day by day.

It counts from the files themselves; `pipeline.audit` compares that with what their footers and the
buffer say.
"""

from __future__ import annotations

import datetime as dt
from collections.abc import Callable, Collection, Iterable, Sequence
from dataclasses import dataclass, field
from functools import partial
from pathlib import Path

import duckdb
import msgspec
import pyarrow as pa

from hb_assets.core.errors import DamagedFileError
from hb_assets.core.schema import IDENTITY, KEY, MINUTES
from hb_assets.core.settings import Settings
from hb_assets.lake import inventory
from hb_assets.lake.compaction.inputs import Inputs
from hb_assets.lake.compaction.merge import fresh_rows
from hb_assets.lake.files import accepted_losses, consolidated, erased, fragments, quarantine
from hb_assets.lake.files.consolidated import Current
from hb_assets.lake.files.counts import Counts
from hb_assets.lake.files.fragments import Fragment
from hb_assets.lake.integrity import damage
from hb_assets.lake.storage import layout, parquet, verified
from hb_assets.lake.storage.engine import engine, figures
from hb_assets.lake.storage.layout import RAW
from hb_assets.lake.storage.store import Lake


class DayLedger(Counts, kw_only=True):
    """The counts of one day.

    `rows` distinct rows came into raw: `unique` + `superseded` + `erased` of them are consolidated,
    `pending` aren't yet; `faults` says, in one line each, what doesn't add up.
    """

    day: dt.date
    pending: int = 0
    faults: list[str] = msgspec.field(default_factory=list)


_DISTINCT_KEYS = f"""
SELECT count(*) FROM (
    SELECT DISTINCT {", ".join(KEY)} FROM raw
)
"""
_IN_BOTH = f"""
SELECT count(*) FROM (
    SELECT DISTINCT {IDENTITY} FROM raw SEMI JOIN quarantined USING ({IDENTITY})
)
"""


def of_days(
    lake: Lake,
    settings: Settings,
    *,
    deep: bool | Collection[dt.date] = False,
    faults: list[str] | None = None,
) -> list[DayLedger]:
    """The ledger of every day that the lake holds, as far as each can be read.

    Args:
        lake: which lake.
        settings: for memory and threads.
        deep: verify every file, and count distinct keys from raw as well, to be held against the
            unique rows; of these days alone where it names some.
        faults: gets a line for each folder of days that can't be read.
    """
    found = inventory.days_found(lake, [] if faults is None else faults)
    return [
        _day(lake, day, settings, deep if isinstance(deep, bool) else day in deep) for day in found
    ]


def _day(lake: Lake, day: dt.date, settings: Settings, deep: bool) -> DayLedger:
    ledger = DayLedger(day=day)
    for shard in range(lake.shards):
        where = f"day {day.isoformat()}, shard {shard:02d}"
        paths = [layout.consolidated_file(lake.root, day, shard)]
        try:
            paths += [one.path for one in fragments.listed(lake, day, shard)]
            if deep:
                ledger.faults += _damage(lake, day, shard, settings)
            _add(ledger, _shard(lake, day, shard, where, settings, deep))
        except DamagedFileError as error:
            ledger.faults.append(str(error))
        except FileNotFoundError:
            ledger.faults.append(f"{where}: files went while it was counted; count again")
        except duckdb.Error as error:
            ledger.faults.append(f"{where}: {parquet.explained(error, paths)}")
        except OSError as error:
            said = f"{error.filename or where} can't be read ({error.strerror})"
            ledger.faults.append(f"{said}: see to its permissions and its disk")
    ledger.faults = list(dict.fromkeys(ledger.faults))
    return ledger


def _damage(lake: Lake, day: dt.date, shard: int, settings: Settings) -> list[str]:
    """One line for each file of a (day, shard) that isn't what was written, or isn't ours."""
    paths = [one.path for one in fragments.listed(lake, day, shard)]
    paths.append(layout.consolidated_file(lake.root, day, shard))
    looks: list[Callable[[], None]] = [
        partial(damage.examine, lake, path, settings) for path in paths
    ]
    made = layout.minutes_file(lake.root, day, shard)
    return _faults([*looks, partial(_examine_minutes, made)])


def _examine_minutes(path: Path) -> None:
    parquet.verify(path)
    parquet.verify_footer(path, MINUTES)


def damage_beside_days(lake: Lake, arrived: Collection[dt.date] | None = None) -> list[str]:
    """One line for each file of quarantine, and of marks beside it, that isn't what was written.

    Args:
        lake: which lake.
        arrived: only those of these arrival dates.
    """
    return _faults(
        partial(parquet.verify, path)
        for kind in (layout.QUARANTINE, layout.RELEASED, layout.ERASED)
        for path in sorted((lake.root / kind).rglob("*.parquet"))
        if arrived is None or layout.day_of_folder(path.parent.name) in arrived
    )


def _faults(looks: Iterable[Callable[[], None]]) -> list[str]:
    faults = []
    for look in looks:
        try:
            look()
        except FileNotFoundError:
            continue
        except DamagedFileError as error:
            faults.append(str(error))
    return faults


def _add(ledger: DayLedger, part: DayLedger) -> None:
    ledger.add(part)
    ledger.pending += part.pending
    ledger.faults += part.faults


_ATTEMPTS = 5


def _shard(
    lake: Lake,
    day: dt.date,
    shard: int,
    where: str,
    settings: Settings,
    deep: bool,
) -> DayLedger:
    """Counts of a shard, taken again when its file was replaced or a fragment went meanwhile."""
    for attempt in range(_ATTEMPTS):
        part = DayLedger(day=day)
        try:
            seen = consolidated.current(lake, day, shard)
        except DamagedFileError as error:
            part.faults.append(str(error))
            part.pending = _rows_of(part, fragments.listed(lake, day, shard), settings)
            part.rows = part.pending
            return part
        try:
            _count_shard(part, lake, shard, where, settings, deep)
        except (FileNotFoundError, duckdb.IOException):
            if attempt == _ATTEMPTS - 1:
                raise
            continue
        if consolidated.is_published(lake, seen, day, shard):
            break
    return part


def _count_shard(
    ledger: DayLedger,
    lake: Lake,
    shard: int,
    where: str,
    settings: Settings,
    deep: bool,
) -> None:
    raw = fragments.listed(lake, ledger.day, shard)
    published = consolidated.current(lake, ledger.day, shard)
    waiting = consolidated.pending(published, raw)
    pending = _pending_rows(ledger, lake, published, waiting, raw, settings)
    ledger.rows += pending
    ledger.pending += pending
    if published is None:
        return
    metadata = published.metadata
    waiting_names = {one.name for one in waiting}
    listed = [one for one in raw if one.name not in waiting_names]
    whole = len(listed) == len(metadata.fragments) and not metadata.pruned
    if whole:
        known = len(ledger.faults)
        listed_rows = _rows_of(ledger, listed, settings)
        whole = known == len(ledger.faults)  # what can't be read can't be held against it
        if whole and listed_rows != metadata.rows + metadata.uncounted:
            ledger.faults.append(
                f"{where}: {listed_rows:,} distinct rows lie in the listed fragments, "
                f"the consolidated file counts {metadata.rows:,}"
            )
    in_file = parquet.footer(published.path).num_rows
    ledger.faults += [
        f"{where}: {why}" for why in metadata.contradictions(ledger.day, shard, in_file)
    ]
    if deep and whole and listed and not metadata.erased and not metadata.uncounted:
        with (
            engine(settings) as connection,
            verified.relations(connection, {"raw": [one.path for one in listed]}),
        ):
            (keys,) = figures(connection, _DISTINCT_KEYS)
        if keys != metadata.unique:
            ledger.faults.append(
                f"{where}: raw has {keys:,} distinct keys, the consolidated file {metadata.unique:,}"
            )
    ledger.add(metadata)


def _pending_rows(
    ledger: DayLedger,
    lake: Lake,
    published: Current | None,
    waiting: Sequence[Fragment],
    raw: Sequence[Fragment],
    settings: Settings,
) -> int:
    """Distinct rows that wait for their consolidation; a replayed row isn't counted."""

    def count(some: Sequence[Fragment]) -> int:
        inputs = Inputs.of(lake, published, some, raw)
        if not inputs.plain:
            with engine(settings) as connection:
                return fresh_rows(inputs, connection)
        return fragments.distinct_rows(some, settings)

    excepted = published.metadata.excepted if published else {}
    restored = [one for one in waiting if str(one.name) in excepted]
    others = [one for one in waiting if str(one.name) not in excepted]
    return sum(_of_sound(ledger, some, count) for some in [others, *([one] for one in restored)])


def _rows_of(ledger: DayLedger, some: Sequence[Fragment], settings: Settings) -> int:
    """Distinct rows of fragments, each damaged one left out, with a fault that says so."""
    return _of_sound(ledger, some, lambda sound: fragments.distinct_rows(sound, settings))


def _of_sound(
    ledger: DayLedger, some: Sequence[Fragment], count: Callable[[Sequence[Fragment]], int]
) -> int:
    while some:
        try:
            return count(some)
        except DamagedFileError as error:
            sound = [one for one in some if one.path != error.path]
            if len(sound) == len(some):
                raise
            ledger.faults.append(str(error))
            some = sound
    return 0


_ERASED = f"""
SELECT count(*) FROM (
    SELECT DISTINCT {IDENTITY} FROM erased
)
"""
_ERASED_BUT_NOT_IN_QUARANTINE = f"""
SELECT count(*) FROM (
    SELECT DISTINCT {IDENTITY} FROM erased
    ANTI JOIN (SELECT {IDENTITY} FROM quarantine) AS kept USING ({IDENTITY})
)
"""


def of_erased(
    lake: Lake, settings: Settings, on_damage: Callable[[DamagedFileError], None] | None = None
) -> int:
    """Heartbeats that were erased before any consolidation: withheld by a drain, or quarantined.

    Args:
        lake: which lake.
        settings: for memory and threads.
        on_damage: told of each damaged file, which is left out; by default it ends it all.

    Raises:
        DamagedFileError: a file can't be read.
    """
    paths = erased.paths(lake)
    if not paths:
        return 0
    records = sorted((lake.root / layout.QUARANTINE).rglob("*.parquet"))
    with (
        engine(settings) as connection,
        verified.relations(
            connection, {"erased": paths, "quarantine": records}, on_damage
        ) as sound,
    ):
        if "erased" not in sound:
            return 0
        query = _ERASED_BUT_NOT_IN_QUARANTINE if "quarantine" in sound else _ERASED
        try:
            return figures(connection, query)[0]
        except duckdb.Error as error:
            raise parquet.explained(error, [*paths, *records]) from None


def of_erased_found(lake: Lake, settings: Settings) -> tuple[int, list[str]]:
    """As `of_erased`, for all files that can be read, with a line for each that can't."""
    faults: list[str] = []
    return of_erased(lake, settings, lambda error: faults.append(str(error))), faults


@dataclass(frozen=True, slots=True)
class WrittenOff:
    """Heartbeats whose loss was accepted: `rows` of which it is known, and `at_most` so many more.

    `faults` names acceptances that can't be read, in one line each.
    """

    rows: int
    at_most: int
    faults: list[str] = field(default_factory=list)


def of_accepted(lake: Lake) -> WrittenOff:
    """Sum of the accepted losses whose files aren't back."""
    faults: list[str] = []
    found = [
        one for _, one in accepted_losses.standing(lake, lambda error: faults.append(str(error)))
    ]
    return WrittenOff(
        sum(one.rows or 0 for one in found),
        sum(one.at_most or 0 for one in found if one.rows is None),
        faults,
    )


@dataclass(frozen=True, slots=True)
class QuarantineLedger:
    """Distinct records in quarantine.

    `released` of them were put back; those `in_fragments` lie in a fragment as well, and count as
    the fragment's; `faults` names files that can't be read, in one line each.
    """

    records: int
    released: int
    in_fragments: int
    faults: list[str] = field(default_factory=list)


_QUARANTINED = "SELECT count(*), count(*) FILTER (released) FROM quarantined"
# Of each fragment the first quarantined entry at or behind its first one: does it lie in it?
_MAY_HOLD = """
SELECT path FROM spans ASOF JOIN (
    SELECT DISTINCT arrival_shard AS source,
        CAST(arrival_ms AS UHUGEINT) * 18446744073709551616 + arrival_seq AS entry
    FROM quarantined
) AS entries ON spans.source = entries.source AND entries.entry >= spans.first
WHERE entries.entry <= spans.last
"""
_SPANS = """
CREATE TEMP TABLE spans AS
SELECT path, source, CAST(first_ms AS UHUGEINT) * 18446744073709551616 + first_seq AS first,
    CAST(last_ms AS UHUGEINT) * 18446744073709551616 + last_seq AS last
FROM named
"""
_NAMED = pa.schema(
    [("path", pa.string()), ("source", pa.int16())]
    + [(name, pa.uint64()) for name in ("first_ms", "first_seq", "last_ms", "last_seq")]
)


def of_quarantine(lake: Lake, settings: Settings) -> QuarantineLedger:
    """Count the distinct records in quarantine."""
    faults: list[str] = []
    with quarantine.gathered(
        lake, settings, on_damage=lambda error: faults.append(str(error))
    ) as connection:
        records, released = figures(connection, _QUARANTINED, {})
        in_fragments = _in_fragments(lake, connection, faults) if records else 0
    return QuarantineLedger(records, released, in_fragments, faults)


def _in_fragments(lake: Lake, connection: duckdb.DuckDBPyConnection, faults: list[str]) -> int:
    """How many quarantined records lie in fragments; only fragments that may hold one are read."""
    named = [
        (str(one.path), one.name.source, *one.name.first, *one.name.last)
        for day in layout.days_of(lake.root, RAW)
        for one in fragments.all_listed(lake, day)
    ]
    columns = zip(*named, strict=True) if named else [()] * len(_NAMED)
    arrays = [pa.array(values, kind) for values, kind in zip(columns, _NAMED.types, strict=True)]
    connection.register("named", pa.Table.from_arrays(arrays, schema=_NAMED))
    connection.execute(_SPANS)
    paths = [Path(path) for (path,) in connection.sql(_MAY_HOLD).fetchall()]
    with verified.relations(
        connection, {"raw": paths}, lambda error: faults.append(str(error))
    ) as sound:
        return figures(connection, _IN_BOTH)[0] if sound else 0
