"""Quantised adapters: what comes back, how large it is, and how far off."""

from __future__ import annotations

from typing import Any, Literal

import numpy as np
import pytest
import torch
from pydantic import ValidationError

import oracles
from stacks import ALL_CASES, Case, Result, collection, merge, relative
from unmerge.adapter import Factors
from unmerge.errors import NonFiniteError
from unmerge.kernels.quantise import dequantise
from unmerge_bundle.encodings import AdapterFactorsEncoding, QuantisedMatrix
from unmerge_strategies.quantize import Quantize

Bits = Literal[8, 4]
# Half a step of the largest entry, with the step rounded up by at most 2⁻⁸.
HALF_STEP = {8: 0.5 / 127 * (1 + 2**-8), 4: 0.5 / 7 * (1 + 2**-8)}


def matrices(
    encoding: Result, name: str
) -> tuple[QuantisedMatrix[torch.Tensor], QuantisedMatrix[torch.Tensor]]:
    """Return A and Bᵀ of one adapter as they are kept."""
    assert isinstance(encoding, AdapterFactorsEncoding)
    index = encoding.names.index(name)
    A, B = encoding.A[index], encoding.B_transposed[index]
    assert isinstance(A, QuantisedMatrix)
    assert isinstance(B, QuantisedMatrix)
    return A, B


@pytest.mark.parametrize("bits", [8, 4])
@pytest.mark.parametrize("case", ALL_CASES, ids=str)
def test_every_entry_is_within_half_a_step_of_its_group(case: Case, bits: Bits) -> None:
    for path, encoding in merge(Quantize(bits=bits, group_size=4), case).items():
        assert encoding.adapters == tuple(sorted(case.modules[path]))
        for name in encoding.adapters:
            original = case.modules[path][name]
            assert encoding.scaling(name) == original.scaling
            kept = matrices(encoding, name)
            for quantised, source in zip(kept, (original.A, original.B.T), strict=True):
                back = dequantise(quantised)
                assert back.shape == source.shape
                for start in range(0, source.shape[1], 4):
                    group, ours = source[:, start : start + 4], back[:, start : start + 4]
                    largest = group.abs().amax(dim=1, keepdim=True)
                    assert ((ours - group).abs() <= largest * HALF_STEP[bits]).all()


@pytest.mark.parametrize(("bits", "bound"), [(8, 0.01), (4, 0.15)])
def test_it_is_as_far_off_as_the_oracle(bits: Bits, bound: float) -> None:
    case = collection((16, 8), d_out=200, d_in=190)
    encoding = merge(Quantize(bits=bits), case)["layer.0"]
    for name, f in case.modules["layer.0"].items():
        A, B = (dequantise(m).numpy() for m in matrices(encoding, name))
        for ours, source in ((A, f.A.numpy()), (B, f.B.T.numpy())):
            error = relative(ours, source)
            assert error < bound
            # Steps of 8 bits cost a per cent: the largest entry is no longer hit exactly.
            assert error < 1.02 * relative(oracles.quantise(source, bits, 64).values, source)


def test_groups_belong_to_one_component_of_one_adapter() -> None:
    # A component a thousand times smaller keeps its relative precision in both factors.
    case = collection((4,), d_out=64, d_in=64)
    f = case.modules["layer.0"]["a"]
    sizes = torch.tensor([1.0, 1e-3, 1e3, 1.0], dtype=f.A.dtype)
    scaled = Factors(A=f.A * sizes[:, None], B=f.B * sizes, scaling=f.scaling)
    encoding = merge(Quantize(), Case("", {"m": {"a": scaled}}))["m"]
    for quantised, source in zip(matrices(encoding, "a"), (scaled.A, scaled.B.T), strict=True):
        for ours, row in zip(dequantise(quantised), source, strict=True):
            assert relative(ours.numpy(), row.double().numpy()) < 0.01


