"""What the generation document says of a module, and the tensors that follow from it.

Everything a reader expects of a tensor, and a writer makes sure of, is a `TensorLayout`: one
description, checked by one function on both sides.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Annotated, ClassVar, Literal, Self, TypeAlias

import numpy as np
from pydantic import Field, model_validator

from unmerge_bundle.arrays import DTYPES, FLOAT_DTYPES, Array, FloatDtype
from unmerge_bundle.encodings import Restores
from unmerge_bundle.errors import TensorMismatchError
from unmerge_bundle.fields import Count, FactName, FormatModel, Kind, ModulePath, Positive
from unmerge_bundle.kinds import LINEAR, check_kernel

__all__ = [
    "AdapterFactorsModule",
    "AffineBasisModule",
    "DeltaModule",
    "FactorsModule",
    "Layouts",
    "MaskedDeltaModule",
    "ModuleEntry",
    "Quantisation",
    "RestoringModule",
    "SharedFactorsModule",
    "TensorLayout",
    "check_tensor",
]


@dataclass(frozen=True, slots=True)
class TensorLayout:
    """What a tensor of an encoding must be.

    Attributes:
        shape: Its shape.
        bits: `None` for numbers, which have the bundle's `store_dtype`. Otherwise the tensor holds
            bytes, whose rows are this many bits, the least significant of the first byte first;
            bits beyond them are 0.
        nonnegative: Whether every number must be at least 0.
    """

    shape: tuple[int, ...]
    bits: int | None = None
    nonnegative: bool = False


Layouts: TypeAlias = dict[str, TensorLayout]


def check_tensor(
    name: str, tensor: Array, layout: TensorLayout, store_dtype: FloatDtype, *, where: str
) -> None:
    """Check a tensor against what it must be; whether its numbers are finite is not looked at.

    Raises:
        TensorMismatchError: Shape or dtype differ, a padding bit is set, or a number that must not
            be negative is negative or NaN.
    """
    dtype = FLOAT_DTYPES[store_dtype] if layout.bits is None else DTYPES["U8"]
    if tensor.dtype != dtype or tensor.shape != layout.shape:
        raise TensorMismatchError(
            f"tensor {name!r} has dtype {tensor.dtype} and shape {tensor.shape}, expected {dtype} "
            f"and {layout.shape}",
            path=where,
        )
    # Not "any below 0": NaN is to be refused as well.
    if layout.nonnegative and not bool((tensor >= 0).all()):
        raise TensorMismatchError(
            f"tensor {name!r} holds NaN or negative numbers, expected numbers ≥ 0", path=where
        )
    if layout.bits is not None and layout.bits % 8:
        padding = np.uint8(0xFF << layout.bits % 8 & 0xFF)
        if bool((tensor[..., -1] & padding).any()):
            raise TensorMismatchError(
                f"tensor {name!r} has bits set beyond the {layout.bits} of a row, expected 0; it "
                "was packed in another order",
                path=where,
            )


def _pieces(length: int, size: int) -> int:
    """Return `⌈length / size⌉`, in integers: a document may claim any length."""
    return -(-length // size)


class _Module(FormatModel):
    restores: ClassVar[Restores | None]

    path: ModulePath
    kind: Kind = LINEAR
    d_out: Positive
    d_in: Positive
    facts: dict[FactName, float]

    @model_validator(mode="after")
    def _whole_kernels(self) -> Self:
        check_kernel(self.kind, self.d_in)
        return self


class FactorsModule(_Module):
    """A merged module as factors."""

    restores: ClassVar[Restores | None] = None

    encoding: Literal["factors"] = "factors"
    blob: Count
    rank: Positive

    def shared_layout(self) -> Layouts:
        """Return what the shared tensors must be, by tensor name."""
        return {
            "A": TensorLayout((self.rank, self.d_in)),
            "B": TensorLayout((self.d_out, self.rank)),
        }


class DeltaModule(_Module):
    """A merged module as a full-rank update."""

    restores: ClassVar[Restores | None] = None

    encoding: Literal["delta"] = "delta"
    blob: Count

    def shared_layout(self) -> Layouts:
        """Return what the shared tensors must be, by tensor name."""
        return {"delta": TensorLayout((self.d_out, self.d_in))}


class AffineBasisModule(_Module):
    """A module whose factors are restored from a mean, a basis and coefficients."""

    restores: ClassVar[Restores | None] = "factors"

    encoding: Literal["affine_basis"] = "affine_basis"
    blob: Count
    rank: Positive
    basis_size: Count

    def shared_layout(self) -> Layouts:
        """Return what the shared tensors must be, by tensor name."""
        return {
            "mean_A": TensorLayout((self.rank, self.d_in)),
            "basis_A": TensorLayout((self.basis_size, self.rank, self.d_in)),
            "mean_B": TensorLayout((self.d_out, self.rank)),
            "basis_B": TensorLayout((self.basis_size, self.d_out, self.rank)),
        }

    def adapter_layout(self, restored_rank: int | None) -> Layouts:  # noqa: ARG002 - one signature
        """Return what an adapter's own tensors must be, by tensor name.

        Args:
            restored_rank: The components that the adapter's record gives the module.
        """
        return {
            "coefficients_A": TensorLayout((self.basis_size, self.d_in)),
            "coefficients_B": TensorLayout((self.basis_size, self.d_out)),
        }

    def admits(self, restored_rank: int | None) -> bool:
        """Return whether an adapter's record may give the module this many components."""
        return restored_rank == self.rank


