"""What kohya's and diffusers' formats share: an adapter that is one safetensors file."""

from __future__ import annotations

import math
from pathlib import Path, PurePath
from typing import Annotated, Self

import torch
from pydantic import AfterValidator, BaseModel, ConfigDict, ValidationError, model_validator

from unmerge.adapter import Adapter, Factors
from unmerge.arrays import VERBATIM_DTYPES, dtype_name
from unmerge.errors import AdapterError, UnsupportedAdapterError
from unmerge.formats.base import describe, entries, excerpt
from unmerge.formats.checks import build_factors, check_finite, shape_text
from unmerge.formats.files import Header, read_header
from unmerge_bundle.jsontext import canonical_bytes
from unmerge_bundle.kinds import LINEAR, check_kind, kernel_of

__all__ = [
    "Alpha",
    "FileRecord",
    "check_convertible",
    "check_scaling",
    "factors_of",
    "header_at",
    "holds_other_adapter",
    "is_file",
    "only_file",
    "require",
    "tensors_of",
]

SUFFIX = ".safetensors"

_OTHER_FILES = (
    "adapter_config.json",
    "adapter_model.safetensors",
    "adapter_model.bin",
    "adapters.safetensors",
)

# Alphas are read with `.item()`, so any real number does; PyTorch's bool is none.
_ALPHA_DTYPES = {name: dtype for name, dtype in VERBATIM_DTYPES.items() if name != "bool"}


class Alpha(BaseModel):
    """The tensor that holds a module's alpha, kept exactly.

    Attributes:
        dtype: Its dtype, "float16".
        shape: Its shape, almost always `()`.
        value: Its one number.
    """

    model_config = ConfigDict(frozen=True, extra="forbid", strict=True)

    dtype: str
    shape: tuple[int, ...]
    value: int | float

    @model_validator(mode="after")
    def _is_a_number_of_its_dtype(self) -> Self:
        try:
            exact = self.tensor().item() == self.value
        except (KeyError, RuntimeError, OverflowError):
            exact = False
        if not exact:
            raise ValueError(f"no {self.dtype} of shape {self.shape} is {self.value!r}")
        return self

    @classmethod
    def of(cls, tensor: torch.Tensor, what: str) -> Alpha:
        """Return what `tensor` holds.

        Args:
            tensor: A single number of any real dtype.
            what: Which tensor of which adapter it is, for messages.

        Raises:
            AdapterError: It is no single real number.
            NonFiniteError: It is NaN or infinite.
        """
        if tensor.numel() != 1 or tensor.dtype not in _ALPHA_DTYPES.values():
            raise AdapterError(
                f"{what} is {dtype_name(tensor.dtype)} of shape {shape_text(tensor)}; expected a "
                "single real number; the file is damaged, get it again"
            )
        check_finite(tensor, what)
        return cls(dtype=dtype_name(tensor.dtype), shape=tuple(tensor.shape), value=tensor.item())

    def tensor(self) -> torch.Tensor:
        """Return the tensor again, bit for bit."""
        return torch.tensor(self.value, dtype=_ALPHA_DTYPES[self.dtype]).reshape(self.shape)


def _plain_name(name: str) -> str:
    if PurePath(name).name != name or not name.lower().endswith(SUFFIX) or "\0" in name:
        raise ValueError(f"expected the name of a {SUFFIX} file")
    return name


class FileRecord(BaseModel):
    """What a file says besides its factors: with them, all it takes to write it again.

    Its canonical JSON is the `Adapter.config` of both formats.

    Attributes:
        file: The file's name.
        metadata: The free text in its header, by key.
        alphas: The alpha tensors, by module path.
        keys: Names of the tensors of A and B by module path, where these are not the format's
            present ones.
    """

    model_config = ConfigDict(frozen=True, extra="forbid", strict=True)

    file: Annotated[str, AfterValidator(_plain_name)]
    metadata: dict[str, str] = {}
    alphas: dict[str, Alpha] = {}
    keys: dict[str, tuple[str, str]] = {}

    def text(self) -> str:
        """Return the record as canonical JSON."""
        return canonical_bytes(self.model_dump()).decode("utf-8")

    @classmethod
    def of(cls, adapter: Adapter) -> Self:
        """Return the record in an adapter's configuration.

        Raises:
            AdapterError: It is none, or is one of other modules.
        """
        where = f'configuration of adapter "{adapter.name}" ({adapter.format})'
        try:
            record = cls.model_validate_json(adapter.config)
        except ValidationError as error:
            first = error.errors(include_url=False)[0]
            place = ".".join(str(part) for part in first["loc"]) or "the text"
            raise AdapterError(
                f"{where}: {excerpt(place)}: {excerpt(first['msg'])}; expected the JSON object "
                "that reading the adapter gave; read it again"
            ) from error
        for path in sorted((record.alphas.keys() | record.keys.keys()) - adapter.modules.keys()):
            raise AdapterError(
                f"{where}: speaks of module {excerpt(path)}, which the adapter does not have; "
                "pass the adapter as it was read"
            )
        return record


def is_file(path: Path) -> bool:
    """Return whether `path` is a file, `False` for a path that no file can have."""
    try:
        return path.is_file()
    except (OSError, ValueError):
        return False


