"""Known faults of the lake: damage and loss that no person has resolved yet.

Everything that shows faults asks here (`hb status`, health, metrics, Dagster, the audit). Faults
are derived from the lake's state each time: from names, footers and stat, so that checking a year
of days is cheap; a footer is read again only when its file changed. What names and footers can't
tell (a page that failed its checksum, a consolidation that failed) is recorded by whoever meets it,
in a small file under `faults/`, until the file in query verifies again or a consolidation of
that day and shard has succeeded.
"""

from __future__ import annotations

import datetime as dt
import hashlib
import logging
import os
import time
from collections.abc import Collection, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Literal

import msgspec

from hb_assets.core.errors import CheckFailedError, DamagedFileError, FencedError, HbError
from hb_assets.lake.files import accepted_losses, fragments
from hb_assets.lake.files.accepted_losses import Acceptance
from hb_assets.lake.files.consolidated import ConsolidatedMetadata
from hb_assets.lake.files.fragments import Fragment
from hb_assets.lake.files.tombstones import Tombstone
from hb_assets.lake.integrity.damage import Place
from hb_assets.lake.storage import checksummed_json, layout, parquet
from hb_assets.lake.storage.catalog import remembered
from hb_assets.lake.storage.durable_files import (
    Fingerprint,
    TempFile,
    barred,
    fingerprint,
    sync_folder,
)
from hb_assets.lake.storage.layout import (
    ACCEPTED,
    DAMAGED,
    ERASED,
    FAULTS,
    HEARTBEATS,
    PRUNED,
    QUARANTINE,
    RAW,
    RELEASED,
    TOMBSTONES,
    FragmentName,
)
from hb_assets.lake.storage.store import FORMAT, Lake

_log = logging.getLogger(__name__)

Kind = Literal[
    "set_aside",
    "damaged",
    "missing",
    "not_adding_up",
    "check_failed",
    "consolidation_failed",
    "unreadable",
    "accepted",
]
_WORDS: dict[str, str] = {
    "set_aside": "a damaged fragment was set aside, its heartbeats are missing",
    "damaged": "a file is damaged",
    "missing": "a file is gone whose heartbeats no other file holds",
    "not_adding_up": "the counts of the consolidated file don't add up",
    "check_failed": "a consolidated file failed its checks",
    "consolidation_failed": "the last consolidation failed",
    "unreadable": "a folder or file can't be read",
    "accepted": "heartbeats were lost with a damaged file, and accepted as lost",
}
_SET_ASIDE = f"{DAMAGED}/{RAW}"


@dataclass(frozen=True, slots=True)
class Fault:
    """A fault of the lake that stands until it is resolved.

    `rows` is how many heartbeats it touches, None where nobody can tell. A loss that was accepted
    is no fault any more; answers that it touches tell of it (`losses`). `message` says in one line
    what is wrong, where, and what to do; it may name the file. `summary` says it without a path.
    """

    kind: Kind
    day: dt.date | None
    shard: int | None
    rows: int | None
    path: Path | None
    message: str

    @property
    def summary(self) -> str:
        """One line without any path, for those who must not see the server's folders."""
        where = _where(self.day, self.shard) if self.day else "beside the days"
        many = f" ({self.rows:,} heartbeats)" if self.rows is not None else ""
        return f"{where}: {_WORDS[self.kind]}{many}; `hb damaged list` on the server says more"


class _Noticed(msgspec.Struct, frozen=True, kw_only=True):
    """A fault recorded under `faults/`; `path` is relative to the lake, `seen` how it looked."""

    format: int = FORMAT
    kind: Kind
    message: str
    since_ms: int
    path: str | None = None
    seen: Fingerprint | None = None


