"""The director: chooses which fault comes next, in the bare phase and under `hb up`.

It runs the processes of each phase, and chooses faults from one seeded source of randomness.
`members`, `buffer_server` and `proxy` inject them.
"""

from __future__ import annotations

import json
import os
import random
import signal
import subprocess
import sys
import time
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

from chaos import points
from chaos.buffer_server import BufferServer
from chaos.members import RANDOM, ROOT, Fate, Faults, Member
from chaos.points import Point
from chaos.proxy import Proxy

BARE: Mapping[str, tuple[str, ...]] = {
    "gateway": ("serve",),
    "drain": ("drain", "--follow"),
    "consolidate": ("consolidate", "--pending"),
    "prune": ("prune",),
    "damaged": ("damaging",),
}
"""Processes of the bare phase, and the arguments of `hb`."""
UP = ("redis", "gateway", "code", "daemon")
"""Members of `hb up` that are killed there (the webserver only shows things)."""
MIN_IDLE = 2.0
"""HB_CLAIM_MIN_IDLE in seconds. Too short on purpose: entries are taken from the living, too."""
_PAUSE = 2.5 * MIN_IDLE
_HITS = {"gateway": 20, "drain": 3, "consolidate": 2, "prune": 2, "damaged": 1}
"""How many-th hit of its point a process meets its fate at, on average, once it was met there."""
_UP_PACE = 6.0
_PACE = 2.5
"""Mean seconds between two faults at random moments."""
_ARMED = 0.85
_PAUSED = 0.2
_LOOK_SECONDS = 0.05


def kills(faults: Faults) -> int:
    """How many of the faults were a kill -9."""
    return sum(count for (_, what), count in faults.items() if what.startswith("killed"))


class Bare:
    """The bare phase: server, gateways, drainers and consolidators as processes of the harness.

    Args:
        crew: how many there are of each process.
        environment: of every `hb`, with HB_REDIS_URL of the proxy before the server.
        logs: folder of their logs.
        server: running.
        to_server: the proxy before it.
        to_gateways: a proxy before each gateway, `upstream` being the gateway's port.
        chance: where every choice comes from.
        faults: counted here.
    """

    def __init__(
        self,
        crew: Mapping[str, int],
        environment: Mapping[str, str],
        logs: Path,
        server: BufferServer,
        to_server: Proxy,
        to_gateways: list[Proxy],
        chance: random.Random,
        faults: Faults,
    ) -> None:
        self._server, self._to_server, self._to_gateways = server, to_server, to_gateways
        self._chance, self._faults = chance, faults
        self._members: list[Member] = []
        for process, arguments in BARE.items():
            for number in range(crew[process]):
                own = dict(environment)
                if process == "gateway":
                    own["HB_GATEWAY_PORT"] = str(to_gateways[number].upstream)
                if process == "drain" and number == 0:
                    own["CHAOS_CLOCK"] = "jumping"
                log = logs / f"chaos-{process}-{number}.log"
                self._members.append(
                    Member(process, arguments, own, log, self._fate, faults, _PAUSE)
                )
        self._random: list[tuple[int, Callable[[], None]]] = [
            (4, self._kill_member),
            (2, self._pause_member),
            (2, self._kill_server),
            (2, self._kill_server_torn),
            (3, self._kill_server_cut),
            (1, self._pause_server),
            (2, self._drop_answers_of_server),
            (2, self._drop_answers_of_gateway),
        ]

    @property
    def unmet(self) -> list[str]:
        """Points where nothing was killed yet."""
        return [
            point.key
            for point in points.POINTS
            if point.process in BARE and not self._killed_at(point)
        ]

    @property
    def surprises(self) -> list[str]:
        """Ends of members that no fault explains."""
        return [line for member in self._members for line in member.surprises]

    def run(self, done: Callable[[], bool]) -> None:
        """Do harm until `done`, then end all members in good order."""
        due = time.monotonic() + 3 * _PACE
        try:
            while not done():
                for member in self._members:
                    member.look()
                if time.monotonic() >= due:
                    weights, faults = zip(*self._random, strict=True)
                    self._chance.choices(faults, weights)[0]()
                    due = time.monotonic() + self._chance.expovariate(1 / _PACE)
                time.sleep(_LOOK_SECONDS)
        finally:
            for member in self._members:
                member.end()

    def _fate(self, process: str) -> Fate | None:
        """A point where this kind of process was killed least often, or nothing at all."""
        known = points.of(process)
        if not known:
            return None
        least = min(self._killed_at(point) for point in known)
        if least and self._chance.random() > _ARMED:
            return None
        point = self._chance.choice([one for one in known if self._killed_at(one) == least])
        if not least:
            return Fate(point, point.hit, signal.SIGKILL)
        paused = self._chance.random() < _PAUSED
        sign = signal.SIGSTOP if paused else signal.SIGKILL
        hit = point.hit + int(self._chance.expovariate(1 / _HITS[process]))
        return Fate(point, hit, sign)

    def _killed_at(self, point: Point) -> int:
        return self._faults[point.process, f"killed {point.name}"]

    def _kill_member(self) -> None:
        self._chance.choice(self._members).harm(signal.SIGKILL)

    def _pause_member(self) -> None:
        self._chance.choice(self._members).harm(signal.SIGSTOP)

    def _kill_server(self) -> None:
        self._server.kill()
        self._faults["redis", f"killed {RANDOM}"] += 1

    def _kill_server_torn(self) -> None:
        self._server.kill_torn()
        self._faults["redis", "killed, half a command left at the AOF's end"] += 1

    def _kill_server_cut(self) -> None:
        self._server.kill_cut(self._chance)
        self._faults["redis", "killed, unconfirmed bytes cut off the AOF"] += 1

    def _pause_server(self) -> None:
        self._server.signal(signal.SIGSTOP)
        time.sleep(_PAUSE)
        self._server.signal(signal.SIGCONT)
        self._faults["redis", f"paused {RANDOM}"] += 1

    def _drop_answers_of_server(self) -> None:
        self._to_server.drop_answers(3)

    def _drop_answers_of_gateway(self) -> None:
        self._chance.choice(self._to_gateways).drop_answers(2)


