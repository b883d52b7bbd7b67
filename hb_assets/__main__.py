"""The command `hb`, and `python -m hb_assets`.

Belongs here: what has to be there before anything heavy is imported. Doesn't belong here: commands
(`cli`).
"""

from __future__ import annotations

import sys

from hb_assets.core import private

_INTERRUPTED = 130


def main() -> None:
    """Run `hb`. Ctrl-C leaves no trace, even while the commands are being imported."""
    private.umask()
    try:
        from hb_assets.cli.app import run

        run(sys.argv[1:])
    except KeyboardInterrupt:
        sys.exit(_INTERRUPTED)


if __name__ == "__main__":
    main()
