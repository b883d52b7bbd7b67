"""The catalogue of mutants stays true to the code: `make mutants` runs them."""

from __future__ import annotations

from collections import Counter
from pathlib import Path

import pytest

from mutants.catalogue import GROUPS, MUTANTS, Mutant

ROOT = Path(__file__).parents[1]


@pytest.mark.parametrize("mutant", MUTANTS, ids=lambda one: one.name)
def test_its_line_and_its_test_are_there(mutant: Mutant) -> None:
    text = (ROOT / mutant.file).read_text(encoding="utf-8")
    assert text.count(mutant.line) == 1, (
        "the line has changed: let the mutant change what does its job now"
    )
    assert mutant.line != mutant.instead
    file, _, test = mutant.test.partition("::")
    assert f"def {test.partition('[')[0]}(" in (ROOT / file).read_text(encoding="utf-8")


def test_there_are_enough_of_them() -> None:
    assert len({one.name for one in MUTANTS}) == len(MUTANTS) >= 60
    found = Counter(one.group for one in MUTANTS)
    assert all(found[group] >= 10 for group in GROUPS)
