"""Pure functions on tensors that strategies share: no I/O, no device, no global randomness."""

from unmerge.kernels.counter import counter_uniform, stream_key
from unmerge.kernels.lowrank import (
    CoreBasis,
    ProductSvd,
    concatenate,
    delta_rows,
    orthonormal_core,
    svd_of_product,
)
from unmerge.kernels.subspace import AffineBasis, affine_basis

__all__ = [
    "AffineBasis",
    "CoreBasis",
    "ProductSvd",
    "affine_basis",
    "concatenate",
    "counter_uniform",
    "delta_rows",
    "orthonormal_core",
    "stream_key",
    "svd_of_product",
]
