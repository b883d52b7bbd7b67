"""Runs first in every Python process that a test starts, and records exceptions in finalisers.

Python prints an exception that a finaliser raises, and goes on: no exit code tells of it. conftest
puts this folder on the children's PYTHONPATH, and fails the test whose children recorded something.
"""

from __future__ import annotations

import os
import sys
import warnings

LOG = os.environ.get("TEST_UNRAISABLE_LOG", os.devnull)
"""The file that is appended to."""


def note(
    seen: sys.UnraisableHookArgs,
    # the last finalisers run when no global is left
    said: str = str(sys.orig_argv),
    log: str = LOG,
    flags: int = os.O_WRONLY | os.O_APPEND,
    print_it=sys.unraisablehook,
    opened=os.open,
    write=os.write,
    close=os.close,
) -> None:
    print_it(seen)
    file = opened(log, flags)
    write(
        file, f"{said}: {seen.err_msg or 'ignored'} {seen.object!r}: {seen.exc_value!r}\n".encode()
    )
    close(file)


sys.unraisablehook = note
# where a finaliser raises it, it is such an exception; supervisord's files aren't ours
if "supervisor.supervisord" not in sys.orig_argv:
    warnings.filterwarnings("error", category=ResourceWarning, module=r"(__main__|hb_assets)\b")
# the embedded server may outlive the command that started it: others use it too
warnings.filterwarnings("ignore", "subprocess .* is still running", ResourceWarning)
