"""The table of docs/reliability.md: what each kind of damage looks like in each place."""

from __future__ import annotations

import json
import shutil
import tempfile
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import dagster as dg
import pytest

from hb_assets_tests import damage
from hb_assets_tests.conftest import emptied
from hb_assets_tests.damage import Damage, Names, Seen
from hb_assets_tests.test_docs import DOCS, rows

TITLE = "## Damage, and where it shows\n"
TABLE = (DOCS / "reliability.md").read_text().split(TITLE)[1].split("\n## ")[0]
PLACES = [cell.strip() for cell in TABLE.partition("\n|")[2].split("\n")[0].split("|")[1:-1]]
EXPECTED = {name: dict(zip(PLACES, cells, strict=True)) for name, *cells in rows(TABLE)}
DAMAGES: dict[str, Damage] = {
    "a bit of a pending fragment flips, and somebody reads it": damage.bit,
    "a pending fragment is cut": damage.cut,
    "a consolidated file is deleted, its fragments are pruned": damage.published_is_gone,
    "a pending fragment is deleted": damage.pending_is_gone,
    "a consolidated file's footer is forged": damage.forged,
    "a string lies at the key of a shard's stream": damage.wrong_type,
    "the lake's disk is full": damage.full_disk,
    "a folder can't be read": damage.closed_folder,
}


@dataclass
class Look:
    """What was seen of one damage; one of `names` has to be read, `home` nobody may see."""

    seen: Seen
    names: Names
    home: str


@pytest.fixture(scope="module")
def look(server_urls: Callable[[str], str]) -> Iterator[Callable[[str], Look]]:
    """Looks at each damage once."""
    looks: dict[str, Look] = {}
    homes: list[Path] = []

    def look(name: str) -> Look:
        if name not in looks:
            homes.append(
                Path(tempfile.mkdtemp(prefix="hb-damage-"))
            )  # others can't get at pytest's
            settings = damage.settings_of(homes[-1], emptied(server_urls("valkey")))
            with (
                dg.DagsterInstance.ephemeral() as instance,
                DAMAGES[name](damage.build(settings), settings) as names_of_it,
            ):
                seen = damage.seen(settings, instance)
            looks[name] = Look(seen, names_of_it, str(settings.home))
        return looks[name]

    yield look
    for home in homes:
        shutil.rmtree(home)


def test_every_damage_is_in_the_table() -> None:
    assert list(EXPECTED) == list(DAMAGES)
    assert PLACES == ["query", "GET", "`hb status`", "/health", "/metrics", "Dagster", "`hb audit`"]


@pytest.mark.parametrize("place", PLACES)
@pytest.mark.parametrize("name", DAMAGES)
def test_cell(look: Callable[[str], Look], name: str, place: str) -> None:
    found = look(name)
    CHECKS[place](found.seen[place], EXPECTED[name][place], found)


def query(seen: list[Seen], expected: str, look: Look) -> None:
    bad, next_day = seen
    assert (next_day["code"], next_day["said"]["count"]) == (0, 1)
    if expected == "refused":
        assert bad["code"] == 2
        assert bad["said"] is None
        assert any(name in bad["complaint"] for name in look.names)
        assert len(bad["complaint"].splitlines()) == 1
    else:
        assert bad["code"] == 0
        assert bad["said"]["count"] == {"whole": 2, "short": 1}[expected]


def get(seen: list[Seen], expected: str, look: Look) -> None:
    bad, next_day = seen
    assert (next_day["code"], next_day["said"]["count"]) == (200, 1)
    assert look.home not in json.dumps(bad)
    if expected == "500":
        assert bad["code"] == 500
        assert bad["said"]["type"]
    else:
        assert bad["code"] == 200
        assert bad["said"]["count"] == {"200": 2, "short": 1}[expected]


def status(seen: Seen, expected: str, look: Look) -> None:
    assert [one["day"] for one in seen["said"]["days"]] == [str(damage.DAY), str(damage.NEXT_DAY)]
    assert seen["said"]["days"][1]["unique"] == 1
    assert len(seen["said"]["buffer"]) >= damage.SHARDS - 1
    names(seen, seen["said"]["alarms"], expected, look)


def audit(seen: Seen, expected: str, look: Look) -> None:
    assert [one["day"] for one in seen["said"]["audit"]["days"]] == [
        str(damage.DAY),
        str(damage.NEXT_DAY),
    ]
    assert seen["said"]["audit"]["days"][1]["unique"] == 1
    names(seen, seen["said"]["audit"]["differences"], expected, look)


def names(seen: Seen, lines: list[str], expected: str, look: Look) -> None:
    if expected == "nothing":
        assert (seen["code"], lines) == (0, [])
    else:
        assert expected == "names it"
        assert seen["code"] == 1
        assert any(name in one for one in lines for name in look.names), lines


def health(seen: Seen, expected: str, look: Look) -> None:
    assert (seen["code"], seen["failing"]) == (200, [])
    assert bool(seen["alarms"]) == (expected == "alarm")
    assert look.home not in json.dumps(seen)


def metrics(seen: dict[str, float], expected: str, look: Look) -> None:
    told = {
        name
        for name, value in seen.items()
        if (value > 0 and name.startswith(("hb_lake_faults", "hb_buffer_unusable")))
        or (value == 0 and name == "hb_lake_up")
    }
    named = expected.replace("SHARD", f"{damage.OTHER_SHARD:02d}").split("`")[1:2]
    assert told == set(named)


def dagster(seen: Seen, expected: str, look: Look) -> None:
    told = {name.partition(":")[0] for name in seen["alarms"]}
    if seen["red"]:
        assert seen["red"] == [str(damage.DAY)]
        told.add("complete")
    assert told == set(expected.split("`")[1::2])


CHECKS: dict[str, Callable[[Any, str, Look], None]] = {
    "query": query,
    "GET": get,
    "`hb status`": status,
    "/health": health,
    "/metrics": metrics,
    "Dagster": dagster,
    "`hb audit`": audit,
}
