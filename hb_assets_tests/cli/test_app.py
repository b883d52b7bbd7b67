"""How every command ends."""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path

import pytest
import typer
from typer.testing import CliRunner

from hb_assets.cli import app as frame
from hb_assets.cli import state
from hb_assets.cli.state import UpState
from hb_assets.core.errors import HbError
from hb_assets.core.processes import Identity
from hb_assets.core.settings import Settings
from hb_assets.lake.storage.store import Lake
from hb_assets_tests.cli.commands import complaint, hb


def run(error: BaseException) -> tuple[int, str]:
    app = typer.Typer(cls=frame._Group, pretty_exceptions_enable=False)

    @app.callback()
    def group() -> None: ...

    @app.command()
    def fail() -> None:
        raise error

    result = CliRunner().invoke(app, ["fail"])
    return result.exit_code, result.stderr


def test_error_that_a_user_can_mend_is_one_line() -> None:
    code, text = run(HbError("the [lake] is\nfull " + "x" * 200))
    assert code == frame.REFUSED
    assert text == "hb: the [lake] is full " + "x" * 200 + "\n"


def test_failure_of_the_system_is_one_line() -> None:
    code, text = run(OSError(28, "No space left on device", "/lake/raw"))
    assert code == frame.REFUSED
    assert text == "hb: No space left on device (/lake/raw)\n"


def test_ctrl_c_leaves_no_trace() -> None:
    assert run(KeyboardInterrupt()) == (frame.INTERRUPTED, "")


def test_every_command_has_help_and_json() -> None:
    app = frame.load_commands()
    for command in app.registered_commands:
        name = command.name or command.callback.__name__.replace("_", "-")
        result = CliRunner().invoke(app, [name, "--help"])
        assert result.exit_code == 0
        assert "--json" in result.stdout, name


def test_the_list_of_commands_says_what_they_say() -> None:
    commands = typer.main.get_command(frame.load_commands()).commands
    said = {name: one.help.split("\n\n")[0].replace("\n", " ") for name, one in commands.items()}
    assert said == {name: purpose for name, (_, purpose) in frame.COMMANDS.items()}


@pytest.mark.parametrize("options", [["--help"], ["--version"], ["--help", "audit"]])
def test_the_list_of_commands_imports_none_of_them(options: list[str]) -> None:
    """It came after two seconds, for what no reader of it wants."""
    heavy = {"duckdb", "pyarrow", "pydantic", "redis", "uvicorn", "hb_assets.core.settings"}
    program = (
        "import atexit, sys; from hb_assets.cli.app import run; "
        f"atexit.register(lambda: print('heavy:', {heavy}.intersection(sys.modules))); "
        f"run({options!r})"
    )
    done = subprocess.run(
        [sys.executable, "-c", program], check=False, capture_output=True, text=True
    )
    assert done.returncode == 0, done.stderr
    assert done.stdout.endswith("heavy: set()\n")
    assert options == ["--version"] or "quarantine" in done.stdout


QUERY = ("query", "u1", "--start", "2025-01-15", "--end", "2025-01-16")
OF_THE_LAKE = {
    " ".join(command): command
    for command in (
        ("consolidate", "--pending"),
        QUERY,
        ("audit",),
        ("prune",),
        ("forget", "u1", "--yes"),
        ("quarantine", "list"),
        ("quarantine", "show"),
        ("quarantine", "replay", "--all"),
        ("damaged", "list"),
        ("damaged", "show", "file"),
        ("damaged", "restore", "file"),
        ("backfill", "2025-01-15", "2025-01-15"),
    )
}


