"""JSON: one object on each line, an array, or indented objects; never held whole."""

from __future__ import annotations

import json
import random
import tracemalloc
from pathlib import Path

import pytest

from hb_assets.pipeline.importing.sources import MOST
from hb_assets_tests.lake.deliveries import NOON, line
from hb_assets_tests.pipeline.importing.reading import of, read

HEARTBEATS = [json.loads(line(at=NOON + n, bpm=70 + n)) for n in range(3)]


def test_lines(tmp_path: Path) -> None:
    lines = [line(), b"", b"\xff", line(bpm=5), line("u2") + b"\r", b'{"user_id": 5}', b"[1]"]
    found = of(tmp_path / "a.ndjson", b"\n".join(lines))
    assert [one.user_id for one in found.heartbeats] == ["u1", "u2"]
    assert found.reasons == [
        (3, "record_not_json"),
        (4, "heart_rate_out_of_range"),
        (6, "user_id_wrong_type"),
        (7, "record_not_an_object"),
    ]


def test_a_byte_order_mark(tmp_path: Path) -> None:
    for text in (line() + b"\n", b"[" + line() + b"]", b"{\n" + line()[1:]):
        found = of(tmp_path / "a.json", b"\xef\xbb\xbf" + text)
        assert (found.bpm, found.refused, found.done.fault) == ([75], [], None)


def test_a_long_line_ends_no_file(tmp_path: Path) -> None:
    long = b'{"x": "' + b"x" * 3 * MOST + b'"}'
    found = of(tmp_path / "a.ndjson", b"\n".join([long, line(), long]))
    assert found.bpm == [75]
    assert found.reasons == [(1, "record_too_long"), (3, "record_too_long")]


@pytest.mark.parametrize("indent", [None, 0, 2])
def test_an_array(tmp_path: Path, indent: int | None) -> None:
    text = json.dumps([*HEARTBEATS[:2], 5, {"user_id": 5}, HEARTBEATS[2]], indent=indent)
    for content in (text, f"\n \n{text}\r\n"):
        found = of(tmp_path / "a.json", content)
        assert found.late == [0, 1, 2]
        assert found.reasons == [(3, "record_not_an_object"), (4, "user_id_wrong_type")]
        assert found.done.fault is None
    assert of(tmp_path / "b.json", "[]").bpm == []


def test_indented_objects(tmp_path: Path) -> None:
    found = of(tmp_path / "a.json", "\n".join(json.dumps(one, indent=4) for one in HEARTBEATS))
    assert found.late == [0, 1, 2]
    assert found.done.fault is None


def test_a_bad_byte_refuses_its_element(tmp_path: Path) -> None:
    bad = line("secret").replace(b"secret", b"secret\xe9")
    found = of(tmp_path / "a.json", b"[" + b",".join([line(), bad, line(bpm=76)]) + b"]")
    assert (found.bpm, found.reasons) == ([75, 76], [(2, "record_not_json")])


@pytest.mark.parametrize(
    ("behind", "why"),
    [
        (b"", "isn't closed behind record 1"),
        (b",", "ends where record 2 is due"),
        (b",]", "record 2 isn't JSON"),
        (b" {}]", "isn't closed behind record 1"),
        (b",{'secret': 177}]", "record 2 isn't JSON"),
        (b',{"user_id": "secret', "record 2 isn't JSON"),
        (b',"' + b"x" * 3 * MOST + b'"]', "record 2 isn't JSON, or is longer"),
        (b"," + b"[" * 100_000, "record 2 isn't JSON"),
        (b"] {}", "something follows"),
    ],
)
def test_an_array_that_breaks_off(tmp_path: Path, behind: bytes, why: str) -> None:
    """What stands before is taken."""
    found = of(tmp_path / "a.json", b"[" + line() + behind)
    assert found.bpm == [75]
    assert why in found.fault


def test_a_value_where_reading_goes_on(tmp_path: Path) -> None:
    """No number is cut in two, wherever it stands."""
    count = 2 * MOST // 9
    found = of(tmp_path / "a.json", "[" + "12345678," * count + line().decode() + "]")
    assert (found.bpm, len(found.refused), found.done.fault) == ([75], count, None)


def test_an_indented_object_that_breaks_off(tmp_path: Path) -> None:
    found = of(tmp_path / "a.json", json.dumps(HEARTBEATS[0], indent=1) + '\n{"user_id": \n')
    assert found.bpm == [70]
    assert "record 2 isn't JSON" in found.fault


def test_an_array_is_never_held_whole(tmp_path: Path) -> None:
    """Nothing of an array that is many times larger than what is read at once is lost."""
    noise = random.Random(11)
    path = tmp_path / "a.json"
    with path.open("wb") as file:
        file.write(b"[")
        for n in range(8000):
            extra = json.dumps({"note": "\u00e9\U0001f600" * noise.randrange(400)}).encode()
            file.write(b",\n"[: 2 * bool(n)] + line(at=NOON + n)[:-1] + b"," + extra[1:])
        file.write(b"]")
    assert path.stat().st_size > 20 * MOST
    tracemalloc.start()
    found = read(path)
    _, peak = tracemalloc.get_traced_memory()
    tracemalloc.stop()
    assert found.late == list(range(8000))
    assert peak < path.stat().st_size / 2
