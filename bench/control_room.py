"""Dagster's overhead: what the control room costs, and whether age slows it.

    python -m bench.control_room            about 6 minutes
    python -m bench.control_room --quick    without `hb up`: loading, a run, ticks; 1 minute

Two installations, each in a temporary folder of its own: a new one, whose lake holds one day, and
an old one, whose lake holds a year, and whose Dagster has seen a month of ticks, reports and runs
(`ages`). CPU time is compared, since others use the machine as well; wall-clock seconds are
reported beside it.
"""

from __future__ import annotations

import argparse
import contextlib
import datetime as dt
import logging
import os
import shutil
import signal
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import dagster as dg
import psutil
from rich.console import Console

from bench import ages
from bench.servers import PATIENCE_SECONDS, ROOT
from bench.table import Report, Row, machine
from hb_assets.buffer import server
from hb_assets.buffer.server import free_port
from hb_assets.cli import state
from hb_assets.cli.dagster_api import ControlRoom
from hb_assets.core.settings import PACKAGE, Settings
from hb_assets.definitions import of
from hb_assets.defs.jobs import CONSOLIDATE_DAY
from hb_assets.defs.resources import Installation
from hb_assets.defs.sensors.drain import MOST_EVENTS

YEAR = 366
MONTH = 30
SENSORS = ("drain", "consolidation", "buffer")
"""Those that look at buffer and lake; `failed_runs` is told of runs by Dagster."""
FLAT = 1.5
"""How much more a tick may cost an old installation than a new one."""
_LOAD = "import resource\n{}\nused = resource.getrusage(resource.RUSAGE_SELF)\nprint(used.ru_utime + used.ru_stime)"
_OURS = (
    "import hb_assets.definitions as m; m.definitions().get_repository_def().load_all_definitions()"
)
NOTES = (
    (
        "ours is an installation with a lake of 366 days, 30 days of a report a minute, 1,200 runs, and "
        "as many ticks as are kept; the reference a new one, with a lake of one day"
    ),
    "before each tick something arrives, so that it finds a changed day",
)


@dataclass
class Room:
    """An installation with its Dagster, in this process."""

    settings: Settings
    instance: dg.DagsterInstance
    cursors: dict[str, str | None] = field(default_factory=dict)

    def __post_init__(self) -> None:
        self._definitions = of(self.settings)
        self._repository = self._definitions.get_repository_def()
        self._resources = {"installation": Installation(self.settings)}

    def tick(self, sensor: str) -> Any:
        """A tick as the daemon makes it, its cursor kept; what the sensor returned."""
        with dg.build_sensor_context(
            instance=self.instance,
            cursor=self.cursors.get(sensor),
            repository_def=self._repository,
            sensor_name=sensor,
            resources=self._resources,
        ) as context:
            found = self._repository.get_sensor_def(sensor).evaluate_tick(context)
        self.cursors[sensor] = found.cursor
        return found

    def run(self, day: dt.date) -> dg.ExecuteInProcessResult:
        """Run `consolidate_day` for a day."""
        job = self._definitions.resolve_job_def(CONSOLIDATE_DAY)
        return job.execute_in_process(partition_key=day.isoformat(), instance=self.instance)


@contextlib.contextmanager
def room(home: Path, lake_days: int) -> Iterator[Room]:
    """A room with a lake of so many days; what it has reported and run stands in its Dagster."""
    settings = Settings(home=home, drain_tick_seconds=1)
    settings.dagster_home.mkdir(parents=True)
    shutil.copyfile(PACKAGE / "dagster.yaml", settings.dagster_home / "dagster.yaml")
    with server.borrowed(settings):
        ages.lake_of(settings, lake_days)
        with dg.DagsterInstance.from_config(str(settings.dagster_home)) as instance:
            yield Room(settings, instance)


def report_all(one: Room) -> None:
    """Tick until every day is reported, as they are a minute after a start."""
    while reports := one.tick("drain").asset_events:
        for event in reports[:1]:
            one.instance.report_runless_asset_event(event)


def loading(repeats: int) -> list[Row]:
    """CPU time until the definitions are loaded, in a new process."""
    ours, dagster = [], []
    for _ in range(repeats):
        dagster.append(_cpu_of("import dagster"))
        ours.append(_cpu_of(_OURS))
    return [Row("definitions loaded, against `import dagster`, CPU", "s", ours, dagster, 2.5, True)]


def _cpu_of(program: str) -> float:
    with tempfile.TemporaryDirectory(prefix="hb-bench-") as home:
        done = subprocess.run(
            [sys.executable, "-c", _LOAD.format(program)],
            cwd=ROOT,
            env={**_environment(), "HB_HOME": home},
            check=True,
            capture_output=True,
            text=True,
        )
    return float(done.stdout)


