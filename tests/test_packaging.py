"""The wheel holds exactly the three packages, and its bundle reader needs nothing of the rest."""

from __future__ import annotations

import subprocess
import sys
import textwrap
import zipfile
from pathlib import Path

import pytest

from adapters import make_adapter
from unmerge import AdapterStore, MergePipeline

ROOT = Path(__file__).parents[1]
BLOCKED = ("torch", "zarr", "icechunk", "unmerge", "unmerge_strategies", "pluggy", "transformers")


@pytest.fixture(scope="module")
def wheel(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("wheel")
    # hatchling itself, so that nothing is fetched and no environment is built.
    subprocess.run(
        [sys.executable, "-m", "hatchling", "build", "--target", "wheel", "--directory", folder],
        cwd=ROOT,
        check=True,
        capture_output=True,
    )
    (built,) = folder.glob("*.whl")
    return built


def test_the_wheel_holds_exactly_the_three_packages(wheel: Path) -> None:
    with zipfile.ZipFile(wheel) as archive:
        names = archive.namelist()
    top = {name.partition("/")[0] for name in names}
    assert {name for name in top if not name.endswith(".dist-info")} == {
        "unmerge",
        "unmerge_bundle",
        "unmerge_strategies",
    }
    for package in ("unmerge", "unmerge_bundle", "unmerge_strategies"):
        assert f"{package}/__init__.py" in names
        assert f"{package}/py.typed" in names


def test_the_wheel_declares_the_entry_points(wheel: Path) -> None:
    with zipfile.ZipFile(wheel) as archive:
        (entry_points,) = [n for n in archive.namelist() if n.endswith("entry_points.txt")]
        text = archive.read(entry_points).decode()
    assert "[unmerge]" in text
    assert "builtin = unmerge_strategies.plugin" in text
    assert "unmerge = unmerge.cli:main" in text


def test_a_bundle_is_read_from_the_wheel_with_everything_else_blocked(
    wheel: Path, tmp_path: Path
) -> None:
    store = AdapterStore.create(tmp_path / "zoo")
    for seed, name in enumerate(("a", "b", "c")):
        store.add(make_adapter(name, seed=seed))
    store.commit("three")
    MergePipeline(store, {"method": "rmm", "basis_size": 2}).run(tmp_path / "out.rmb")

    site = tmp_path / "site"
    with zipfile.ZipFile(wheel) as archive:
        archive.extractall(site)
    program = textwrap.dedent(
        f"""
        import sys

        class Block:
            def find_spec(self, name, path=None, target=None):
                if name.partition(".")[0] in {BLOCKED!r}:
                    raise ImportError(f"{{name}} is blocked")

        sys.meta_path.insert(0, Block())
        sys.path.insert(0, {str(site)!r})
        import unmerge_bundle
        assert unmerge_bundle.__file__.startswith({str(site)!r}), unmerge_bundle.__file__
        bundle = unmerge_bundle.open({str(tmp_path / "out.rmb")!r})
        assert unmerge_bundle.verify({str(tmp_path / "out.rmb")!r}, "reconstruction").ok
        bundle.restore("b").save_peft({str(tmp_path / "restored")!r})
        print(",".join(bundle.adapters))
        """
    )
    done = subprocess.run(
        [sys.executable, "-c", program], check=False, capture_output=True, text=True, cwd=tmp_path
    )
    assert done.returncode == 0, done.stderr
    assert done.stdout.strip() == "a,b,c"
    assert (tmp_path / "restored" / "adapter_model.safetensors").is_file()
