"""Embeddings and convolutions from PEFT through a pipeline and back: the weights PEFT merges."""

from __future__ import annotations

import dataclasses
import itertools
import warnings
from collections.abc import Callable
from pathlib import Path
from typing import Any, cast

import peft
import pytest
import torch
from safetensors.torch import load_file

import unmerge_bundle
from layers import KINDS, Layers
from unmerge import Adapter, AdapterStore, MergePipeline, read_adapter
from unmerge.appending import append
from unmerge.errors import IncompatibleAdaptersError
from unmerge.store import AdapterInfo
from unmerge_bundle import RefitError

SETTINGS: dict[str, dict[str, Any]] = {
    "first": {"lora_alpha": 5, "trainable_token_indices": {"rows": [0, 3]}},
    "second": {"lora_alpha": 6, "use_rslora": True, "trainable_token_indices": {"rows": [5]}},
    "third": {"lora_alpha": 3, "alpha_pattern": {"square": 7, "tokens": 2}},
}


Pipeline = Callable[..., MergePipeline]


@pytest.fixture
def pipeline(tmp_path: Path) -> Pipeline:
    """Make a pipeline over a new store that holds some adapters."""
    numbers = itertools.count()

    def make(merger: dict[str, Any], *adapters: Adapter, **options: Any) -> MergePipeline:
        store = AdapterStore.create(tmp_path / f"zoo-{next(numbers)}")
        for adapter in adapters:
            store.add(adapter)
        store.commit("adapters")
        return MergePipeline(store, merger, **options)

    return make


@pytest.fixture(scope="module")
def directories(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Path]:
    folder = tmp_path_factory.mktemp("peft")
    for seed, (name, settings) in enumerate(SETTINGS.items()):
        spec = peft.LoraConfig(r=2, target_modules=list(KINDS), **settings)
        model = peft.get_peft_model(Layers(), spec)
        generator = torch.Generator().manual_seed(seed)
        for parameter in model.parameters():
            if parameter.requires_grad:
                parameter.data = torch.randn(parameter.shape, generator=generator)
        model.save_pretrained(folder / name)
    return {name: folder / name for name in SETTINGS}


@pytest.fixture(scope="module")
def adapters(directories: dict[str, Path]) -> list[Adapter]:
    return [read_adapter(directory) for directory in directories.values()]


def weights(directory: Path) -> dict[str, torch.Tensor]:
    with warnings.catch_warnings():
        warnings.simplefilter("error")  # PEFT warns of what it misses, and of what it ignores
        model = peft.PeftModel.from_pretrained(Layers(), directory)
    return cast(dict[str, torch.Tensor], model.merge_and_unload().state_dict())


def assert_close(found: dict[str, torch.Tensor], expected: dict[str, torch.Tensor]) -> None:
    assert found.keys() == expected.keys()
    for key, tensor in expected.items():
        torch.testing.assert_close(found[key], tensor, rtol=1e-4, atol=1e-4, msg=key)


def test_plans_know_the_kinds(pipeline: Pipeline, adapters: list[Adapter]) -> None:
    plan = pipeline({"method": "average"}, *adapters).plan()
    assert {shape.path: shape.kind for shape in plan.modules} == KINDS


@pytest.mark.parametrize("portable", [False, True])
@pytest.mark.parametrize(
    "merger", [{"method": "rmm", "basis_size": 2}, {"method": "jd", "rank": 6}]
)
def test_restored_adapters_change_the_weights_as_the_originals_do(
    pipeline: Pipeline,
    directories: dict[str, Path],
    adapters: list[Adapter],
    tmp_path: Path,
    merger: dict[str, Any],
    portable: bool,
) -> None:
    pipeline(merger, *adapters).run(tmp_path / "out.rmb")
    bundle = unmerge_bundle.open(tmp_path / "out.rmb")
    assert {path: entry.kind for path, entry in bundle.modules.items()} == KINDS
    for name, directory in directories.items():
        out = tmp_path / name
        bundle.restore(name).save_peft(out, portable=portable)
        assert_close(weights(out), weights(directory))
        # Trained rows replace those of the embedding; they come back to the bit.
        before, after = (
            load_file(place / "adapter_model.safetensors") for place in (directory, out)
        )
        rows = {key for key in before if "trainable_tokens" in key}
        assert len(rows) == (name != "third")
        for key in rows:
            assert torch.equal(after[key], before[key])
        if not portable and merger["method"] == "rmm":
            config = "adapter_config.json"
            assert (out / config).read_bytes() == (directory / config).read_bytes()
            assert read_adapter(out).modules.keys() == KINDS.keys()


@pytest.mark.parametrize("merger", [{"method": "average"}, {"method": "ties"}])
def test_exported_adapters_change_the_weights_by_the_merged_delta(
    pipeline: Pipeline, adapters: list[Adapter], tmp_path: Path, merger: dict[str, Any]
) -> None:
    pipeline(merger, *adapters).run(tmp_path / "out.rmb")
    merged = unmerge_bundle.open(tmp_path / "out.rmb").merged()
    merged.save_peft(tmp_path / "dir", rank=24)
    found, base = weights(tmp_path / "dir"), Layers().state_dict()
    for path, kind in KINDS.items():
        delta = torch.from_numpy(merged.delta(path))
        expected = base[f"{path}.weight"]
        expected += delta.T if kind == "embedding" else delta.reshape(expected.shape)
    assert_close(found, base)