def _environment() -> dict[str, str]:
    return {name: text for name, text in os.environ.items() if not name.startswith("HB_")}


def a_run(new: Room, repeats: int) -> list[Row]:
    """What a run of a day that is consolidated already costs, and how many events it writes."""
    seconds, events = [], []
    for _ in range(repeats):
        began = time.process_time()
        done = new.run(ages.TODAY)
        seconds.append(time.process_time() - began)
        events.append(float(len(new.instance.all_logs(done.run_id))))
    return [
        Row("run of a day that is done, in process, CPU", "s", seconds),
        Row("its events", "events", events, target=300, at_most=True),
    ]


def ticks(new: Room, old: Room, repeats: int) -> list[Row]:
    """CPU time of ticks in both, in turns; something arrives before each."""
    rows = []
    for sensor in SENSORS:
        first = [_tick_ms(one, sensor) for one in (old, new)]
        rows.append(Row(f"first tick of {sensor}, CPU", "ms", first[:1], first[1:]))
    for one in (new, old):
        report_all(one)
    for sensor in SENSORS:
        found: dict[str, list[float]] = {"new": [], "old": []}
        for _ in range(repeats):
            found["new"].append(_tick_ms(new, sensor))
            found["old"].append(_tick_ms(old, sensor))
        rows.append(Row(f"tick of {sensor}, CPU", "ms", found["old"], found["new"], FLAT, True))
    old.cursors.clear()  # so that it has all days to report
    events = [float(len(old.tick("drain").asset_events))]
    rows.append(
        Row(
            "reports of a tick that has a year to report",
            "events",
            events,
            target=MOST_EVENTS,
            at_most=True,
        )
    )
    return rows


def _tick_ms(one: Room, sensor: str) -> float:
    ages.append(one.settings, ages.TODAY, 1)
    began = time.process_time()
    one.tick(sensor)
    return (time.process_time() - began) * 1000


@dataclass(frozen=True, slots=True)
class Up:
    """A running `hb up`."""

    settings: Settings
    members: dict[str, psutil.Process]

    def cpu_seconds(self) -> float:
        """CPU time of Dagster's daemon and code server so far."""
        times = [self.members[name].cpu_times() for name in ("daemon", "code")]
        return float(sum(one.user + one.system for one in times))


@contextlib.contextmanager
def up(home: Path) -> Iterator[Up]:
    """`hb up` on a home of ours, for the time of the block, once all of it is ready."""
    ports = {"HB_GATEWAY_PORT": str(free_port()), "HB_DAGSTER_PORT": str(free_port())}
    settings = Settings(
        home=home,
        gateway_port=int(ports["HB_GATEWAY_PORT"]),
        dagster_port=int(ports["HB_DAGSTER_PORT"]),
    )
    log = home / "up.log"
    with log.open("ab") as out:
        child = subprocess.Popen(
            [sys.executable, "-m", "hb_assets", "up", "--no-sample"],
            cwd=ROOT,
            env={**_environment(), **ports, "HB_HOME": str(home)},
            stdin=subprocess.DEVNULL,
            stdout=out,
            stderr=out,
            start_new_session=True,
        )
    try:
        yield Up(settings, _members(child, settings, log))
    finally:
        child.send_signal(signal.SIGTERM)
        child.wait(PATIENCE_SECONDS)


def _members(
    child: subprocess.Popen[bytes], settings: Settings, log: Path
) -> dict[str, psutil.Process]:
    deadline = time.monotonic() + 2 * PATIENCE_SECONDS
    while True:
        running = state.running(settings)
        found = state.read(settings) if running else None
        if found is not None and found.phase == "running":
            return {
                one.name: psutil.Process(one.pid) for one in found.members if one.pid is not None
            }
        if child.poll() is not None or time.monotonic() > deadline:
            raise SystemExit(f"bench: hb up doesn't start:\n{log.read_text()[-2000:]}")
        time.sleep(0.2)


def launched(at: Up, repeats: int) -> list[Row]:
    """Seconds from launching a run of a day that is done to its first step, and to its end."""
    first, whole = [], []
    with (
        ControlRoom(f"http://127.0.0.1:{at.settings.dagster_port}") as dagster,
        dg.DagsterInstance.from_config(str(at.settings.dagster_home)) as instance,
    ):
        for _ in range(repeats):
            began = time.time()
            run_id = dagster.launch(ages.TODAY)
            while not all(run.ended for run in dagster.runs([run_id])):
                time.sleep(0.2)
            whole.append(time.time() - began)
            starts = instance.all_logs(run_id, of_type=dg.DagsterEventType.STEP_START)
            first.append(starts[0].timestamp - began)
    return [
        Row("a run, launched to first step", "s", first),
        Row("a run of a day that is done, launched to end", "s", whole),
    ]


