"""`hb damaged`: what is damaged or lost, putting whole copies back, and accepting a loss."""

from __future__ import annotations

import datetime as dt
from collections.abc import Callable, Iterator
from contextlib import closing
from dataclasses import dataclass
from pathlib import Path
from typing import Annotated

import typer

from hb_assets.buffer import connection, server
from hb_assets.cli import output
from hb_assets.cli.app import FAILED, AsJson, app, existing_lake, settings_of
from hb_assets.core.days import EPOCH
from hb_assets.core.errors import DamagedFileError, HbError
from hb_assets.core.settings import Settings
from hb_assets.lake import recovery
from hb_assets.lake.files import accepted_losses
from hb_assets.lake.files.accepted_losses import Acceptance
from hb_assets.lake.integrity import known_faults
from hb_assets.lake.integrity.known_faults import Fault
from hb_assets.lake.recovery import GivenUp
from hb_assets.lake.storage import parquet
from hb_assets.lake.storage.layout import DAMAGED, HEARTBEATS, RAW, FragmentName
from hb_assets.lake.storage.store import Lake
from hb_assets.pipeline.audit import audit
from hb_assets.pipeline.coordination import coordinated

group = typer.Typer(no_args_is_help=True, help="Damaged files, and what was lost with them.")
app.add_typer(group, name="damaged")

File = Annotated[
    str, typer.Argument(metavar="FILE", help="A file as `list` names it, or its name alone.")
]


@dataclass(frozen=True, slots=True)
class _State:
    """A lake's damage, as `hb damaged list` shows it.

    `kept` are files under `damaged/` whose heartbeats nobody misses, or that were accepted as lost.
    """

    faults: list[Fault]
    accepted: list[Acceptance]
    kept: list[Path]
    unread: list[str]


def _state(lake: Lake) -> _State:
    faults = known_faults.faults(lake)
    unread: list[str] = []
    losses = [
        one for _, one in accepted_losses.standing(lake, lambda error: unread.append(str(error)))
    ]
    missed = {fault.path for fault in faults}
    aside = (path for path in sorted((lake.root / DAMAGED).rglob("*.parquet")))
    return _State(faults, losses, [path for path in aside if path not in missed], unread)


@group.command("list")
def list_files(context: typer.Context, as_json: AsJson = False) -> None:
    """What is damaged, missing or accepted as lost; exit code 1 while anything isn't resolved."""
    lake = existing_lake(settings_of(context))
    found = _state(lake)
    if as_json:
        output.print_json({"faults": found.faults, "accepted": found.accepted, "kept": found.kept})
    else:
        _show_state(lake, found)
    for line in found.unread:
        output.complain(line)
    if found.faults or found.unread:
        raise typer.Exit(FAILED)


def _show_state(lake: Lake, found: _State) -> None:
    for fault in found.faults:
        output.results.print(fault.message, markup=False, soft_wrap=True)
    for one in found.accepted:
        output.results.print(
            f"{lake.root / one.file}: {_many(one)} accepted as lost on "
            f"{_instant(one.accepted_ms)}: {one.reason or 'no reason given'}",
            markup=False,
            soft_wrap=True,
        )
    for path in found.kept:
        output.results.print(
            f"{path} is a damaged file that nobody misses: it may be deleted",
            markup=False,
            soft_wrap=True,
        )
    if not (found.faults or found.accepted or found.kept or found.unread):
        output.results.print(f"nothing of {lake.root} is damaged, as far as names and footers tell")


@group.command()
def show(context: typer.Context, file: File, as_json: AsJson = False) -> None:
    """What is known of one damaged or lost file."""
    lake = existing_lake(settings_of(context))
    path = _found(lake, file)
    state = _state(lake)
    where = str(_place(lake, path))
    name = FragmentName.parse(path.name)
    losses = [one for one in state.accepted if one.file == where]
    faults = [one for one in state.faults if one.path and str(_place(lake, one.path)) == where]
    about = {
        "file": path,
        "place": lake.root / where,
        "is_there": path.exists(),
        "verifies": _verifies(path),
        "rows": _rows(path),
        "first_entry": list(name.first) if name else None,
        "last_entry": list(name.last) if name else None,
        "faults": [one.message for one in faults],
        "accepted": losses,
    }
    if as_json:
        output.print_json(about)
        return
    for label, value in about.items():
        shown = "; ".join(map(str, value)) if isinstance(value, list) else value
        if label == "accepted":
            shown = "; ".join(f"{_many(one)}: {one.reason}" for one in losses)
        text = "unknown" if shown is None else shown
        output.results.print(f"{label}: {text}", markup=False, soft_wrap=True)


