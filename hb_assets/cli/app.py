"""The typer app that all commands share: its `--json` option, settings, and how errors end.

A command module registers itself, and each of its commands stands in `COMMANDS`:

    @app.command()
    def audit(context: typer.Context, as_json: AsJson = False) -> None:
        "Reconcile every day."
        settings = settings_of(context)
        ...
        raise typer.Exit(FAILED)

Exit codes: 0 done; 1 done, but the result is bad news (it doesn't add up, a run failed); 2 could
not be done (one line on stderr says why); 130 ended by Ctrl-C.
"""

from __future__ import annotations

import errno
import importlib
import traceback
from collections.abc import Sequence
from typing import TYPE_CHECKING, Annotated, Any

import typer
from typer.core import TyperGroup

from hb_assets import __version__
from hb_assets.core.errors import HbError, SettingsError

if TYPE_CHECKING:
    import datetime as dt

    from hb_assets.core.settings import Settings
    from hb_assets.lake.storage.store import Lake

COMMANDS = {
    "up": ("up", "Start everything: buffer, gateway, Dagster. One Ctrl-C ends all of it."),
    "down": ("up", "End the running `hb up` and wait until everything of it is gone."),
    "serve": (
        "serve",
        "Serve the HTTP gateway alone, until Ctrl-C; `hb up` runs it together with all the rest.",
    ),
    "import": (
        "importing",
        "Bring files into the buffer, the way any heartbeat goes; importing twice changes nothing.",
    ),
    "drain": ("drain", "Bring heartbeats from the buffer into durable fragments of the lake."),
    "consolidate": (
        "consolidate",
        "Deduplicate and sort days into consolidated files, check them, and make their minutes.",
    ),
    "query": (
        "query",
        "Heart rate of one user over time, out of everything that is durable in the lake.",
    ),
    "audit": (
        "audit",
        "Reconcile the buffer and every day of the lake; exit code 1 when it doesn't add up.",
    ),
    "prune": (
        "prune",
        "Delete raw fragments that are consolidated and older than HB_RAW_KEEP, and leftovers.",
    ),
    "forget": (
        "forget",
        "Erase all heartbeats of a user that have arrived by now; nothing brings them back.",
    ),
    "status": (
        "status",
        "Show members, buffer, lake and alarms. Exit code 1 when there is an alarm.",
    ),
    "backfill": (
        "backfill",
        "Consolidate every day from FIRST to LAST that the lake holds, by Dagster, and wait for it.",
    ),
    "keys": ("keys", "API keys of the gateway."),
    "quarantine": ("quarantine", "Records that couldn't be used."),
    "damaged": ("damaged", "Damaged files, and what was lost with them."),
    "sensors": ("sensors", "Dagster's sensors: list, start and stop them."),
}
"""Commands in the order of `hb --help`: the module of this package that has it, and what it does.

One command's module is imported to run it, and none for the list of all: importing takes seconds.
"""

FAILED = 1
REFUSED = 2
INTERRUPTED = 130

AsJson = Annotated[bool, typer.Option("--json", help="Print the result as JSON on stdout.")]


class _Group(TyperGroup):
    """Ends every command alike: one line on stderr for what a user can mend, never a trace."""

    def invoke(self, ctx: Any) -> Any:
        try:
            return super().invoke(ctx)
        except HbError as error:
            _complain(str(error))
            raise typer.Exit(REFUSED) from None
        except KeyboardInterrupt:
            raise typer.Exit(INTERRUPTED) from None
        except OSError as error:
            if error.errno == errno.EPIPE:
                raise  # the reader of our output went away; typer ends quietly
            _complain(error)
            raise typer.Exit(REFUSED) from None
        except (typer.Exit, typer.Abort, typer.TyperException):
            raise
        except Exception as error:
            if _debugging(ctx):
                raise
            # an unforeseen message may quote a heartbeat: where it happened has to do
            last = traceback.extract_tb(error.__traceback__)[-1]
            _complain(
                f"unexpected {type(error).__name__} in {last.filename}:{last.lineno}; this is a "
                "bug, HB_LOG_LEVEL=debug shows its trace"
            )
            raise typer.Exit(REFUSED) from None


def _complain(about: str | OSError) -> None:
    from hb_assets.cli import output

    output.complain(about if isinstance(about, str) else output.line(about))


