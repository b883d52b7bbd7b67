"""Supervision of the members of `hb up`, by supervisord as a child process of ours.

supervisord's configuration, its start and end, what it says about the members, and how processes of
an `hb up` that was killed are ended. Which members there are is in `members`.

Nothing lingers: supervisord gets SIGTERM when `hb up` dies however it dies (Linux), and ends its
members; what outlives even that is ended by the next `hb up`, by the recorded processes.
"""

from __future__ import annotations

import ctypes
import os
import re
import secrets
import shlex
import signal
import subprocess
import sys
import threading
import time
import xmlrpc.client
from collections.abc import Callable, Mapping, Sequence
from contextlib import suppress
from pathlib import Path
from typing import Any

import psutil
from supervisor.xmlrpc import SupervisorTransport

from hb_assets.buffer import server
from hb_assets.cli import state
from hb_assets.cli.state import MemberState
from hb_assets.core.errors import HbError, SettingsError
from hb_assets.core.processes import Identity
from hb_assets.core.settings import PACKAGE, SOCKET_PATH_BYTES, Settings

STOP_SECONDS = 15
"""How long one member may take to end before it is killed."""
_POLL_SECONDS = 0.5
_PR_SET_PDEATHSIG = 1


class Supervisor:
    """supervisord with its members; start it in the main thread.

    Args:
        settings: places of configuration, socket and logs.
        members: argv by name, in the order of their start; they end in the reverse order.
        environment: variables of all members.
        on_change: called from a thread of its own with the members' states and every process
            below us, whenever one of them changed.
    """

    def __init__(
        self,
        settings: Settings,
        members: Mapping[str, Sequence[str]],
        environment: Mapping[str, str],
        on_change: Callable[[tuple[MemberState, ...], tuple[Identity, ...]], None],
    ) -> None:
        self._settings = settings
        self._members = {name: tuple(argv) for name, argv in members.items()}
        self._environment = dict(environment)
        self._on_change = on_change
        self._password = secrets.token_urlsafe(24)
        self._process: subprocess.Popen[bytes] | None = None
        self._url = ""
        self._seen: dict[str, int] = {}
        self._restarts = dict.fromkeys(self._members, 0)
        self._states: tuple[MemberState, ...] = ()
        self._processes: tuple[Identity, ...] = ()
        self._ending = threading.Event()
        self._watcher = threading.Thread(target=self._watch, name="watch members", daemon=True)

    @property
    def states(self) -> tuple[MemberState, ...]:
        """States of the members, half a second old at most."""
        return self._states

    def log(self, name: str) -> Path:
        """Log file of one member."""
        return self._settings.log_dir / f"{name}.log"

    def launch(self) -> None:
        """Start supervisord, with no member running yet. Raises HbError when it doesn't start."""
        configuration = self._settings.run_dir / "supervisord.conf"
        self._url, listener = self._endpoint()
        _write_private(configuration, self._configuration(listener))
        output = self._settings.log_dir / "supervisord.out"
        with output.open("wb") as sink:
            self._process = subprocess.Popen(
                [sys.executable, "-m", "supervisor.supervisord", "-n", "-c", str(configuration)],
                stdin=subprocess.DEVNULL,
                stdout=sink,
                stderr=subprocess.STDOUT,
                start_new_session=True,  # a terminal's Ctrl-C is for us alone
                preexec_fn=_end_with_parent(),  # noqa: PLW1509  # no thread of ours runs yet
                # the members inherit it, so that no secret stands in a file or an argv
                env=self._environment,
            )
        self._processes = (Identity.of(self._process.pid),)
        self._on_change((), self._processes)
        self._watcher.start()

    def answers(self) -> bool:
        """Whether supervisord takes commands. Raises HbError when it is gone."""
        self.check()
        try:
            self._call("getState")
        except (OSError, xmlrpc.client.Error):
            return False
        return True

    def start(self, name: str) -> None:
        """Start one member without waiting for it; it is started again whenever it dies."""
        try:
            self._call("startProcess", name, False)
        except (OSError, xmlrpc.client.Error) as error:
            self.check()
            raise HbError(
                f"{name} can't be started ({_reason(error)}); see {self.log(name)}"
            ) from None

    def check(self) -> None:
        """Raises HbError when supervisord died: then nothing is started again any more."""
        if self._process is not None and self._process.poll() is not None:
            raise HbError(
                "supervisord ended unexpectedly, so all members were ended; see "
                f"{self._settings.log_dir / 'supervisord.log'} and supervisord.out beside it"
            )

    def restarts(self, name: str) -> int:
        """How often a member was started again."""
        return self._restarts.get(name, 0)

    def end(self, urgent: Callable[[], bool]) -> None:
        """End all members, the last one first, then supervisord.

        Args:
            urgent: polled while waiting; once it says True, everything is killed at once.
        """
        if self._process is None:
            return
        self._ending.set()
        if self._watcher.is_alive():
            self._watcher.join()
        self._look_at_processes()
        if self._process.poll() is None:
            self._process.terminate()
        deadline = time.monotonic() + STOP_SECONDS * (len(self._members) + 1)
        while self._process.poll() is None and time.monotonic() < deadline and not urgent():
            time.sleep(0.05)
        kill(self._processes, patience=0)
        self._process.wait()
        self._process = None

    def _watch(self) -> None:
        while not self._ending.wait(_POLL_SECONDS):
            if self._process is None or self._process.poll() is not None:
                kill(self._processes, patience=STOP_SECONDS)
                return
            states, processes = self._states, self._processes
            self._look_at_processes()
            self._look_at_members()
            if (states, processes) != (self._states, self._processes):
                self._on_change(self._states, self._processes)

    def _look_at_processes(self) -> None:
        """List living descendants, orphans of killed members too: we saw them before."""
        assert self._process is not None
        found = {known for known in self._processes if known.lives()}
        try:
            supervisord = psutil.Process(self._process.pid)
            found.update(state.identify([supervisord, *supervisord.children(recursive=True)]))
        except psutil.Error:
            pass  # it died meanwhile; what we saw before is what there is
        self._processes = tuple(sorted(found))

    def _look_at_members(self) -> None:
        try:
            answers = self._call("getAllProcessInfo")
        except (OSError, xmlrpc.client.Error):
            return  # not up yet, or going down
        by_name = {answer["name"]: answer for answer in answers}
        states = []
        for name in self._members:
            answer = by_name[name]
            pid = int(answer["pid"]) or None
            if pid is not None and pid != self._seen.get(name):
                self._restarts[name] += name in self._seen
                self._seen[name] = pid
            since = float(answer["start"]) if pid else None
            states.append(
                MemberState(name, answer["statename"].lower(), pid, since, self._restarts[name])
            )
        self._states = tuple(states)

    def _call(self, method: str, *arguments: object) -> Any:
        transport = SupervisorTransport("hb", self._password, self._url)
        with xmlrpc.client.ServerProxy("http://127.0.0.1", transport=transport) as proxy:
            return getattr(proxy.supervisor, method)(*arguments)

    def _endpoint(self) -> tuple[str, list[str]]:
        """URL of supervisord's RPC and the section that makes it listen there."""
        path = self._settings.run_dir / "supervisor.sock"
        login = ["username = hb", f"password = {self._password}"]
        if len(os.fsencode(path)) <= SOCKET_PATH_BYTES:
            listener = ["[unix_http_server]", f"file = {_value(path)}", "chmod = 0600", *login]
            return f"unix://{path}", listener
        port = server.free_port()
        return (
            f"http://127.0.0.1:{port}",
            ["[inet_http_server]", f"port = 127.0.0.1:{port}", *login],
        )

    def _configuration(self, listener: list[str]) -> str:
        folder = self._settings.log_dir
        lines = [
            *listener,
            "[rpcinterface:supervisor]",
            "supervisor.rpcinterface_factory = supervisor.rpcinterface:make_main_rpcinterface",
            "[supervisord]",
            "nodaemon = true",
            "silent = true",
            "strip_ansi = true",
            f"umask = {_umask():03o}",
            f"logfile = {_value(folder / 'supervisord.log')}",
            "logfile_maxbytes = 5MB",
            "logfile_backups = 2",
            f"pidfile = {_value(self._settings.run_dir / 'supervisord.pid')}",
            f"childlogdir = {_value(folder)}",
        ]
        for number, (name, argv) in enumerate(self._members.items(), start=1):
            lines += [
                f"[program:{name}]",
                f"command = {_value(shlex.join(argv))}",
                f"directory = {_value(PACKAGE.parent)}",
                f"priority = {number}",
                "autostart = false",
                "autorestart = true",
                "startsecs = 1",
                "startretries = 1000000000",
                f"stopwaitsecs = {STOP_SECONDS}",
                "stopasgroup = true",
                "killasgroup = true",
                "redirect_stderr = true",
                f"stdout_logfile = {_value(self.log(name))}",
                "stdout_logfile_maxbytes = 10MB",
                "stdout_logfile_backups = 3",
            ]
        return "\n".join(lines) + "\n"


