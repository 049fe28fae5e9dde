"""A zoo that holds every restoring encoding at once, made from the adapters' own originals."""

from __future__ import annotations

from typing import Any

import numpy as np
import numpy.typing as npt

from unmerge_bundle import (
    AdapterFactorsEncoding,
    AdapterRecord,
    AffineBasisEncoding,
    Encoding,
    MaskedDeltaEncoding,
    ModuleErrors,
    QuantisedMatrix,
    RecordedModule,
    RestoringEncoding,
    SharedFactorsEncoding,
    measure,
    quantise,
)
from unmerge_bundle.arrays import FLOAT_DTYPES, FloatDtype

Array = npt.NDArray[Any]

NAMES = ("code", "math", "sql")
SCALINGS = {"code": 2.0, "math": 0.5, "sql": 1.25}
RANKS = {"code": 2, "math": 3, "sql": 1}
# Odd sizes, so that rows of bits end inside a byte and groups of a row are cut off.
D_OUT, D_IN = 5, 11
KINDS = ("affine", "core", "diagonal", "masked", "own", "quantised4", "quantised8", "tall")


def originals(seed: int = 0, dtype: Any = np.float32) -> dict[str, tuple[Array, Array]]:
    rng = np.random.default_rng(seed)
    return {
        name: (
            rng.standard_normal((rank, D_IN)).astype(dtype),
            rng.standard_normal((D_OUT, rank)).astype(dtype),
        )
        for name, rank in RANKS.items()
    }


def encode(
    kind: str, factors: dict[str, tuple[Array, Array]], dtype: FloatDtype = "float32", seed: int = 1
) -> RestoringEncoding[Array]:
    """Return an encoding of some kind; shared tensors are random, what is per adapter is not."""
    rng = np.random.default_rng(seed)
    names = tuple(factors)
    stored = FLOAT_DTYPES[dtype]

    def draw(*shape: int) -> Array:
        return rng.standard_normal(shape).astype(stored)

    common: dict[str, Any] = {
        "names": names,
        "scalings": tuple(SCALINGS[name] for name in names),
        "facts": {"iterations": 12, "objective": 0.25 * len(kind)},
    }
    if kind == "affine":
        return AffineBasisEncoding(
            **common,
            mean_A=draw(3, D_IN),
            basis_A=draw(2, 3, D_IN),
            coefficients_A=draw(len(names), 2, D_IN),
            mean_B=draw(D_OUT, 3),
            basis_B=draw(2, D_OUT, 3),
            coefficients_B=draw(len(names), 2, D_OUT),
        )
    if kind in ("core", "diagonal", "tall"):
        k_out, k_in = {"core": (2, 3), "diagonal": (3, 3), "tall": (4, 2)}[kind]
        cores = (k_out,) if kind == "diagonal" else (k_out, k_in)
        return SharedFactorsEncoding(
            **common, U=draw(D_OUT, k_out), V=draw(k_in, D_IN), cores=draw(len(names), *cores)
        )
    if kind == "masked":
        masks = rng.integers(0, 2, (len(names), D_OUT, D_IN)).astype(bool)
        return MaskedDeltaEncoding(
            **common,
            unified=draw(D_OUT, D_IN),
            masks=np.packbits(masks, axis=2, bitorder="little"),
        )

    def own(matrix: Array) -> Array | QuantisedMatrix[Array]:
        if kind == "own":
            return np.ascontiguousarray(matrix).astype(stored)
        return quantise(matrix, bits=int(kind[-1]), group_size=4, dtype=dtype)

    return AdapterFactorsEncoding(
        **common,
        A=tuple(own(A) for A, _ in factors.values()),
        B_transposed=tuple(own(B.T) for _, B in factors.values()),
        d_out=D_OUT,
        d_in=D_IN,
    )


