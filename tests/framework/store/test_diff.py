"""Two versions compared: which adapters and modules differ, in what, and by how much."""

from __future__ import annotations

import dataclasses
import json
from collections.abc import Callable
from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest
import torch

from assorted import KINDS, assorted
from unmerge.adapter import Adapter, Factors
from unmerge.errors import StoreError, UnknownVersionError
from unmerge.store import AdapterChange, AdapterStore, ModuleChange, ModuleInfo, StoreDiff
from unmerge.store import diff as diff_module
from unmerge.store.view import StoreView

PATH = "layers.0.q_proj"
A = torch.tensor([[1.0, 0.0]])
B = torch.tensor([[3.0], [4.0]])


def one(*factors: Factors, name: str = "a", **rest: Any) -> Adapter:
    """An adapter with these factors in modules m0, m1, …"""
    return Adapter(name, {f"m{i}": f for i, f in enumerate(factors)}, **rest)


def gaussian(seed: int, *, rank: int = 3, dtype: torch.dtype = torch.float32) -> Factors:
    generator = torch.Generator().manual_seed(seed)
    shapes = ((rank, 8), (6, rank))
    first, second = (torch.randn(shape, generator=generator).to(dtype) for shape in shapes)
    return Factors(first, second, 0.3 * (seed + 1))


def delta(factors: Factors) -> np.ndarray[Any, Any]:
    product: np.ndarray[Any, Any] = (factors.B.double() @ factors.A.double()).numpy()
    return factors.scaling * product


def replaced(store: AdapterStore, before: Adapter, after: Adapter) -> AdapterChange:
    """Return what the diff says of an adapter that took another's place."""
    store.add(before)
    store.add(assorted("bystander", seed=1))
    first = store.commit("before")
    store.add(after, replace=True)
    store.commit("after")
    found = store.diff(first)
    assert (found.added, found.removed, found.unchanged) == ((), (), 1)
    json.dumps(dataclasses.asdict(found), allow_nan=False)
    [change] = found.changed
    assert change.name == "a"
    return change


def forbid_reading(monkeypatch: pytest.MonkeyPatch) -> None:
    def read(*arguments: object) -> None:
        raise AssertionError("a tensor is read")

    for method in ("read_module", "read_adapter", "read_verbatim"):
        monkeypatch.setattr(StoreView, method, read)


def test_adapters_that_come_and_go(
    filled: AdapterStore, kit: SimpleNamespace, monkeypatch: pytest.MonkeyPatch
) -> None:
    first = filled.version
    filled.remove("chat")
    filled.remove("sql")
    filled.add(kit.make("b"))
    filled.add(kit.make("a"))
    second = filled.commit("others")
    forbid_reading(monkeypatch)
    assert filled.diff(first) == StoreDiff(
        before=first,
        after=second,
        added=("a", "b"),
        removed=("chat", "sql"),
        changed=(),
        unchanged=1,
    )
    back = filled.checkout(first).diff(second)
    assert (back.before, back.after) == (second, first)
    assert (back.added, back.removed) == (("chat", "sql"), ("a", "b"))
    assert filled.diff(second, first[:8].lower()) == back
    assert filled.diff(first, first).unchanged == 3


def test_a_scaling_that_halves(store: AdapterStore) -> None:
    change = replaced(store, one(Factors(A, B, 2.0)), one(Factors(A, B, 1.0)))
    assert change.fields == ("digest",)
    assert change.verbatim == {}
    info = ModuleInfo(rank=1, d_out=2, d_in=2, dtype="float32", scaling=2.0, kind="linear")
    assert change.modules == {
        "m0": ModuleChange(
            change="changed",
            before=info,
            after=dataclasses.replace(info, scaling=1.0),
            norm_before=pytest.approx(10.0, rel=1e-15),
            norm_after=pytest.approx(5.0, rel=1e-15),
            difference=pytest.approx(0.5, rel=1e-15),
        )
    }


@pytest.mark.parametrize(
    "after",
    [
        Factors(A, 2 * B, 1.0),
        Factors(-A, -B, 2.0),
        Factors(torch.cat([A, 0 * A]), torch.cat([B, B], dim=1), 2.0),
        Factors(A.half(), B.bfloat16(), 2.0),
    ],
    ids=["scaling", "signs", "rank", "dtypes"],
)
def test_another_form_of_the_same_delta(store: AdapterStore, after: Factors) -> None:
    """A change to the bit, of no effect: exactly zero."""
    change = replaced(store, one(Factors(A, B, 2.0)), one(after))
    assert change.modules["m0"].difference == 0.0
    assert change.modules["m0"].norm_after == pytest.approx(10.0)


