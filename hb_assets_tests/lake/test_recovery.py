"""Recovery: what was given up is counted as that, and what is put back counts as new."""

from __future__ import annotations

from dataclasses import dataclass
from datetime import timedelta
from functools import partial
from pathlib import Path

import pyarrow.parquet as pq
import pytest

from hb_assets.core import days
from hb_assets.core.errors import DamagedFileError, HbError
from hb_assets.core.record import shard_of
from hb_assets.core.settings import Settings
from hb_assets.lake import ledger, recovery
from hb_assets.lake.compaction import pruning
from hb_assets.lake.compaction.consolidation import consolidate
from hb_assets.lake.files import accepted_losses, consolidated, fragments
from hb_assets.lake.files.accepted_losses import Acceptance
from hb_assets.lake.files.fragments import Fragment
from hb_assets.lake.integrity import damage, known_faults
from hb_assets.lake.storage import layout, parquet
from hb_assets.lake.storage.store import Lake
from hb_assets_tests.lake.deliveries import DAY, NOON, deliver, entry, line, minute_points, rows_of
from hb_assets_tests.lake.deliveries import consolidated as rows_consolidated

SHARD = shard_of("u1", 4)
SOON, LATER = days.end_ms(DAY) + 1000, days.end_ms(DAY) + 2000
LATEST = dict.fromkeys(range(4), (SOON, 0))
EVER = dict.fromkeys(range(4), (LATER, 0))


@pytest.fixture
def settings(tmp_path: Path) -> Settings:
    """No server: nothing here asks for one."""
    return Settings(home=tmp_path / "home", shards=4, raw_keep=timedelta(0))


@pytest.fixture
def copies(tmp_path: Path) -> Path:
    (folder := tmp_path / "copies").mkdir()
    return folder


def published(lake: Lake) -> Path:
    return layout.consolidated_file(lake.root, DAY, SHARD)


def metadata(lake: Lake) -> consolidated.ConsolidatedMetadata:
    found = consolidated.current(lake, DAY, SHARD)
    assert found is not None
    return found.metadata


def copied(path: Path, copies: Path) -> Path:
    copy = copies / path.name
    copy.write_bytes(path.read_bytes())
    return copy


def flip(path: Path, at: int) -> None:
    content = bytearray(path.read_bytes())
    content[at] ^= 1
    path.write_bytes(content)


def no_ledger() -> int:
    raise AssertionError("the footer tells")


@dataclass(frozen=True)
class Accepted:
    acceptance: Acceptance
    kept: int | None


def accept(lake: Lake, path: Path, settings: Settings, missing: int | None = None) -> Accepted:
    shortfall = no_ledger if missing is None else lambda: missing
    done = recovery.accept(lake, path, settings, reason="disk 3", shortfall=shortfall)
    assert done.acceptance is not None
    return Accepted(done.acceptance, done.kept)


def losses(lake: Lake) -> list[Acceptance]:
    return [one for _, one in accepted_losses.standing(lake, lambda error: pytest.fail(str(error)))]


def counted(lake: Lake, settings: Settings) -> tuple[int, int]:
    """Rows of the lake's ledger, which has to add up, and those that are written off."""
    days = ledger.of_days(lake, settings, deep=True)
    assert [fault for one in days for fault in one.faults] == []
    return sum(one.rows for one in days), ledger.of_accepted(lake).rows


def lose(lake: Lake, settings: Settings, one: Fragment) -> None:
    """Damage a fragment and consolidate without it."""
    flip(one.path, 10)
    [_] = consolidate(lake, DAY, settings, watermarks=LATEST).require().set_aside


