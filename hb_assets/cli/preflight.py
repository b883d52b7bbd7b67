"""Checks that `hb up` makes before it starts anything.

One for each thing that would make a member fail, with the one line that says what to do.
"""

from __future__ import annotations

import re
import socket
import tempfile
from collections.abc import Iterator
from contextlib import closing, contextmanager

from hb_assets.buffer import connection, durability, server
from hb_assets.cli import state, supervision
from hb_assets.core import private_files
from hb_assets.core.errors import AlreadyRunningError, SettingsError
from hb_assets.core.settings import Settings
from hb_assets.gateway.auth.access import Access
from hb_assets.gateway.http import tls
from hb_assets.lake.storage.store import Lake

_LEFTOVERS_SECONDS = 20.0
_BORROWERS_SECONDS = 60.0


def make_home(settings: Settings) -> None:
    """Make the folders under HB_HOME and write to them. Raises SettingsError when that fails."""
    if re.search(r"%|\s[;#]|[\r\n]", str(settings.home_dir)):
        # Dagster's SQLite addresses expand `%`; supervisord's ini dialect can't write the others
        raise SettingsError(
            f"HB_HOME {str(settings.home_dir)!r}: `hb up` can't have '%', a line end, or ';' or '#' "
            "after a blank in its path; set HB_HOME to another folder"
        )
    folders = (settings.run_dir, settings.log_dir, settings.dagster_home)
    try:
        for folder in folders:
            private_files.make_folder(folder)
            with tempfile.TemporaryFile(dir=folder) as probe:
                probe.write(b"hb")
        settings.run_dir.chmod(0o700)  # sockets: whoever connects can run code as us
    except OSError as error:
        raise SettingsError(
            f"HB_HOME {settings.home_dir} can't be written ({error.strerror}); "
            "mend it, or set HB_HOME to another folder"
        ) from None


@contextmanager
def only_one(settings: Settings) -> Iterator[None]:
    """Be the only `hb up` on this HB_HOME, and end what a killed one left behind.

    Raises:
        AlreadyRunningError: another one runs (the message names its pid), or a command still uses
            an embedded server of its own.
    """
    left = state.read(settings)
    if left is not None:
        if left.identity.lives():
            raise AlreadyRunningError(
                f"`hb up` runs already on {settings.home_dir} (pid {left.pid}); end it with "
                "`hb down`, or set HB_HOME to another folder"
            )
        supervision.kill(left.processes, patience=_LEFTOVERS_SECONDS)
    with server.exclusive(settings, _BORROWERS_SECONDS):
        yield


def check_access(settings: Settings) -> None:
    """Raises SettingsError when API keys or the certificate keep the gateway from serving."""
    Access(settings).load()
    tls.server_context(settings)


def check_ports(settings: Settings) -> None:
    """Raises AlreadyRunningError naming the port that is taken, and the setting that moves it."""
    if settings.gateway_port == settings.dagster_port:
        raise SettingsError(
            f"HB_GATEWAY_PORT and HB_DAGSTER_PORT are both {settings.gateway_port}; change one"
        )
    _check_port(settings.gateway_host, settings.gateway_port, "HB_GATEWAY_PORT")
    _check_port("127.0.0.1", settings.dagster_port, "HB_DAGSTER_PORT")


def _check_port(host: str, port: int, variable: str) -> None:
    family = socket.AF_INET6 if ":" in host else socket.AF_INET
    with closing(socket.socket(family)) as probe:
        probe.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
        try:
            probe.bind((host, port))
        except OSError as error:
            raise AlreadyRunningError(
                f"port {port} on {host} can't be used ({error.strerror}); "
                f"end what uses it, or set {variable} to another port"
            ) from None


def check_redis(settings: Settings) -> None:
    """Raises BufferUnavailableError when HB_REDIS_URL's server doesn't answer or isn't durable."""
    if settings.embedded:
        return
    with closing(connection.connect(settings)) as client:
        connection.ping(client)
        durability.require(client, settings)


def check_lake(settings: Settings) -> None:
    """Raises LakeMismatchError, SettingsError or DamagedFileError when the lake can't be used."""
    Lake.open(settings)
