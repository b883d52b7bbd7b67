"""Layers: what pyproject.toml's import-linter contracts say holds; SQL stays clear of data."""

from __future__ import annotations

import ast
import re
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path

ROOT = Path(__file__).parents[1]


def test_imports_keep_to_the_layers() -> None:
    command = Path(sys.executable).with_name("lint-imports")
    linted = subprocess.run(
        [command, "--no-cache"], cwd=ROOT, capture_output=True, text=True, check=False
    )
    assert linted.returncode == 0, linted.stdout + linted.stderr


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
