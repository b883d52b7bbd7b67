"""A small lake with every kind of file, and the queries and commands that can be run on it.

Three days of a few users in two shards: one consolidated, where a batch was delivered twice, with
late rows waiting; one pruned; one half raw. Records lie in quarantine, two of them released; a user
was forgotten, and more came of them. Each query is made by the functions that commands, assets and
the gateway use, and its answer is plain data, to be compared with that of an undamaged lake.
"""

from __future__ import annotations

import datetime as dt
import json
import random
from collections.abc import Callable, Hashable, Iterable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path

import pyarrow as pa
import pyarrow.parquet as pq
from typer.testing import CliRunner

from hb_assets.cli.app import load_commands
from hb_assets.core import days
from hb_assets.core.errors import DamagedFileError, HbError
from hb_assets.core.record import shard_of
from hb_assets.core.settings import Settings
from hb_assets.lake import erasure, ledger, minutes
from hb_assets.lake.compaction import pruning
from hb_assets.lake.compaction.consolidation import consolidate, no_lock
from hb_assets.lake.erasure import Whose
from hb_assets.lake.files import accepted_losses, erased, fragments, quarantine, tombstones
from hb_assets.lake.files.accepted_losses import Acceptance
from hb_assets.lake.ingest.decode import decode
from hb_assets.lake.query import series
from hb_assets.lake.query.series import Query
from hb_assets.lake.storage import layout, parquet
from hb_assets.lake.storage.store import Lake

SHARDS = 2
FIRST = dt.date(2025, 1, 15)
DAYS = tuple(FIRST + dt.timedelta(days=n) for n in range(3))
LATE, PRUNED, RAW = DAYS
_GIVEN_UP = RAW + dt.timedelta(days=1)
"""Of this day one fragment was lost, and the loss accepted."""
USERS = tuple(f"user-{n}" for n in range(6))
FORGOTTEN = "user-forgotten"
_READINGS = 120
_ROW_GROUP = 200
_ARRIVED = days.end_ms(DAYS[-1])
_ALL = {0: (2**60, 0)}

Items = frozenset[Hashable]


@dataclass(frozen=True, slots=True)
class Answer:
    """The answer to a query, and whether it says that something is wrong.

    `items` are points, rows or counts. `trace` says that an error came that nobody foresaw.
    """

    items: Items = frozenset()
    told: bool = False
    trace: str = ""


@dataclass(frozen=True, slots=True)
class _Entry:
    shard: int
    ms: int
    seq: int
    data: bytes | None
    deliveries: int = 1
    own: int | None = None


def settings_of(home: Path, root: Path) -> Settings:
    """Settings of a process that works on a copy of the lake at `root`."""
    return Settings(home=home, lake=str(root), shards=SHARDS, duckdb_threads=1, raw_keep="0s")


def made(settings: Settings, seed: int) -> None:
    """Make the lake that the settings name."""
    parquet.ROW_GROUP = _ROW_GROUP  # several row groups a file, as large ones have
    chance = random.Random(seed)
    lake = Lake.open(settings)
    everybody = (*USERS, FORGOTTEN)
    for seq, day in enumerate((*DAYS, *DAYS)):
        _deliver(lake, settings, seq, _lines(chance, day, everybody, seq))
    _deliver(lake, settings, 3, _lines(chance, LATE, everybody, 3))  # again: a drain that died
    for day in (LATE, PRUNED):
        consolidate(lake, day, settings, watermarks=_ALL).require()
    pruning.prune(lake, settings, days=[PRUNED])
    consolidate(lake, RAW, settings, shards=[0]).require()
    records = list(quarantine.records(lake, settings))
    quarantine.release(lake, records[:2])
    cutoffs = dict.fromkeys(range(SHARDS), (_ARRIVED, 99))
    shard = shard_of(FORGOTTEN, SHARDS)
    hashed = tombstones.hashed(lake, FORGOTTEN)
    tombstones.put(
        lake, tombstones.Tombstone(user=hashed, shard=shard, cutoffs=cutoffs, asked_ms=_ARRIVED)
    )
    for seq, day in enumerate(DAYS, 20):  # late ones, of the forgotten user as well
        _deliver(lake, settings, seq, _lines(chance, day, everybody, seq))
    for day in DAYS:
        minutes.build(lake, day, settings)
    loss = layout.FragmentName.new(0, (_ARRIVED, 30), (_ARRIVED, 30))
    accepted_losses.put(
        lake,
        accepted_losses.file_of(lake, layout.RAW, _GIVEN_UP, 0, str(loss).removesuffix(".parquet")),
        Acceptance(
            file=f"{layout.RAW}/day={_GIVEN_UP}/shard=00/{loss}",
            day=_GIVEN_UP.isoformat(),
            shard=0,
            reason="a disk died",
            rows=17,
            at_most=None,
            accepted_ms=_ARRIVED,
            source=0,
            first=loss.first,
            last=loss.last,
        ),
    )