def faults(lake: Lake, days: Collection[dt.date] | None = None) -> list[Fault]:
    """All known faults, day by day and shard by shard; one unreadable place hides no other.

    Args:
        lake: which lake.
        days: only these; None: all, and what belongs to no day.
    """
    found: list[Fault] = []
    held: dict[str, frozenset[dt.date]] = {}
    for kind in (RAW, HEARTBEATS, PRUNED, _SET_ASIDE, FAULTS):
        if days is not None and kind not in (_SET_ASIDE, FAULTS):
            continue
        try:
            held[kind] = frozenset(layout.days_of(lake.root, kind))
        except OSError as error:
            found.append(_unreadable(lake.root / kind, error, None, None))
    if days is None:
        days = frozenset[dt.date]().union(*held.values())
        found += _noticed(lake, None, None, None)
        found += _beside_days(lake)
    # Most days have neither: not to look into their folders saves half of the time.
    set_aside, noticed = held.get(_SET_ASIDE, frozenset()), held.get(FAULTS, frozenset())
    for day in sorted(days):
        for shard in range(lake.shards):
            published, of_file = _published(lake, day, shard)
            seen = [*of_file, *_pending(lake, day, shard, published)]
            if day in set_aside:
                seen += _set_aside(lake, day, shard, published)
            if day in noticed:
                known = {fault.path for fault in seen if fault.path is not None}
                told = _noticed(lake, day, shard, published)
                seen += [fault for fault in told if fault.path not in known]
            found += seen
        if day in noticed:
            found += _noticed(lake, day, None, None)
    return list(dict.fromkeys(found))


_TOUCHING = ("set_aside", "missing", "damaged")
_OF_LOSSES = (_SET_ASIDE, FAULTS, f"{ACCEPTED}/{RAW}", f"{ACCEPTED}/{HEARTBEATS}")


def losses(lake: Lake, day: dt.date, shard: int) -> list[Fault]:
    """Losses that answers about a (day, shard) have to mention, accepted ones included.

    Most have nothing, and cost a few stats.
    """
    place = f"day={day.isoformat()}/shard={shard:02d}"
    if not any(os.path.exists(f"{lake.root}/{kind}/{place}") for kind in _OF_LOSSES):  # noqa: PTH110
        return []
    found = [one for one in faults(lake, [day]) if one.shard == shard and one.kind in _TOUCHING]
    return [*found, *(_accepted(lake, one) for one in accepted_losses.of_shard(lake, day, shard))]


def _accepted(lake: Lake, loss: Acceptance) -> Fault:
    day, path = dt.date.fromisoformat(loss.day), lake.root / loss.file
    many = f"{loss.rows:,}" if loss.rows is not None else f"at most {loss.at_most or 0:,}"
    message = (
        f"{path} was damaged or lost, and its heartbeats accepted as lost ({many}): "
        "hb damaged restore puts a whole copy back"
    )
    return Fault("accepted", day, loss.shard, loss.rows, path, message)


def _where(day: dt.date | None, shard: int | None) -> str:
    of_shard = "" if shard is None else f", shard {shard:02d}"
    return f"day {day}{of_shard}"


def _unreadable(path: Path, error: OSError, day: dt.date | None, shard: int | None) -> Fault:
    closed = barred(path)
    if closed != path:  # one fault, however much lies behind it
        path, shard = closed, None
        day = layout.day_of_folder(path.name)
    message = f"{path} can't be read ({error.strerror}): mend its permissions or its disk"
    return Fault("unreadable", day, shard, None, path, message)


def _published(
    lake: Lake, day: dt.date, shard: int
) -> tuple[ConsolidatedMetadata | None, tuple[Fault, ...]]:
    """Footer metadata of the consolidated file, if readable, and what is wrong with the file."""
    path = _text(lake, HEARTBEATS, day, shard) + "/heartbeats.parquet"
    try:
        return _judged(path, Fingerprint.of(os.stat(path)), day, shard)  # noqa: PTH116  # thousands a look
    except FileNotFoundError:
        pass
    except OSError as error:
        return None, (_unreadable(Path(path), error, day, shard),)
    mark = layout.pruned_mark(lake.root, day, shard)
    try:
        if not mark.exists() or os.path.exists(path):  # noqa: PTH110  # published meanwhile
            return None, ()
    except OSError as error:
        return None, (_unreadable(mark, error, day, shard),)
    message = (
        f"{path} is gone, and raw fragments that it included were pruned: put a copy in its place "
        "(hb damaged restore FILE), or accept the loss of what raw no longer holds "
        f"(hb damaged accept {path})"
    )
    return None, (Fault("missing", day, shard, None, Path(path), message),)


