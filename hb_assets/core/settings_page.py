"""Generator of docs/settings.md: `python -m hb_assets.core.settings_page > docs/settings.md`.

Nothing of this machine or its environment goes into the page, so that it is the same everywhere.
"""

from __future__ import annotations

import datetime as dt
import inspect
import re
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any, Literal, get_args, get_origin

from pydantic import PlainSerializer, SecretStr
from pydantic.fields import FieldInfo

from hb_assets.core.settings import Bytes, Quota, Settings

_HEAD = """\
# Settings

<!-- Generated from hb_assets/core/settings.py: make docs -->

Every setting is an environment variable. An empty one counts as not set. A value that can't be
used ends a command with exit code 2 and one line that names the variable. Every command warns about
other variables that begin with `HB_`; nothing reads them, and the members of `hb up` don't get them.

- duration: `500ms`, `90s`, `15m`, `6h`, `7d`, or a number of seconds
- size: a number of bytes, or `64KiB`, `64MiB`, `1GiB`, `1TiB` (`64m` means the same as `64MiB`)
- limit: `100000/10m`, an amount and the time in which it is there again, or `off`
- list: words separated by commas
- day: `2025-01-15`
"""


def page() -> str:
    """The page as Markdown: one table for each group of settings, in the order of the class."""
    defaults = Settings.model_construct().model_dump(mode="json")
    lines = [_HEAD.rstrip()]
    for group, names in _groups():
        lines += ["", f"## {group}", "", "| variable | value | default | meaning |"]
        lines += ["|---|---|---|---|"]
        for name in names:
            field = Settings.model_fields[name]
            default = "" if field.default_factory else defaults[name]
            default = int(default) if isinstance(default, bool) else default
            shown = f"`{default}`" if default not in (None, "") else ""
            cells = (f"`HB_{name.upper()}`", _kind(field), shown, field.description or "")
            lines.append("| " + " | ".join(cells) + " |")
    return "\n".join(lines) + "\n"


def _groups() -> Iterator[tuple[str, list[str]]]:
    """Headings and field names, out of the comments that group the class's source."""
    source = inspect.getsource(Settings)
    for part in re.split(r"^    # -- ", source, flags=re.MULTILINE)[1:]:
        heading, _, body = part.partition("\n")
        names = re.findall(r"^    (\w+): ", body, flags=re.MULTILINE)
        yield heading[0].upper() + heading[1:], names


_KINDS: tuple[tuple[object, str], ...] = (
    (dt.timedelta, "duration"),
    (dt.date, "day"),
    (Quota, "limit"),
    (Path, "path"),
    (SecretStr, "URL"),
    (tuple, "list"),
    (bool, "0 or 1"),
    (int, "integer"),
    (float, "number"),
    (str, "text"),
)


_SIZE = get_args(Bytes)[1]
_BOUNDS = {"ge": "from", "gt": "above", "le": "to"}


def _kind(field: FieldInfo) -> str:
    choices = get_args(field.annotation)
    if get_origin(field.annotation) is Literal:
        return ", ".join(f"`{choice}`" for choice in choices)
    annotation: Any = choices[0] if type(None) in choices else field.annotation
    annotation = get_origin(annotation) or annotation
    known = next(kind for of, kind in _KINDS if annotation is of)
    known = "size" if _SIZE in field.metadata else known
    written: Any = next(
        (rule.func for rule in field.metadata if isinstance(rule, PlainSerializer)), str
    )
    rules = {
        rule: written(getattr(found, rule))
        for found in field.metadata
        for rule in _BOUNDS
        if hasattr(found, rule)
    }
    bounds = " ".join(f"{word} {rules[rule]}" for rule, word in _BOUNDS.items() if rule in rules)
    return f"{known}, {bounds}" if bounds else known


if __name__ == "__main__":
    sys.stdout.write(page())
