"""Layers: what pyproject.toml's import-linter contracts say holds; SQL stays clear of data."""

from __future__ import annotations

import ast
import re
import subprocess
import sys
import tomllib
from collections.abc import Iterator
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[1]


def test_imports_keep_to_the_layers() -> None:
    command = Path(sys.executable).with_name("lint-imports")
    linted = subprocess.run(
        [command, "--no-cache"], cwd=ROOT, capture_output=True, text=True, check=False
    )
    assert linted.returncode == 0, linted.stdout + linted.stderr


@pytest.mark.parametrize(
    ("contract", "heading"),
    [("layers", "| package | what it is for | alone"), ("lake", "| package | what it is for |\n")],
)
def test_the_table_of_the_architecture_is_what_is_checked(contract: str, heading: str) -> None:
    page = (ROOT / "docs" / "architecture.md").read_text()
    rows = page[page.index(heading) :].partition("\n\n")[0].splitlines()[2:]
    told = [re.findall(r"`(\w+)`", row.split("|")[1]) for row in rows]
    project = tomllib.loads((ROOT / "pyproject.toml").read_text())
    [found] = [c for c in project["tool"]["importlinter"]["contracts"] if c["id"] == contract]
    places = {
        name: place
        for place, layer in enumerate(found["layers"])
        for name in re.findall(r"\w+", layer)
        if name != "__main__"
    }
    assert sorted(name for row in told for name in row) == sorted(places)
    lowest = [max(places[name] for name in row) for row in told]
    assert lowest == sorted(lowest), "the highest layer comes first"


def texts_made_in_functions(module: ast.Module) -> Iterator[ast.JoinedStr]:
    for outer in ast.walk(module):
        if isinstance(outer, ast.FunctionDef | ast.AsyncFunctionDef | ast.Lambda):
            yield from (inner for inner in ast.walk(outer) if isinstance(inner, ast.JoinedStr))


def test_sql_is_put_together_at_import_time_only() -> None:
    """What exists at import time is our own names; data come later, and are bound."""
    sql = re.compile(r"\b(SELECT|FROM|WHERE|INSERT|COPY|CREATE|ATTACH|SET)\b")
    faults = [
        f"{path.relative_to(ROOT)}:{text.lineno}"
        for path in sorted((ROOT / "hb_assets" / "lake").rglob("*.py"))
        for text in texts_made_in_functions(ast.parse(path.read_text()))
        if any(
            isinstance(part, ast.Constant) and sql.search(str(part.value)) for part in text.values
        )
    ]
    assert not faults