@pytest.mark.parametrize("bits", [8, 4])
@pytest.mark.parametrize("group_size", [1, 3, 64])
@pytest.mark.parametrize("case", ALL_CASES, ids=str)
def test_the_predicted_size_is_the_size(case: Case, group_size: int, bits: Bits) -> None:
    merger, stack = Quantize(bits=bits, group_size=group_size), case.stack()
    for module, encoding in zip(stack, merge(merger, case).values(), strict=True):
        predicted = merger.predict(module.shape)
        kept = [m for name in encoding.adapters for m in matrices(encoding, name)]
        assert predicted.shared == 0
        assert predicted.per_adapter == sum(m.scales.numel() for m in kept)
        assert predicted.packed_bytes == sum(m.codes.numel() for m in kept)


def test_sizes_by_hand() -> None:
    # Rank 2, 130 inputs, 64 outputs, groups of 64: rows of A take 3 steps, rows of Bᵀ one.
    shape = collection((2,), d_out=64, d_in=130).stack().module(0).shape
    eight, four = Quantize().predict(shape), Quantize(bits=4).predict(shape)
    assert (eight.per_adapter, eight.packed_bytes) == (8, 388)
    assert (four.per_adapter, four.packed_bytes) == (8, 194)


@pytest.mark.parametrize("bits", [8, 4])
def test_rounding_the_steps_to_bfloat16_changes_nothing(bits: Bits) -> None:
    encoding = merge(Quantize(bits=bits), collection((4, 4), d_out=70, d_in=66))["layer.0"]
    stored = encoding.map(lambda t: t.to(torch.bfloat16) if t.is_floating_point() else t)
    for name in encoding.adapters:
        for ours, kept in zip(matrices(encoding, name), matrices(stored, name), strict=True):
            assert torch.equal(kept.scales.double(), ours.scales)


def test_an_adapter_of_zeros_comes_back_as_zeros() -> None:
    f = Factors(A=torch.ones(2, 3), B=torch.zeros(4, 2), scaling=1.0)
    A, B = matrices(merge(Quantize(bits=4), Case("", {"m": {"a": f}}))["m"], "a")
    assert not dequantise(B).any()
    np.testing.assert_allclose(dequantise(A), 1.0, rtol=2**-7)


def test_one_adapter_does_not_depend_on_the_others() -> None:
    case = collection((4, 6, 3))
    alone = Case("", {"layer.0": {"b": case.modules["layer.0"]["b"]}})
    one = matrices(merge(Quantize(), alone)["layer.0"], "b")
    among = matrices(merge(Quantize(), case)["layer.0"], "b")
    for left, right in zip(one, among, strict=True):
        assert torch.equal(left.codes, right.codes)
        assert torch.equal(left.scales, right.scales)


def test_float32_and_float64_stacks_agree() -> None:
    case = collection((4, 4), d_out=33, d_in=29)
    case.modules["layer.0"] = {
        name: Factors(A=f.A.float(), B=f.B.float(), scaling=f.scaling)
        for name, f in case.modules["layer.0"].items()
    }
    narrow = merge(Quantize(), case, dtype=torch.float32)["layer.0"]
    wide = merge(Quantize(), case, dtype=torch.float64)["layer.0"]
    for name in narrow.adapters:
        for left, right in zip(matrices(narrow, name), matrices(wide, name), strict=True):
            assert torch.equal(left.codes, right.codes)


@pytest.mark.parametrize("value", [float("nan"), float("inf")])
@pytest.mark.parametrize("side", ["A", "B"])
def test_a_factor_that_is_not_finite_is_refused(value: float, side: str) -> None:
    case = collection()
    getattr(case.modules["layer.0"]["b"], side)[1, 1] = value
    with pytest.raises(NonFiniteError, match="NaN or infinity"):
        merge(Quantize(), case)


@pytest.mark.parametrize("fields", [{"bits": 3}, {"bits": 16}, {"group_size": 0}])
def test_a_wrong_field_is_refused(fields: dict[str, Any]) -> None:
    [name] = fields
    with pytest.raises(ValidationError, match=rf"(?m)^{name}$"):
        Quantize.model_validate(fields)


def test_it_declares_what_it_does() -> None:
    capabilities = Quantize().capabilities
    assert capabilities.restores == "factors"
    assert capabilities.ignores_weights
    assert capabilities.mixed_ranks
    assert not capabilities.gauge_invariant
    assert Quantize(bits=4).lossless() is None
    assert Quantize(bits=4).recipe() == {"method": "quantize", "bits": 4, "group_size": 64}
