"""An adapter in memory: factors per module path, verbatim tensors, and where it came from."""

from __future__ import annotations

import hashlib
from collections.abc import Mapping
from dataclasses import dataclass, field

import torch

from unmerge.arrays import dtype_name
from unmerge_bundle.kinds import LINEAR

__all__ = ["Adapter", "AdapterDigest", "Factors"]


@dataclass(frozen=True, slots=True)
class Factors:
    """One module's low-rank update, `delta = scaling · B @ A`.

    Attributes:
        A: `(rank, d_in)`, in the dtype it was stored in.
        B: `(d_out, rank)`, likewise.
        scaling: `alpha / rank`, or `alpha / sqrt(rank)` for rsLoRA; kept apart from the factors
            so that it enters exactly once.
        kind: The layer the module is, see `unmerge_bundle.check_kind`. Factors of a convolution
            are matrices here: A is `(rank, channels · kernel)`, B is `(d_out, rank)`. Those of an
            embedding are A `(rank, tokens)` and B `(features, rank)`.
    """

    A: torch.Tensor
    B: torch.Tensor
    scaling: float
    kind: str = LINEAR

    @property
    def rank(self) -> int:
        """Number of rows of A and columns of B."""
        return self.A.shape[0]

    @property
    def d_in(self) -> int:
        """Number of input features."""
        return self.A.shape[1]

    @property
    def d_out(self) -> int:
        """Number of output features."""
        return self.B.shape[0]


@dataclass(frozen=True)
class Adapter:
    """One fine-tuned LoRA.

    Attributes:
        name: The adapter's name; see `unmerge_bundle.check_name` for what is allowed.
        modules: Factors by module path (no `base_model.model.`, no `.weight`), sorted by path.
        verbatim: Tensors that are no low-rank update (task heads, trained biases), by the key
            they have in the source file, sorted.
        config: What the source says beside its tensors, as text. For PEFT that is
            `adapter_config.json` byte for byte; for other formats a JSON object of the format's
            own from which it can write the source again.
        format: Name of the format it was read from, "peft".
        base_model: Id of the base model, where the source names one.
        revision: Revision of the base model, where the source names one.
        source: Where it was read from, for people.
    """

    name: str
    modules: Mapping[str, Factors]
    verbatim: Mapping[str, torch.Tensor] = field(default_factory=dict)
    config: str = ""
    format: str = "peft"
    base_model: str | None = None
    revision: str | None = None
    source: str = ""

    def digest(self) -> str:
        """Return `sha256:…` over everything that makes the adapter: tensors, dtypes, scalings.

        Two adapters have one digest exactly when their tensors agree bit for bit and are used
        with the same scalings; name, configuration text and source do not count.
        """
        total = AdapterDigest()
        for path, factors in sorted(self.modules.items()):
            total.module(path, factors.scaling, factors.kind)
            total.tensor("A", factors.A)
            total.tensor("B", factors.B)
        for key, tensor in sorted(self.verbatim.items()):
            total.verbatim(key, tensor)
        return str(total)


class AdapterDigest:
    """`Adapter.digest()`, taken while the tensors come in; they need never be together in memory.

    Modules come first, sorted by path, A before B; then the verbatim tensors, sorted by key.
    """

    def __init__(self) -> None:
        self._total = hashlib.sha256()

    def module(self, path: str, scaling: float, kind: str) -> None:
        """Begin a module; `tensor` is to follow for its A and its B."""
        suffix = "" if kind == LINEAR else f" {kind}"
        self._total.update(f"module {path} {scaling.hex()}{suffix}\n".encode())

    def tensor(self, label: str, tensor: torch.Tensor) -> None:
        """Take in a tensor, of any dtype there is for adapters; `label` is "A" or "B"."""
        shape = "x".join(str(n) for n in tensor.shape)
        self._total.update(f"{label} {dtype_name(tensor.dtype)} {shape}\n".encode())
        data = tensor.detach().cpu().contiguous().reshape(-1).view(torch.uint8)
        self._total.update(data.numpy().data)

    def verbatim(self, key: str, tensor: torch.Tensor) -> None:
        """Take in a verbatim tensor."""
        self.tensor(f"verbatim {key}", tensor)

    def __str__(self) -> str:
        """Return `sha256:…` over what has come in."""
        return f"sha256:{self._total.hexdigest()}"