def _lines(chance: random.Random, day: dt.date, users: Iterable[str], turn: int) -> list[bytes]:
    found = []
    for user in users:
        for n in range(_READINGS):
            at = days.start_ms(day) + (n * 25 + turn) * 10_000
            found.append(
                json.dumps(
                    {
                        "user_id": user,
                        "device_id": f"device_{chance.choice('abc')}",
                        "timestamp_ms": at,
                        "heart_rate": chance.randint(50, 180),
                    }
                ).encode()
            )
    found += [b'{"user_id": "%d", "heart_rate": "none"}' % turn, b"no JSON at all"]
    return found


def _deliver(lake: Lake, settings: Settings, seq: int, lines: Sequence[bytes]) -> None:
    """What a drain does with an entry of each source shard."""
    half = len(lines) // 2
    entries = [
        _Entry(source, _ARRIVED, seq, b"\n".join(part))
        for source, part in enumerate((lines[:half], lines[half:]))
    ]
    decoded = decode(entries, settings)
    rows, gone = tombstones.withheld(lake, decoded.rows)
    fragments.publish(lake, rows)
    quarantine.publish(lake, decoded.rejected)
    erased.publish(lake, settings, gone)


@dataclass(frozen=True, slots=True)
class Asked:
    """The subject of a query: a day and a shard, and a user of that shard."""

    day: dt.date
    shard: int
    user: str

    @classmethod
    def near(cls, chance: random.Random, path: Path) -> Asked:
        """A subject that a file may matter for."""
        day, shard = layout.place_of(path) or (chance.choice(DAYS), chance.randrange(SHARDS))
        if layout.TOMBSTONES in path.parts or path.name == "lake.json":
            return cls(day, shard_of(FORGOTTEN, SHARDS), FORGOTTEN)
        return cls(day, shard, next(one for one in USERS if shard_of(one, SHARDS) == shard))

    def heeded_by(self, way: str) -> Asked:
        """The same for all that a way of asking answers alike."""
        day = self.day if way in ("consolidate", "minutes", "prune") else FIRST
        of_user = way in ("http", "command", "query", "forget")
        return Asked(day, self.shard if of_user else 0, self.user if of_user else USERS[0])


Way = Callable[[Settings, Asked], Answer]


def _points(rows: Iterable[Mapping[str, object]]) -> Items:
    return frozenset((row["timestamp"], row["device_id"], row["heart_rate"]) for row in rows)


def by_json(status: bool, answer: Mapping[str, object]) -> Answer:
    """The answer of the gateway or the command; `status` says whether it counts as one."""
    if not status:
        return Answer(told=True)
    rows = answer["data"]
    assert isinstance(rows, list)
    return Answer(_points(rows), told="warnings" in answer or "next" in answer)


def command(settings: Settings, asked: Asked) -> Answer:
    """`hb query` over all days."""
    arguments = ["query", asked.user, "--start", str(DAYS[0])]
    arguments += ["--end", str(RAW + dt.timedelta(days=1)), "--granularity", "1s", "--json"]
    result = CliRunner().invoke(
        load_commands(),
        arguments,
        env={"HB_HOME": str(settings.home), "HB_LAKE": settings.lake, "HB_SHARDS": str(SHARDS)},
    )
    trace = _trace(result.exception, result.stderr)
    if result.exit_code not in (0, 1) or trace or not result.stdout:
        return Answer(told=True, trace=trace)
    found = by_json(True, json.loads(result.stdout))
    return Answer(found.items, found.told or bool(result.exit_code))


def _trace(error: BaseException | None, stderr: str) -> str:
    if error is None or isinstance(error, SystemExit | HbError):
        return "Traceback" if "Traceback" in stderr else ""
    return type(error).__name__


def in_process(settings: Settings, asked: Asked) -> Answer:
    """The same query, put to the lake as readers of a gateway do."""
    lake = Lake.open(settings)
    start, end = days.start_ms(DAYS[0]), days.end_ms(RAW)
    page = series.answer(lake, Query(asked.user, start, end, granularity="1s"), settings)
    return Answer(
        _points(page.points.to_pylist()), told=bool(page.warnings or page.next_ms is not None)
    )