@remembered(20_000)
def _judged(
    path: str,
    _seen: Fingerprint,
    day: dt.date,
    shard: int,
) -> tuple[ConsolidatedMetadata | None, tuple[Fault, ...]]:
    where, file = _where(day, shard), Path(path)
    try:
        footer = parquet.footer(file)
        metadata = parquet.metadata_in(footer, file, ConsolidatedMetadata)
    except DamagedFileError as error:
        return None, (Fault("damaged", day, shard, None, file, str(error)),)
    return metadata, tuple(
        Fault(
            "not_adding_up",
            *(day, shard, None, file),
            f"{where}: {why}; put a copy in the place of {path} (hb damaged restore FILE)",
        )
        for why in metadata.contradictions(day, shard, footer.num_rows)
    )


def _set_aside(
    lake: Lake, day: dt.date, shard: int, published: ConsolidatedMetadata | None
) -> Iterator[Fault]:
    """Faults of fragments that were set aside and whose rows are missed."""
    folder = _text(lake, _SET_ASIDE, day, shard)
    try:
        entries = list(_entries(folder))
    except OSError as error:
        yield _unreadable(Path(folder), error, day, shard)
        return
    given_up = accepted_losses.fragments(lake, day, shard)
    for name, path, seen in entries:
        if name in given_up or (published is not None and published.includes(name)):
            continue
        if layout.shard_folder(lake.root, RAW, day, shard).joinpath(str(name)).exists():
            continue
        rows = _rows(path, seen)
        many = "nobody can tell how many" if rows is None else f"{rows:,}"
        message = (
            f"{path} is a damaged fragment that was set aside, {many} heartbeats are missing: put "
            f"a whole copy back (hb damaged restore FILE), or give them up (hb damaged accept "
            f"{name})"
        )
        yield Fault("set_aside", day, shard, rows, Path(path), message)


def _pending(
    lake: Lake, day: dt.date, shard: int, published: ConsolidatedMetadata | None
) -> Iterator[Fault]:
    """Faults of pending fragments whose footers aren't what was written."""
    folder = _text(lake, RAW, day, shard)
    included = frozenset(published.fragments) if published else frozenset()
    try:
        entries = [one for one in _entries(folder) if str(one[0]) not in included]
    except OSError as error:
        yield _unreadable(Path(folder), error, day, shard)
        return
    for name, path, seen in entries:
        try:
            fault = _fault_of_fragment(path, seen, name, day, shard)
        except FileNotFoundError:
            continue
        except OSError as error:
            fault = _unreadable(Path(path), error, day, shard)
        if fault is not None:
            yield fault


@remembered(200_000)
def _fault_of_fragment(
    path: str,
    _seen: Fingerprint,
    name: FragmentName,
    day: dt.date,
    shard: int,
) -> Fault | None:
    try:
        fragments.verify_place(Fragment(name, Path(path)), day, shard)
    except DamagedFileError as error:
        return Fault("damaged", day, shard, None, Path(path), str(error))
    return None


@remembered(20_000)
def _rows(path: str, _seen: Fingerprint) -> int | None:
    """Rows of a damaged fragment by its footer, if that is sound."""
    try:
        return int(parquet.footer(Path(path)).num_rows)
    except (DamagedFileError, OSError):
        return None


def _beside_days(lake: Lake) -> Iterator[Fault]:
    """Faults of files of quarantine, its markers and tombstones that aren't what was written."""
    yield from _tombstones(lake)
    for kind in (QUARANTINE, RELEASED, ERASED):
        try:
            folders = [
                layout.day_folder(lake.root, kind, day) for day in layout.days_of(lake.root, kind)
            ]
        except OSError as error:
            yield _unreadable(lake.root / kind, error, None, None)
            continue
        for folder in folders:
            try:
                entries = list(_entries(str(folder)))
            except OSError as error:
                yield _unreadable(folder, error, None, None)
                continue
            for _, path, seen in entries:
                fault = _fault_of_footer(path, seen)
                if fault is not None:
                    yield fault


