"""`docs/adapters.md` shows the tables the reader works from, word for word."""

from __future__ import annotations

from pathlib import Path

from unmerge.formats.peft_fields import FIELDS
from unmerge.formats.peft_keys import EMBEDDING_MODULES, REFUSED_TENSORS

DOC = Path(__file__).parents[3] / "docs" / "adapters.md"


def section(name: str) -> list[str]:
    text = DOC.read_text(encoding="utf-8")
    start, end = f"<!-- {name}: begin -->\n", f"\n<!-- {name}: end -->"
    assert text.count(start) == text.count(end) == 1
    return text[text.index(start) + len(start) : text.index(end)].splitlines()


def test_fields() -> None:
    assert section("fields") == [
        "| field | treatment | because |",
        "|---|---|---|",
        *(f"| `{field.name}` | {field.treatment} | {field.because} |" for field in FIELDS),
    ]
    assert len({field.name for field in FIELDS}) == len(FIELDS)


def test_refused_tensors() -> None:
    assert section("tensors") == [
        "| name contains | because |",
        "|---|---|",
        *(f"| `{name}` | {because} |" for name, because in REFUSED_TENSORS.items()),
    ]


def test_embeddings() -> None:
    listed = ", ".join(f"`{name}`" for name in sorted(EMBEDDING_MODULES))
    assert listed in " ".join(DOC.read_text(encoding="utf-8").split())
