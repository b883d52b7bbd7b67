"""`make chaos`: one run, from an empty HB_HOME to the verdict.

Options, the order of the phases, and their share of the time:

    1. bare    server, gateways, drainers and consolidators, killed at named points and at random
    2. hb up   the same HB_HOME under its supervisor, Dagster included; members killed at random
               (not with --short)
    3. settled everything started once more, drained, consolidated, audited, and checked

The seed decides which fault follows which, and where; when a process gets there, the machine does.
"""

from __future__ import annotations

import argparse
import json
import random
import shutil
import signal
import subprocess
import sys
import tempfile
import time
from collections import Counter
from collections.abc import Mapping
from contextlib import ExitStack
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from rich.console import Console

from chaos import checker, surprises
from chaos.buffer_server import BufferServer
from chaos.damaging import COPIES
from chaos.director import MIN_IDLE, Bare, Up, kills
from chaos.load import Client
from chaos.members import ROOT, Faults, environment
from chaos.proxy import Proxy
from chaos.report import Report
from hb_assets.buffer import server
from hb_assets.buffer.server import free_port
from hb_assets.core import days
from hb_assets.core.settings import Settings

CLIENTS = 8
SHARDS = 4
_SENT, _BARE, _UP = 0.5, 0.66, 0.86
"""Shares of the time: when the load should be through, and when the phases end at the latest."""
_UP_KILLS = 12
_SPOOL_SECONDS = 60
_notes = Console(stderr=True, highlight=False)


@dataclass(frozen=True, slots=True)
class Demand:
    """What a run has to reach, within `minutes`."""

    minutes: float
    kills: int
    heartbeats: int
    up: bool
    crew: Mapping[str, int]

    def seconds(self, share: float) -> float:
        """Seconds after which this share of the time is over."""
        return 60 * self.minutes * share


_FULL_CREW = {"gateway": 2, "drain": 3, "consolidate": 2, "prune": 1, "damaged": 1}
_SHORT_CREW = {"gateway": 1, "drain": 2, "consolidate": 1, "prune": 1, "damaged": 1}
FULL = Demand(minutes=14, kills=200, heartbeats=2_000_000, up=True, crew=_FULL_CREW)
SHORT = Demand(minutes=1.7, kills=20, heartbeats=50_000, up=False, crew=_SHORT_CREW)


