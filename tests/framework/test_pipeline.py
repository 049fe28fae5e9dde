"""MergePipeline: plans, bundles, errors, determinism, and that a failure leaves nothing behind."""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path
from typing import ClassVar

import numpy as np
import pytest
import torch

import unmerge_bundle
from adapters import make_adapter
from unmerge import (
    AdapterFactorsEncoding,
    AdapterStore,
    Capabilities,
    FactorsEncoding,
    MergePipeline,
    Merger,
    Recipe,
    ReversibleMerger,
)
from unmerge.arrays import to_numpy
from unmerge.errors import (
    AdapterNotInStoreError,
    CapabilityError,
    ConfigError,
    IncompatibleAdaptersError,
    MemoryBudgetError,
    ModuleNotInAdapterError,
    NonFiniteError,
    PluginError,
)
from unmerge_strategies import Rmm

LAYERS = 12
SHAPES = {f"layers.{n}.q": (24, 16) for n in range(LAYERS)} | {"layers.0.up": (40, 16)}


def make_store(path: Path, count: int = 4, **settings: object) -> AdapterStore:
    store = AdapterStore.create(path)
    for seed in range(count):
        store.add(make_adapter(f"a{seed}", seed=seed, modules=SHAPES, **settings))
    store.commit("adapters")
    return store


@pytest.fixture
def store(tmp_path: Path) -> AdapterStore:
    return make_store(tmp_path / "zoo")


def files(folder: Path) -> dict[str, bytes]:
    return {p.name: p.read_bytes() for p in folder.rglob("*") if p.is_file()}


def blobs(bundle: Path) -> dict[str, bytes]:
    return files(bundle / "blobs")


def dense(adapter_modules: object, path: str) -> np.ndarray:
    module = adapter_modules[path]
    A = np.asarray(module.A, dtype=np.float64)
    B = np.asarray(module.B, dtype=np.float64)
    return module.scaling * B @ A


@pytest.mark.parametrize("dtype", [torch.float32, torch.float16, torch.bfloat16])
def test_rmm_at_full_basis_restores_within_the_stored_precision(
    tmp_path: Path, dtype: torch.dtype
) -> None:
    store = make_store(tmp_path / "zoo", dtype=dtype)
    pipeline = MergePipeline(store, {"method": "rmm", "basis_size": 3}, dtype="float32")
    pipeline.run(tmp_path / "out.rmb")
    bundle = unmerge_bundle.open(tmp_path / "out.rmb")
    for name in store.names():
        original = store.read_adapter(name)
        restored = bundle.restore(name)
        for path, factors in original.modules.items():
            module = restored.modules[path]
            for mine, theirs in ((module.A, factors.A), (module.B, factors.B)):
                exact = to_numpy(theirs).astype(np.float64)
                assert mine.dtype == to_numpy(theirs).dtype
                error = np.linalg.norm(mine.astype(np.float64) - exact) / np.linalg.norm(exact)
                # float32 rounds once in the basis; narrower dtypes round back to the original.
                assert error <= (1e-6 if dtype == torch.float32 else 1e-4)
            assert module.scaling == factors.scaling


def test_recorded_errors_are_those_a_reader_gets(store: AdapterStore, tmp_path: Path) -> None:
    report = MergePipeline(store, {"method": "rmm", "basis_size": 1}).run(tmp_path / "out.rmb")
    bundle = unmerge_bundle.open(tmp_path / "out.rmb")
    for name in store.names():
        original = store.read_adapter(name)
        restored = bundle.restore(name)
        for path, factors in original.modules.items():
            delta = factors.scaling * (factors.B.double() @ factors.A.double()).numpy()
            expected = np.linalg.norm(dense(restored.modules, path) - delta)
            expected /= np.linalg.norm(delta)
            assert report.errors[name][path].delta == pytest.approx(expected, rel=1e-9)
            assert bundle.errors(name)[path] == report.errors[name][path]
            assert expected > 0.01  # p = 1 of 4 adapters must lose something


