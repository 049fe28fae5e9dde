"""The three packages depend on each other in one direction only, and on few others."""

from __future__ import annotations

import ast
import sys
from collections.abc import Iterator
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[1]
PACKAGES = {
    "unmerge_bundle": ROOT / "formats" / "unmerge_bundle",
    "unmerge": ROOT / "framework" / "unmerge",
    "unmerge_strategies": ROOT / "plugins" / "unmerge_strategies",
}
THIRD_PARTY = {
    "unmerge_bundle": {"numpy", "ml_dtypes", "pydantic", "safetensors"},
    "unmerge": {
        *("numpy", "ml_dtypes", "pydantic", "pydantic_core", "safetensors"),
        *(
            "torch",
            "zarr",
            "numcodecs",
            "icechunk",
            "pluggy",
            "filelock",
            "threadpoolctl",
            "click",
            "rich",
            "yaml",
        ),
    },
    "unmerge_strategies": {"torch", "pydantic"},
}
OURS = {
    "unmerge_bundle": {"unmerge_bundle"},
    "unmerge": {"unmerge_bundle", "unmerge"},
    "unmerge_strategies": {"unmerge", "unmerge_strategies"},
}
# Inside `unmerge`, from the bottom up: a module may import those below it.
LAYERS = (
    ("errors", "hookspecs"),
    ("arrays", "plugins"),
    ("adapter",),
    ("appending",),
    ("kernels",),
    ("formats",),
    ("stack", "store"),
    ("importing", "exporting"),
    ("merger",),
    ("matrices", "registry"),
    ("elementwise",),
    ("basis", "linear", "trimming"),
    ("recipe", "chunking"),
    ("plan",),
    ("execution",),
    ("pipeline",),
    ("diagnostics",),
    ("demo",),
    ("cli",),
)
LAZY_ONLY = {"transformers", "peft", "huggingface_hub", "matplotlib", "pytest", "hypothesis"}
MAY_BE_LAZY = {"demo.py", "hub.py", "plot.py", "suites.py", "generators.py"}


def sources(package: str) -> list[Path]:
    return sorted(PACKAGES[package].rglob("*.py"))


def imports(path: Path) -> Iterator[tuple[str, bool]]:
    """Every imported module with whether the import runs when the file is imported."""
    tree = ast.parse(path.read_text(encoding="utf-8"))
    deferred = {
        id(inner)
        for node in ast.walk(tree)
        if isinstance(node, ast.FunctionDef | ast.AsyncFunctionDef) or _type_checking(node)
        for inner in ast.walk(node)
    }
    for node in ast.walk(tree):
        eager = id(node) not in deferred
        if isinstance(node, ast.Import):
            yield from ((alias.name, eager) for alias in node.names)
        elif isinstance(node, ast.ImportFrom):
            assert node.level == 0, f"{path}: relative import"
            assert node.module is not None
            yield node.module, eager


def _type_checking(node: ast.AST) -> bool:
    return (
        isinstance(node, ast.If)
        and isinstance(node.test, ast.Name)
        and node.test.id == "TYPE_CHECKING"
    )


@pytest.mark.parametrize("package", PACKAGES)
def test_a_package_imports_only_what_its_layer_may(package: str) -> None:
    allowed = THIRD_PARTY[package] | OURS[package] | set(sys.stdlib_module_names)
    for path in sources(package):
        for module, eager in imports(path):
            top = module.partition(".")[0]
            if top in LAZY_ONLY and package == "unmerge":
                assert not eager, f"{path.name} imports {module} eagerly"
                assert path.name in MAY_BE_LAZY, f"{path.name} imports {module}"
                continue
            assert top in allowed, f"{package}/{path.name} imports {module}"


def test_strategies_use_public_names_and_no_other_strategy() -> None:
    import unmerge

    for path in sources("unmerge_strategies"):
        tree = ast.parse(path.read_text(encoding="utf-8"))
        for node in ast.walk(tree):
            if not isinstance(node, ast.ImportFrom) or node.module is None:
                continue
            if node.module == "unmerge":
                hidden = {alias.name for alias in node.names} - set(unmerge.__all__)
                assert not hidden, f"{path.name} imports {hidden}, which are not public"
            elif node.module.startswith("unmerge."):
                assert node.module.split(".")[1] in ("kernels", "errors"), f"{path}: {node.module}"
            elif node.module.startswith("unmerge_strategies"):
                assert path.name in ("plugin.py", "__init__.py"), f"{path.name}: {node.module}"


def test_the_framework_is_layered() -> None:
    rank = {name: level for level, names in enumerate(LAYERS) for name in names}
    for path in sources("unmerge"):
        place = path.relative_to(PACKAGES["unmerge"])
        name = place.parts[0].removesuffix(".py")
        if name in ("__init__", "testing"):
            continue
        assert name in rank, f"{place} has no layer"
        for module, eager in imports(path):
            parts = module.split(".")
            if parts[0] != "unmerge" or not eager:
                continue
            below = parts[1] if len(parts) > 1 else "hookspecs"
            if below != name:
                assert rank[below] < rank[name], f"{place} imports {module} from above"


def test_the_source_roots_are_no_packages() -> None:
    for root in ("framework", "plugins", "formats"):
        assert not (ROOT / root / "__init__.py").exists()


@pytest.mark.parametrize("package", PACKAGES)
def test_every_file_says_first_why_it_exists_and_is_not_too_long(package: str) -> None:
    for path in sources(package):
        lines = path.read_text(encoding="utf-8").splitlines()
        assert lines[0].startswith('"""'), path
        assert len(lines) <= 600, path
