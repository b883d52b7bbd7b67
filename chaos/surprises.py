"""Finds errors and process ends that no injected fault explains.

It lists which exit codes and which lines of logs are expected.
"""

from __future__ import annotations

import re
from collections.abc import Iterator
from pathlib import Path

EXIT_CODES = {0, 1, 2}
"""What `hb` ends with by itself: done, bad news, could not be done (`hb_assets.cli.app`)."""
_FORESEEN = (
    "dagster._core.errors.DagsterUserCodeUnreachableError",
    "grpc._channel._InactiveRpcError",
)
"""What Dagster's own processes make a trace of when their code server is killed."""
_ENDED = re.compile(
    r"exited: (?P<name>\S+) \((?:terminated by (?P<sign>\w+)|exit status (?P<code>\d+))"
)
"""How supervisord says that a member ended."""
_SIGNALS = {"SIGKILL", "SIGTERM", "SIGINT"}


def of_logs(logs: Path) -> list[str]:
    """Lines of all logs: every fault has to end in one clear line, never in a trace or a crash."""
    found: set[str] = set()
    for log in logs.glob("*.log"):
        lines = log.read_text(errors="replace").splitlines()
        found |= {f"{log.name}: {line}" for line in (*_errors(lines), *_ends(lines))}
    return sorted(found)


def _errors(lines: list[str]) -> Iterator[str]:
    """What a trace ended with; and what a command says of an error that it doesn't know."""
    in_trace = False
    for line in lines:
        if "unexpected " in line:
            yield line.strip()
        if line.startswith("Traceback "):
            if in_trace:
                yield "a trace that doesn't end"
            in_trace = True
        elif in_trace and line and not line[0].isspace():
            in_trace = False
            if not line.startswith(_FORESEEN):
                yield line.strip()
    if in_trace:
        yield "a trace that doesn't end"


def _ends(lines: list[str]) -> Iterator[str]:
    for line in lines:
        ended = _ENDED.search(line)
        if ended is None:
            continue
        code = ended["code"]
        foreseen = ended["sign"] in _SIGNALS if code is None else int(code) in EXIT_CODES
        if not foreseen:
            yield line.strip()