class Up:
    """The phase under `hb up`: its members are killed at random moments, and started again by it.

    Args:
        environment: of `hb up`, without HB_REDIS_URL.
        logs: folder of its log.
        chance, faults: as in `Bare`.
    """

    def __init__(
        self, environment: Mapping[str, str], logs: Path, chance: random.Random, faults: Faults
    ) -> None:
        self._environment = dict(environment)
        self._chance, self._faults = chance, faults
        self._log = logs / "chaos-up.log"
        with self._log.open("wb") as log:
            self._child = subprocess.Popen(
                [sys.executable, "-m", "hb_assets", "up", "--no-sample"],
                env=self._environment,
                cwd=ROOT,
                stdin=subprocess.DEVNULL,
                stdout=log,
                stderr=log,
                start_new_session=True,
            )

    def wait(self, seconds: float) -> None:
        """Wait until everything runs. Raises RuntimeError."""
        deadline = time.monotonic() + seconds
        while "everything runs" not in self._log.read_text(errors="replace"):
            if self._child.poll() is not None or time.monotonic() > deadline:
                raise RuntimeError(f"`hb up` doesn't start; see {self._log}")
            time.sleep(0.1)

    @property
    def unmet(self) -> list[str]:
        """Members that weren't killed yet."""
        return [name for name in UP if not self._killed(name)]

    def run(self, done: Callable[[], bool]) -> None:
        """Kill members at random moments until `done`, the least harmed first."""
        due = time.monotonic()
        while not done():
            if time.monotonic() >= due:
                self._harm()
                due = time.monotonic() + self._chance.uniform(0.5, 1.5) * _UP_PACE
            time.sleep(_LOOK_SECONDS)

    def _harm(self) -> None:
        pids = {
            one["name"]: one["pid"]
            for one in self.status().get("members", [])
            if one["state"] == "running"
        }
        names = [name for name in UP if name in pids]
        if not names:
            return
        least = min(self._killed(name) for name in names)
        name = self._chance.choice([one for one in names if self._killed(one) == least])
        os.kill(pids[name], signal.SIGKILL)
        self._faults[f"hb up: {name}", f"killed {RANDOM}"] += 1

    def _killed(self, name: str) -> int:
        return self._faults[f"hb up: {name}", f"killed {RANDOM}"]

    def status(self) -> dict[str, Any]:
        """What `hb status` says; empty while it can't."""
        asked = subprocess.run(
            [sys.executable, "-m", "hb_assets", "status", "--json"],
            env=self._environment,
            cwd=ROOT,
            capture_output=True,
            check=False,
        )
        try:
            found: dict[str, Any] = json.loads(asked.stdout)
        except ValueError:
            return {}
        return found

    def end(self) -> None:
        """As Ctrl-C does. Raises RuntimeError when it doesn't end."""
        self._child.send_signal(signal.SIGINT)
        try:
            self._child.wait(timeout=120)
        except subprocess.TimeoutExpired:
            self._child.terminate()
            raise RuntimeError(f"`hb up` doesn't end; see {self._log}") from None
