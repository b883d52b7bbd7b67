"""`hb sensors`: which of Dagster's sensors tick; start and stop them."""

from __future__ import annotations

import time
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from typing import Annotated

import typer

from hb_assets.cli import output, state
from hb_assets.cli.app import AsJson, app, settings_of
from hb_assets.cli.dagster_api import ControlRoom, Sensor
from hb_assets.core.errors import HbError

sensors = typer.Typer(no_args_is_help=True, help="Dagster's sensors: list, start and stop them.")
app.add_typer(sensors, name="sensors")

Names = Annotated[
    list[str], typer.Argument(help="Names of sensors, as `hb sensors list` has them.")
]


@sensors.command(name="list")
def list_(context: typer.Context, as_json: AsJson = False) -> None:
    """Show every sensor, whether it runs, and when it ticked last."""
    with _room(context) as room:
        found = room.sensors()
    if as_json:
        shown = [{"name": one.name, "running": one.running, "ticked": one.ticked} for one in found]
        output.print_json(shown)
        return
    table = output.table("Sensors", "sensor", "state", "last tick")
    for one in found:
        ticked = f"{output.duration(time.time() - one.ticked)} ago" if one.ticked else "-"
        table.add_row(one.name, "running" if one.running else "stopped", ticked)
    output.results.print(table)


@sensors.command()
def start(context: typer.Context, names: Names) -> None:
    """Start sensors."""
    with _room(context) as room:
        for one in _named(names, room.sensors()):
            room.start_sensor(one)
            output.results.print(f"{one.name} runs")


@sensors.command()
def stop(context: typer.Context, names: Names) -> None:
    """Stop sensors; they stay stopped, with an alarm, until `hb sensors start`."""
    with _room(context) as room:
        for one in _named(names, room.sensors()):
            room.stop_sensor(one)
            output.results.print(f"{one.name} is stopped, until `hb sensors start {one.name}`")


@contextmanager
def _room(context: typer.Context) -> Iterator[ControlRoom]:
    settings = settings_of(context)
    up = state.running(settings)
    if up is None:
        raise HbError(
            f"no `hb up` runs on {settings.home_dir}, so that no sensor ticks: start it first"
        )
    with ControlRoom(up.dagster) as room:
        yield room


def _named(names: Sequence[str], found: Sequence[Sensor]) -> list[Sensor]:
    by_name = {one.name: one for one in found}
    for name in names:
        if name not in by_name:
            raise HbError(f"no sensor is called {name!r}; there are {', '.join(by_name)}")
    return [by_name[name] for name in names]
