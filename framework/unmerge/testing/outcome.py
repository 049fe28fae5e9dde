"""What encodings mean, read off their tensors: deltas, bits, elements. No strategy, no format code.

The formulas are written out once more here, in float64, so that a law is judged by what the
format documents and not by the arithmetic of whoever reads or writes bundles.
"""

from __future__ import annotations

import hashlib
from collections.abc import Iterable, Mapping

import torch

from unmerge.testing.results import Violation
from unmerge_bundle.encodings import (
    AdapterFactorsEncoding,
    AffineBasisEncoding,
    DeltaEncoding,
    Encoding,
    FactorsEncoding,
    MaskedDeltaEncoding,
    QuantisedMatrix,
    SharedFactorsEncoding,
)

__all__ = [
    "Result",
    "Results",
    "all_tensors",
    "bits",
    "check_close",
    "check_same_bits",
    "deltas",
    "total_norm",
]

Result = Encoding[torch.Tensor]
Results = Mapping[str, Result]

MERGED = ""
"""Key of the one delta of an encoding that restores nothing."""


def deltas(encoding: Result) -> dict[str, torch.Tensor]:
    """Return what an encoding holds, `(d_out, d_in)` in float64: one delta, or one per adapter.

    Returns:
        By adapter name; under `""` where the encoding holds one merged result.
    """
    if isinstance(encoding, FactorsEncoding):
        return {MERGED: encoding.B.double() @ encoding.A.double()}
    if isinstance(encoding, DeltaEncoding):
        return {MERGED: encoding.delta.double()}
    return {
        name: encoding.scaling(name) * _unscaled(encoding, index)
        for index, name in enumerate(encoding.adapters)
    }


def _unscaled(encoding: Result, index: int) -> torch.Tensor:
    left: torch.Tensor
    right: torch.Tensor
    if isinstance(encoding, AffineBasisEncoding):
        a = encoding.coefficients_A[index].double()  # (p, d_in)
        b = encoding.coefficients_B[index].double()  # (p, d_out)
        right = encoding.mean_A.double() + (a[:, None, :] * encoding.basis_A.double()).sum(0)
        left = encoding.mean_B.double() + (b[:, :, None] * encoding.basis_B.double()).sum(0)
        return left @ right
    if isinstance(encoding, SharedFactorsEncoding):
        core = encoding.cores[index].double()
        core = torch.diag(core) if encoding.diagonal else core
        left, right = encoding.U.double(), core @ encoding.V.double()
        return left @ right
    if isinstance(encoding, MaskedDeltaEncoding):
        left, right = encoding.unified.double(), _unpacked(encoding.masks[index], encoding.shape[1])
        return left * right
    if isinstance(encoding, AdapterFactorsEncoding):
        left, right = _dense(encoding.B_transposed[index]).T, _dense(encoding.A[index])
        return left @ right
    raise Violation(
        "an input of this check",
        "one of the encodings that unmerge_bundle defines",
        f'an encoding of kind "{encoding.kind}"',
    )


def _unpacked(mask: torch.Tensor, columns: int) -> torch.Tensor:
    """Return a packed mask `(d_out, bytes)` as `(d_out, columns)` of 0.0 and 1.0."""
    bits_of_byte = (mask[:, :, None] >> torch.arange(8, device=mask.device)) & 1
    return bits_of_byte.flatten(1)[:, :columns].double()


def _dense(matrix: torch.Tensor | QuantisedMatrix[torch.Tensor]) -> torch.Tensor:
    if not isinstance(matrix, QuantisedMatrix):
        return matrix.double()
    codes = matrix.codes
    if matrix.bits == 4:
        codes = torch.stack([codes & 15, codes >> 4], dim=2).flatten(1)
    integers: torch.Tensor = codes[:, : matrix.columns].double() - 2 ** (matrix.bits - 1)
    scales = matrix.scales.double().repeat_interleave(matrix.group_size, dim=1)
    return integers * scales[:, : matrix.columns]


def all_tensors(encoding: Result) -> dict[str, torch.Tensor]:
    """Return every tensor of an encoding; an adapter's own are named `adapter/tensor`."""
    tensors = dict(encoding.shared_tensors())
    for name in encoding.adapters:
        for key, tensor in encoding.adapter_tensors(name).items():
            tensors[f"{name}/{key}"] = tensor
    return tensors


def bits(encoding: Result) -> str:
    """Return a hash of everything an encoding says: kind, names, scalings, facts, every bit."""
    total = hashlib.sha256()
    scalings = [encoding.scaling(name).hex() for name in encoding.adapters]
    facts = sorted((name, float(value).hex()) for name, value in encoding.facts.items())
    total.update(repr((encoding.kind, encoding.adapters, scalings, facts)).encode())
    for name, tensor in sorted(all_tensors(encoding).items()):
        total.update(repr((name, str(tensor.dtype), tuple(tensor.shape))).encode())
        flat = tensor.detach().cpu().contiguous().reshape(-1).view(torch.uint8)
        total.update(flat.numpy().tobytes())
    return total.hexdigest()


def check_same_bits(case: str, expected: Results, got: Results, law: str) -> None:
    """Raise `Violation` unless both results agree in every bit, module by module."""
    for path, encoding in expected.items():
        if bits(got[path]) != bits(encoding):
            difference = _distance(deltas(got[path]), deltas(encoding), 0.0)
            raise Violation(
                f"{case}, module {path}",
                f"{law}, bit for bit",
                f"another result, at a relative distance of {difference:.3g}",
            )


def check_close(
    case: str, expected: Results, got: Results, law: str, *, tolerance: float, scale: float = 0.0
) -> None:
    """Raise `Violation` unless both results hold the same deltas, module by module.

    Args:
        case: The input, for the message.
        expected: By module path.
        got: Likewise.
        law: What should hold, for the message.
        tolerance: Largest Frobenius distance, relative to the larger of `scale` and the norm of
            what is expected.
        scale: Size of the numbers that went in, so that a result out of cancellation is not
            judged by its own size.
    """
    for path, encoding in expected.items():
        difference = _distance(deltas(got[path]), deltas(encoding), scale)
        # Not "> tolerance": a NaN is a violation as well.
        if not difference <= tolerance:
            raise Violation(
                f"{case}, module {path}",
                f"{law}, to a relative distance of {tolerance:g}",
                f"a distance of {difference:.3g}",
            )


def _distance(
    got: Mapping[str, torch.Tensor], expected: Mapping[str, torch.Tensor], scale: float
) -> float:
    if got.keys() != expected.keys():
        return float("inf")
    return max((_relative(got[name], expected[name], scale) for name in expected), default=0.0)


def _relative(got: torch.Tensor, expected: torch.Tensor, scale: float) -> float:
    if got.shape != expected.shape:
        return float("inf")
    difference = float(torch.linalg.vector_norm(got - expected))
    reference = max(float(torch.linalg.vector_norm(expected)), scale)
    return difference / reference if reference else difference


def total_norm(matrices: Iterable[torch.Tensor]) -> float:
    """Return the sum of the Frobenius norms."""
    return float(sum(torch.linalg.vector_norm(matrix.double()) for matrix in matrices))
