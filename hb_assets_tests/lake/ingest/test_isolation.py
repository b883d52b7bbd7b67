"""Isolation: what ends its decoder is poison, and nothing else is."""

from __future__ import annotations

import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import psutil
import pyarrow as pa
import pytest

from hb_assets.core.errors import HbError
from hb_assets.core.settings import Settings
from hb_assets.lake.ingest import isolation
from hb_assets.lake.ingest.decode import Decoded, decode
from hb_assets_tests.lake.deliveries import Delivered, line

pytestmark = pytest.mark.slow


@pytest.fixture(autouse=True)
def nothing_is_left(settings: Settings) -> Iterator[None]:
    before = psutil.Process().children()  # servers of other tests
    yield
    assert set(psutil.Process().children()) <= set(before)
    spill = settings.run_dir / "spill"
    assert not spill.exists() or list(spill.iterdir()) == []


@pytest.fixture
def acting(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(
        isolation, "COMMAND", (sys.executable, "-m", "hb_assets_tests.dying_decoder")
    )


def suspect(data: bytes | None, seq: int = 0) -> Delivered:
    return Delivered(seq=seq, data=data, deliveries=6)


def whole(parts: Iterator[Decoded]) -> Decoded:
    found = list(parts)
    return Decoded(
        pa.concat_tables([part.rows for part in found]),
        pa.concat_tables([part.rejected for part in found]),
        [sum(part.counts[0] for part in found)],
        sum(part.unknown_fields for part in found),
    )


def examined(settings: Settings, *suspects: Delivered) -> dict[int, Decoded]:
    return {one.seq: whole(parts) for one, parts in isolation.examine(suspects, settings)}


def without_time(rejected: pa.Table) -> list[dict[str, Any]]:
    return rejected.drop_columns(["quarantined_at"]).to_pylist()


def test_a_good_suspect_is_as_good_as_any_entry(settings: Settings) -> None:
    more = line("u3")[:-1] + b', "steps": 7}'
    suspects = [
        suspect(b"\n".join([line(), b"bad", b"", more, line(bpm=5), line("a\\u0000b")]), 1),
        suspect(None, 2),
        suspect(b" \n", 3),
        suspect(b"[" * 100_000 + b"\n" + line() + b"\n\xff\n", 4),
    ]
    found = examined(settings, *suspects)
    assert list(found) == [1, 2, 3, 4]
    for one in suspects:
        usual, careful = decode([one], settings), found[one.seq]
        assert careful.rows.equals(usual.rows)
        assert without_time(careful.rejected) == without_time(usual.rejected)
        assert (careful.counts, careful.unknown_fields) == (usual.counts, usual.unknown_fields)


def test_none() -> None:
    assert list(isolation.examine([], Settings(home=Path("/dev/null/nowhere")))) == []


def test_poison(settings: Settings, acting: None, caplog: pytest.LogCaptureFixture) -> None:
    """Its lines are refused one by one; entries before it are decoded, those behind it later."""
    poison = suspect(b"\n".join([line("secret"), b"", b"segfault", b" ", b"\xff"]) + b"\n", 2)
    first, last = suspect(line(), 1), suspect(line(), 3)
    found: dict[int, Decoded] = {}
    for _ in range(3):  # cycles: each does at least one
        found |= examined(settings, *(one for one in (first, poison, last) if one.seq not in found))
    assert list(found) == [1, 2, 3]
    assert found[3].rows.num_rows == 1
    assert found[1].rows.num_rows == 1
    assert found[2].rows.num_rows == 0
    rejected = found[2].rejected
    assert rejected["raw"].to_pylist() == [line("secret"), b"segfault", b"\xff"]
    assert rejected["arrival_pos"].to_pylist() == [0, 2, 4]
    assert set(rejected["attempts"].to_pylist()) == {6}
    assert set(rejected["reason"].to_pylist()) == {"record_poison"}
    [message] = set(rejected["message"].to_pylist())
    assert "SIGSEGV" in message
    assert "secret" not in message + caplog.text
    assert found[2].counts == [3]


@pytest.mark.parametrize(
    ("word", "how"),
    [
        (b"killed", "SIGKILL"),
        (b"spin", "HB_POISON_SECONDS"),
        (b"sleep", "SIGALRM"),
        (b"fail", "it raised RuntimeError"),
        (b"allocate", "it raised MemoryError"),
    ],
)
def test_how_poison_ends_its_decoder_is_told(
    settings: Settings, acting: None, caplog: pytest.LogCaptureFixture, word: bytes, how: str
) -> None:
    quick = settings.model_copy(update={"poison_seconds": 1.0})
    rejected = examined(quick, suspect(b"\n".join([line("secret"), word])))[0].rejected
    assert rejected["reason"].to_pylist() == ["record_poison"] * 2
    [message] = set(rejected["message"].to_pylist())
    assert how in message
    assert "secret" not in message + caplog.text


def test_more_memory_than_a_suspect_may_take(settings: Settings) -> None:
    """No hook here: the kernel's limit ends the child."""
    small = settings.model_copy(update={"poison_memory": 512 * 2**20})
    huge = suspect(b'{"x": "' + b"y" * 300_000_000 + b'"}')
    found = examined(small, huge)[0]
    assert found.rejected["reason"].to_pylist() == ["record_poison"]
    assert len(found.rejected["raw"][0].as_buffer()) == len(huge.data or b"")


def test_a_large_entry_has_its_time_piece_by_piece(settings: Settings, acting: None) -> None:
    """It takes more CPU time than one piece may: that proves nothing."""
    tight = settings.model_copy(update={"poison_seconds": 1.0, "drain_max_rows": 1})
    large = suspect(b"\n".join([line("busy"), *(line(f"u{n}") for n in range(3))]))
    assert examined(tight, large)[0].rows.num_rows == 4


FULL = """
import resource
from hb_assets.lake.ingest import isolation
resource.setrlimit(resource.RLIMIT_FSIZE, ({bytes}, {bytes}))
isolation.main()
"""


@pytest.mark.parametrize("free", [0, 1, 600])
def test_a_disk_where_nothing_more_can_be_written(
    settings: Settings, monkeypatch: pytest.MonkeyPatch, free: int
) -> None:
    """No hook here: no file of the child's, whatever it is for, grows beyond the limit."""
    code = FULL.format(bytes=free)
    monkeypatch.setattr(isolation, "COMMAND", (sys.executable, "-c", code))
    monkeypatch.setenv("PYTHONDONTWRITEBYTECODE", "1")  # Python would keep a module's first bytes
    with pytest.raises(OSError, match="File too large"):
        examined(settings, suspect(b"\n".join(line(f"u{n}") for n in range(500))))


def test_a_count_that_could_not_be_written(
    settings: Settings, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The disk had room for the file itself, and for no byte in it."""
    code = """
import errno, pathlib
from hb_assets.lake.ingest import isolation
def write_text(path, _):
    path.touch()
    raise OSError(errno.ENOSPC, "No space left on device")
pathlib.Path.write_text = write_text
isolation.main()
"""
    monkeypatch.setattr(isolation, "COMMAND", (sys.executable, "-c", code))
    with pytest.raises(OSError, match="No space left"):
        examined(settings, suspect(line()))


@pytest.mark.parametrize("end", ["sys.exit(1)", "os._exit(1)", "os.close(2); os._exit(120)"])
def test_an_end_without_a_reason_says_nothing_about_an_entry(
    settings: Settings, monkeypatch: pytest.MonkeyPatch, end: str
) -> None:
    code = f"""
import os, sys
from hb_assets.lake.ingest import decode; from hb_assets.lake.ingest import isolation
def pieces(*_, **__):
    {end}
decode.pieces = pieces
isolation.main()
"""
    monkeypatch.setattr(isolation, "COMMAND", (sys.executable, "-c", code))
    with pytest.raises(HbError, match="without a reason"):
        examined(settings, suspect(line()))


def test_a_child_that_says_more_than_a_pipe_holds(
    settings: Settings, monkeypatch: pytest.MonkeyPatch
) -> None:
    code = "import os; [os.write(2, b'x' * 2**16) for _ in range(9)]; "
    code += "from hb_assets.lake.ingest import isolation; isolation.main()"
    monkeypatch.setattr(isolation, "COMMAND", (sys.executable, "-c", code))
    assert examined(settings, suspect(line()))[0].rows.num_rows == 1


def test_a_disk_that_fails_under_a_mapped_file(settings: Settings, acting: None) -> None:
    with pytest.raises(OSError, match="SIGBUS"):
        examined(settings, suspect(b"bus error"))


def test_a_disk_that_is_full_says_nothing_about_an_entry(settings: Settings, acting: None) -> None:
    found = isolation.examine([suspect(line(), 1), suspect(b"full disk", 2)], settings)
    assert next(found)[0].seq == 1
    with pytest.raises(OSError, match="No space left"):
        next(found)


def test_somebody_who_ends_the_child_says_nothing_about_an_entry(
    settings: Settings, acting: None
) -> None:
    with pytest.raises(HbError, match="ended by SIGTERM"):
        examined(settings, suspect(b"terminated"))


@pytest.mark.parametrize(
    "code", ["pass", "raise SystemExit(3)", "import os; os.abort()", "raise OSError"]
)
def test_a_child_that_cannot_start_says_nothing_about_an_entry(
    settings: Settings, monkeypatch: pytest.MonkeyPatch, code: str
) -> None:
    monkeypatch.setattr(isolation, "COMMAND", (sys.executable, "-c", code))
    with pytest.raises(HbError, match="can't start"):
        examined(settings, suspect(line()))


def test_no_program(settings: Settings, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(isolation, "COMMAND", ("/no/such/program",))
    with pytest.raises(FileNotFoundError):
        examined(settings, suspect(line()))