class SharedFactorsModule(_Module):
    """A module whose deltas are restored from a core between two shared factors."""

    restores: ClassVar[Restores | None] = "delta"

    encoding: Literal["shared_factors"] = "shared_factors"
    blob: Count
    rank_out: Positive
    rank_in: Positive
    diagonal: bool

    @model_validator(mode="after")
    def _consistent(self) -> SharedFactorsModule:
        if self.diagonal and self.rank_out != self.rank_in:
            raise ValueError(
                f"diagonal cores need rank_out = rank_in, got {self.rank_out} and {self.rank_in}"
            )
        return self

    def shared_layout(self) -> Layouts:
        """Return what the shared tensors must be, by tensor name."""
        return {
            "U": TensorLayout((self.d_out, self.rank_out)),
            "V": TensorLayout((self.rank_in, self.d_in)),
        }

    def adapter_layout(self, restored_rank: int | None) -> Layouts:  # noqa: ARG002 - one signature
        """Return what an adapter's own tensors must be, by tensor name.

        Args:
            restored_rank: The components that the adapter's record gives the module.
        """
        shape = (self.rank_out,) if self.diagonal else (self.rank_out, self.rank_in)
        return {"core": TensorLayout(shape)}

    def admits(self, restored_rank: int | None) -> bool:
        """Return whether an adapter's record may give the module this many components."""
        return restored_rank == min(self.rank_out, self.rank_in)


class MaskedDeltaModule(_Module):
    """A module whose deltas are restored from one unified delta and a mask."""

    restores: ClassVar[Restores | None] = "delta"

    encoding: Literal["masked_delta"] = "masked_delta"
    blob: Count

    def shared_layout(self) -> Layouts:
        """Return what the shared tensors must be, by tensor name."""
        return {"unified": TensorLayout((self.d_out, self.d_in))}

    def adapter_layout(self, restored_rank: int | None) -> Layouts:  # noqa: ARG002 - one signature
        """Return what an adapter's own tensors must be, by tensor name.

        Args:
            restored_rank: The components that the adapter's record gives the module.
        """
        return {"mask": TensorLayout((self.d_out, _pieces(self.d_in, 8)), bits=self.d_in)}

    def admits(self, restored_rank: int | None) -> bool:
        """Return whether an adapter's record may give the module this many components."""
        return restored_rank is None


class Quantisation(FormatModel):
    """How matrices are stored as integers; see `unmerge_bundle.QuantisedMatrix`."""

    bits: Literal[4, 8]
    group_size: Positive


class AdapterFactorsModule(_Module):
    """A module of which every adapter keeps factors of its own; nothing is shared."""

    restores: ClassVar[Restores | None] = "factors"

    encoding: Literal["adapter_factors"] = "adapter_factors"
    blob: None
    quantisation: Quantisation | None

    def shared_layout(self) -> Layouts:
        """Return what the shared tensors must be: there are none."""
        return {}

    def adapter_layout(self, restored_rank: int | None) -> Layouts:
        """Return what an adapter's own tensors must be, by tensor name.

        Args:
            restored_rank: The components that the adapter's record gives the module.
        """
        rows = restored_rank or 0
        layouts: Layouts = {}
        for name, columns in (("A", self.d_in), ("B_transposed", self.d_out)):
            if self.quantisation is None:
                layouts[name] = TensorLayout((rows, columns))
                continue
            bits = columns * self.quantisation.bits
            groups = _pieces(columns, self.quantisation.group_size)
            layouts[f"{name}.codes"] = TensorLayout((rows, _pieces(bits, 8)), bits=bits)
            layouts[f"{name}.scales"] = TensorLayout((rows, groups), nonnegative=True)
        return layouts

    def admits(self, restored_rank: int | None) -> bool:
        """Return whether an adapter's record may give the module this many components."""
        return restored_rank is not None


RestoringModule: TypeAlias = (
    AffineBasisModule | SharedFactorsModule | MaskedDeltaModule | AdapterFactorsModule
)
ModuleEntry = Annotated[
    FactorsModule | DeltaModule | RestoringModule, Field(discriminator="encoding")
]
