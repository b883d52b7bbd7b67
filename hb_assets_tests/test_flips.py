"""Flipped bits and cut files: no answer is wrong without a word, and the harness would see one."""

from __future__ import annotations

from pathlib import Path

import pytest

from chaos import flips
from hb_assets_tests.examples import examples


@pytest.fixture(scope="module")
def home(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return tmp_path_factory.mktemp("flips")


@pytest.mark.long
@pytest.mark.timeout(900)
def test_no_answer_is_wrong_without_a_word(home: Path) -> None:
    count = examples(100)
    found = flips.run(home, count, seed=11, workers=1)
    assert found.bad == []
    assert found.of("right", "told") == count
    assert found.of("told") > count // 5


@pytest.mark.long
@pytest.mark.timeout(300)
def test_without_verification_answers_are_wrong_without_a_word(home: Path) -> None:
    """Else the harness would find nothing, whatever the readers did."""
    assert flips.run(home, 10, seed=11, workers=1, control=True).of("wrong") > 0
