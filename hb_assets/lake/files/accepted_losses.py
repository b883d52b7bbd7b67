"""Accepted losses: one file under `accepted/` for each file that a person has written off.

The audit counts what such a file held as written off. An acceptance has no effect any more once the
file is back: a fragment that lies in raw again, a consolidated file that wasn't made without it. So
a restore that dies half way changes no count.
"""

from __future__ import annotations

import datetime as dt
import os
from collections.abc import Callable, Iterable, Iterator
from pathlib import Path

import msgspec

from hb_assets.core.errors import DamagedFileError
from hb_assets.lake.files.consolidated import current
from hb_assets.lake.storage import checksummed_json, layout
from hb_assets.lake.storage.durable_files import TempFile, sync_folder
from hb_assets.lake.storage.layout import ACCEPTED, HEARTBEATS, RAW, FragmentName
from hb_assets.lake.storage.store import FORMAT, Lake


class Acceptance(msgspec.Struct, frozen=True, kw_only=True):
    """One accepted loss.

    `file` is where the file lay, relative to the lake; `first` and `last` bound the entry ids of a
    fragment, which came by the shard `source`. `rows` heartbeats are lost; None: nobody can
    tell, but `at_most` so many. `pruned_ms` is the mark that stood where a consolidated file was
    written off as a whole (see `recovery`).
    """

    format: int = FORMAT
    file: str
    day: str
    shard: int
    reason: str
    rows: int | None
    at_most: int | None
    accepted_ms: int
    source: int | None = None
    first: tuple[int, int] | None = None
    last: tuple[int, int] | None = None
    pruned_ms: int | None = None


def file_of(lake: Lake, kind: str, day: dt.date, shard: int, stem: str) -> Path:
    """The file that says that a loss is accepted; `stem` is the lost file's name without suffix."""
    return layout.shard_folder(lake.root / ACCEPTED, kind, day, shard) / f"{stem}.json"


def put(lake: Lake, path: Path, acceptance: Acceptance) -> None:
    """Write an acceptance, in the place of one of the same file; durable on return."""
    with TempFile(lake.root, path.parent) as temp:
        checksummed_json.write(temp.path, acceptance)
        temp.publish_replacing(path)


def remove(path: Path) -> None:
    """Take an acceptance back; durable on return."""
    if path.exists():
        path.unlink(missing_ok=True)
        sync_folder(path.parent)


def stems(lake: Lake, kind: str, day: dt.date, shard: int) -> list[str]:
    """Names without suffix of the files of a (day, shard) whose loss is accepted."""
    try:
        with os.scandir(file_of(lake, kind, day, shard, "").parent) as found:
            names = [entry.name for entry in found]
    except FileNotFoundError:
        return []
    return sorted(name.removesuffix(".json") for name in names if name.endswith(".json"))


def fragments(lake: Lake, day: dt.date, shard: int) -> frozenset[FragmentName]:
    """Fragments of a (day, shard) whose loss is accepted."""
    found = (FragmentName.parse(f"{stem}.parquet") for stem in stems(lake, RAW, day, shard))
    return frozenset(name for name in found if name is not None)


def standing(
    lake: Lake, on_damage: Callable[[DamagedFileError], None]
) -> Iterator[tuple[Path, Acceptance]]:
    """Acceptances whose file isn't back, each with its own file."""
    yield from _standing(lake, (lake.root / ACCEPTED).rglob("*.json"), on_damage)


def of_shard(lake: Lake, day: dt.date, shard: int) -> list[Acceptance]:
    """Standing acceptances of a (day, shard) that can be read."""
    paths = [
        file_of(lake, kind, day, shard, stem)
        for kind in (RAW, HEARTBEATS)
        for stem in stems(lake, kind, day, shard)
    ]
    return [one for _, one in _standing(lake, paths, lambda _: None)]


def _standing(
    lake: Lake, paths: Iterable[Path], on_damage: Callable[[DamagedFileError], None]
) -> Iterator[tuple[Path, Acceptance]]:
    for path in sorted(paths):
        try:
            found = checksummed_json.read(path, Acceptance)
        except FileNotFoundError:
            continue
        except DamagedFileError as error:
            on_damage(error)
            continue
        if not _is_back(lake, path, found):
            yield path, found


def _is_back(lake: Lake, path: Path, acceptance: Acceptance) -> bool:
    try:
        published = current(lake, dt.date.fromisoformat(acceptance.day), acceptance.shard)
    except DamagedFileError:
        published = None
    if not acceptance.file.startswith(f"{HEARTBEATS}/"):
        name = Path(acceptance.file).name
        included = published is not None and name in published.names
        return included or (lake.root / acceptance.file).exists()
    return published is not None and path.stem not in published.metadata.losses
