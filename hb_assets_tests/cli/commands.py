"""Runs commands in this process, as a terminal would."""

from __future__ import annotations

import json
from typing import Any

from typer.testing import CliRunner, Result

from hb_assets.cli.app import load_commands


def hb(*arguments: object, code: int = 0) -> Result:
    """Runs a command; it has to end with this exit code, and never with a trace."""
    result = CliRunner().invoke(load_commands(), [str(argument) for argument in arguments])
    assert result.exit_code == code, (result.output, result.exception)
    assert "Traceback" not in result.output
    return result


def told(*arguments: object, code: int = 0) -> Any:
    """What a command says with --json."""
    return json.loads(hb(*arguments, "--json", code=code).stdout)


def complaint(*arguments: object, code: int = 2) -> str:
    """The one line that a failing command complains with."""
    result = hb(*arguments, code=code)
    assert result.stdout == ""
    return result.stderr