@group.command()
def restore(
    context: typer.Context,
    file: Annotated[
        str,
        typer.Argument(
            metavar="FILE", help="A whole copy, wherever it lies; or a mended file of `list`."
        ),
    ],
    as_json: AsJson = False,
) -> None:
    """Put a whole copy of a fragment or consolidated file back; it says itself where it belongs.

    It is verified before. An accepted loss is taken back, and its heartbeats count as new ones.
    """
    settings = settings_of(context)
    lake = existing_lake(settings)
    copy = Path(file) if Path(file).is_file() else _found(lake, file)
    with coordinated(lake, settings, start_server=False) as known:
        done = recovery.restore(lake, copy, settings, lock=known.lock)
    if as_json:
        output.print_json(done)
        return
    taken_back = ", its loss isn't accepted any more" if done.was_accepted else ""
    output.results.print(
        f"{done.path} is back with {done.rows:,} rows{taken_back}; hb consolidate takes in what is "
        "pending",
        markup=False,
        soft_wrap=True,
    )


@group.command()
def accept(
    context: typer.Context,
    file: File,
    reason: Annotated[str, typer.Option(help="Why, in your words; kept beside it.")] = "",
    delete: Annotated[
        bool, typer.Option("--delete", help="Delete the file under damaged/ as well.")
    ] = False,
    yes: Annotated[bool, typer.Option("--yes", help="Don't ask.")] = False,
    as_json: AsJson = False,
) -> None:
    """Accept that the heartbeats of a damaged or missing file are lost.

    Of a consolidated file what is sound of it is kept. `hb damaged restore` takes it back.
    """
    settings = settings_of(context)
    lake = existing_lake(settings)
    path = _found(lake, file)
    if not yes:
        typer.confirm(f"Give up the heartbeats that only {path} holds?", abort=True)
    with coordinated(lake, settings, start_server=False) as known:
        done = recovery.accept(
            lake,
            path,
            settings,
            reason=reason,
            shortfall=_shortfall(lake, settings),
            lock=known.lock,
            delete=delete,
        )
    if as_json:
        output.print_json(done)
    else:
        output.results.print(_accepted(lake, done), markup=False, soft_wrap=True)


def _accepted(lake: Lake, done: GivenUp) -> str:
    if done.acceptance is None:
        return "it was deleted; nothing is lost with it"
    kept = "" if done.kept is None else f"; {done.kept:,} rows of its day and shard are kept"
    file = lake.root / done.acceptance.file
    return f"{file}: {_many(done.acceptance)} are accepted as lost{kept}"


def _shortfall(lake: Lake, settings: Settings) -> Callable[[], int]:
    """A function that asks the ledger how many heartbeats are missing, known losses left out."""

    def ask() -> int:
        known = sum(one.rows or 0 for one in known_faults.faults(lake) if one.kind == "set_aside")
        with server.borrowed(settings), closing(connection.connect(settings)) as client:
            connection.ping(client)
            return max(0, audit(client, lake, settings).missing_at_most - known)

    return ask


def _found(lake: Lake, file: str) -> Path:
    """The file that an argument names: a path, a place in the lake, or a fragment's name.

    Raises:
        HbError: it names no file of the lake.
    """
    given = Path(file).absolute()
    if given.is_relative_to(lake.root):
        return _aside(lake, given)
    if (lake.root / file).exists() or file.startswith((f"{RAW}/", f"{HEARTBEATS}/")):
        return _aside(lake, lake.root / file)
    for path in _named(lake, file):
        return path
    raise HbError(f"{file} is no file of {lake.root}: `hb damaged list` names the damaged ones")


def _named(lake: Lake, name: str) -> Iterator[Path]:
    """Files with this name: among the damaged ones, among the missed ones, in raw."""
    if not FragmentName.is_one(name):
        return
    yield from sorted((lake.root / DAMAGED).rglob(name))
    known = [one.path for one in known_faults.faults(lake) if one.path is not None]
    yield from (path for path in known if path.name == name)
    losses = (one.file for _, one in accepted_losses.standing(lake, lambda _: None))
    yield from (lake.root / file for file in losses if Path(file).name == name)
    yield from sorted((lake.root / RAW).rglob(name))


def _aside(lake: Lake, path: Path) -> Path:
    """Path of a place's file; a fragment that was set aside lies under `damaged/`."""
    where = lake.root / DAMAGED / path.relative_to(lake.root)
    return where if not path.exists() and where.exists() else path


def _place(lake: Lake, path: Path) -> Path:
    where = path.relative_to(lake.root)
    return where.relative_to(DAMAGED) if where.parts[0] == DAMAGED else where


def _verifies(path: Path) -> bool:
    try:
        parquet.verify(path)
    except (DamagedFileError, OSError):
        return False
    return True


def _rows(path: Path) -> int | None:
    try:
        return int(parquet.footer(path).num_rows)
    except (DamagedFileError, OSError):
        return None


def _many(one: Acceptance) -> str:
    if one.rows is not None:
        return f"{one.rows:,} heartbeats"
    return f"an unknown number of heartbeats, at most {one.at_most or 0:,},"


def _instant(epoch_ms: int) -> str:
    moment = EPOCH + dt.timedelta(milliseconds=epoch_ms)
    return moment.isoformat(timespec="seconds").replace("+00:00", "Z")
