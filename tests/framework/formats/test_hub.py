"""Adapters come from the hub by id and revision, from its cache offline, or not with a reason."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
from huggingface_hub import constants
from safetensors.torch import save

from adapters import make_adapter, peft_tensors
from hub_server import Hub, serve
from unmerge.adapter import Adapter
from unmerge.errors import AdapterError, ConfigError, UnknownFormatError
from unmerge.formats import CheckpointFormat, PeftFileFormat, read_adapter
from unmerge.formats.hub import HubAddress, hub_address

CONFIG, WEIGHTS = "adapter_config.json", "adapter_model.safetensors"


def peft_files(adapter: Adapter, folder: str = "") -> dict[str, bytes]:
    return {
        f"{folder}{CONFIG}": adapter.config.encode(),
        f"{folder}{WEIGHTS}": save(peft_tensors(adapter)),
    }


@pytest.fixture(autouse=True)
def elsewhere(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """An empty working directory and cache; nothing can be reached."""
    monkeypatch.chdir(tmp_path)
    monkeypatch.setenv("NO_PROXY", "127.0.0.1")
    monkeypatch.delenv("HF_TOKEN", raising=False)
    monkeypatch.setattr(constants, "HF_HUB_CACHE", str(tmp_path / "cache"))
    monkeypatch.setattr(constants, "HF_HUB_OFFLINE", True)
    return tmp_path


@pytest.fixture
def hub(monkeypatch: pytest.MonkeyPatch) -> Iterator[Hub]:
    """A hub with two revisions of one adapter, which can be reached."""
    served = Hub()
    old, new = make_adapter("x", seed=0), make_adapter("x", seed=1)
    served.push("org/sql", {**peft_files(old), "train.py": b"raise SystemExit"}, "v1")
    others = {"README.md": b"", "optimizer.pt": b"", "checkpoint-5/" + WEIGHTS: b"", "a.bin": b""}
    served.push("org/sql", {**peft_files(new), **others}, "main", "refs/pr/1")
    with serve(served) as endpoint:
        monkeypatch.setattr(constants, "HF_HUB_OFFLINE", False)
        monkeypatch.setattr(constants, "ENDPOINT", endpoint)
        template = endpoint + "/{repo_id}/resolve/{revision}/{filename}"
        monkeypatch.setattr(constants, "HUGGINGFACE_CO_URL_TEMPLATE", template)
        yield served


def refused(path: str, error: type[Exception] = AdapterError, **arguments: Any) -> str:
    with pytest.raises(error) as caught:
        read_adapter(path, **arguments)
    assert "\n" not in str(caught.value)
    return str(caught.value)


def seed_of(adapter: Adapter) -> int:
    seeds = {make_adapter("x", seed=seed).digest(): seed for seed in range(3)}
    return seeds[adapter.digest()]


@pytest.mark.parametrize(
    ("path", "revision", "seed"),
    [
        ("org/sql", None, 1),
        ("hf://org/sql", None, 1),
        ("hf://org/sql/", None, 1),
        ("org/sql", "v1", 0),
        ("org/sql@v1", None, 0),
        ("hf://org/sql@v1", None, 0),
        ("hf://org/sql", "v1", 0),
        ("org/sql@refs/pr/1", None, 1),
        ("hf://org/sql@refs%2Fpr%2F1", None, 1),
    ],
)
def test_an_id(hub: Hub, path: str, revision: str | None, seed: int) -> None:
    adapter = read_adapter(path, revision=revision)
    assert seed_of(adapter) == seed
    assert (adapter.name, adapter.format) == ("sql", "peft")
    commit = list(hub.commits["org/sql"])[seed]
    assert adapter.source == f"org/sql@{commit}"
    # The base model's revision is another thing than the adapter's.
    assert (adapter.base_model, adapter.revision) == ("org/base", None)


def test_a_commit(hub: Hub) -> None:
    commit = hub.refs["org/sql"]["v1"]
    assert seed_of(read_adapter(f"org/sql@{commit}", name="other")) == 0


def test_only_what_is_read_is_downloaded(hub: Hub) -> None:
    read_adapter("org/sql")
    assert hub.downloaded() == [CONFIG, WEIGHTS]


def test_a_branch_that_moves(hub: Hub) -> None:
    assert seed_of(read_adapter("org/sql")) == 1
    commit = hub.push("org/sql", peft_files(make_adapter("x", seed=2)), "main")
    adapter = read_adapter("org/sql")
    assert (seed_of(adapter), adapter.source) == (2, f"org/sql@{commit}")


def test_the_cache_without_a_connection(hub: Hub, monkeypatch: pytest.MonkeyPatch) -> None:
    source = read_adapter("org/sql").source
    asked = len(hub.requests)
    monkeypatch.setattr(constants, "HF_HUB_OFFLINE", True)
    assert read_adapter("org/sql").source == source
    assert len(hub.requests) == asked
    text = refused("org/sql", revision="v1")
    assert "with revision v1 it is not (or not whole) in the local cache" in text


def test_a_cache_made_by_hand(elsewhere: Path) -> None:
    commit = "0123456789" * 4
    repository = elsewhere / "cache" / "models--org--sql"
    (repository / "refs").mkdir(parents=True)
    (repository / "refs" / "main").write_text(commit)
    (repository / "snapshots" / commit).mkdir(parents=True)
    for file, data in peft_files(make_adapter("x", seed=0)).items():
        (repository / "snapshots" / commit / file).write_bytes(data)
    adapter = read_adapter("org/sql")
    assert (seed_of(adapter), adapter.source) == (0, f"org/sql@{commit}")


def test_local_paths_win(hub: Hub, elsewhere: Path) -> None:
    (elsewhere / "org" / "sql").mkdir(parents=True)
    for file, data in peft_files(make_adapter("x", seed=2)).items():
        (elsewhere / "org" / "sql" / file).write_bytes(data)
    adapter = read_adapter("org/sql")
    assert (seed_of(adapter), adapter.source) == (2, "org/sql")
    # A misspelt local path stays local: its name is nobody else's business.
    assert "found nothing there" in refused("org/sqll")
    assert "found nothing there" in refused("org/sql@v1")
    assert not hub.requests
    assert seed_of(read_adapter("hf://org/sql")) == 1


def test_a_path_object_is_a_path(hub: Hub) -> None:
    with pytest.raises(AdapterError, match="found nothing there"):
        read_adapter(Path("org/sql"))
    with pytest.raises(ConfigError, match="is a local path, which has no revision v1"):
        read_adapter(Path("org/sql"), revision="v1")
    assert not hub.requests


def test_a_revision_where_there_can_be_none(hub: Hub) -> None:
    assert "is a local path" in refused("adapters", ConfigError, revision="v1")
    assert "given twice, as v1 and as main" in refused("org/sql@v1", ConfigError, revision="main")


@pytest.mark.parametrize("path", ["hf://sql", "hf://", "hf://org/sql@", "hf://org/a/../../b"])
def test_addresses_that_are_none(path: str) -> None:
    assert "no address on the hub; expected hf://org/name" in refused(path)


@pytest.mark.parametrize(
    "path", ["sql", "./org/sql", "/org/sql", "org/sql/x", "~/sql", "org\\sql", "org/-sql", "o/s@"]
)
def test_paths_that_are_no_ids(path: str) -> None:
    assert hub_address(path) is None


@pytest.mark.parametrize(
    ("inside", "name"),
    [
        ("", "sql"),
        ("adapters/french", "french"),
        ("style.safetensors", "style"),
        ("adapter_model.safetensors", "sql"),
        ("french/adapters.safetensors", "french"),
    ],
)
def test_names(inside: str, name: str) -> None:
    assert HubAddress("", "org/sql", None, inside).name == name


def test_a_directory_and_a_file_in_a_repository(hub: Hub) -> None:
    adapter = make_adapter("x", seed=0, alpha=8)
    files = {
        **peft_files(adapter, "adapters/french/"),
        "a.safetensors": save(peft_tensors(adapter)),
    }
    commit = hub.push("org/many", files, "main")
    found = read_adapter("hf://org/many/adapters/french")
    assert (found.name, found.source) == ("french", f"org/many@{commit}/adapters/french")
    assert found.digest() == adapter.digest()
    file = read_adapter("hf://org/many@main/a.safetensors", format=PeftFileFormat(alpha=8))
    assert (file.name, file.format) == ("a", "peft_file")
    assert (file.digest(), file.source) == (adapter.digest(), f"org/many@{commit}/a.safetensors")
    weights = read_adapter(f"hf://org/many/adapters/french/{WEIGHTS}")
    assert (weights.name, weights.format) == ("french", "peft")
    text = refused("org/many")
    assert f"holds none of {CONFIG}, {WEIGHTS}" in text
    assert f"it holds a.safetensors, adapters/french/{WEIGHTS}" in text
    assert "it holds a.safetensors" in refused("hf://org/many/b.safetensors")


def test_pickled_weights_only_where_there_is_nothing_else(hub: Hub) -> None:
    config = make_adapter("x", seed=0).config.encode()
    hub.push("org/old", {CONFIG: config, "adapter_model.bin": b"no weights"}, "main")
    assert "adapter_model.bin: no tensors that can be loaded safely" in refused("org/old")
    assert hub.downloaded() == [CONFIG, "adapter_model.bin"]


def test_a_checkpoint_is_asked_for_by_its_format(hub: Hub) -> None:
    files = {
        "config.json": b"{}",
        "model.safetensors": save({}),
        "x.py": b"",
        **peft_files(make_adapter("x", seed=0)),
    }
    hub.push("org/tuned", files, "main")
    with pytest.raises((AdapterError, ConfigError)):
        read_adapter("org/tuned", format=CheckpointFormat(base="nowhere", rank=1))
    assert hub.downloaded() == ["config.json", "model.safetensors"]


def test_what_is_not_there(hub: Hub) -> None:
    text = refused("org/none")
    assert text.startswith("org/none: nothing is at that local path, and the repository org/none")
    assert "does not exist or is private; check the id" in text
    assert refused("hf://org/none").startswith("hf://org/none: the repository org/none on the hub")
    assert "has no revision v9; expected one of its branches" in refused("org/sql@v9")
    hub.gated.add("org/sql")
    assert "is gated; accept its conditions" in refused("org/sql")


def test_a_format_is_known_before_anything_is_downloaded(hub: Hub) -> None:
    assert "did you mean peft" in refused("org/sql", UnknownFormatError, format="pefd")
    assert not hub.requests


def test_no_connection() -> None:
    text = refused("org/sql")
    assert "cannot be reached, and it is not (or not whole) in the local cache" in text
    assert "HF_HUB_OFFLINE" in text


def test_a_hub_that_fails(hub: Hub, monkeypatch: pytest.MonkeyPatch) -> None:
    def broken(*arguments: Any, **options: Any) -> str:
        raise RuntimeError("first line\nsecond line")

    monkeypatch.setattr("huggingface_hub.snapshot_download", broken)
    assert "could not be downloaded: first line; try again" in refused("org/sql")


def test_an_id_that_the_hub_does_not_allow(hub: Hub) -> None:
    assert "org/a--b" in refused("org/a--b")


def test_without_the_client(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "huggingface_hub", None)
    text = refused("org/sql")
    assert "nothing is at that local path, and reading from the hub needs huggingface_hub" in text
    assert "pip install 'unmerge[hub]'" in text


def test_the_usual_environment_variables(elsewhere: Path) -> None:
    served = Hub()
    served.push("org/sql", peft_files(make_adapter("x", seed=0)), "main")
    script = (
        "import json; from unmerge import read_adapter; a = read_adapter('org/sql');"
        "print(json.dumps([a.digest(), a.source]))"
    )
    with serve(served) as endpoint:
        environment = {
            **os.environ,
            "HF_ENDPOINT": endpoint,
            "HF_HUB_CACHE": str(elsewhere / "other"),
            "HF_HUB_DISABLE_PROGRESS_BARS": "1",
        }
        run = subprocess.run(
            [sys.executable, "-c", script],
            env=environment,
            capture_output=True,
            text=True,
            check=True,
            timeout=120,
        )
    digest, source = json.loads(run.stdout)
    assert digest == make_adapter("x", seed=0).digest()
    assert source == f"org/sql@{served.refs['org/sql']['main']}"
    assert (elsewhere / "other" / "models--org--sql").is_dir()
