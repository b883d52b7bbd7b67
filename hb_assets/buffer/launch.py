"""Script that turns into the embedded server, holding its folder's lock for as long as it lives.

The lock is taken before the server's program replaces this one, and goes with the process, however
it ends, so that two servers can never write one folder. It is a POSIX record lock: such a lock
outlives exec, isn't handed on to the server's own children, and the kernel tells who holds it.
Standard library only: it runs without site-packages, to start fast.

    python -I -S launch.py LOCK SECONDS SERVER CONFIGURATION
"""

from __future__ import annotations

import fcntl
import os
import sys
import time

HELD = 75
"""Exit code when another process still holds the lock after SECONDS."""


def main(lock: str, seconds: str, *argv: str) -> None:
    """Wait for the lock, then run `argv` in place of this process."""
    held = os.open(lock, os.O_RDWR | os.O_CREAT, 0o600)
    deadline = time.monotonic() + float(seconds)
    while True:
        try:
            fcntl.lockf(held, fcntl.LOCK_EX | fcntl.LOCK_NB)
            break
        except (BlockingIOError, PermissionError):  # which of them is the platform's choice
            if time.monotonic() >= deadline:
                sys.stderr.write(f"another server holds {lock}\n")
                sys.exit(HELD)
            time.sleep(0.02)
    os.set_inheritable(held, True)
    os.execv(argv[0], argv)  # noqa: S606  # the program and its arguments are `server.prepare`'s


if __name__ == "__main__":
    main(*sys.argv[1:])