def test_a_fragment_given_up_and_put_back(lake: Lake, settings: Settings, copies: Path) -> None:
    """The watermark passes it meanwhile, and all else is pruned: it is no replay all the same."""
    deliver(lake, settings, entry([line(), line(at=NOON + 1)], 0))
    [bad] = deliver(lake, settings, entry([line(bpm=80), line(at=NOON + 2), line(bpm=81)], 5))
    deliver(lake, settings, entry([line(bpm=90)], 9))
    copy = copied(bad.path, copies)
    lose(lake, settings, bad)
    assert metadata(lake).mark(0) == (0, 0), "it waits for a person's word"
    aside = lake.root / layout.DAMAGED / bad.path.relative_to(lake.root)

    for _ in range(2):
        done = accept(lake, aside, settings)
        assert (done.acceptance.rows, done.acceptance.first) == (3, bad.name.first)
        assert counted(lake, settings) == (3, 3)
        assert known_faults.faults(lake) == []
        [told] = known_faults.losses(lake, DAY, SHARD)
        assert (told.kind, told.rows) == ("accepted", 3)
    consolidate(lake, DAY, settings, rewrite=True, watermarks=LATEST).require()
    assert metadata(lake).mark(0) == LATEST[0]
    assert pruning.prune(lake, settings).fragments == 2
    assert consolidate(lake, DAY, settings, watermarks=LATEST).require().unique == 2
    assert counted(lake, settings) == (3, 3)

    for _ in range(2):
        recovery.restore(lake, copy, settings)
        assert losses(lake) == known_faults.losses(lake, DAY, SHARD) == []
        assert not aside.exists()
        assert counted(lake, settings) == (6, 0)
    late = deliver(lake, settings, entry([line(at=NOON + 3)], 11, ms=SOON + 1))
    late += deliver(lake, settings, entry([line(bpm=66)], 3))  # it came again, all of it
    done = consolidate(lake, DAY, settings, watermarks=EVER).require()
    assert done.pending == 1 + len(late)
    assert (done.rows, done.unique, done.superseded) == (7, 4, 3)
    assert {one[2]: one[3] for one in rows_consolidated(lake)} == {
        NOON: 90,
        NOON + 1: 75,
        NOON + 2: 75,
        NOON + 3: 75,
    }
    assert metadata(lake).excepted == {}
    assert counted(lake, settings) == (7, 0)
    assert known_faults.faults(lake) == []


def test_a_fragment_put_back_before_anybody_gave_it_up(
    lake: Lake, settings: Settings, copies: Path
) -> None:
    [bad] = deliver(lake, settings, entry([line()], 0))
    copy = copied(bad.path, copies)
    lose(lake, settings, bad)
    assert not recovery.restore(lake, copy, settings).was_accepted
    assert known_faults.faults(lake) == []
    assert consolidate(lake, DAY, settings).require().unique == 1


def test_a_file_mended_where_it_was_set_aside(lake: Lake, settings: Settings) -> None:
    [bad] = deliver(lake, settings, entry([line()], 0))
    lose(lake, settings, bad)
    aside = lake.root / layout.DAMAGED / bad.path.relative_to(lake.root)
    with pytest.raises(HbError, match="nothing was put back"):
        recovery.restore(lake, aside, settings)
    flip(aside, 10)
    recovery.restore(lake, aside, settings)
    assert bad.path.exists()
    assert not aside.exists()


def test_a_damaged_fragment_in_its_place_is_replaced(
    lake: Lake, settings: Settings, copies: Path
) -> None:
    [bad] = deliver(lake, settings, entry([line()], 0))
    copy = copied(bad.path, copies)
    flip(bad.path, 10)
    recovery.restore(lake, copy, settings)
    assert known_faults.faults(lake) == []
    assert consolidate(lake, DAY, settings).require().set_aside == []


def test_a_crash_between_two_steps_of_a_restore(
    lake: Lake, settings: Settings, copies: Path
) -> None:
    """The file is back, its acceptance still lies there: it counts once."""
    [bad] = deliver(lake, settings, entry([line()], 0))
    copy = copied(bad.path, copies)
    lose(lake, settings, bad)
    accept(lake, lake.root / layout.DAMAGED / bad.path.relative_to(lake.root), settings)
    bad.path.write_bytes(copy.read_bytes())
    assert counted(lake, settings) == (1, 0)
    consolidate(lake, DAY, settings, watermarks=LATEST).require()
    assert counted(lake, settings) == (1, 0)


def test_how_many_rows_is_a_bound_where_they_may_have_come_twice(
    lake: Lake, settings: Settings, copies: Path
) -> None:
    [bad] = deliver(lake, settings, entry([line(), line(bpm=80)], 0))
    deliver(lake, settings, entry([line(), line(bpm=80)], 0))
    copy = copied(bad.path, copies)
    lose(lake, settings, bad)
    found = accept(
        lake, lake.root / layout.DAMAGED / bad.path.relative_to(lake.root), settings
    ).acceptance
    assert (found.rows, found.at_most) == (None, 2)
    consolidate(lake, DAY, settings, rewrite=True, watermarks=LATEST).require()
    assert metadata(lake).mark(0) == LATEST[0]
    assert pruning.prune(lake, settings).fragments == 0, "a restore needs it to tell"
    recovery.restore(lake, copy, settings)
    assert pruning.prune(lake, settings).fragments == 0, "and so does its consolidation"
    done = consolidate(lake, DAY, settings).require()
    assert (done.rows, done.unique, done.replayed) == (2, 1, 2)
    assert pruning.prune(lake, settings).fragments == 2