def test_stored_elements_follow_the_papers_formula(store: AdapterStore, tmp_path: Path) -> None:
    r, N = 4, 4
    for p in (1, 2, 3):
        pipeline = MergePipeline(store, {"method": "rmm", "basis_size": p})
        plan = pipeline.plan()
        report = pipeline.run(tmp_path / f"{p}.rmb")
        assert report.element_ratio == pytest.approx((p * (r + N) + r) / (r * N))
        assert plan.output is not None
        assert plan.output.total == report.elements
        assert plan.output_bytes == report.nbytes
        positions = sum(d_out + d_in for d_out, d_in in SHAPES.values())
        assert report.elements == positions * (p * (r + N) + r)


@pytest.mark.parametrize(
    "merger",
    [
        {"method": "rmm", "basis_size": 2},
        {"method": "mm_svd", "inner": {"method": "average"}},
        {"method": "task_arithmetic"},
    ],
)
def test_bytes_do_not_depend_on_budget_workers_or_import_order(
    tmp_path: Path, merger: dict[str, object]
) -> None:
    forwards = make_store(tmp_path / "forwards")
    backwards = AdapterStore.create(tmp_path / "backwards")
    for seed in (3, 1, 0, 2):
        backwards.add(make_adapter(f"a{seed}", seed=seed, modules=SHAPES))
        backwards.commit(f"a{seed}")
    reference = MergePipeline(forwards, merger, workers=1)
    reference.run(tmp_path / "reference.rmb")
    expected = blobs(tmp_path / "reference.rmb")
    smallest = _smallest_budget(forwards, merger)
    variants = [
        MergePipeline(forwards, merger, workers=2),
        MergePipeline(forwards, merger, workers=1, memory_budget=smallest),
        MergePipeline(backwards, merger, workers=2),
    ]
    assert len(variants[1].plan().chunks) > len(reference.plan().chunks)
    for number, pipeline in enumerate(variants):
        pipeline.run(tmp_path / f"{number}.rmb")
        assert blobs(tmp_path / f"{number}.rmb") == expected


RUN = """
import sys
from unmerge import AdapterStore, MergePipeline
store, out, method = sys.argv[1:]
MergePipeline(AdapterStore.open(store), {"method": method}).run(out)
"""


def test_bytes_are_equal_in_fresh_processes_with_any_number_of_threads(tmp_path: Path) -> None:
    store = AdapterStore.create(tmp_path / "zoo")
    # Large enough for BLAS to use several threads, with which sums round differently.
    modules = {"layers.0.up": (1024, 512), "layers.1.up": (1024, 512)}
    for seed in range(4):
        store.add(make_adapter(f"a{seed}", seed=seed, modules=modules, rank=16))
    store.commit("large")
    for method in ("rmm", "mm_svd"):
        written = []
        for number, threads in enumerate(("1", "2", None)):
            settings = {} if threads is None else {"OMP_NUM_THREADS": threads}
            settings |= {} if threads is None else {"OPENBLAS_NUM_THREADS": threads}
            out = tmp_path / f"{method}-{number}.rmb"
            subprocess.run(
                [sys.executable, "-c", RUN, Path(store.address), out, method],
                check=True,
                env={**os.environ, "PYTHONHASHSEED": str(number), **settings},
            )
            written.append(blobs(out))
        assert written[0] == written[1] == written[2]


def _smallest_budget(store: AdapterStore, merger: dict[str, object]) -> int:
    with pytest.raises(MemoryBudgetError) as caught:
        MergePipeline(store, merger, workers=1, memory_budget=1).plan()
    return caught.value.required


def test_a_budget_too_small_names_the_smallest_that_works(
    store: AdapterStore, tmp_path: Path
) -> None:
    merger = {"method": "rmm"}
    required = _smallest_budget(store, merger)
    with pytest.raises(MemoryBudgetError, match=str(required)):
        MergePipeline(store, merger, workers=1, memory_budget=required - 1).run(tmp_path / "o.rmb")
    assert not (tmp_path / "o.rmb").exists()
    MergePipeline(store, merger, workers=1, memory_budget=required).run(tmp_path / "o.rmb")


def test_merged_bundles_hold_the_merged_delta(store: AdapterStore, tmp_path: Path) -> None:
    weights = {"a0": 2.0, "a1": -1.0, "a2": 0.0}
    MergePipeline(store, {"method": "task_arithmetic", "scale": 0.5}, weights=weights).run(
        tmp_path / "out.rmb"
    )
    merged = unmerge_bundle.open(tmp_path / "out.rmb").merged()
    for path in SHAPES:
        expected = np.zeros(SHAPES[path])
        for name in store.names():
            f = store.read_adapter(name).modules[path]
            delta = f.scaling * (f.B.double() @ f.A.double()).numpy()
            expected += 0.5 * weights.get(name, 1.0) * delta
        got = merged.delta(path)
        assert np.linalg.norm(got - expected) <= 1e-6 * np.linalg.norm(expected)


