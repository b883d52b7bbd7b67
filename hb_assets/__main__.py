"""Entry point of the command `hb`, and of `python -m hb_assets`.

What has to happen before anything heavy is imported is done here; the commands are in `cli`.
"""

from __future__ import annotations

import sys

from hb_assets.core import private_files

_INTERRUPTED = 130


def main() -> None:
    """Run `hb`. Ctrl-C leaves no trace, even while the commands are being imported."""
    private_files.umask()
    try:
        from hb_assets.cli.app import run

        run(sys.argv[1:])
    except KeyboardInterrupt:
        sys.exit(_INTERRUPTED)


if __name__ == "__main__":
    main()