class Run:
    """One run in an empty HB_HOME."""

    def __init__(self, home: Path, demand: Demand, seed: int) -> None:
        self._home, self._demand = home, demand
        self._began = time.monotonic()
        self._chance = random.Random(seed)
        self._faults: Faults = Counter()
        self._report = Report(seed)
        today = days.start_ms(days.day_of(time.time_ns() // 1_000_000))
        self._start_ms = today - 2 * days.MS_PER_DAY
        self._clients: list[Client] = []
        self._common: dict[str, object] = {
            "home": home,
            "shards": SHARDS,
            "claim_min_idle": f"{MIN_IDLE:g}s",
            "redis_timeout": "2s",
            "drain_poll": "300ms",
            "duckdb_memory": "256MiB",
            "duckdb_threads": 1,
            "raw_keep": "5s",
            "temp_keep": "10s",
            "log_level": "warning",
        }
        self._plain = environment(
            **self._common, gateway_port=free_port(), dagster_port=free_port()
        )

    def run(self) -> Report:
        """Do everything; the report says whether it went well."""
        with ExitStack() as stack:
            settings = Settings(home=self._home)
            to_server = _proxy(stack, str(settings.run_dir / "redis.sock"))
            to_gateways = [_proxy(stack, free_port()) for _ in range(self._demand.crew["gateway"])]
            buffer = BufferServer(settings, to_server)
            buffer.start()
            stack.callback(buffer.end)
            self._start_clients(stack, to_gateways)
            self._bare(buffer, to_server, to_gateways)
            buffer.end()
            if self._demand.up:
                self._up(stack, to_gateways)
            for client in self._clients:
                client.ending.set()
            for client in self._clients:
                client.join()
            dropped = to_server.dropped + sum(proxy.dropped for proxy in to_gateways)
        self._tell("settling")
        self._settle()
        self._account(dropped, buffer.cut_bytes)
        return self._report

    def _start_clients(self, stack: ExitStack, to_gateways: list[Proxy]) -> None:
        rate = self._demand.heartbeats / self._demand.seconds(_SENT) / CLIENTS
        for number in range(CLIENTS):
            # one gateway each: only its own answers tell a client what was stored before what
            port = to_gateways[number % len(to_gateways)].port
            client = Client(number, port, rate, self._start_ms)
            client.start()
            stack.callback(client.ending.set)
            self._clients.append(client)

    def _bare(self, buffer: BufferServer, to_server: Proxy, to_gateways: list[Proxy]) -> None:
        self._tell("bare phase")
        # locks only save work, so that nothing may depend on them
        redis_url = f"redis://127.0.0.1:{to_server.port}"
        hb = environment(**self._common, redis_url=redis_url, locks="none")
        logs = self._home / "logs"
        bare = Bare(
            self._demand.crew, hb, logs, buffer, to_server, to_gateways, self._chance, self._faults
        )
        wanted = self._demand.kills - (_UP_KILLS if self._demand.up else 0)
        share = 0.8 if self._demand.up else 1.0
        bare.run(
            lambda: (
                self._over(_BARE)
                or (not bare.unmet and self._reached(wanted, int(share * self._demand.heartbeats)))
            )
        )
        self._report.surprises += bare.surprises
        if self._demand.up:
            self._report.shortfalls += [f"nothing was killed at {key}" for key in bare.unmet]

    def _up(self, stack: ExitStack, to_gateways: list[Proxy]) -> None:
        self._tell("hb up")
        up = Up(self._plain, self._home / "logs", self._chance, self._faults)
        stack.callback(up.end)
        up.wait(120)
        for proxy in to_gateways:
            proxy.upstream = int(self._plain["HB_GATEWAY_PORT"])
        up.run(
            lambda: (
                self._over(_UP)
                or (up.unmet == [] and self._reached(self._demand.kills, self._demand.heartbeats))
            )
        )

    def _over(self, share: float) -> bool:
        return time.monotonic() - self._began >= self._demand.seconds(share)

    def _reached(self, wanted: int, heartbeats: int) -> bool:
        return kills(self._faults) >= wanted and self._acknowledged >= heartbeats

    @property
    def _acknowledged(self) -> int:
        return sum(client.acknowledged for client in self._clients)

    def _tell(self, phase: str) -> None:
        _notes.print(
            f"{time.monotonic() - self._began:5.0f} s  {phase} "
            f"({kills(self._faults)} kills, {self._acknowledged:,} heartbeats acknowledged so far)"
        )

    def _settle(self) -> None:
        """Bring everything into consolidated files, as an operator would; ask for the audit."""
        self._empty_spool()
        self._hb("drain", "--until-empty")
        for copy in sorted((self._home / COPIES).glob("*.parquet")):
            self._hb("damaged", "restore", str(copy))
        self._hb("consolidate", "--all")
        verdict = self._hb("audit", "--deep")
        report = self._report
        if verdict:
            report.adds_up = bool(verdict["adds_up"])
            report.differences = list(verdict["audit"]["differences"])
            report.quarantined = int(verdict["audit"]["quarantined"])
            report.replayed = sum(int(day["replayed"]) for day in verdict["audit"]["days"])

    def _empty_spool(self) -> None:
        """Let a gateway bring to Redis what was accepted while it was away."""
        settings = Settings(home=self._home)
        with (
            server.borrowed(settings),
            (self._home / "logs" / "chaos-settling.log").open("wb") as log,
        ):
            gateway = subprocess.Popen(
                [sys.executable, "-m", "hb_assets", "serve"],
                env=self._plain,
                cwd=ROOT,
                stdin=subprocess.DEVNULL,
                stdout=log,
                stderr=log,
            )
            deadline = time.monotonic() + _SPOOL_SECONDS
            while time.monotonic() < deadline:
                spool = self._hb("status").get("spool")
                if spool is None or not spool["heartbeats"]:
                    break
            else:
                self._report.surprises.append(f"the spool isn't empty after {_SPOOL_SECONDS} s")
            gateway.terminate()
            gateway.wait()

    def _hb(self, *arguments: str) -> Any:
        done = subprocess.run(
            [sys.executable, "-m", "hb_assets", *arguments, "--json"],
            env=self._plain,
            cwd=ROOT,
            capture_output=True,
            text=True,
            check=False,
        )
        if done.returncode and arguments != ("status",):  # which has alarms to tell of
            said = f"ended with {done.returncode}: {done.stderr.strip()}"
            self._report.surprises.append(f"hb {' '.join(arguments)} {said}")
        return json.loads(done.stdout) if done.stdout else {}

    def _account(self, dropped: int, cut_bytes: int) -> None:
        report = self._report
        sent = [client.sent for client in self._clients]
        report.lake = checker.check(self._home / "lake", sent, self._start_ms)
        report.kills = kills(self._faults)
        for (process, what), count in self._faults.items():
            report.faults.setdefault(process, {})[what] = count
        report.dropped_answers, report.cut_bytes = dropped, cut_bytes
        report.sent = sum(client.attempted for client in self._clients)
        report.attempts = dict(sum((one.answers for one in self._clients), Counter[str]()))
        report.refused = dict(sum((one.refused for one in self._clients), Counter[str]()))
        report.surprises += surprises.of_logs(self._home / "logs")
        for name, found, wanted in (
            ("kills", report.kills, self._demand.kills),
            ("acknowledged heartbeats", report.lake.acknowledged, self._demand.heartbeats),
        ):
            if found < wanted:
                report.shortfalls.append(
                    f"{found:,} {name}, {wanted:,} were demanded: give it more --minutes"
                )
        report.seconds = time.monotonic() - self._began


def _proxy(stack: ExitStack, upstream: str | int) -> Proxy:
    proxy = Proxy(upstream)
    stack.callback(proxy.close)
    return proxy


def main() -> int:
    """Parse options, run, report. Returns the exit code."""
    parser = argparse.ArgumentParser(
        prog="make chaos ARGS=...", description="Kill everything, lose nothing."
    )
    parser.add_argument("--short", action="store_true", help="what CI runs: bare phase only")
    parser.add_argument("--seed", type=int, default=None, help="default: another one each time")
    parser.add_argument("--minutes", type=float, help="time limit")
    parser.add_argument("--kills", type=int, help="least number of kills")
    parser.add_argument("--heartbeats", type=int, help="least number of acknowledged heartbeats")
    parser.add_argument("--json", action="store_true", help="print the report as JSON")
    parser.add_argument("--keep", action="store_true", help="keep HB_HOME even when all is well")
    options = parser.parse_args()
    base = SHORT if options.short else FULL
    demand = Demand(
        minutes=options.minutes or base.minutes,
        kills=base.kills if options.kills is None else options.kills,
        heartbeats=base.heartbeats if options.heartbeats is None else options.heartbeats,
        up=base.up,
        crew=base.crew,
    )
    seed = random.SystemRandom().randrange(10**6) if options.seed is None else options.seed
    home = Path(tempfile.mkdtemp(prefix="hb-chaos-"))
    for number in (signal.SIGINT, signal.SIGTERM):  # also in the background, where the shell
        signal.signal(number, signal.default_int_handler)  # has SIGINT ignored
    try:
        report = Run(home, demand, seed).run()
    except KeyboardInterrupt:
        _notes.print(f"stopped; everything is left in {home}")
        return 130
    if options.json:
        print(report.json())
    else:
        report.show(Console(highlight=False))
    if report.good and not options.keep:
        shutil.rmtree(home)
    else:
        _notes.print(f"everything is left in {home}")
    return 0 if report.good else 1


if __name__ == "__main__":
    sys.exit(main())
