"""An operator on a disk that flips bits: damages a fragment, and resolves it by `hb damaged`.

`python -m chaos.victim damaging` does this once: copies a raw fragment, flips a bit of it in place,
has `hb consolidate` set it aside, accepts its loss every other time, and puts the copy back. A copy
that an earlier one, which was killed, left behind is put back first.
"""

from __future__ import annotations

import os
import random
import shutil
import sys
from contextlib import suppress
from pathlib import Path

from hb_assets.__main__ import main as hb_main
from hb_assets.core import settings as settings_module

COPIES = "chaos-copies"
"""Folder under HB_HOME that holds copies of files that are damaged now."""


def main() -> None:
    """Damage one fragment and resolve it."""
    settings = settings_module.load()
    copies = settings.home_dir / COPIES
    copies.mkdir(exist_ok=True)
    left = sorted(copies.glob("*.parquet"))
    if left:
        put_back(left[0])
        return
    found = list((settings.lake_dir / "raw").rglob("*.parquet"))
    if not found:
        return
    copy = _damage(random.choice(found), copies)
    if copy is None:
        return
    _hb("consolidate", "--pending")
    if random.random() < 0.5:
        _hb("damaged", "accept", copy.name, "--yes")
    put_back(copy)


def put_back(copy: Path) -> None:
    """Restore a file; its copy goes when that is done."""
    if _hb("damaged", "restore", str(copy)) == 0:
        copy.unlink()


def _damage(path: Path, copies: Path) -> Path | None:
    """Flip a bit in place; the copy, None where the file went meanwhile."""
    copy, temp = copies / path.name, copies / "copying"
    with suppress(FileNotFoundError):
        shutil.copyfile(path, temp)
        os.replace(temp, copy)  # noqa: PTH105  # Path's own are points where this may be killed
        with path.open("r+b") as file:
            file.seek(10)
            byte = file.read(1)[0]
            file.seek(10)
            file.write(bytes([byte ^ 1]))
        return copy
    for one in (temp, copy):
        one.unlink(missing_ok=True)
    return None


def _hb(*arguments: str) -> int:
    """Run an `hb` command in this process; its exit code."""
    sys.argv = ["hb", *arguments]
    try:
        hb_main()
    except SystemExit as end:
        return int(end.code or 0)
    return 0
