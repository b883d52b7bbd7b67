"""Lua scripts that change a shard atomically, one .lua file each, and a loader for them.

Every key is declared, and all keys of a call share a hash tag, so that the scripts work on a
cluster (`append` takes any number of shards, and would have to be called for each there); nothing
in them is newer than Redis 7.0.
"""

from __future__ import annotations

import hashlib
from dataclasses import dataclass
from functools import cache
from importlib import resources


@dataclass(frozen=True, slots=True)
class Script:
    """A script's text, and the SHA-1 digest that EVALSHA calls it by."""

    text: str
    sha: str


@cache
def catalogue() -> dict[str, Script]:
    """All scripts by name (the file's name without .lua)."""
    found = {}
    for file in resources.files(__name__).iterdir():
        if file.name.endswith(".lua"):
            text = file.read_text(encoding="utf-8")
            digest = hashlib.sha1(text.encode(), usedforsecurity=False).hexdigest()
            found[file.name.removesuffix(".lua")] = Script(text, digest)
    return found