@pytest.mark.parametrize("command", OF_THE_LAKE.values(), ids=OF_THE_LAKE)
def test_looking_at_a_lake_makes_neither_lake_nor_home(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, command: tuple[str, ...]
) -> None:
    home, lake = tmp_path / "home", tmp_path / "lake"
    monkeypatch.setenv("HB_HOME", str(home))
    monkeypatch.setenv("HB_LAKE", str(lake))
    assert complaint(*command).startswith(f"hb: there is no HB_HOME at {home}: check HB_HOME")
    Lake.open(Settings(home=home, lake=str(lake)))
    assert "there is no HB_HOME" in complaint(*command)
    assert not home.exists()
    home.mkdir()
    monkeypatch.delenv("HB_LAKE")
    text = complaint(*command)
    assert text.startswith(f"hb: there is no lake at {home / 'lake'}: check HB_HOME and HB_LAKE")
    assert text.count("\n") == 1
    assert list(home.iterdir()) == []
    assert f"there is no lake at {home / 'lake'}" in hb("status").stderr
    assert list(home.iterdir()) == []


@pytest.mark.parametrize(
    ("command", "code", "says"),
    [
        ("status", 0, "there is no HB_HOME at"),
        ("keys list", 0, "no keys"),
        ("keys revoke abc", 2, "there are no keys"),
        ("down", 0, "no `hb up` runs"),
        ("sensors list", 2, "hb up"),
    ],
)
def test_what_needs_no_lake_makes_no_home(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, command: str, code: int, says: str
) -> None:
    home = tmp_path / "home"
    monkeypatch.setenv("HB_HOME", str(home))
    assert says in hb(*command.split(), code=code).output
    assert not home.exists()


def test_a_variable_that_is_no_setting_is_warned_about(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("HB_HOME", str(tmp_path))
    monkeypatch.setenv("HB_SHARD", "4")
    monkeypatch.setenv("HB_XYZ", "4")
    monkeypatch.setenv("HB_EXECUTOR", "multiprocess")
    result = hb("status", "--json")
    assert result.stderr.splitlines() == [
        "warning: HB_SHARD is no setting: is HB_SHARDS meant?",
        "warning: HB_XYZ is no setting; docs/settings.md lists them",
    ]


@pytest.mark.parametrize(
    "command",
    [
        ("consolidate", "2025-1-5"),
        ("prune", "2025-W03-1"),
        ("quarantine", "list", "--day", "20250115"),
        ("backfill", "2025-01-15", "2025-02-30"),
        ("query", "u1", "--start", "2025-01-15", "--end", "2025-01-15T10.30"),
        ("query", "\udcff", "--start", "2025-01-15", "--end", "2025-01-16"),
        (*QUERY, "--device", "\udcff"),
        (*QUERY, "--granularity", "7m"),
        ("forget", "\udcff", "--yes"),
        ("quarantine", "show", "--after", "x"),
        ("quarantine", "show", "--limit", "0"),
        ("status", "--days", "-1"),
        ("serve", "--workers", "many"),
        ("keys", "create", "name", "--scope", "read", "--expires", "0d"),
        ("import", "file", "--format", "xml"),
    ],
)
def test_an_argument_that_cannot_be_used(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, command: tuple[str, ...]
) -> None:
    """One error that says which and how it is written; nothing is done."""
    monkeypatch.setenv("HB_HOME", str(tmp_path))
    Lake.open(Settings(home=tmp_path))
    text = complaint(*command)
    assert text.count("Error") == 1
    assert "Invalid value" in text
    assert "isoformat" not in text


def test_settings_that_differ_from_the_running_up(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Acknowledged rows must not end in another lake, nor come out of another Redis."""
    settings = Settings(home=tmp_path)
    settings.run_dir.mkdir()
    own = Identity.of(os.getpid())
    running = UpState(own, settings.start_date, 16, "g", "d", "running", str(settings.lake_dir))
    state.write(settings, running)
    monkeypatch.setenv("HB_HOME", str(tmp_path))
    app = frame.load_commands()
    for variable, value in (("HB_LAKE", "/elsewhere"), ("HB_REDIS_URL", "redis://:geheim@host")):
        with monkeypatch.context() as patch:
            patch.setenv(variable, value)
            result = CliRunner().invoke(app, ["drain"])
        assert result.exit_code == frame.REFUSED
        assert variable in result.stderr
        assert "geheim" not in result.stderr