@pytest.mark.parametrize("dtype", [torch.float32, torch.float16, torch.bfloat16])
@pytest.mark.parametrize("ranks", [(3, 3), (2, 7), (9, 1)])
def test_norms_against_dense_deltas(
    store: AdapterStore, ranks: tuple[int, int], dtype: torch.dtype
) -> None:
    before, after = (gaussian(seed, rank=r, dtype=dtype) for seed, r in enumerate(ranks))
    change = replaced(store, one(before), one(after)).modules["m0"]
    norms = [float(np.linalg.norm(delta(factors))) for factors in (before, after)]
    assert change.norm_before == pytest.approx(norms[0], rel=1e-12)
    assert change.norm_after == pytest.approx(norms[1], rel=1e-12)
    difference = float(np.linalg.norm(delta(after) - delta(before)))
    assert change.difference == pytest.approx(difference / norms[0], rel=1e-12)


def test_a_delta_that_was_zero(store: AdapterStore) -> None:
    """As LoRA begins: there is nothing to be relative to."""
    change = replaced(store, one(Factors(A, 0 * B, 2.0)), one(Factors(A, B, 2.0))).modules["m0"]
    assert (change.norm_before, change.difference) == (0.0, None)
    assert change.norm_after == pytest.approx(10.0)


@pytest.mark.parametrize("scaling", [1e-300, 1e300])
def test_scalings_at_the_end_of_the_range(store: AdapterStore, scaling: float) -> None:
    before, after = Factors(A, 1e30 * B, scaling), Factors(A, 2e30 * B, scaling)
    change = replaced(store, one(before), one(after)).modules["m0"]
    assert change.difference == pytest.approx(1.0)
    expected = None if scaling > 1 else pytest.approx(5e-270)
    assert change.norm_before == expected


def test_modules_that_come_and_go(store: AdapterStore) -> None:
    shared = gaussian(0)
    before = Adapter("a", {"kept": shared, "left": Factors(A, B, 2.0), "moved": gaussian(1)})
    after = Adapter("a", {"kept": shared, "moved": gaussian(2), "new": Factors(A, B, 1.0)})
    modules = replaced(store, before, after).modules
    assert list(modules) == ["left", "moved", "new"]
    left, new = modules["left"], modules["new"]
    assert [modules[path].change for path in modules] == ["removed", "changed", "added"]
    assert (left.after, left.norm_after, left.difference) == (None, None, None)
    assert left.norm_before == pytest.approx(10.0)
    assert (new.before, new.norm_before, new.difference) == (None, None, None)
    assert new.norm_after == pytest.approx(5.0)
    assert new.after is not None
    assert new.after.rank == 1


def test_every_kind_and_dtype(store: AdapterStore) -> None:
    before = assorted("a", seed=1, dtype=torch.float16)
    after = assorted("a", seed=2, dtype=torch.float32, rank=3)
    modules = replaced(store, before, after).modules
    assert {path: m.after.kind for path, m in modules.items() if m.after} == dict(KINDS)
    for path, change in modules.items():
        norms = [float(np.linalg.norm(delta(x.modules[path]))) for x in (before, after)]
        assert [change.norm_before, change.norm_after] == pytest.approx(norms, rel=1e-9)


def test_verbatim_tensors(store: AdapterStore) -> None:
    zero = torch.zeros(2)
    factors = Factors(A, B, 2.0)
    before = one(factors, verbatim={"b": zero, "c": zero, "d": zero, "e": zero})
    after = one(factors, verbatim={"a": zero, "c": -zero, "d": zero, "e": zero.double()})
    change = replaced(store, before, after)
    assert change.fields == ("digest",)
    assert change.modules == {}
    assert change.verbatim == {"a": "added", "b": "removed", "c": "changed", "e": "changed"}


def test_verbatim_tensors_whose_bytes_are_the_same(store: AdapterStore) -> None:
    """The bytes of all together are; whose they are is another thing."""
    one_, two = torch.tensor([1, 2]), torch.tensor([3])
    factors = Factors(A, B, 2.0)
    before = one(factors, verbatim={"a": one_, "b": two})
    after = one(factors, verbatim={"a": one_[:1], "b": torch.tensor([2, 3])})
    assert replaced(store, before, after).verbatim == {"a": "changed", "b": "changed"}


def test_what_is_no_tensor(filled: AdapterStore, monkeypatch: pytest.MonkeyPatch) -> None:
    first = filled.version
    filled.annotate("sql", note="good", metadata={"team": "x"})
    filled.annotate("chat", note="bad")
    filled.commit("noted")
    forbid_reading(monkeypatch)
    found = filled.diff(first)
    assert found.unchanged == 1
    assert found.changed == (
        AdapterChange("chat", ("note",), {}, {}),
        AdapterChange("sql", ("note", "metadata"), {}, {}),
    )


