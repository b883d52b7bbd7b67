"""`hb up`: everything in the foreground, under supervision; `hb down` ends it from elsewhere.

The order of things: check, start, wait, send the sample, stay, end. Each is done by a module beside
this one.
"""

from __future__ import annotations

import os
import signal
import threading
import time
from collections.abc import Callable, Iterator
from contextlib import ExitStack, contextmanager
from typing import Annotated

import msgspec
import typer

from hb_assets.cli import members, output, preflight, state
from hb_assets.cli.app import FAILED, INTERRUPTED, AsJson, app, settings_of
from hb_assets.cli.dagster_api import ControlRoom, room_of
from hb_assets.cli.interrupts import Interrupts
from hb_assets.cli.members import Member
from hb_assets.cli.state import MemberState, UpState
from hb_assets.cli.supervision import Supervisor
from hb_assets.core.errors import HbError
from hb_assets.core.processes import Identity
from hb_assets.core.settings import Settings

_START_SECONDS = 120.0
_FAILED_STARTS = 3
_POLL_SECONDS = 0.1
_DOWN_SECONDS = 120.0


@app.command()
def up(
    context: typer.Context,
    once: Annotated[bool, typer.Option("--once", help="End after the sample.")] = False,
    no_sample: Annotated[bool, typer.Option("--no-sample", help="Send no sample.")] = False,
    as_json: AsJson = False,
) -> None:
    """Start everything: buffer, gateway, Dagster. One Ctrl-C ends all of it.

    Sends a sample first and shows what became of it. With --once it ends there: exit code 0 only
    when the sample adds up.
    """
    settings = settings_of(context, agree=False)
    code = 0
    with Interrupts() as interrupts:
        staying = False
        try:
            with _everything(settings, interrupts) as (supervisor, room):
                gateway, dagster = members.gateway_url(settings), room_of(settings)
                if no_sample:
                    if as_json:
                        output.print_json({"gateway": gateway, "dagster": dagster})
                else:
                    code = _sample(settings, supervisor, room, as_json=as_json)
                if not once:
                    if no_sample:
                        output.note(f"gateway {gateway}   Dagster {dagster}", style="bold")
                    output.note("everything runs, until Ctrl-C")
                    staying = True
                    while True:
                        supervisor.check()
                        time.sleep(_POLL_SECONDS)
        except KeyboardInterrupt:
            code = 0 if staying else INTERRUPTED
    raise typer.Exit(code)


@app.command()
def down(context: typer.Context, as_json: AsJson = False) -> None:
    """End the running `hb up` and wait until everything of it is gone."""
    settings = settings_of(context, agree=False)
    running = state.running(settings)
    if running is not None:
        os.kill(running.pid, signal.SIGTERM)
        deadline = time.monotonic() + _DOWN_SECONDS
        while running.identity.lives():
            if time.monotonic() > deadline:
                raise HbError(
                    f"`hb up` (pid {running.pid}) hasn't ended within {_DOWN_SECONDS:.0f} s"
                )
            time.sleep(_POLL_SECONDS)
    if as_json:
        output.print_json({"ended": running.pid if running is not None else None})
    elif running is not None:
        output.results.print(f"ended `hb up` (pid {running.pid}) and its members")
    else:
        output.results.print(f"no `hb up` runs on {settings.home_dir}")


@contextmanager
def _everything(
    settings: Settings, interrupts: Interrupts
) -> Iterator[tuple[Supervisor, ControlRoom]]:
    """Context with all members started and ready; all of them have ended after it."""
    preflight.make_home(settings)
    with ExitStack() as stack:
        stack.enter_context(preflight.only_one(settings))
        preflight.check_access(settings)
        preflight.check_ports(settings)
        preflight.check_redis(settings)
        preflight.check_lake(settings)
        room = stack.enter_context(ControlRoom(room_of(settings)))
        stages = members.stages(settings, room)
        notebook = _Notebook(settings)
        supervisor = Supervisor(
            settings,
            {member.name: member.argv for stage in stages for member in stage},
            members.members_environment(settings),
            notebook.change,
        )
        try:
            with interrupts.held_back():
                supervisor.launch()
            _wait("supervisord", supervisor.answers, supervisor, interrupts)
            for stage in stages:
                _start(stage, supervisor, interrupts)
            notebook.phase("running")
            yield supervisor, room
        finally:
            with interrupts.held_back():
                output.note("ending everything ...")
                notebook.phase("ending")
                supervisor.end(lambda: interrupts.urgent)
                notebook.close()
                output.note("everything has ended")


class _Notebook:
    """Keeps the state file up to date; we and the supervisor's watcher thread both write it."""

    def __init__(self, settings: Settings) -> None:
        self._settings = settings
        self._lock = threading.Lock()
        self._up = UpState(
            identity=Identity.of(os.getpid()),
            start_date=settings.start_date,
            shards=settings.shards,
            gateway=members.gateway_url(settings),
            dagster=room_of(settings),
            phase="starting",
            lake=str(settings.lake_dir),
            redis=state.redis_digest(settings),
        )
        state.write(settings, self._up)

    def phase(self, name: str) -> None:
        self._write(phase=name)

    def change(self, states: tuple[MemberState, ...], processes: tuple[Identity, ...]) -> None:
        self._write(members=states, processes=processes)

    def close(self) -> None:
        with self._lock:
            state.path(self._settings).unlink(missing_ok=True)

    def _write(self, **changes: object) -> None:
        with self._lock:
            self._up = msgspec.structs.replace(self._up, **changes)
            state.write(self._settings, self._up)


def _start(stage: list[Member], supervisor: Supervisor, interrupts: Interrupts) -> None:
    """Start the members of a stage side by side and wait until each is ready."""
    began = time.monotonic()
    for member in stage:
        supervisor.start(member.name)
    for member in stage:
        _wait(member.name, member.ready, supervisor, interrupts)
        output.note(f"{member.name} is ready ({time.monotonic() - began:.1f} s)")


def _wait(
    name: str, ready: Callable[[], bool], supervisor: Supervisor, interrupts: Interrupts
) -> None:
    deadline = time.monotonic() + _START_SECONDS
    while True:
        with interrupts.held_back():  # it would leave a connection half made
            if ready():
                return
        supervisor.check()
        if supervisor.restarts(name) >= _FAILED_STARTS or time.monotonic() > deadline:
            raise HbError(f"{name} doesn't come up; its log says why: {supervisor.log(name)}")
        time.sleep(_POLL_SECONDS)


def _sample(settings: Settings, supervisor: Supervisor, room: ControlRoom, *, as_json: bool) -> int:
    from hb_assets.cli import sample

    try:
        result = sample.run(settings, room, members.gateway_url(settings), room_of(settings))
    except HbError:
        supervisor.check()  # when supervisord is gone, that is what there is to say
        raise
    if as_json:
        output.print_json(result)
    else:
        output.results.print(sample.table(result))
        if result.adds_up:
            output.results.print("it all adds up", style="bold green")
        output.results.print(f"gateway  {result.gateway}\nDagster  {result.dagster}")
    for difference in result.differences:
        output.complain(f"it doesn't add up: {difference}")
    return 0 if result.adds_up else FAILED
