"""`hb keys`: create, list and revoke the API keys of the gateway."""

from __future__ import annotations

import datetime as dt
import sys
from typing import Annotated

import typer
from pydantic import TypeAdapter, ValidationError
from rich.text import Text

from hb_assets.cli import output
from hb_assets.cli.app import AsJson, app, settings_of, text_of
from hb_assets.core import record
from hb_assets.core.errors import HbError
from hb_assets.core.settings import PositiveDuration
from hb_assets.gateway.auth import keyring
from hb_assets.gateway.auth.keyring import ADMIN, NAME_MAX, READ, SCOPES, Key, ScopeName

group = typer.Typer(no_args_is_help=True, help="API keys of the gateway.")
app.add_typer(group, name="keys")

_LONGEST_DAYS = 36_500
_lifetime: TypeAdapter[dt.timedelta] = TypeAdapter(PositiveDuration)


@group.command()
def create(
    context: typer.Context,
    name: Annotated[str, typer.Argument(metavar="NAME", help="What you call it.")],
    scopes: Annotated[
        list[str],
        typer.Option(
            "--scope",
            metavar=f"[{'|'.join(SCOPES)}]",
            help="What it may do (admin: everything); may be given several times.",
        ),
    ],
    user: Annotated[
        str | None,
        typer.Option(help="With read: this user's readings only; - reads the user_id from stdin."),
    ] = None,
    expires: Annotated[
        str | None,
        typer.Option(metavar="AFTER", help="When it ends, like 90d or 12h; default: never."),
    ] = None,
    as_json: AsJson = False,
) -> None:
    """Make a key and print it, this once; only a hash of it is kept.

    From the first key on the gateway asks everybody for one.
    """
    settings = settings_of(context, agree=False)
    if not 0 < len(name) <= NAME_MAX or not name.isprintable():
        raise typer.BadParameter(f"1 to {NAME_MAX} printable characters", param_hint="NAME")
    may = _scopes(scopes)
    if user is not None and (READ not in may or ADMIN in may):
        raise typer.BadParameter("goes with --scope read, without admin", param_hint="--user")
    user_id = None if user is None else _user_id(user)
    lifetime = _lifetime_of(expires)
    first = keyring.read(keyring.path(settings)) is None
    key, token = keyring.create(settings, name, may, user_id=user_id, lifetime=lifetime)
    if as_json:
        output.print_json({**_described(key), "token": token})
        return
    until = "never expires" if key.expires is None else f"expires {_iso(key.expires)}"
    output.note(f"key {key.id} ({name}): {_may(key)}; {until}. It is shown only this once:")
    typer.echo(token)
    if first:
        output.note("from now on the gateway asks everybody for a key")


@group.command(name="list")
def list_(
    context: typer.Context,
    user: Annotated[
        str | None,
        typer.Option(help="Only keys for this user's readings; - reads the user_id from stdin."),
    ] = None,
    as_json: AsJson = False,
) -> None:
    """List keys by id and name. Secrets and user ids aren't kept, only hashes of them."""
    settings = settings_of(context, agree=False)
    keys = keyring.read(keyring.path(settings)) or ()
    if user is not None:
        user_id = _user_id(user)
        keys = tuple(key for key in keys if key.is_for(user_id))
    if as_json:
        output.print_json([_described(key) for key in keys])
    elif not keys:
        output.results.print("no keys")
    else:
        table = output.table("API keys (UTC)", "id", "may", "created", "expires", "name")
        now = dt.datetime.now(dt.UTC)
        for key in keys:
            until = "never" if key.expires is None else key.expires.date().isoformat()
            table.add_row(
                key.id,
                _may(key),
                key.created.date().isoformat(),
                "expired" if key.expired(now) else until,
                Text(key.name),
            )
        output.results.print(table)


@group.command()
def revoke(
    context: typer.Context,
    identifier: Annotated[str, typer.Argument(metavar="ID", help="Id as `list` prints it.")],
    as_json: AsJson = False,
) -> None:
    """End a key for good; running gateways refuse it within two seconds."""
    settings = settings_of(context, agree=False)
    if keyring.read(keyring.path(settings)) is None:
        raise HbError(f"there are no keys in {settings.home_dir}: check HB_HOME")
    key = keyring.revoke(settings, identifier)
    left = len(keyring.read(keyring.path(settings)) or ())
    if as_json:
        output.print_json({"revoked": key.id, "left": left})
        return
    output.results.print(f"revoked {key.id} ({key.name})", markup=False)
    if not left:
        output.note("that was the last key: gateways refuse everybody until there is another")


def _scopes(given: list[str]) -> list[ScopeName]:
    known: dict[str, ScopeName] = {name: name for name in SCOPES}
    if not known.keys() >= set(given):
        raise typer.BadParameter(f"each is one of {', '.join(SCOPES)}", param_hint="--scope")
    return [known[name] for name in given]


def _user_id(given: str) -> str:
    user_id = text_of(sys.stdin.readline().rstrip("\n") if given == "-" else given, "--user")
    shortest, longest = record.ID_LENGTH
    if not shortest <= len(user_id) <= longest:
        raise typer.BadParameter(f"{shortest} to {longest} characters", param_hint="--user")
    return user_id


def _lifetime_of(expires: str | None) -> dt.timedelta | None:
    if expires is None:
        return None
    try:
        lifetime = _lifetime.validate_python(expires)
    except ValidationError:
        raise typer.BadParameter(
            "not a duration like 12h or 90d, above 0", param_hint="--expires"
        ) from None
    if not dt.timedelta(seconds=1) <= lifetime <= dt.timedelta(days=_LONGEST_DAYS):
        raise typer.BadParameter(f"1s to {_LONGEST_DAYS}d", param_hint="--expires")
    return lifetime


def _may(key: Key) -> str:
    return ", ".join(f"{one} (one user)" if one == READ and key.user else one for one in key.scopes)


def _described(key: Key) -> dict[str, object]:
    return {
        "id": key.id,
        "name": key.name,
        "scopes": key.scopes,
        "one_user": key.user is not None,
        "created": key.created,
        "expires": key.expires,
        "expired": key.expired(dt.datetime.now(dt.UTC)),
    }


def _iso(moment: dt.datetime) -> str:
    return moment.isoformat(timespec="seconds").replace("+00:00", "Z")