def test_selection_of_adapters_and_modules(store: AdapterStore, tmp_path: Path) -> None:
    pipeline = MergePipeline(
        store, {"method": "average"}, adapters=["a2", "a0", "a1"], modules=["*.q"]
    )
    pipeline.run(tmp_path / "out.rmb")
    merged = unmerge_bundle.open(tmp_path / "out.rmb").merged()
    assert [source.name for source in merged.sources] == ["a0", "a1", "a2"]
    assert set(merged.modules) == {f"layers.{n}.q" for n in range(LAYERS)}


def test_a_reversible_merge_of_some_modules_is_refused(store: AdapterStore, tmp_path: Path) -> None:
    # The rest of every adapter would be lost, and what is restored would not be the adapter.
    pipeline = MergePipeline(store, {"method": "rmm"}, modules=["*.q"])
    assert any("would lack 1 of its modules" in line for line in pipeline.plan().refusals)
    with pytest.raises(IncompatibleAdaptersError, match="would lack"):
        pipeline.run(tmp_path / "out.rmb")
    assert not (tmp_path / "out.rmb").exists()


def test_weights_that_have_no_effect_are_refused(store: AdapterStore) -> None:
    plan = MergePipeline(store, {"method": "rmm"}, weights={"a0": 2.0}).plan()
    assert plan.refusals == ("rmm does not use weights; leave them out",)


def test_many_refusals_of_one_kind_are_one_line(tmp_path: Path) -> None:
    store = AdapterStore.create(tmp_path / "zoo")
    modules = {f"m{n:02}": (8, 8) for n in range(30)}
    store.add(make_adapter("a", seed=0, modules=modules, rank=4))
    store.add(make_adapter("b", seed=1, modules=modules, rank=2))
    store.commit("mixed")
    (line,) = MergePipeline(store, {"method": "rmm"}).plan().refusals
    assert line.startswith("m00 (and 29 more modules): ranks 2, 4 differ")


def test_a_plan_refuses_weights_that_cancel(store: AdapterStore) -> None:
    weights = {"a0": 0.1, "a1": 0.2, "a2": -0.3, "a3": 0.0}
    (line,) = MergePipeline(store, {"method": "average"}, weights=weights).plan().refusals
    assert "sum to 0" in line


def test_a_module_that_some_adapters_lack(tmp_path: Path) -> None:
    store = AdapterStore.create(tmp_path / "zoo")
    full = dict(SHAPES)
    partial = {path: shape for path, shape in SHAPES.items() if path != "layers.1.q"}
    for seed, shapes in enumerate((full, partial, full)):
        store.add(make_adapter(f"a{seed}", seed=seed, modules=shapes))
    store.commit("mixed")
    pipeline = MergePipeline(store, {"method": "rmm", "basis_size": 2})
    assert pipeline.plan().absent == {"a1": ("layers.1.q",)}
    assert any("a1" in warning for warning in pipeline.plan().warnings)
    pipeline.run(tmp_path / "out.rmb")
    bundle = unmerge_bundle.open(tmp_path / "out.rmb")
    assert set(bundle.restore("a1").modules) == set(partial)
    assert set(bundle.restore("a0").modules) == set(full)
    for errors in (bundle.errors(name) for name in bundle.adapters):
        assert max(e.delta for e in errors.values()) < 1e-5


def test_an_adapter_that_has_no_selected_module_is_refused(tmp_path: Path) -> None:
    store = AdapterStore.create(tmp_path / "zoo")
    store.add(make_adapter("a", seed=0, modules={"x.q": (8, 8)}))
    store.add(make_adapter("b", seed=1, modules={"x.q": (8, 8)}))
    store.add(make_adapter("c", seed=2, modules={"x.v": (8, 8)}))
    store.commit("three")
    with pytest.raises(IncompatibleAdaptersError, match='"c"'):
        MergePipeline(store, {"method": "rmm"}, modules=["x.q"]).run(tmp_path / "out.rmb")
    assert not (tmp_path / "out.rmb").exists()