def settle(at: Up) -> None:
    """Wait until each sensor has ticked twice since it was started."""
    began, deadline = time.time(), time.monotonic() + 2 * PATIENCE_SECONDS
    with dg.DagsterInstance.from_config(str(at.settings.dagster_home)) as instance:
        while time.monotonic() < deadline:
            ended = [
                tick
                for one in instance.all_instigator_state()
                if one.sensor_instigator_data
                for tick in instance.get_ticks(
                    one.instigator_origin_id, one.selector_id, after=began, limit=2
                )
                if tick.end_timestamp
            ]
            if len(ended) == 2 * len(ages.TICKS_KEPT):
                return
            time.sleep(1)
    raise SystemExit(f"bench: the sensors don't tick; see {at.settings.home}/up.log")


def ticking(at: Up, seconds: float) -> tuple[float, dict[str, list[float]]]:
    """CPU ms of daemon and code server per second, and the ticks' ms on the clock, by sensor."""
    began, used = time.time(), at.cpu_seconds()
    while time.time() < began + seconds:
        ages.append(at.settings, ages.TODAY, 1)
        time.sleep(1)
    busy = (at.cpu_seconds() - used) * 1000 / (time.time() - began)
    found = {}
    with dg.DagsterInstance.from_config(str(at.settings.dagster_home)) as instance:
        for one in instance.all_instigator_state():
            ticks = instance.get_ticks(
                one.instigator_origin_id, one.selector_id, after=began, limit=1000
            )
            found[one.instigator_name] = [
                (tick.end_timestamp - tick.timestamp) * 1000 for tick in ticks if tick.end_timestamp
            ]
    return busy, found


def running(
    new: Path, old: Path, cursors: Mapping[str, str | None], seconds: float, runs: int
) -> list[Row]:
    """What the daemon does with both installations, one after the other.

    Args:
        new: home of the new one.
        old: home of the old one.
        cursors: what the sensors of the old one know by now.
        seconds: how long to look at each.
        runs: how many to launch.
    """
    with up(old) as at:
        settle(at)
    ages.ticks_of(Settings(home=old).dagster_home, cursors)
    rows: list[Row] = []
    busy, found = {}, {}
    for name, home in (("new", new), ("old", old)):
        with up(home) as at:
            settle(at)
            busy[name], found[name] = ticking(at, seconds)
            if name == "new":
                rows += launched(at, runs)
    rows.append(
        Row("daemon and code server, CPU a second", "ms", [busy["old"]], [busy["new"]], FLAT, True)
    )
    for sensor in ("consolidation", "buffer", "failed_runs"):
        rows.append(
            Row(
                f"tick of {sensor}, by the daemon, on the clock",
                "ms",
                found["old"][sensor],
                found["new"][sensor],
            )
        )
    return rows


def measured(*, quick: bool, repeats: int = 7, say: Callable[[str], None] = print) -> list[Row]:
    """All rows."""
    rows = loading(3 if quick else 5)
    with contextlib.ExitStack() as stack:
        base = Path(stack.enter_context(tempfile.TemporaryDirectory(prefix="hb-bench-")))
        with contextlib.ExitStack() as rooms:
            say("making a new installation, and one with a year of days and a month of reports")
            new = rooms.enter_context(room(base / "new", 1))
            old = rooms.enter_context(room(base / "old", YEAR))
            for one in (new, old):
                for event in one.tick("drain").asset_events[:1]:
                    one.instance.report_runless_asset_event(event)
                one.run(ages.TODAY)
            ages.past_of(old.settings.dagster_home, MONTH)
            rows += a_run(new, 3)
            rows += ticks(new, old, repeats)
            report_all(old)
        if not quick:
            say("running `hb up` on both, one after the other")
            rows += running(base / "new", base / "old", old.cursors, 40, 3)
    return rows


def main(arguments: Sequence[str] | None = None) -> None:
    """Measure and print the table."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawTextHelpFormatter
    )
    parser.add_argument("--quick", action="store_true", help="without `hb up`")
    parser.add_argument("--json", action="store_true", help="the figures of every run, as JSON")
    chosen = parser.parse_args(arguments)
    logging.disable()
    progress = Console(stderr=True)
    report = Report(machine(Path(tempfile.gettempdir())), list(NOTES))
    report.rows = measured(quick=chosen.quick, say=progress.print)
    if chosen.json:
        print(report.json())
    else:
        report.show(Console(width=200 if not sys.stdout.isatty() else None))


if __name__ == "__main__":
    main()