@pytest.mark.parametrize("then", ["stays", "is back", "is deleted"])
def test_what_repeats_an_included_fragment_that_was_set_aside_counts_once(
    lake: Lake, settings: Settings, copies: Path, then: str
) -> None:
    """Its drain died before it could acknowledge; what came again has more entries, as a rule."""
    first = [
        entry([line(), line(bpm=80)], 0),
        entry([line(at=NOON + 1)], 2),
        entry([line(at=NOON + 1, bpm=81)], 3),
    ]
    [bad] = deliver(lake, settings, *first)
    consolidate(lake, DAY, settings).require()
    copy = copied(bad.path, copies)
    bad.path.write_bytes(b"PAR1")
    damage.set_aside(lake, parquet.damaged(bad.path, "cut"), settings)
    if then == "is deleted":
        aside = lake.root / layout.DAMAGED / bad.path.relative_to(lake.root)
        recovery.accept(lake, aside, settings, reason="disk 3", shortfall=no_ledger, delete=True)
    between = entry([line(), line(at=NOON + 2)], 1)
    behind = entry([line(at=NOON + 1, bpm=82)], 4)
    again = deliver(lake, settings, first[0], between, *first[1:], behind)
    assert ledger.of_days(lake, settings)[0].pending == 3
    done = consolidate(lake, DAY, settings, watermarks=LATEST).require()
    assert done.pending == len(again) == 1
    if then == "is back":
        recovery.restore(lake, copy, settings)
        done = consolidate(lake, DAY, settings, rewrite=True, watermarks=LATEST).require()
    assert (done.rows, done.unique, done.superseded) == (7, 3, 4)
    [day] = ledger.of_days(lake, settings, deep=True)
    assert (day.rows, day.pending) == (7, 0)
    assert day.faults == []


def test_nobody_can_tell_how_many(lake: Lake, settings: Settings) -> None:
    [bad] = deliver(lake, settings, entry([line()], 0))
    bad.path.write_bytes(bad.path.read_bytes()[:-1])
    found = accept(lake, bad.path, settings, missing=7).acceptance
    assert (found.rows, found.at_most) == (None, 7)
    assert ledger.of_accepted(lake).at_most == 7
    assert not bad.path.exists()
    assert known_faults.faults(lake) == []


def test_nothing_is_lost_with_what_is_sound_or_included(lake: Lake, settings: Settings) -> None:
    [one] = deliver(lake, settings, entry([line()], 0))
    with pytest.raises(HbError, match="is sound: nothing is lost"):
        accept(lake, one.path, settings)
    consolidate(lake, DAY, settings)
    with pytest.raises(HbError, match="is sound: nothing is lost"):
        accept(lake, published(lake), settings)
    flip(published(lake), 10)
    with pytest.raises(HbError, match="raw has all"):
        accept(lake, published(lake), settings)
    consolidate(lake, DAY, settings).require()
    one.path.write_bytes(b"PAR1")
    with pytest.raises(HbError, match="in the consolidated file"):
        accept(lake, one.path, settings)
    with pytest.raises(HbError, match="is neither"):
        accept(lake, lake.root / "lake.json", settings)
    assert losses(lake) == []


# -- consolidated files


@pytest.fixture
def groups(lake: Lake, settings: Settings, monkeypatch: pytest.MonkeyPatch) -> list[int]:
    """A consolidated file of several row groups, whose raw was pruned; rows of each."""
    monkeypatch.setattr(parquet, "ROW_GROUP", 8)
    lines = [line(at=NOON + n) for n in range(40)]
    deliver(lake, settings, entry([*lines, line(bpm=76)], 0))
    consolidate(lake, DAY, settings, watermarks=LATEST).require()
    pruning.prune(lake, settings)
    found = parquet.footer(published(lake))
    assert found.num_row_groups > 3
    return [found.row_group(number).num_rows for number in range(found.num_row_groups)]


def damage_group(lake: Lake, number: int) -> None:
    path = published(lake)
    column = parquet.footer(path).row_group(number).column(3)
    end = column.data_page_offset + column.total_compressed_size
    flip(path, end - 3)