def test_heads_travel_with_reversible_bundles_and_are_named_otherwise(tmp_path: Path) -> None:
    store = AdapterStore.create(tmp_path / "zoo")
    for seed in range(3):
        head = {"base_model.model.classifier.weight": torch.randn(seed + 2, 16)}
        store.add(make_adapter(f"a{seed}", seed=seed, modules=SHAPES, verbatim=head))
    store.commit("with heads")
    MergePipeline(store, {"method": "rmm"}).run(tmp_path / "out.rmb")
    restored = unmerge_bundle.open(tmp_path / "out.rmb").restore("a1")
    head = store.read_verbatim("a1")["base_model.model.classifier.weight"]
    assert np.array_equal(restored.verbatim["base_model.model.classifier.weight"], to_numpy(head))
    pipeline = MergePipeline(store, {"method": "average"})
    assert pipeline.plan().unmerged["a0"] == ("base_model.model.classifier.weight",)
    pipeline.run(tmp_path / "merged.rmb")
    merged = unmerge_bundle.open(tmp_path / "merged.rmb").merged()
    assert set(merged.unmerged) == {"a0", "a1", "a2"}


def test_mixed_ranks_are_refused_before_anything_is_written(tmp_path: Path) -> None:
    store = AdapterStore.create(tmp_path / "zoo")
    store.add(make_adapter("a", seed=0, modules=SHAPES, rank=4))
    store.add(make_adapter("b", seed=1, modules=SHAPES, rank=2))
    store.commit("mixed ranks")
    pipeline = MergePipeline(store, {"method": "rmm"})
    assert any("ranks 2, 4 differ" in line for line in pipeline.plan().refusals)
    before = files(tmp_path)
    with pytest.raises(IncompatibleAdaptersError, match="ranks 2, 4 differ"):
        pipeline.run(tmp_path / "out.rmb")
    assert files(tmp_path) == before
    MergePipeline(store, {"method": "task_arithmetic"}).run(tmp_path / "ta.rmb")


def test_warnings_say_when_nothing_is_saved(tmp_path: Path) -> None:
    store = make_store(tmp_path / "zoo", count=2)
    plan = MergePipeline(store, {"method": "rmm", "basis_size": 5}).plan()
    assert any("cut to 1" in line for line in plan.warnings)
    assert any("saves nothing" in line for line in plan.warnings)
    assert plan.element_ratio is not None
    assert plan.element_ratio >= 1


def test_an_existing_output_is_refused_and_kept(store: AdapterStore, tmp_path: Path) -> None:
    out = tmp_path / "out.rmb"
    pipeline = MergePipeline(store, {"method": "rmm"})
    pipeline.run(out)
    before = files(tmp_path)
    with pytest.raises(unmerge_bundle.OutputExistsError):
        MergePipeline(store, {"method": "average"}).run(out)
    assert files(tmp_path) == before
    MergePipeline(store, {"method": "average"}).run(out, overwrite=True)
    assert unmerge_bundle.open(out).restores is None


class Failing(Merger, frozen=True):
    """Returns something unusable, on request."""

    method: ClassVar[str] = "test.failing"
    how: str = "raise"

    def merge(self, stack, context):
        if self.how == "raise":
            raise RuntimeError("no")
        if self.how == "few":
            return []
        if self.how == "none":
            return None
        if self.how == "restoring":
            return Rmm().merge(stack, context)
        if self.how == "writes":
            stack.A.zero_()
        A = stack.A[:, 0]
        B = stack.B[:, 0] * (float("nan") if self.how == "nan" else 1e30)
        if self.how == "narrow":
            A = A[..., :-1]
        if self.how == "complex":
            A = A.to(torch.complex64)
        if self.how == "numpy":
            return [FactorsEncoding(A=a.numpy(), B=b.numpy()) for a, b in zip(A, B, strict=True)]
        return [FactorsEncoding(A=a, B=b) for a, b in zip(A, B, strict=True)]


