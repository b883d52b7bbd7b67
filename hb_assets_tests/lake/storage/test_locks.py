"""Lock files: they save work, and never stop it."""

from __future__ import annotations

from datetime import timedelta

from hb_assets.core.settings import Settings
from hb_assets.lake.compaction.consolidation import consolidate
from hb_assets.lake.storage.locks import FileLocks
from hb_assets.lake.storage.store import Lake
from hb_assets_tests.lake.deliveries import DAY, deliver, entry, line


def test_held_by_one_at_a_time_and_not_waited_for_for_ever(lake: Lake, settings: Settings) -> None:
    impatient = settings.model_copy(update={"lock_wait": timedelta(milliseconds=50)})
    ours, theirs = FileLocks(lake, impatient), FileLocks(lake, impatient)
    with ours(DAY, 0) as held, theirs(DAY, 0) as held_too, theirs(DAY, 1) as another:
        assert (held, held_too, another) == (True, False, True)
    with theirs(DAY, 0) as free:
        assert free


def test_whoever_cant_have_it_works_all_the_same(lake: Lake, settings: Settings) -> None:
    impatient = settings.model_copy(update={"lock_wait": timedelta(milliseconds=10)})
    deliver(lake, settings, entry([line()]))
    locks = FileLocks(lake, impatient)
    with locks(DAY, 0), locks(DAY, 1), locks(DAY, 2), locks(DAY, 3):
        other = FileLocks(lake, impatient)
        assert consolidate(lake, DAY, settings, lock=other).unique == 1