def test_sound_row_groups_are_kept(
    lake: Lake, settings: Settings, copies: Path, groups: list[int]
) -> None:
    before, rows = metadata(lake), rows_of(published(lake))
    copy = copied(published(lake), copies)
    deliver(lake, settings, entry([line(at=NOON + 100)], 1, ms=SOON + 1))
    damage_group(lake, 1)
    with pytest.raises(DamagedFileError, match="hb damaged"):
        consolidate(lake, DAY, settings).require()
    for _ in range(2):
        done = accept(lake, published(lake), settings)
        assert (done.acceptance.rows, done.kept) == (groups[1], 40 - groups[1])
        assert known_faults.faults(lake) == []
        first, behind = groups[0], groups[0] + groups[1]
        assert rows_of(published(lake)) == rows[:first] + rows[behind:]
        after = metadata(lake)
        assert (after.watermark, after.corrections) == (before.watermark, 1)
        assert counted(lake, settings) == (41 - groups[1] + 1, groups[1])
        # as if the last step had never happened
        damaged = next((lake.root / layout.DAMAGED / layout.HEARTBEATS).rglob("*.parquet"))
        published(lake).write_bytes(damaged.read_bytes())
    accept(lake, published(lake), settings)
    points = minute_points(lake, "u1", NOON, NOON + 60_000, None, settings)
    assert len(points) == 1

    deliver(lake, settings, entry([line(at=NOON + 101)], 2, ms=SOON + 1))
    consolidate(lake, DAY, settings, watermarks=EVER).require()
    assert counted(lake, settings) == (43 - groups[1], groups[1])
    assert pruning.prune(lake, settings).fragments == 0, "a restore needs them"
    for _ in range(2):
        if losses(lake):
            assert recovery.restore(lake, copy, settings).was_accepted
        assert counted(lake, settings) == (43, 0)
        assert consolidate(lake, DAY, settings).require().unique == 42
    assert [one[3] for one in rows_consolidated(lake) if one[2] == NOON] == [76]
    assert pruning.prune(lake, settings).faults == ()


def test_an_older_copy_that_lacks_what_was_pruned_is_refused(
    lake: Lake, settings: Settings, copies: Path, groups: list[int]
) -> None:
    copy = copied(published(lake), copies)
    with pytest.raises(HbError, match="is sound and lacks nothing"):
        recovery.restore(lake, copy, settings)
    deliver(lake, settings, entry([line(at=NOON + 100)], 1, ms=SOON + 1))
    consolidate(lake, DAY, settings, watermarks=EVER).require()
    assert pruning.prune(lake, settings).fragments == 1
    damage_group(lake, 0)
    with pytest.raises(HbError, match=r"raw no longer has \(1 fragments\)"):
        recovery.restore(lake, copy, settings)
    accept(lake, published(lake), settings)
    deliver(lake, settings, entry([line(at=NOON + 101)], 3, ms=SOON + 1))
    consolidate(lake, DAY, settings, watermarks=EVER).require()
    with pytest.raises(HbError, match=r"raw no longer has \(1 fragments\)"):
        recovery.restore(lake, copy, settings)


@pytest.mark.parametrize("how", ["cut", "gone"])
def test_a_file_without_a_footer_is_given_up_as_a_whole(
    lake: Lake, settings: Settings, copies: Path, groups: list[int], how: str
) -> None:
    deliver(lake, settings, entry([line(at=NOON + 100)], 1, ms=SOON + 1))
    path = published(lake)
    copy = copied(path, copies)
    if how == "cut":
        path.write_bytes(path.read_bytes()[:-1])
    else:
        path.unlink()
    assert len(consolidate(lake, DAY, settings).failed) == 1
    done = accept(lake, path, settings, missing=41)
    assert (done.acceptance.rows, done.acceptance.at_most, done.kept) == (None, 41, 1)
    assert known_faults.faults(lake) == []
    assert counted(lake, settings) == (1, 0)
    assert len(losses(lake)) == 1
    assert recovery.restore(lake, copy, settings).was_accepted
    assert counted(lake, settings) == (42, 0)
    assert consolidate(lake, DAY, settings).require().unique == 41
    assert losses(lake) == []