@pytest.mark.parametrize(
    ("how", "error", "dtype"),
    [
        ("raise", PluginError, None),
        ("few", CapabilityError, None),
        ("none", CapabilityError, None),
        ("numpy", CapabilityError, None),
        ("complex", CapabilityError, None),
        ("narrow", CapabilityError, None),
        ("restoring", CapabilityError, None),
        ("writes", CapabilityError, None),
        ("nan", NonFiniteError, None),
        ("big", NonFiniteError, "float16"),
    ],
)
def test_a_failing_merger_leaves_nothing_behind(
    store: AdapterStore, tmp_path: Path, how: str, error: type[Exception], dtype: str | None
) -> None:
    before = files(tmp_path)
    with pytest.raises(error):
        MergePipeline(store, Failing(how=how), dtype=dtype).run(tmp_path / "out.rmb")
    assert files(tmp_path) == before
    assert sorted(p.name for p in tmp_path.iterdir()) == ["zoo"]


class WrongFirst(ReversibleMerger, frozen=True):
    """Keeps all factors, those of the first adapter as bytes."""

    method: ClassVar[str] = "test.wrong_first"

    @property
    def capabilities(self) -> Capabilities:
        return Capabilities(restores="factors", ignores_weights=True, mixed_ranks=True)

    def merge(self, stack, context):
        return [
            AdapterFactorsEncoding(
                names=module.adapters,
                scalings=tuple(f.scaling for f in module.factors),
                A=(module.factors[0].A.to(torch.uint8), *(f.A for f in module.factors[1:])),
                B_transposed=tuple(f.B.T for f in module.factors),
                d_out=module.shape.d_out,
                d_in=module.shape.d_in,
            )
            for module in stack
        ]


def test_the_tensors_of_every_adapter_are_checked(store: AdapterStore, tmp_path: Path) -> None:
    with pytest.raises(CapabilityError, match=r"A as torch\.uint8, expected a real floating"):
        MergePipeline(store, WrongFirst()).run(tmp_path / "out.rmb")


class NeedsData(Merger, frozen=True):
    """Declares an input the pipeline has not."""

    method: ClassVar[str] = "test.needs_data"

    @property
    def capabilities(self) -> Capabilities:
        return Capabilities(needs_activations=True)

    def merge(self, stack, context):
        raise AssertionError("must not be reached")


def test_an_input_that_is_not_there_is_refused_in_the_plan(store: AdapterStore) -> None:
    assert any("activations" in line for line in MergePipeline(store, NeedsData()).plan().refusals)


class Surveying(Merger, frozen=True):
    """Scales every module by the largest entry of the whole collection, found in two passes."""

    method: ClassVar[str] = "test.surveying"

    @property
    def capabilities(self) -> Capabilities:
        return Capabilities(needs_survey=True, mixed_ranks=True)

    def survey(self, passes, context):
        largest = max(float(stack.B.abs().max()) for stack in passes)
        modules = sum(len(stack) for stack in passes)
        assert passes.count == 2
        return {"largest": largest, "modules": modules}

    def merge(self, stack, context):
        scale = context.state["largest"] * context.state["modules"]
        return [
            FactorsEncoding(A=module.factors[0].A, B=module.factors[0].B * scale)
            for module in stack
        ]


class FailingSurvey(Surveying, frozen=True):
    """Raises in its survey."""

    method: ClassVar[str] = "test.failing_survey"

    def survey(self, passes, context):
        raise KeyError("no such fact")


def test_a_failing_survey_is_reported_as_the_mergers(store: AdapterStore, tmp_path: Path) -> None:
    with pytest.raises(PluginError, match=r"test\.failing_survey .*survey: failed with KeyError"):
        MergePipeline(store, FailingSurvey()).run(tmp_path / "out.rmb")
    assert sorted(p.name for p in tmp_path.iterdir()) == ["zoo"]


def test_a_survey_sees_every_module_as_often_as_it_asks(
    store: AdapterStore, tmp_path: Path
) -> None:
    seen: list[tuple[str, int, int]] = []
    MergePipeline(store, Surveying()).run(
        tmp_path / "out.rmb", progress=lambda *event: seen.append(event)
    )
    adapters = [store.read_adapter(name) for name in store.names()]
    largest = max(float(f.B.abs().max()) for a in adapters for f in a.modules.values())
    merged = unmerge_bundle.open(tmp_path / "out.rmb").merged()
    for path in SHAPES:
        f = adapters[0].modules[path]
        expected = (f.B * largest * len(SHAPES)) @ f.A
        assert np.allclose(merged.delta(path), expected.numpy(), rtol=1e-5, atol=1e-4)
    assert seen[-1] == ("merge", len(SHAPES), len(SHAPES))
    assert ("survey", len(SHAPES), len(SHAPES)) in seen