def _debugging(context: typer.Context) -> bool:
    settings: Settings | None = context.find_root().obj
    return settings is not None and settings.log_level == "debug"


app = typer.Typer(
    name="hb",
    cls=_Group,
    no_args_is_help=True,
    add_completion=False,
    pretty_exceptions_enable=False,
    help="Heart-rate heartbeats: from HTTP through Redis Streams to checked daily Parquet.",
)


def _show_version(wanted: bool) -> None:
    if wanted:
        typer.echo(f"hb_assets {__version__}")
        raise typer.Exit


@app.callback()
def _hb(
    version: Annotated[
        bool,
        typer.Option("--version", callback=_show_version, is_eager=True, help="Show the version."),
    ] = False,
) -> None:
    pass


def settings_of(context: typer.Context, *, agree: bool = True) -> Settings:
    """Settings of this process, loaded once.

    Args:
        context: the command's context.
        agree: refuse settings that differ from the running `hb up` in what all processes of one
            installation must agree on (HB_START_DATE, HB_SHARDS, HB_LAKE, HB_REDIS_URL).

    Raises:
        SettingsError: a value can't be used, or differs from that of the running `hb up`.
    """
    from hb_assets.cli import output
    from hb_assets.core import settings as loading

    root = context.find_root()
    if root.obj is None:
        for name, like in loading.unknown().items():
            meant = f": is {like} meant?" if like else "; docs/settings.md lists them"
            output.note(f"warning: {name} is no setting{meant}", style="yellow")
        root.obj = loading.load()
    settings: Settings = root.obj
    if agree:
        _agree(settings)
    return settings


def _agree(settings: Settings) -> None:
    from hb_assets.cli import state

    up = state.running(settings)
    if up is None:
        return
    theirs = {"HB_START_DATE": up.start_date, "HB_SHARDS": up.shards, "HB_LAKE": up.lake}
    ours = {
        "HB_START_DATE": settings.start_date,
        "HB_SHARDS": settings.shards,
        "HB_LAKE": str(settings.lake_dir),
    }
    differing = [
        f"{name} is {ours[name]} here and {theirs[name]} there"
        for name in ours
        if ours[name] != theirs[name]
    ]
    if up.redis != state.redis_digest(settings):
        differing.append("HB_REDIS_URL is another one")
    if differing:
        raise SettingsError(
            f"`hb up` (pid {up.pid}) runs on this HB_HOME with other settings: "
            + "; ".join(differing)
            + "; use the same in both terminals"
        )


def existing_lake(settings: Settings) -> Lake:
    """Open the lake for a command that needs one: neither lake nor home is created.

    Raises:
        SettingsError: HB_HOME or the lake isn't there.
        HbError: the lake can't be used, as `Lake.open`.
    """
    from hb_assets.lake.storage.store import Lake

    if not settings.home_dir.is_dir():
        raise SettingsError(
            f"there is no HB_HOME at {settings.home_dir}: check HB_HOME; `hb up`, `hb serve`, "
            "`hb import` and `hb drain` make one"
        )
    return Lake.open(settings, create=False)


def day_of(text: str, hint: str | None = None) -> dt.date:
    """The day that an argument names. Raises typer.BadParameter."""
    from hb_assets.core.days import parse_day

    try:
        return parse_day(text)
    except ValueError:
        raise typer.BadParameter(f"not a day like 2025-01-15: {text!r}", param_hint=hint) from None


def text_of(text: str, hint: str) -> str:
    """An argument that is compared with ids. Raises typer.BadParameter where it isn't UTF-8."""
    try:
        text.encode()
    except UnicodeEncodeError:
        raise typer.BadParameter("must be UTF-8", param_hint=hint) from None
    return text


def load_commands() -> typer.Typer:
    """The app with all its commands."""
    for module, _ in COMMANDS.values():
        importlib.import_module(f"hb_assets.cli.{module}")
    return app


def run(arguments: Sequence[str]) -> None:
    """Run the command that these arguments name, and exit; import no other."""
    wanted = arguments[0] if arguments else ""  # an option of `hb` itself runs no command
    if wanted in COMMANDS:
        importlib.import_module(f"hb_assets.cli.{COMMANDS[wanted][0]}")
    else:
        for name, (_, purpose) in COMMANDS.items():
            app.command(name, help=purpose)(_only_listed)
    app(arguments)


def _only_listed() -> None:
    """Placeholder for a command that is only listed."""