def _tombstones(lake: Lake) -> Iterator[Fault]:
    folder = lake.root / TOMBSTONES
    try:
        for path in sorted(folder.glob("*.json")):
            fault = _fault_of_tombstone(path, fingerprint(path))
            if fault is not None:
                yield fault
    except FileNotFoundError:
        pass  # it was replaced just now
    except OSError as error:
        yield _unreadable(folder, error, None, None)


@remembered(50_000)
def _fault_of_tombstone(path: Path, _seen: Fingerprint) -> Fault | None:
    try:
        checksummed_json.read(path, Tombstone)
    except DamagedFileError as error:
        return Fault("damaged", None, None, None, path, str(error))
    return None


@remembered(50_000)
def _fault_of_footer(path: str, _seen: Fingerprint) -> Fault | None:
    try:
        parquet.footer(Path(path))
    except FileNotFoundError:
        return None
    except DamagedFileError as error:
        return Fault("damaged", None, None, None, Path(path), str(error))
    except OSError as error:
        return _unreadable(Path(path), error, None, None)
    return None


def _entries(folder: str) -> Iterator[tuple[FragmentName, str, Fingerprint]]:
    """Fragments in a folder, each with how it looks now."""
    try:
        with os.scandir(folder) as found:
            listed = [(FragmentName.parse(entry.name), entry) for entry in found]
    except FileNotFoundError:
        return
    for name, entry in listed:
        if name is None:
            continue
        try:
            yield name, entry.path, Fingerprint.of(entry.stat())
        except FileNotFoundError:
            continue


def _text(lake: Lake, kind: str, day: dt.date, shard: int) -> str:
    """The folder of a (day, shard) as text: making a Path takes longer than a stat."""
    return f"{lake.root}/{kind}/day={day.isoformat()}/shard={shard:02d}"


def notice(
    lake: Lake,
    fault_of: HbError | OSError,
    *,
    day: dt.date | None,
    shard: int | None,
) -> None:
    """Record a fault in the lake that can't be told from names and footers. Never raises.

    A damaged file that verifies when it is looked at again is no fault: it was replaced meanwhile,
    or what failed was something else.

    Args:
        lake: which lake.
        fault_of: the error that was raised.
        day: of which day, if of one.
        shard: of which shard, if of one.
    """
    if isinstance(fault_of, FencedError):
        return
    path = fault_of.path if isinstance(fault_of, DamagedFileError) else None
    if isinstance(fault_of, DamagedFileError) and (
        path is None or not path.is_relative_to(lake.root)
    ):
        return  # a file that is gone: names tell that
    kind: Kind = "damaged" if path is not None else "consolidation_failed"
    if isinstance(fault_of, CheckFailedError):
        kind = "check_failed"
    message = str(fault_of)
    if isinstance(fault_of, OSError):
        message = f"{fault_of.strerror or type(fault_of).__name__}: {fault_of.filename or 'disk'}"
        message = f"{_where(day, shard)}: {message}"
    try:
        seen = fingerprint(path) if path is not None else None
        where = str(path.relative_to(lake.root)) if path is not None else None
        folder = _folder(lake, day, shard)
        target = folder / f"{_digest(kind, where)}.json"
        before = dict(_notes(folder)).get(target)
        if before is not None and (before.message, before.seen) == (message, seen):
            return
        if path is not None and _verifies(str(path), fingerprint(path)):
            return
        noticed = _Noticed(
            kind=kind, message=message, since_ms=int(time.time() * 1000), path=where, seen=seen
        )
        with TempFile(lake.root, folder) as temp:
            checksummed_json.write(temp.path, noticed)
            temp.publish_replacing(target)
    except (OSError, HbError) as error:
        _log.warning("a fault can't be recorded in the lake (%s): %s", error, message)


