"""Executors: which one the settings name."""

from __future__ import annotations

import dagster as dg
import pytest

from hb_assets.core.errors import SettingsError
from hb_assets.core.settings import Settings
from hb_assets.defs import executors


@pytest.mark.parametrize(
    ("name", "executor"),
    [
        ("in_process", dg.in_process_executor.name),
        ("multiprocess", "preloaded"),
        ("dagster:in_process_executor", dg.in_process_executor.name),
    ],
)
def test_it_is_the_one_that_is_named(name: str, executor: str) -> None:
    assert executors.chosen(Settings(executor=name)).name == executor


@pytest.mark.parametrize("name", ["no_such_module:celery", "dagster:no_such_name", "dagster:op"])
def test_one_that_is_not_there_is_a_clear_line(name: str) -> None:
    with pytest.raises(SettingsError, match="HB_EXECUTOR") as caught:
        executors.chosen(Settings(executor=name))
    assert name.partition(":")[2] in str(caught.value) or "no_such_module" in str(caught.value)