def test_the_average_is_that_of_the_weights(
    pipeline: Pipeline, directories: dict[str, Path], adapters: list[Adapter], tmp_path: Path
) -> None:
    """Against PEFT alone: no layout of ours takes part in the expected numbers."""
    pipeline({"method": "average"}, *adapters).run(tmp_path / "out.rmb")
    unmerge_bundle.open(tmp_path / "out.rmb").merged().save_peft(tmp_path / "dir")
    each = [weights(directory) for directory in directories.values()]
    found = weights(tmp_path / "dir")
    for path in KINDS:
        key = f"{path}.weight"
        expected = sum(one[key] for one in each) / len(each)
        torch.testing.assert_close(found[key], expected, rtol=1e-4, atol=1e-4, msg=key)


def with_kind(adapter: Adapter, path: str, kind: str) -> Adapter:
    factors = dataclasses.replace(adapter.modules[path], kind=kind)
    return dataclasses.replace(adapter, modules={**adapter.modules, path: factors})


def test_adapters_that_disagree_on_a_kind_are_refused_by_the_store(
    pipeline: Pipeline, adapters: list[Adapter]
) -> None:
    other = with_kind(adapters[1], "square", "conv2d:1x1")
    with pytest.raises(
        IncompatibleAdaptersError,
        match=r'^square: adapter "second" has it as conv2d:1x1, .* as conv2d:3x3; .* same base mod',
    ):
        pipeline({"method": "average"}, adapters[0], other, adapters[2])


def test_adapters_that_disagree_on_a_kind_are_refused_by_the_plan(
    pipeline: Pipeline,
    adapters: list[Adapter],
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    """Whatever let them in."""
    listed = AdapterStore.list

    def infos(store: AdapterStore) -> list[AdapterInfo]:
        first, second, third = listed(store)
        square = dataclasses.replace(second.modules["square"], kind="conv2d:1x1")
        modules = {**second.modules, "square": square}
        return [first, dataclasses.replace(second, modules=modules), third]

    monkeypatch.setattr(AdapterStore, "list", infos)
    run = pipeline({"method": "average"}, *adapters)
    with pytest.raises(
        IncompatibleAdaptersError,
        match=r'^square: .* conv2d:1x1 in "second", conv2d:3x3 in "first"; .* same base model',
    ):
        run.plan()
    with pytest.raises(IncompatibleAdaptersError):
        run.run(tmp_path / "out.rmb")
    # Where the module is not merged, nothing is to be agreed on.
    modules = [path for path in KINDS if path != "square"]
    pipeline({"method": "average"}, *adapters, modules=modules).plan()


def test_chunks_hold_layers_of_several_kinds_without_a_trace(
    pipeline: Pipeline, adapters: list[Adapter], tmp_path: Path
) -> None:
    """A linear layer of a convolution's shape: one chunk, and the bytes of two."""
    twins = [
        dataclasses.replace(
            adapter,
            modules={
                "line": adapter.modules["line"],
                "twin": dataclasses.replace(adapter.modules["line"], kind="linear"),
            },
        )
        for adapter in adapters
    ]
    whole = pipeline({"method": "ties"}, *twins)
    [chunk] = whole.plan().chunks
    assert [shape.kind for shape in chunk.modules] == ["conv1d:3", "linear"]
    tight = pipeline({"method": "ties"}, *twins, memory_budget=chunk.peak_bytes - 1)
    assert len(tight.plan().chunks) == 2
    digests = []
    for index, run in enumerate((whole, tight)):
        run.run(tmp_path / f"{index}.rmb")
        bundle = unmerge_bundle.open(tmp_path / f"{index}.rmb")
        digests.append(bundle.generations[-1].document.digest)
        merged = bundle.merged()
        assert merged.kinds == {"line": "conv1d:3", "twin": "linear"}
        assert merged.delta("line").tobytes() == merged.delta("twin").tobytes()
    assert digests[0] == digests[1]


def test_appending_keeps_kinds_and_refuses_others(
    pipeline: Pipeline, directories: dict[str, Path], adapters: list[Adapter], tmp_path: Path
) -> None:
    first, second, third = adapters
    pipeline({"method": "quantize"}, first, second).run(tmp_path / "out.rmb")
    with pytest.raises(RefitError, match=r"tokens: adapter 'third' has the module as linear"):
        append(tmp_path / "out.rmb", with_kind(third, "tokens", "linear"))
    append(tmp_path / "out.rmb", third)
    restored = unmerge_bundle.open(tmp_path / "out.rmb").restore("third")
    assert {path: module.kind for path, module in restored.modules.items()} == KINDS
    restored.save_peft(tmp_path / "dir")
    found, expected = weights(tmp_path / "dir"), weights(directories["third"])
    for key, tensor in expected.items():
        torch.testing.assert_close(found[key], tensor, rtol=0, atol=0.2, msg=key)
