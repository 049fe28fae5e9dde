"""Full fine-tuned checkpoints as adapters, by the SVD of what fine-tuning changed (PT-SVD)."""

from __future__ import annotations

import os
from pathlib import Path
from typing import ClassVar, Literal

from pydantic import Field, model_validator

from unmerge.adapter import Adapter
from unmerge.arrays import DTYPES
from unmerge.errors import ConfigError
from unmerge.formats.base import AdapterFormat, entries
from unmerge.formats.checkpoint_layout import HEADS
from unmerge.formats.checkpoint_reading import CONFIG_FILE, Model, Reading
from unmerge.formats.checks import adapter_name, own_name
from unmerge.formats.hub import Download, download, hub_address
from unmerge.formats.shards import WEIGHTS, weights_files
from unmerge.kernels.truncation import RankChoice
from unmerge_bundle.jsontext import canonical_bytes

__all__ = ["CheckpointFormat"]


class CheckpointFormat(AdapterFormat):
    """A model fine-tuned in full, as transformers or diffusers saves it, read against its base.

    Post-training SVD: the change `Δ = W_tuned − W_base` of every layer's weight is replaced by the
    nearest matrix of a rank, which is given, or the smallest that keeps the fraction `energy` of
    `‖Δ‖²` or leaves at most the relative `error` `‖Δ − B A‖ / ‖Δ‖` (Frobenius norms, per module).
    The factors are `B = U √S` and `A = √S Vᵀ`, with scaling 1.

    A layer that did not change is no module of the adapter. What is no layer's weight (norms,
    biases, bare parameters), or of a layer that `modules` leaves out, is kept verbatim and whole
    if it changed. So are new heads, and embeddings and heads of another size. Tensors that only
    one of the two has are refused otherwise.

    Numerics: Δ is one float32 subtraction per entry (float64 if a checkpoint is), its SVD float64
        with exact truncation, see `unmerge.kernels.dense.leading_svd`; factors are rounded once.
        One matrix at a time: beside the adapter, Δ and what the SVD takes.
    Source: RMM (`docs/methods/rmm.md`), section 3.1, where the rank is fixed; `energy`, `error` and
        what happens to other tensors are ours.
    """

    format: ClassVar[str] = "checkpoint"
    looks_for: ClassVar[str] = (
        f"a directory with {CONFIG_FILE} and {WEIGHTS[0]} (or its index) of a fine-tuned model"
    )

    base: str | None = Field(
        default=None,
        description="base model: a directory or an id on the hub; required for reading",
    )
    rank: int | None = Field(
        default=None, ge=1, description="rank of every module, or the layer's smaller dimension"
    )
    energy: float | None = Field(
        default=None, gt=0, le=1, description="fraction of a change's squared norm that must stay"
    )
    error: float | None = Field(
        default=None, ge=0, lt=1, description="largest relative Frobenius error of a module"
    )
    dtype: Literal["float32", "float16", "bfloat16"] = Field(
        default="float32", description="dtype of the factors"
    )
    modules: tuple[str, ...] = Field(
        default=("*",), description="patterns of the module paths that become low-rank"
    )
    heads: tuple[str, ...] = Field(
        default=(),
        description="further first or second names of modules that one of the models may lack",
    )
    base_model: str | None = Field(
        default=None, description="id of the base model; by default base, or _name_or_path"
    )
    revision: str | None = Field(default=None, description="revision of the base model")

    @model_validator(mode="after")
    def _one_choice(self) -> CheckpointFormat:
        RankChoice(rank=self.rank, energy=self.energy, error=self.error)
        return self

    def recognises(self, path: Path) -> bool:
        """Return whether `path` is a directory with a configuration, weights, and no adapter."""
        names = [entry.name for entry in entries(path)]
        adapter = any(name.startswith("adapter") or "lora" in name.lower() for name in names)
        return CONFIG_FILE in names and bool(weights_files(path)) and not adapter

    def read(self, path: Path, name: str | None) -> Adapter:
        """Return the change from `base` to the model at `path` as an adapter.

        Args:
            path: Directory of the fine-tuned model.
            name: The adapter's name; by default that of the directory.

        Returns:
            The adapter. Module paths and verbatim keys are the fine-tuned model's. `config` is a
            JSON object with, per module, `rank`, `error` (of the factors as they are stored) and
            `rounding` (the part of Δ that the rounding of the fine-tuned weights to their dtype
            explains), the digests of both models, and what was kept whole or left out, and why.

        Raises:
            ConfigError: `base`, or one of `rank`, `energy` and `error`, is not given; `dtype` is
                too narrow for the error asked for.
            AdapterError: A file is missing or damaged, or the base cannot be had from the hub; the
                models do not belong together, or do not differ.
            UnsupportedAdapterError: A model is quantised; a tensor is in one model only and no
                head's; input and output embeddings are tied in one model only.
            NonFiniteError: A tensor that changed holds NaN or an infinity.
        """
        given, keep = self._demand(path)
        chosen = adapter_name(own_name(path) if name is None else name, path)
        tuned = Model(path, "fine-tuned")
        address = hub_address(given)
        place = (
            Download(Path(given), given) if address is None else download(address, checkpoint=True)
        )
        base = Model(place.path, "base")
        tuned.check_type(base)
        reading = Reading(
            name=chosen,
            tuned=tuned,
            base=base,
            keep=keep,
            dtype=DTYPES[self.dtype],
            patterns=self.modules,
            heads=(*HEADS, *self.heads),
        )
        reading.run()
        digest = base.tensors.digest()
        known = address.repository if address else tuned.field("_name_or_path")
        record = {
            "base": {"digest": digest, "source": place.source},
            "checkpoint": {"config": tuned.text, "digest": tuned.tensors.digest()},
            "dtype": self.dtype,
            "keep": self.model_dump(include={"rank", "energy", "error"}, exclude_none=True),
            "settings": tuned.settings_unlike(base),
            **reading.report,
        }
        return Adapter(
            name=chosen,
            modules=dict(sorted(reading.modules.items())),
            verbatim=dict(sorted(reading.verbatim.items())),
            config=canonical_bytes(record).decode(),
            format=self.format,
            # Without a name the digest, so that changes of different models are not merged.
            base_model=self.base_model or known or digest,
            revision=self.revision,
            source=os.fspath(path),
        )

    def _demand(self, path: Path) -> tuple[str, RankChoice]:
        """Return what reading cannot do without."""
        keep = RankChoice(rank=self.rank, energy=self.energy, error=self.error)
        missing = []
        if self.base is None:
            missing.append("base (the model it was fine-tuned from: a directory or an id)")
        if keep == RankChoice():
            missing.append("one of rank, energy and error (how much of every change is kept)")
        if self.base is None or missing:
            raise ConfigError(
                f"{path}: reading a full checkpoint as an adapter needs {' and '.join(missing)}; "
                'give CheckpointFormat(base="path/to/base", rank=16) as the format (on the command '
                "line --format checkpoint --set base=path/to/base --set rank=16)"
            )
        return self.base, keep
