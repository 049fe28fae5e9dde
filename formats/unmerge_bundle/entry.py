"""From an encoding in memory to what the generation document will say of its module."""

from __future__ import annotations

from collections.abc import Sized
from typing import Any, TypeAlias

from pydantic import ValidationError

from unmerge_bundle.arrays import Array
from unmerge_bundle.encodings import (
    AdapterFactorsEncoding,
    AffineBasisEncoding,
    DeltaEncoding,
    Encoding,
    FactorsEncoding,
    MaskedDeltaEncoding,
    QuantisedMatrix,
    RestoringEncoding,
    SharedFactorsEncoding,
)
from unmerge_bundle.errors import InvalidInputError, TensorMismatchError
from unmerge_bundle.kinds import LINEAR
from unmerge_bundle.model import first_problem
from unmerge_bundle.modules import (
    AdapterFactorsModule,
    AffineBasisModule,
    DeltaModule,
    FactorsModule,
    MaskedDeltaModule,
    Quantisation,
    RestoringModule,
    SharedFactorsModule,
)

__all__ = ["Module", "module_entry"]

Module: TypeAlias = FactorsModule | DeltaModule | RestoringModule


def module_entry(path: str, encoding: Encoding[Array], *, kind: str = LINEAR) -> Module:
    """Return the manifest's entry of `encoding`, its blob still to be filled in.

    Shapes are taken from the tensors that show them; whether all others fit is for
    `modules.check_tensor` to say.

    Args:
        path: The module.
        encoding: What it becomes.
        kind: The layer it is, see `kinds.check_kind`.

    Raises:
        InvalidInputError: The path or the kind is not allowed, the shape does not fit the kind, a
            fact is not finite, or the encoding is not one of the format's.
        TensorMismatchError: Its tensors have shapes from which nothing can be told, or its
            matrices are not all quantised alike.
    """
    try:
        d_out, d_in = encoding.shape
        common: dict[str, Any] = {
            "path": path,
            "kind": kind,
            "d_out": d_out,
            "d_in": d_in,
            "facts": dict(encoding.facts),
        }
        if isinstance(encoding, FactorsEncoding):
            return FactorsModule(**common, blob=0, rank=encoding.A.shape[0])
        if isinstance(encoding, DeltaEncoding):
            return DeltaModule(**common, blob=0)
        if isinstance(encoding, AffineBasisEncoding):
            _check_count(path, encoding, encoding.coefficients_A, encoding.coefficients_B)
            basis_size, rank, _ = encoding.basis_A.shape
            return AffineBasisModule(**common, blob=0, rank=rank, basis_size=basis_size)
        if isinstance(encoding, SharedFactorsEncoding):
            _check_count(path, encoding, encoding.cores)
            return SharedFactorsModule(
                **common,
                blob=0,
                rank_out=encoding.U.shape[1],
                rank_in=encoding.V.shape[0],
                diagonal=encoding.diagonal,
            )
        if isinstance(encoding, MaskedDeltaEncoding):
            _check_count(path, encoding, encoding.masks)
            return MaskedDeltaModule(**common, blob=0)
        if isinstance(encoding, AdapterFactorsEncoding):
            _check_count(path, encoding, encoding.A, encoding.B_transposed)
            return AdapterFactorsModule(
                **common, blob=None, quantisation=_quantisation(path, encoding)
            )
    except TensorMismatchError:
        raise
    except ValidationError as problem:
        raise InvalidInputError(first_problem(problem), path=path) from problem
    except (ValueError, IndexError):
        shapes = {name: tensor.shape for name, tensor in encoding.shared_tensors().items()}
        raise TensorMismatchError(
            f"shared tensors of encoding {encoding.kind} have shapes {shapes}", path=path
        ) from None
    raise InvalidInputError(
        f"encoding {encoding.kind!r} is not one of factors, delta, affine_basis, shared_factors, "
        "masked_delta, adapter_factors; return one of the format's own classes",
        path=path,
    )


def _check_count(path: str, encoding: RestoringEncoding[Array], *stacks: Sized) -> None:
    for stack in stacks:
        if len(stack) != len(encoding.names):
            raise TensorMismatchError(
                f"{len(encoding.names)} adapters, but something of its own for {len(stack)} in "
                f"encoding {encoding.kind}",
                path=path,
            )


def _quantisation(path: str, encoding: AdapterFactorsEncoding[Array]) -> Quantisation | None:
    """Return how all matrices are quantised, `None` where they are raw.

    Raises:
        TensorMismatchError: They differ, or a matrix claims another number of columns than the
            module has.
    """
    found: set[tuple[int, int] | None] = set()
    for matrices, columns in (
        (encoding.A, encoding.d_in),
        (encoding.B_transposed, encoding.d_out),
    ):
        for matrix in matrices:
            if not isinstance(matrix, QuantisedMatrix):
                found.add(None)
                continue
            found.add((matrix.bits, matrix.group_size))
            if matrix.columns != columns:
                raise TensorMismatchError(
                    f"a quantised matrix has {matrix.columns} columns, expected {columns}",
                    path=path,
                )
    if len(found) > 1:
        raise TensorMismatchError(
            "its matrices must be all raw, or all quantised with one bits and one group_size",
            path=path,
        )
    scheme = next(iter(found), None)
    if scheme is None:
        return None
    return Quantisation.model_validate({"bits": scheme[0], "group_size": scheme[1]})