def fill(
    zoo: Any,
    *,
    kinds: tuple[str, ...] = KINDS,
    dtype: FloatDtype = "float32",
    source_dtype: FloatDtype | None = None,
    lacking: dict[str, str] | None = None,
) -> Any:
    """Put the given kinds, a module each, into a `conftest.Zoo` made for `NAMES`."""
    source_dtype = source_dtype or dtype
    lacking = lacking or {}
    encodings: dict[str, Encoding[Array]] = {}
    errors: dict[str, dict[str, ModuleErrors]] = {}
    zoo.originals = {name: {} for name in NAMES}
    for index, kind in enumerate(kinds):
        all_factors = originals(index, FLOAT_DTYPES[source_dtype])
        factors = {n: f for n, f in all_factors.items() if lacking.get(n) != kind}
        encoding = encode(kind, factors, dtype, seed=index + 50)
        encodings[kind] = encoding
        errors[kind] = {}
        for name, pair in factors.items():
            zoo.originals[name][kind] = pair
            errors[kind][name] = measure(
                encoding,
                name,
                pair,
                source_scaling=SCALINGS[name],
                dtype=source_dtype,
                path=kind,
            )
    zoo.encodings, zoo.errors, zoo.verbatim = encodings, errors, {}
    zoo.records = {
        name: record(name, tuple(zoo.originals[name]), source_dtype, zoo.records[name])
        for name in NAMES
    }
    absent = {n: (k,) for n, k in lacking.items()}
    zoo.info = zoo.info.model_copy(update={"absent": absent, "store_dtype": dtype})
    return zoo


def record(
    name: str, paths: tuple[str, ...], dtype: FloatDtype, like: AdapterRecord
) -> AdapterRecord:
    modules = tuple(
        RecordedModule(path=p, rank=RANKS[name], source_scaling=SCALINGS[name], dtype=dtype)
        for p in paths
    )
    return like.model_copy(update={"name": name, "modules": modules})


def dense(encoding: RestoringEncoding[Array], name: str) -> Array:
    """Return the delta by the encoding's definition, entry by entry and in float64."""
    shared = {k: t.astype(np.float64) for k, t in encoding.shared_tensors().items()}
    own = encoding.adapter_tensors(name)
    scaling = encoding.scaling(name)
    if isinstance(encoding, AffineBasisEncoding):
        c_A, c_B = (own[f"coefficients_{f}"].astype(np.float64) for f in "AB")
        A = shared["mean_A"] + np.einsum("kj,kij->ij", c_A, shared["basis_A"])
        B = shared["mean_B"] + np.einsum("ki,kij->ij", c_B, shared["basis_B"])
        return np.asarray(scaling * B @ A)
    if isinstance(encoding, SharedFactorsEncoding):
        core = own["core"].astype(np.float64)
        full = np.diag(core) if core.ndim == 1 else core
        return np.asarray(scaling * shared["U"] @ full @ shared["V"])
    if isinstance(encoding, MaskedDeltaEncoding):
        result = np.zeros((D_OUT, D_IN))
        for i in range(D_OUT):
            for j in range(D_IN):
                if own["mask"][i, j // 8] >> (j % 8) & 1:
                    result[i, j] = scaling * shared["unified"][i, j]
        return result
    assert isinstance(encoding, AdapterFactorsEncoding)
    matrices = []
    for matrix in (encoding.A, encoding.B_transposed):
        found = matrix[encoding.names.index(name)]
        matrices.append(
            by_hand(found) if isinstance(found, QuantisedMatrix) else found.astype(np.float64)
        )
    return np.asarray(scaling * matrices[1].T @ matrices[0])


def by_hand(matrix: QuantisedMatrix[Array]) -> Array:
    rows = len(matrix.codes)
    result = np.zeros((rows, matrix.columns))
    for i in range(rows):
        for j in range(matrix.columns):
            if matrix.bits == 8:
                code = int(matrix.codes[i, j])
            else:
                code = int(matrix.codes[i, j // 2]) >> (4 * (j % 2)) & 15
            q = code - (1 << (matrix.bits - 1))
            result[i, j] = q * float(matrix.scales[i, j // matrix.group_size])
    return result
