"""Pure functions on tensors that strategies share: no I/O, no device, no global randomness."""

from unmerge.kernels.alignment import SharedBasis, shared_basis
from unmerge.kernels.bits import pack_bits, unpack_bits
from unmerge.kernels.counter import counter_uniform, stream_key
from unmerge.kernels.eigen import leading_eigenvectors
from unmerge.kernels.gauges import aligned, balanced
from unmerge.kernels.lowrank import (
    TILE_ROWS,
    CoreBasis,
    ProductSvd,
    concatenate,
    delta_rows,
    orthonormal_core,
    svd_of_product,
)
from unmerge.kernels.signs import elected_signs
from unmerge.kernels.sparsify import Cut, largest_magnitudes
from unmerge.kernels.subspace import AffineBasis, affine_basis, factor_positions

__all__ = [
    "TILE_ROWS",
    "AffineBasis",
    "CoreBasis",
    "Cut",
    "ProductSvd",
    "SharedBasis",
    "affine_basis",
    "aligned",
    "balanced",
    "concatenate",
    "counter_uniform",
    "delta_rows",
    "elected_signs",
    "factor_positions",
    "largest_magnitudes",
    "leading_eigenvectors",
    "orthonormal_core",
    "pack_bits",
    "shared_basis",
    "stream_key",
    "svd_of_product",
    "unpack_bits",
]
