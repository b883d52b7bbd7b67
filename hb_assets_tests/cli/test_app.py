"""How every command ends."""

from __future__ import annotations

import typer
from typer.testing import CliRunner

from hb_assets.cli import app as frame
from hb_assets.errors import HbError


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