def only_file(path: Path) -> Path | None:
    """Return `path` if it is a safetensors file, or the only such file in the directory `path`."""
    if path.suffix.lower() == SUFFIX and is_file(path):
        return path
    files = [entry for entry in entries(path) if entry.suffix.lower() == SUFFIX and is_file(entry)]
    return files[0] if len(files) == 1 else None


def holds_other_adapter(path: Path) -> bool:
    """Return whether the directory `path` has a file by which PEFT's or MLX's is recognised."""
    return any(is_file(path / name) for name in _OTHER_FILES)


def header_at(file: Path) -> Header | None:
    """Return the header of a safetensors file, or `None` if it has no readable one."""
    try:
        return read_header(file)
    except (AdapterError, ValueError):  # ValueError: a path with a NUL
        return None


def require(file: Path | None, path: Path, wanted: str) -> Path:
    """Return `file`.

    Raises:
        AdapterError: There is none; says what is at `path` instead.
    """
    if file is None:
        raise AdapterError(
            f"{path}: no adapter here; looked for {wanted}; found {describe(path)}; pass the file"
        )
    return file


def factors_of(
    down: torch.Tensor, up: torch.Tensor, scaling: float, *, path: str, adapter: str
) -> Factors:
    """Return the factors of a linear layer or of a convolution.

    A convolution's delta is that of two in a row: the first with the layer's kernel into `rank`
    channels, the second of size 1. Row-major, that is `up @ down` of the flattened tensors.

    Args:
        down: `(rank, d_in)`, or `(rank, channels, *kernel)` with up to three kernel dimensions.
        up: `(d_out, rank)`, or `(d_out, rank, 1, …)` with as many dimensions as `down`.
        scaling: What multiplies the product.
        path: The module's path.
        adapter: The adapter's name, for messages.

    Raises:
        AdapterError: Dimensions, shapes or dtypes are not as expected.
        UnsupportedAdapterError: The second convolution has a size other than 1.
        NonFiniteError: A factor holds NaN or an infinity.
    """
    if not (3 <= down.ndim <= 5 and up.ndim == down.ndim):
        return build_factors(down, up, scaling, path=path, adapter=adapter)
    if any(size != 1 for size in up.shape[2:]):
        raise UnsupportedAdapterError(
            f'{path}: factor B of adapter "{adapter}" has shape {shape_text(up)}; a second '
            "convolution of size 1 is supported, expected (d_out, rank, 1, …); use an adapter "
            "trained without it",
            feature="convolution",
        )
    kernel = "x".join(str(size) for size in down.shape[2:])
    kind = f"conv{down.ndim - 2}d:{kernel}"
    factors = build_factors(
        down.flatten(1), up.flatten(1), scaling, path=path, adapter=adapter, kind=kind
    )
    try:
        check_kind(kind)
    except ValueError as error:
        raise AdapterError(
            f'{path}: factor A of adapter "{adapter}" has shape {shape_text(down)}; {error}'
        ) from error
    return factors


def tensors_of(factors: Factors, path: str) -> tuple[torch.Tensor, torch.Tensor]:
    """Return A and B in the shapes they have in a file; the inverse of `factors_of`.

    Raises:
        AdapterError: A cannot be that of the convolution that `kind` says it is.
    """
    if factors.kind == LINEAR:
        return factors.A, factors.B
    kernel = kernel_of(factors.kind)
    channels, rest = divmod(factors.d_in, math.prod(kernel))
    if rest:
        raise AdapterError(
            f"{path}: factor A has shape {shape_text(factors.A)}; expected a multiple of "
            f"{math.prod(kernel)} columns for {factors.kind}; correct the adapter's kind"
        )
    down = factors.A.reshape(factors.rank, channels, *kernel)
    return down, factors.B.reshape(factors.d_out, factors.rank, *(1 for _ in kernel))


def check_convertible(adapter: Adapter, target: str) -> None:
    """Refuse an adapter that holds what neither format has a place for.

    Raises:
        UnsupportedAdapterError: It has tensors that are no low-rank update, or embeddings.
    """
    where = f'adapter "{adapter.name}" ({adapter.format}) cannot be written as {target}'
    for key in adapter.verbatim:
        raise UnsupportedAdapterError(
            f'{where}: its tensor "{excerpt(key)}" is no low-rank update and would be lost; '
            "export it in its own format",
            feature=key,
        )
    for path, factors in adapter.modules.items():
        if factors.kind != LINEAR and not kernel_of(factors.kind):
            raise UnsupportedAdapterError(
                f"{where}: {path} is of kind {factors.kind}, for which the format has no tensor "
                "names; export it in its own format",
                feature=factors.kind,
            )


def check_scaling(adapter: Adapter, path: str, expected: float) -> None:
    """Refuse a module whose scaling is not the one that the adapter's configuration gives it.

    Raises:
        AdapterError: It has another one.
    """
    scaling = float(adapter.modules[path].scaling)
    if scaling.hex() != expected.hex():  # minus zero is another scaling than zero
        raise AdapterError(
            f'{path}: adapter "{adapter.name}" has scaling {scaling!r}, its configuration says '
            f"{expected!r}; expected one and the same; pass the adapter as it was read"
        )
