"""`make mutants`: break one line at a time, and see that the test which should notice does.

Each change of mutants/catalogue.py is made in a copy of the tree, and the one test that it names is
run there: killed where the test fails, survived where it passes. First every named test has to pass
on the code as it is. Exit code 1: something survived, a line isn't there exactly once, or a test
fails without any change.
"""

from __future__ import annotations

import argparse
import datetime as dt
import os
import shutil
import sys
import tempfile
import time
from collections.abc import Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from pathlib import Path
from queue import SimpleQueue

from mutants import running
from mutants.catalogue import GROUPS, MUTANTS, Mutant

ROOT = Path(__file__).parents[1]
_LEFT_OUT = shutil.ignore_patterns(".*", "*.egg-info", "__pycache__", "images", "build")
_PARTS = 4
"""With --short a run takes one of so many parts, another one each day."""
_AT_ONCE = 2
_FAILED = 1
"""pytest's exit code where tests ran and some failed."""


@dataclass(frozen=True, slots=True)
class Outcome:
    """What became of a mutant: killed, survived, or why that can't be told."""

    mutant: Mutant
    verdict: str
    seconds: float
    said: str = ""

    @property
    def killed(self) -> bool:
        """Whether the test noticed."""
        return self.verdict == "killed"


class Copies:
    """Copies of the tree, each lent to one mutant at a time."""

    def __init__(self, folder: Path, count: int) -> None:
        self._free: SimpleQueue[Path] = SimpleQueue()
        self._changes = 0
        for number in range(count):
            copy = folder / str(number)
            shutil.copytree(ROOT, copy, ignore=_LEFT_OUT)
            self._free.put(copy)

    def try_tests(self, tests: Sequence[str]) -> str:
        """What pytest says of the tests on the code as it is; nothing where all of them pass."""
        copy = self._free.get()
        try:
            code, said = running.run(copy, tests)
        finally:
            self._free.put(copy)
        return said if code else ""

    def try_mutant(self, mutant: Mutant) -> Outcome:
        """Make the change, run its test, and take the change back."""
        began = time.monotonic()
        copy = self._free.get()
        try:
            path = copy / mutant.file
            original = path.read_text(encoding="utf-8")
            times = original.count(mutant.line)
            if times != 1:
                return Outcome(mutant, f"the line is there {times} times", 0.0)
            try:
                path.write_text(original.replace(mutant.line, mutant.instead), encoding="utf-8")
                self._outdate(path)
                code, said = running.run(copy, [mutant.test], "-x")
            finally:
                path.write_text(original, encoding="utf-8")
                self._outdate(path)
        finally:
            self._free.put(copy)
        verdict = {0: "survived", _FAILED: "killed"}.get(code, f"pytest ended with {code}")
        return Outcome(mutant, verdict, time.monotonic() - began, said)

    def _outdate(self, path: Path) -> None:
        """Give a file a time of its own: Python tells by second and size whether to compile."""
        self._changes += 1
        os.utime(path, (self._changes, self._changes))


def _chosen(options: argparse.Namespace) -> list[Mutant]:
    chosen = list(MUTANTS)
    if options.only:
        unknown = set(options.only) - {one.name for one in MUTANTS}
        if unknown:
            sys.exit(f"no mutant is called {', '.join(sorted(unknown))}: --list shows all")
        chosen = [one for one in chosen if one.name in options.only]
    if options.group:
        chosen = [one for one in chosen if one.group in options.group]
    if options.short:
        part = dt.datetime.now(dt.UTC).date().toordinal() % _PARTS
        chosen = chosen[part::_PARTS]
    return chosen


def _options() -> argparse.Namespace:
    parser = argparse.ArgumentParser(prog="python -m mutants", description=__doc__)
    parser.add_argument("--only", action="append", metavar="NAME", help="this mutant")
    parser.add_argument("--group", action="append", choices=GROUPS, help="those of this group")
    parser.add_argument("--short", action="store_true", help="a quarter of them, by the date")
    parser.add_argument("--list", action="store_true", help="show what there is, run nothing")
    parser.add_argument("--verbose", action="store_true", help="show what the tests said")
    return parser.parse_args()


def main() -> int:
    """Run the mutants that the command line asks for; the exit code."""
    options = _options()
    chosen = _chosen(options)
    if options.list:
        for one in chosen:
            print(f"{one.group:26} {one.name:40} {one.file}")
        return 0
    began = time.monotonic()
    tests = {
        group: sorted({one.test for one in chosen if one.group == group})
        for group in dict.fromkeys(one.group for one in chosen)
    }
    with (
        tempfile.TemporaryDirectory(prefix="mutants-") as folder,
        ThreadPoolExecutor(_AT_ONCE) as pool,
    ):
        copies = Copies(Path(folder), _AT_ONCE)
        for group, said in zip(tests, pool.map(copies.try_tests, tests.values()), strict=True):
            if said:
                print(f"tests of {group} fail on the code as it is:\n{said}")
                return 1
        outcomes = []
        for outcome in pool.map(copies.try_mutant, chosen):
            outcomes.append(outcome)
            one = outcome.mutant
            print(f"{outcome.verdict:9} {one.name} ({one.group}, {outcome.seconds:.0f} s)")
            if options.verbose or outcome.verdict not in ("killed", "survived"):
                print(outcome.said)
            sys.stdout.flush()
    others = [one for one in outcomes if not one.killed]
    for outcome in others:
        one = outcome.mutant
        print(f"\n{one.name}: {outcome.verdict}\n  {one.file}: {one.line.strip()}\n  {one.test}")
    print(
        f"\n{len(outcomes) - len(others)} killed, {len(others)} not, of {len(outcomes)}"
        f" in {time.monotonic() - began:.0f} s"
    )
    return 1 if others else 0


if __name__ == "__main__":
    sys.exit(main())