def test_where_an_adapter_comes_from(store: AdapterStore, monkeypatch: pytest.MonkeyPatch) -> None:
    factors = Factors(A, B, 2.0)
    before = one(factors, config="x", source="here", base_model="m")
    after = one(factors, config="y", source="there", base_model="m", revision="r", format="kohya")
    forbid_reading(monkeypatch)
    change = replaced(store, before, after)
    assert change.fields == ("config", "format", "source", "revision")


def test_without_modules_no_tensor_is_read(
    store: AdapterStore, monkeypatch: pytest.MonkeyPatch
) -> None:
    store.add(assorted("a", seed=1, head=True))
    first = store.commit("")
    store.add(assorted("a", seed=2, head=True), replace=True)
    store.commit("")
    forbid_reading(monkeypatch)
    [change] = store.diff(first, modules=False).changed
    assert change == AdapterChange("a", ("digest", "config"), {}, {})


def test_only_what_changed_is_read(filled: AdapterStore, monkeypatch: pytest.MonkeyPatch) -> None:
    first = filled.version
    old = filled.read_adapter("math")
    path, other = sorted(old.modules)
    changed = dataclasses.replace(
        old,
        modules={**old.modules, path: dataclasses.replace(old.modules[path], scaling=7.0)},
    )
    filled.add(changed, replace=True)
    filled.commit("")
    asked = []
    read: Callable[..., Any] = StoreView.read_module

    def read_module(self: StoreView, path: str, names: list[str]) -> Any:
        asked.append((path, names))
        return read(self, path, names)

    monkeypatch.setattr(StoreView, "read_module", read_module)
    steps: list[tuple[int, int]] = []
    [change] = filled.diff(first, progress=lambda *step: steps.append(step)).changed
    # Its rows were all written again, so all are compared; that the other is the same is seen.
    assert list(change.modules) == [path]
    assert change.modules[path].difference == pytest.approx(69.0)
    assert change.verbatim == {}
    assert asked == [(p, ["math"]) for p in (path, path, other, other)]
    assert steps == [(1, 2), (2, 2)]


def test_the_same_adapter_elsewhere_in_the_store(
    filled: AdapterStore, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Removed and added again, it has other rows and another time, and is the same."""
    first = filled.version
    adapter = filled.read_adapter("math")
    filled.remove("math")
    filled.commit("")
    filled.add(adapter)
    filled.commit("")
    forbid_reading(monkeypatch)
    found = filled.diff(first)
    assert (found.changed, found.unchanged) == ((), 3)


def test_batches_are_no_different(store: AdapterStore, monkeypatch: pytest.MonkeyPatch) -> None:
    for seed in range(4):
        store.add(assorted(f"a{seed}", seed=seed))
    first = store.commit("")
    for seed in range(4):
        store.add(assorted(f"a{seed}", seed=9 + seed, rank=3), replace=True)
    store.commit("")
    whole = store.diff(first)
    asked: list[int] = []
    read: Callable[..., Any] = StoreView.read_module

    def read_module(self: StoreView, path: str, names: list[str]) -> Any:
        asked.append(len(names))
        return read(self, path, names)

    monkeypatch.setattr(StoreView, "read_module", read_module)
    monkeypatch.setattr("unmerge.store.diff._BATCH_BYTES", 1)
    assert store.diff(first) == whole
    assert asked == [1] * (2 * 4 * len(KINDS))
    assert len(whole.changed) == 4


def test_layers_of_another_size_have_no_difference() -> None:
    other = Factors(torch.ones(1, 3), B, 2.0)
    assert diff_module._difference(Factors(A, B, 2.0), other) is None


def test_versions_that_are_not_there(filled: AdapterStore) -> None:
    with pytest.raises(UnknownVersionError, match="v9"):
        filled.diff("v9")
    with pytest.raises(UnknownVersionError, match="v9"):
        filled.diff(filled.version, "v9")


def test_damage_is_an_error(
    filled: AdapterStore, kit: SimpleNamespace, monkeypatch: pytest.MonkeyPatch
) -> None:
    first = filled.version
    filled.add(dataclasses.replace(kit.make("another"), name="sql"), replace=True)
    filled.commit("")
    monkeypatch.setattr("unmerge.store.view.zlib.crc32", lambda data: 0)
    with pytest.raises(StoreError, match=f"{PATH}: factor A"):
        filled.diff(first)
