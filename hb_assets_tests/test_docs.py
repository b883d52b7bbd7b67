"""What the docs promise is what the code does: tables, examples, names."""

from __future__ import annotations

import re
from pathlib import Path

import pyarrow as pa
import pytest

from hb_assets.core import record, schema
from hb_assets.lake.files.consolidated import ConsolidatedMetadata

DOCS = Path(__file__).parents[1] / "docs"
LAKE = (DOCS / "lake.md").read_text()


def section(name: str) -> str:
    return LAKE.split(f"\n## {name}\n")[1].split("\n## ")[0]


def rows(text: str) -> list[list[str]]:
    """Cells of a section's table, without its head."""
    lines = [line for line in text.splitlines() if line.startswith("|")]
    return [[cell.strip() for cell in line.strip("|").split("|")] for line in lines[2:]]


@pytest.mark.parametrize(
    ("name", "columns"),
    [
        ("heartbeats/", schema.HEARTBEATS),
        ("minutes/", schema.MINUTES),
        ("quarantine/", schema.QUARANTINE),
    ],
)
def test_columns(name: str, columns: pa.Schema) -> None:
    assert rows(section(name)) == [
        [field.name, str(field.type), field.metadata[b"comment"].decode()] for field in columns
    ]


def test_shards() -> None:
    for user, number, shard in rows(section("Shards")):
        assert record.shard_of(user.strip("`"), 2**64) == int(number)
        assert record.shard_of(user.strip("`"), 16) == int(shard)


def test_footer_fields() -> None:
    named = [name.strip() for row in rows(section("Footers")) for name in row[0].split(",")]
    assert sorted(named) == sorted(ConsolidatedMetadata.__struct_encode_fields__)


@pytest.mark.parametrize(
    "page",
    [*sorted(DOCS.rglob("*.md")), *sorted(DOCS.parent.glob("*.md"))],
    ids=lambda page: page.stem,
)
def test_links(page: Path) -> None:
    for target in re.findall(r"\]\((?!http)([^)#]+)[^)]*\)", page.read_text()):
        assert (page.parent / target).exists(), target
