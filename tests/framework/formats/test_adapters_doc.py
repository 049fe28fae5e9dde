"""`docs/adapters.md` shows the tables the reader works from, and a format that works."""

from __future__ import annotations

import re
import tomllib
import types
from pathlib import Path

import numpy as np
import pytest
import torch

from unmerge.errors import AdapterError, NonFiniteError, UnsupportedAdapterError
from unmerge.formats import Formats, plugin, read_adapter
from unmerge.formats.peft_fields import FIELDS
from unmerge.formats.peft_keys import EMBEDDING_MODULES, REFUSED_TENSORS
from unmerge.plugins import get_plugin_manager

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


def features() -> list[tuple[str, str, list[str]]]:
    """Return the rows of PEFT's table of features: name, what becomes of it, fields."""
    text = DOC.read_text(encoding="utf-8")
    table = text[text.index("| feature | is | by |") : text.index("The reasons are in")]
    rows = [[cell.strip() for cell in line.split("|")[1:-1]] for line in table.splitlines()[2:]]
    return [(row[0], row[1], re.findall("`([^`]+)`", row[2])) for row in rows if row]


def test_the_features_agree_with_the_fields() -> None:
    treatment = {field.name: field.treatment for field in FIELDS}
    # Of these, the value decides.
    either = {"init_lora_weights", "peft_type"}
    named = set()
    for feature, becomes, fields in features():
        assert becomes in ("supported", "kept verbatim", "refused"), feature
        named.update(fields)
        for name in set(fields) - either:
            assert (treatment[name] == "refused") == (becomes == "refused"), name
            assert becomes != "kept verbatim" or treatment[name] == "used", name
    assert {name for name, what in treatment.items() if what == "refused"} <= named


# -- the format of the guide -------------------------------------------------------------------


def program() -> types.ModuleType:
    (source,) = (block for block in blocks("python") if "class AcmeFormat" in block)
    module = types.ModuleType("acme_adapters")
    exec(compile(source, "acme_adapters.py", "exec"), module.__dict__)  # noqa: S102
    return module


def blocks(language: str) -> list[str]:
    text = DOC.read_text(encoding="utf-8")
    found: list[str] = re.findall(rf"^```{language}\n(.*?)^```", text, flags=re.M | re.S)
    return found


@pytest.fixture(scope="module")
def formats() -> Formats:
    """The built-in formats and the guide's, registered as an entry point would be."""
    manager = get_plugin_manager(load_entry_points=False)
    manager.register(plugin)
    manager.register(program())
    return Formats(manager)


def archive(path: Path, **arrays: np.ndarray) -> Path:
    np.savez(path, **arrays)
    return path


A = np.arange(12, dtype=np.float32).reshape(3, 4)
B = np.ones((5, 3), dtype=np.float32)


def test_the_guide_s_format_reads(formats: Formats, tmp_path: Path) -> None:
    path = archive(tmp_path / "sql.npz", **{"layers.0.q/A": A, "layers.0.q/B": B})
    adapter = read_adapter(path, formats=formats)
    assert (adapter.name, adapter.format, list(adapter.modules)) == (
        "sql",
        "acme.npz",
        ["layers.0.q"],
    )
    assert torch.equal(adapter.modules["layers.0.q"].A, torch.from_numpy(A))
    doubled = read_adapter(path, format=formats.build("acme.npz", {"scaling": 2.0}))
    assert doubled.modules["layers.0.q"].scaling == 2.0


def test_the_guide_s_format_fails_closed(formats: Formats, tmp_path: Path) -> None:
    cases = {
        "half": ({"q/A": A}, AdapterError, "expected <module>/A and"),
        "more": ({"q/A": A, "q/B": B, "head": B}, AdapterError, "expected <module>/A and"),
        "none": ({}, AdapterError, "expected <module>/A and"),
        "unfit": ({"q/A": A, "q/B": B.T}, AdapterError, "do not fit"),
        "double": ({"q/A": A.astype(float), "q/B": B}, AdapterError, "is float64; expected"),
        "text": ({"q/A": np.array("x"), "q/B": B}, AdapterError, "no archive of tensors"),
        "inf": ({"q/A": np.full_like(A, np.inf), "q/B": B}, NonFiniteError, "NaN or infinite"),
        "path": ({"a..q/A": A, "a..q/B": B}, AdapterError, "names no module"),
    }
    for name, (arrays, error, words) in cases.items():
        with pytest.raises(error, match=words):
            read_adapter(archive(tmp_path / f"{name}.npz", **arrays), formats=formats)
    (tmp_path / "text.npz").write_text("no archive")
    with pytest.raises(AdapterError, match="no archive of tensors"):
        read_adapter(tmp_path / "text.npz", formats=formats)
    truncated = archive(tmp_path / "cut.npz", **{"q/A": A, "q/B": B})
    truncated.write_bytes(truncated.read_bytes()[:-30])
    with pytest.raises(AdapterError, match="no archive of tensors"):
        read_adapter(truncated, formats=formats)


def test_the_guide_s_format_cannot_write(formats: Formats, tmp_path: Path) -> None:
    path = archive(tmp_path / "sql.npz", **{"q/A": A, "q/B": B})
    adapter = read_adapter(path, formats=formats)
    with pytest.raises(UnsupportedAdapterError, match="can only be read"):
        formats.build("acme.npz").write(adapter, tmp_path)


def test_the_guide_registers_its_format() -> None:
    (toml,) = blocks("toml")
    assert tomllib.loads(toml)["project"]["entry-points"]["unmerge"] == {"acme": "acme_adapters"}
