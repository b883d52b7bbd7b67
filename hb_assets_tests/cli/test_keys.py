from __future__ import annotations

from pathlib import Path

import pytest

from hb_assets.cli import status
from hb_assets.core.settings import Settings
from hb_assets.gateway.auth import keyring
from hb_assets_tests.cli.commands import complaint, hb, told


@pytest.fixture(autouse=True)
def home(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> Path:
    monkeypatch.setenv("HB_HOME", str(tmp_path / "home"))
    return tmp_path / "home"


def test_a_key_is_printed_once_and_alone(home: Path) -> None:
    made = hb("keys", "create", "phones", "--scope", "ingest", "--scope", "read")
    token = made.stdout.strip()
    assert keyring.TOKEN.fullmatch(token)
    assert "from now on" in made.stderr
    assert "from now on" not in hb("keys", "create", "more", "--scope", "admin").stderr
    assert token[16:] not in hb("keys", "list").output + (home / "keys.json").read_text()


def test_list_tells_what_each_may(home: Path) -> None:
    app = told("keys", "create", "app", "--scope", "read", "--user", "u1", "--expires", "90d")
    ops = told("keys", "create", "ops", "--scope", "admin")
    rows = told("keys", "list")
    assert [(row["name"], row["scopes"], row["one_user"]) for row in rows] == [
        ("app", ["read"], True),
        ("ops", ["admin"], False),
    ]
    assert rows[0]["expires"]
    assert rows[1]["expires"] is None
    shown = hb("keys", "list").stdout
    assert app["id"] in shown
    assert "u1" not in shown
    assert [row["id"] for row in told("keys", "list", "--user", "u1")] == [app["id"]]
    assert ops["id"] not in hb("keys", "list", "--user", "u1").stdout


def test_revoke_ends_one_key_and_warns_about_the_last(home: Path) -> None:
    first, second = (told("keys", "create", name, "--scope", "ingest")["id"] for name in "ab")
    assert told("keys", "revoke", first) == {"revoked": first, "left": 1}
    assert "last key" in hb("keys", "revoke", second).stderr
    assert "hb keys list" in complaint("keys", "revoke", second)
    assert told("keys", "list") == []


@pytest.mark.parametrize(
    "wrong",
    [
        ["x", "--scope", "everything"],
        ["x", "--scope", "read", "--scope", "admin", "--user", "u1"],
        ["x", "--scope", "read", "--user", "u" * 129],
        ["x", "--scope", "read", "--expires", "0s"],
        ["a\nb", "--scope", "read"],
    ],
)
def test_what_can_not_be_is_refused_and_nothing_made(home: Path, wrong: list[str]) -> None:
    complaint("keys", "create", *wrong)
    assert not home.exists()


def test_a_damaged_file_is_an_alarm(home: Path) -> None:
    hb("keys", "create", "phones", "--scope", "ingest")
    (home / "keys.json").write_text("{")
    assert "damaged" in complaint("keys", "list")
    assert any("damaged" in alarm for alarm in status.gathered(Settings(home=home)).alarms)