def consolidation(settings: Settings, asked: Asked) -> Answer:
    """A day's consolidation: the rows that are published then."""
    lake = Lake.open(settings)
    done = consolidate(lake, asked.day, settings)
    told = bool(done.failed or done.set_aside)
    return Answer(_published(lake, [asked.day]), told)


def building(settings: Settings, asked: Asked) -> Answer:
    """A day's minutes."""
    lake = Lake.open(settings)
    minutes.build(lake, asked.day, settings)
    return Answer(_rows(layout.minutes_file(lake.root, asked.day, n) for n in range(SHARDS)))


def forgetting(settings: Settings, asked: Asked) -> Answer:
    """Forgetting a user: what the lake holds of everybody else, and whether anything is left."""
    lake = Lake.open(settings)
    cutoffs = dict.fromkeys(range(SHARDS), (_ARRIVED, 99))
    for shard, latest in erasure.latest(lake, asked.user, settings).items():
        cutoffs[shard] = max(cutoffs[shard], latest)
    hashed = tombstones.hashed(lake, asked.user)
    stone = tombstones.Tombstone(
        user=hashed, shard=asked.shard, cutoffs=cutoffs, asked_ms=_ARRIVED, spool_cleared=True
    )
    tombstones.put(lake, stone)
    whose = Whose(asked.user, cutoffs)
    erasure.forget_quarantine(lake, whose, settings)
    for day in erasure.holding(lake, whose, settings):
        erasure.forget_day(lake, day, whose, settings, watermarks=_ALL, lock=no_lock)
    left = erasure.holding(lake, whose, settings)
    aside = erasure.unreadable(lake)
    return Answer(
        _published(lake, DAYS) | {("left", bool(left))} | {("set aside", bool(aside))},
        told=bool(aside),
    )


def auditing(settings: Settings, _: Asked) -> Answer:
    """The lake's side of the audit."""
    lake = Lake.open(settings)
    ledgers = ledger.of_days(lake, settings)
    records = ledger.of_quarantine(lake, settings)
    counts = {
        (one.day, one.rows, one.unique, one.repeats, one.corrections, one.erased, one.pending)
        for one in ledgers
    }
    lost = ledger.of_accepted(lake)
    told = any(one.faults for one in ledgers) or bool(records.faults) or bool(lost.faults)
    lost_rows = ("accepted", lost.rows, lost.at_most)
    counted = ("quarantine", records.records, records.released, records.in_fragments)
    return Answer(
        frozenset({*counts, counted, ("erased", ledger.of_erased(lake, settings)), lost_rows}),
        told=told,
    )


def listing(settings: Settings, _: Asked) -> Answer:
    """`hb quarantine list`: each record, and whether it was released."""
    lake = Lake.open(settings)
    faults: list[DamagedFileError] = []
    found = quarantine.records(lake, settings, on_damage=faults.append)
    items = frozenset((one.id, one.raw, one.reason, one.released) for one in found)
    return Answer(items, told=bool(faults))


def pruned(settings: Settings, asked: Asked) -> Answer:
    """`hb prune`: whether a fragment went whose rows no sound file holds."""
    lake = Lake.open(settings)
    before = fragments.all_listed(lake, asked.day)
    done = pruning.prune(lake, settings, days=[asked.day])
    lost = False
    for one in {*before} - {*fragments.all_listed(lake, asked.day)}:
        try:
            parquet.verify(layout.consolidated_file(lake.root, asked.day, _shard(one.path)))
        except DamagedFileError:
            lost = True
    return Answer(frozenset({("lost", lost)}), told=bool(done.faults) and not lost)


def _shard(path: Path) -> int:
    place = layout.place_of(path)
    assert place is not None
    return place[1]


def _published(lake: Lake, which: Iterable[dt.date]) -> Items:
    return _rows(
        layout.consolidated_file(lake.root, day, shard) for day in which for shard in range(SHARDS)
    )


def _rows(paths: Iterable[Path]) -> Items:
    """Rows as they stand in files, read by plain pyarrow: nobody is to judge himself.

    A damaged file that had to stay where it is may not be readable at all.
    """
    found: set[Hashable] = set()
    for path in paths:
        try:
            rows = pq.read_table(path, partitioning=None).to_pylist()
        except FileNotFoundError:
            continue
        except (pa.ArrowException, OSError):
            found.add(("unreadable", path.name))
        else:
            found |= {tuple(row.values()) for row in rows}
    return frozenset(found)