def kill(processes: Sequence[Identity], *, patience: float) -> None:
    """End what still lives of these processes: SIGTERM, and after `patience` seconds SIGKILL."""
    alive = []
    for known in processes:
        with suppress(psutil.Error):  # it ended by itself
            if known.lives():
                alive.append(psutil.Process(known.pid))
    if patience > 0:
        for process in alive:
            _signal(process, signal.SIGTERM)
        _, alive = psutil.wait_procs(alive, timeout=patience)
    for process in alive:
        _signal(process, signal.SIGKILL)
    psutil.wait_procs(alive, timeout=5)


def _signal(process: psutil.Process, number: int) -> None:
    with suppress(psutil.Error):  # it ended by itself
        process.send_signal(number)  # psutil looks again whether the pid was given to another


def _end_with_parent() -> Callable[[], None] | None:
    """What the child runs before exec so that it gets SIGTERM when we die; Linux only."""
    if sys.platform != "linux":
        return None
    prctl = ctypes.CDLL(None, use_errno=True).prctl
    parent = os.getpid()

    def ask() -> None:
        prctl(_PR_SET_PDEATHSIG, signal.SIGTERM)
        if os.getppid() != parent:  # we died before it was asked for
            os._exit(1)

    return ask


def _value(text: str | Path) -> str:
    """A value of supervisord's ini dialect, which has no way to write ` ;` or ` #`."""
    if re.search(r"\s[;#]|[\r\n]", str(text)):
        raise SettingsError(
            "HB_HOME can't have ';' or '#' after a blank, or a line end, in its path: " + repr(text)
        )
    return str(text).replace("%", "%%")


def _umask() -> int:
    mask = os.umask(0o077)
    os.umask(mask)
    return mask


def _write_private(path: Path, text: str) -> None:
    path.unlink(missing_ok=True)
    path.touch(0o600, exist_ok=False)
    path.write_text(text, encoding="utf-8")


def _reason(error: Exception) -> str:
    if isinstance(error, xmlrpc.client.Fault):
        return str(error.faultString).lower()
    return type(error).__name__