@pytest.mark.parametrize("step", ["move_aside", "mark_complete", "consolidate"])
def test_giving_up_as_a_whole_dies_half_way(
    lake: Lake, settings: Settings, groups: list[int], monkeypatch: pytest.MonkeyPatch, step: str
) -> None:
    """Asked again it goes on, and gives up once."""
    path = published(lake)
    path.write_bytes(path.read_bytes()[:-1])

    def dying(*_: object, **__: object) -> None:
        raise KeyboardInterrupt

    with monkeypatch.context() as patch:
        patch.setattr(damage if step == "move_aside" else recovery, step, dying)
        with pytest.raises(KeyboardInterrupt):
            accept(lake, path, settings, missing=41)
    if step == "consolidate":
        with pytest.raises(HbError, match="raw has all"):
            accept(lake, path, settings)
    else:
        accept(lake, path, settings)
    assert [one.at_most for one in losses(lake)] == [41]
    assert known_faults.faults(lake) == []
    assert consolidate(lake, DAY, settings).require().unique == 0


def test_without_page_checksums_nothing_of_it_can_be_trusted(
    lake: Lake, settings: Settings, monkeypatch: pytest.MonkeyPatch
) -> None:
    """A file of an older release: which of its row groups is damaged can't be told."""
    plain = partial(pq.ParquetWriter)

    def older(*arguments: object, **options: object) -> pq.ParquetWriter:
        return plain(*arguments, **{**options, "write_page_checksum": False})

    with monkeypatch.context() as patch:
        patch.setattr(parquet.pq, "ParquetWriter", older)
        deliver(lake, settings, entry([line(at=NOON + n) for n in range(9)], 0))
        consolidate(lake, DAY, settings, watermarks=LATEST).require()
    deliver(lake, settings, entry([line(at=NOON + 50)], 1, ms=SOON + 1))
    pruning.prune(lake, settings)
    damage_group(lake, 0)
    done = accept(lake, published(lake), settings)
    assert (done.acceptance.rows, done.kept) == (9, 0)
    assert consolidate(lake, DAY, settings).require().unique == 1
    assert counted(lake, settings) == (1, 9)


def test_raw_brings_back_what_a_damaged_row_group_held(
    lake: Lake, settings: Settings, groups: list[int]
) -> None:
    [one] = deliver(lake, settings, entry([line(at=NOON + n, bpm=99) for n in range(40)], 1))
    consolidate(lake, DAY, settings).require()
    assert fragments.listed(lake, DAY, SHARD) == [one]
    damage_group(lake, 2)
    done = accept(lake, published(lake), settings)
    assert (done.acceptance.rows, done.kept) == (0, 40)
    assert {row[3] for row in rows_consolidated(lake)} == {99}


@pytest.mark.parametrize("of", ["fragment", "consolidated"])
def test_a_copy_that_comes_while_the_damaged_one_is_set_aside_stays(
    lake: Lake, settings: Settings, copies: Path, monkeypatch: pytest.MonkeyPatch, of: str
) -> None:
    """It went away in the place of the damaged one, which had been looked at before."""
    [path] = [one.path for one in deliver(lake, settings, entry([line("u1")]))]
    if of == "consolidated":
        consolidate(lake, DAY, settings).require()
        path = published(lake)
    copy = copied(path, copies)
    flip(path, 10)
    move = damage.move_aside

    def late(lake: Lake, path: Path) -> Path | None:
        monkeypatch.setattr(damage, "move_aside", move)
        recovery.restore(lake, copy, settings)
        return move(lake, path)

    monkeypatch.setattr(damage, "move_aside", late)
    said = damage.set_aside(lake, parquet.damaged(path, "a bit"), settings)
    assert said is not None
    assert "a whole copy" in said
    assert path.read_bytes() == copy.read_bytes()
    assert list((lake.root / layout.DAMAGED).rglob("*.parquet")) == []


def test_a_restored_fragment_that_was_set_aside_meanwhile_is_put_back(
    lake: Lake, settings: Settings, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The only whole one was removed in the place of the damaged one."""
    [path] = [one.path for one in deliver(lake, settings, entry([line("u1")]))]
    whole = path.read_bytes()
    moved = damage.move_aside(lake, path)
    assert moved is not None
    remove = accepted_losses.remove

    def late(given_up: Path) -> None:
        damage.move_aside(lake, path)
        remove(given_up)

    monkeypatch.setattr(accepted_losses, "remove", late)
    recovery.restore(lake, moved, settings)
    assert path.read_bytes() == whole
    assert not moved.exists()