def resolved(lake: Lake, day: dt.date, shard: int) -> None:
    """Remove recorded faults of a (day, shard) whose consolidation has succeeded.

    What is said of a file that is still there, and still isn't sound, stays. Never raises: a record
    that can't be removed stays until it can.
    """
    folder = _folder(lake, day, shard)
    try:
        over = [
            path
            for path, noticed in _notes(folder)
            if noticed is None or noticed.path is None or not _stands(lake, noticed, None)
        ]
        for path in over:
            path.unlink(missing_ok=True)
        if over:
            sync_folder(folder)
    except OSError as error:
        _log.warning("a fault that is over can't be removed from %s: %s", folder, error)


def _folder(lake: Lake, day: dt.date | None, shard: int | None) -> Path:
    if day is None:
        return lake.root / FAULTS
    if shard is None:
        return layout.day_folder(lake.root, FAULTS, day)
    return layout.shard_folder(lake.root, FAULTS, day, shard)


def _digest(kind: str, path: str | None) -> str:
    return hashlib.blake2b(f"{kind} {path or ''}".encode(), digest_size=8).hexdigest()


def _notes(folder: Path) -> list[tuple[Path, _Noticed | None]]:
    """Recorded faults in a folder; None where one can't be read."""
    try:
        with os.scandir(folder) as found:
            paths = sorted(Path(entry.path) for entry in found if entry.name.endswith(".json"))
    except FileNotFoundError:
        return []
    notes: list[tuple[Path, _Noticed | None]] = []
    for path in paths:
        try:
            notes.append((path, checksummed_json.read(path, _Noticed)))
        except FileNotFoundError:
            continue
        except DamagedFileError:
            notes.append((path, None))
    return notes


def _noticed(
    lake: Lake,
    day: dt.date | None,
    shard: int | None,
    published: ConsolidatedMetadata | None,
) -> Iterator[Fault]:
    folder = _folder(lake, day, shard)
    try:
        notes = _notes(folder)
    except OSError as error:
        yield _unreadable(folder, error, day, shard)
        return
    for path, noticed in notes:
        if noticed is None:
            message = f"{path} is damaged: the fault recorded there can't be read; remove it"
            yield Fault("damaged", day, shard, None, path, message)
            continue
        try:
            stands = _stands(lake, noticed, published)
        except OSError as error:
            yield _unreadable(lake.root / (noticed.path or ""), error, day, shard)
            continue
        if not stands:
            continue
        about = lake.root / noticed.path if noticed.path is not None else None
        if about is None or about.exists():
            yield Fault(noticed.kind, day, shard, None, about, noticed.message)
        else:
            message = (
                f"{about} was damaged and is gone, so that its heartbeats are missing: put a whole "
                f"copy back (hb damaged restore FILE)"
            )
            yield Fault("missing", day, shard, None, about, message)


def _stands(lake: Lake, noticed: _Noticed, published: ConsolidatedMetadata | None) -> bool:
    """Whether a recorded fault isn't resolved yet.

    Raises:
        OSError: its file can't be looked at.
    """
    if noticed.path is None:
        return True
    path = lake.root / noticed.path
    try:
        seen = fingerprint(path)
    except FileNotFoundError:
        if not noticed.path.startswith(f"{RAW}/"):
            return False  # names tell whether it is missed
        name = FragmentName.parse(path.name)
        place = Place.of(lake, path)
        given_up = place and name in accepted_losses.fragments(lake, place.day, place.shard)
        known = given_up or (lake.root / DAMAGED / noticed.path).exists()
        included = name is not None and published is not None and published.includes(name)
        return not (known or included)
    return seen == noticed.seen or not _verifies(str(path), seen)


@remembered(10_000)
def _verifies(path: str, _seen: Fingerprint) -> bool:
    """Whether a file is whole, all of its bytes read."""
    try:
        parquet.verify(Path(path))
    except FileNotFoundError:
        return True
    except DamagedFileError:
        return False
    return True
