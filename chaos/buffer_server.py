"""The embedded server as a process of the harness: killed, paused, its append-only file cut."""

from __future__ import annotations

import os
import random
import signal
import subprocess
import time
from pathlib import Path

from chaos.proxy import Proxy
from hb_assets.buffer import server
from hb_assets.core.settings import Settings

_TORN = b"*4\r\n$4\r\nXADD\r\n$14\r\nhb:{00}:stream\r\n$1\r\n*\r\n$4\r\nda"
"""What a power cut leaves of a command that nobody was told is stored."""
_HOLD_SECONDS = 1.5


class BufferServer:
    """The server that `hb` would start under the settings' HB_HOME, behind a proxy."""

    def __init__(self, settings: Settings, proxy: Proxy) -> None:
        files = server.prepare(settings)
        self._argv, self._log, self._proxy = files.argv, files.log, proxy
        self._folder = settings.redis_dir / "appendonlydir"
        self._settings = settings
        self._child: subprocess.Popen[bytes] | None = None
        self.cut_bytes = 0
        """Bytes that no answer had confirmed and that were cut off."""

    def start(self) -> None:
        """Start it and wait until it has loaded its file and answers. Raises RuntimeError."""
        with self._log.open("ab") as log:
            self._child = subprocess.Popen(
                self._argv, stdin=subprocess.DEVNULL, stdout=log, stderr=log
            )
        deadline = time.monotonic() + 60
        while not server.running(self._settings):
            if self._child.poll() is not None or time.monotonic() > deadline:
                raise RuntimeError(f"the embedded server doesn't come back; see {self._log}")
            time.sleep(0.02)

    def end(self) -> None:
        """End it in good order, if it runs."""
        if self._child is not None and self._child.poll() is None:
            self.signal(signal.SIGCONT)
            self.signal(signal.SIGTERM)

    def signal(self, sign: signal.Signals) -> None:
        """Send it a signal; SIGKILL and SIGTERM wait for its end."""
        assert self._child is not None
        self._child.send_signal(sign)
        if sign in (signal.SIGKILL, signal.SIGTERM):
            self._child.wait()

    def kill(self) -> None:
        """Kill it and start it from its file."""
        self.signal(signal.SIGKILL)
        self.start()

    def kill_torn(self) -> None:
        """Kill it, leave half a command at the end of its file, and start it."""
        self.signal(signal.SIGKILL)
        with self.append_only_file().open("ab") as file:
            file.write(_TORN)
        self.start()

    def kill_cut(self, chance: random.Random) -> None:
        """Kill it, cut off bytes that no answer had confirmed, and start it.

        Answers are held back first. The server answers only what its file has on disk, so that
        whatever the file grows by from then on was never confirmed to anybody.
        """
        self._proxy.hold_answers()
        try:
            file = self.append_only_file()
            confirmed = file.stat().st_size
            deadline = time.monotonic() + _HOLD_SECONDS
            while file.stat().st_size == confirmed and time.monotonic() < deadline:
                time.sleep(0.02)
            self.signal(signal.SIGKILL)
            if file == self.append_only_file():  # else the server began another one meanwhile
                size = file.stat().st_size
                keep = chance.randint(confirmed, size)
                os.truncate(file, keep)
                self.cut_bytes += size - keep
        finally:
            self._proxy.release()
        self.start()

    def append_only_file(self) -> Path:
        """The file that the server appends to, as its manifest says."""
        manifest = (self._folder / "appendonly.aof.manifest").read_text()
        names = [line.split()[1] for line in manifest.splitlines() if line.endswith("type i")]
        return self._folder / names[-1]