@pytest.mark.parametrize(
    ("arguments", "error"),
    [
        ({"adapters": ["a0", "nobody"]}, AdapterNotInStoreError),
        ({"weights": {"nobody": 1.0}}, AdapterNotInStoreError),
        ({"adapters": ["a0", "a1"], "weights": {"a2": 1.0}}, ConfigError),
        ({"modules": ["nothing.*"]}, ModuleNotInAdapterError),
    ],
)
def test_wrong_selections_are_refused(
    store: AdapterStore, arguments: dict[str, object], error: type[Exception]
) -> None:
    with pytest.raises(error):
        MergePipeline(store, {"method": "average"}, **arguments).plan()


@pytest.mark.parametrize(
    "arguments",
    [
        {"adapters": []},
        {"adapters": ["a0", "a0"]},
        {"weights": {"a0": float("nan")}},
        {"seed": -1},
        {"dtype": "float64"},
        {"device": "tpu"},
        {"device": "nonsense"},
        {"memory_budget": 0},
        {"workers": 0},
    ],
)
def test_wrong_arguments_are_refused_at_once(
    store: AdapterStore, arguments: dict[str, object]
) -> None:
    with pytest.raises(ConfigError):
        MergePipeline(store, {"method": "average"}, **arguments)


def test_an_empty_store_is_refused(tmp_path: Path) -> None:
    with pytest.raises(ConfigError, match="no adapters"):
        MergePipeline(AdapterStore.create(tmp_path / "zoo"), {"method": "average"}).plan()


def test_the_recipe_in_the_bundle_makes_the_same_bundle(
    store: AdapterStore, tmp_path: Path
) -> None:
    MergePipeline(
        store, {"method": "mm_svd", "rank": 3}, weights={"a1": 0.25}, seed=7, dtype="bfloat16"
    ).run(tmp_path / "one.rmb")
    recorded = unmerge_bundle.open(tmp_path / "one.rmb").generation.recipe
    recipe = Recipe.from_data(recorded)
    MergePipeline.from_recipe(store, recipe).run(tmp_path / "two.rmb")
    assert blobs(tmp_path / "one.rmb") == blobs(tmp_path / "two.rmb")


def test_an_older_version_is_merged_as_it_was(store: AdapterStore, tmp_path: Path) -> None:
    version = store.version
    MergePipeline(store, {"method": "rmm"}).run(tmp_path / "before.rmb")
    store.add(make_adapter("late", seed=9, modules=SHAPES))
    store.commit("one more")
    old = AdapterStore.open(Path(store.address), at=version)
    MergePipeline(old, {"method": "rmm"}).run(tmp_path / "after.rmb")
    assert blobs(tmp_path / "before.rmb") == blobs(tmp_path / "after.rmb")


def test_threads_are_as_before_after_a_run(store: AdapterStore, tmp_path: Path) -> None:
    before = torch.get_num_threads()
    MergePipeline(store, {"method": "average"}).run(tmp_path / "out.rmb")
    assert torch.get_num_threads() == before


@pytest.mark.gpu
@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA device")
def test_cuda_agrees_with_the_cpu(store: AdapterStore, tmp_path: Path) -> None:
    for method in ("rmm", "mm_svd"):
        for device in ("cpu", "cuda"):
            MergePipeline(store, {"method": method}, device=device).run(
                tmp_path / f"{method}-{device}.rmb"
            )
        cpu = unmerge_bundle.open(tmp_path / f"{method}-cpu.rmb")
        cuda = unmerge_bundle.open(tmp_path / f"{method}-cuda.rmb")
        for path in SHAPES:
            if method == "mm_svd":
                assert np.allclose(cpu.merged().delta(path), cuda.merged().delta(path), rtol=1e-4)
            else:
                mine, theirs = cpu.restore("a0"), cuda.restore("a0")
                assert np.allclose(mine.delta(path), theirs.delta(path), rtol=1e-4, atol=1e-6)
