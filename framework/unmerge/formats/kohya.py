"""Reads and writes LoRA files as kohya's sd-scripts saves them: its delta exactly, or an error."""

from __future__ import annotations

import re
from collections.abc import Mapping
from pathlib import Path
from typing import Any, ClassVar

import torch
from pydantic import Field

from unmerge.adapter import Adapter
from unmerge.errors import AdapterError, UnsupportedAdapterError
from unmerge.formats.base import AdapterFormat, excerpt
from unmerge.formats.checks import (
    adapter_name,
    check_partners,
    module_path,
    own_name,
    save_tensors,
)
from unmerge.formats.diffusers_keys import COMPONENTS
from unmerge.formats.files import Header, load_safetensors, parse_json_object, read_header
from unmerge.formats.single_file import (
    Alpha,
    FileRecord,
    check_convertible,
    check_scaling,
    factors_of,
    header_at,
    holds_other_adapter,
    only_file,
    require,
    tensors_of,
)

__all__ = ["REFUSED_NAMES", "KohyaFormat", "is_kohya"]

DOWN, UP, ALPHA = ".lora_down.weight", ".lora_up.weight", ".alpha"

REFUSED_NAMES: Mapping[str, str] = {
    "lora_mid": "a CP (Tucker) decomposition has a third factor between A and B",
    "dora_scale": "DoRA rescales the updated weight",
    "hada_": "LoHa multiplies two low-rank products entry by entry",
    "lokr_": "LoKr is a Kronecker product",
    "oft_": "OFT rotates the weight",
    "a1": "GLoRA also changes the weight and the bias in proportion",
    "a2": "GLoRA also changes the weight and the bias in proportion",
    "b1": "GLoRA also changes the weight and the bias in proportion",
    "b2": "GLoRA also changes the weight and the bias in proportion",
    "w_norm": "a trained normalisation is no low-rank update",
    "b_norm": "a trained normalisation is no low-rank update",
    "diff": "a full difference is no low-rank update",
    "diff_b": "the difference of a bias is no low-rank update",
    "set_weight": "a replaced weight is no low-rank update",
    "reshape_weight": "the base weight is padded to another shape",
    "scalar": "LyCORIS multiplies the product by one more trained number",
    "on_input": "(IA)³ rescales inputs or outputs",
    "bias": "a bias is no part of a low-rank delta",
    "bias_": "LyCORIS adds sparse entries to the weight",
    "bundle_emb": "a trained text embedding is no low-rank update",
}
"""What parts of tensor names are refused, and why; one that ends in `_` stands for all that begin
so. `docs/adapters.md` shows the same list."""

# What sd-scripts, LyCORIS and OneTrainer begin the names of modules with. Files of their other
# methods are recognised too, so that these are refused by name instead of being unknown.
_OUR_NAMES = re.compile(r"(lora_(unet|te[1-4]?|transformer|prior)|lycoris|oft_unet)_[^.]*\.")

# sd-scripts and what follows it (musubi-tuner) have one module for each architecture. DyLoRA and
# LoRA-FA train otherwise and save plain factors; LyCORIS says in `algo` what it saved.
_PLAIN_NETWORK = re.compile(r"networks\.(lora(_\w+)?|dylora)")
_LYCORIS = frozenset({"lycoris.kohya", "locon.locon_kohya"})
_PLAIN_ALGORITHMS = frozenset({"lora", "locon"})
# Trainers differ in whether the saved alpha takes these into account; LyCORIS' does for rs_lora.
_CHANGING_ARGUMENTS = ("dora_wd", "use_dora", "weight_decompose", "use_rslora", "rslora")

_HUB_ID = re.compile(r"[\w.-]+/[\w.-]+")
# What sd-scripts has no name for; of converted adapters only.
_BASE_MODEL, _REVISION = "unmerge.base_model", "unmerge.revision"

_COMPONENTS = {
    "unet": "lora_unet",
    "transformer": "lora_transformer",
    "text_encoder_2": "lora_te2",
    "text_encoder_3": "lora_te3",
}


class KohyaFormat(AdapterFormat):
    """Single files with `lora_down`, `lora_up` and `alpha`, as kohya's sd-scripts saves them.

    The format flattens names: the dots of a module's path become underscores, and cannot be told
    from other underscores afterwards. The module path is therefore the name in the file,
    `lora_unet_down_blocks_0_…`, and is never guessed back into a dotted one. Other trainers write
    dotted names in front of `lora_down`; these are read by the same rule.

    Sources: kohya-ss/sd-scripts `networks/lora.py` (`LoRAModule`, `create_network_from_weights`,
    `save_weights`), `networks/merge_lora.py`; ComfyUI `comfy/weight_adapter/lora.py`.
    """

    format: ClassVar[str] = "kohya"
    looks_for: ClassVar[str] = (
        "a .safetensors file with tensors <module>.lora_down.weight and <module>.lora_up.weight, "
        "or a directory with only that one"
    )

    prefix: str = Field(
        "lora_unet",
        pattern=r"^[A-Za-z][A-Za-z0-9_]*$",
        description="what names begin with when another format's modules are written, where their "
        "path does not say which part of the model they belong to",
    )

    def recognises(self, path: Path) -> bool:
        """Return whether `path` is such a file, or a directory with one and no other adapter."""
        file = only_file(path)
        if file is None or holds_other_adapter(path):
            return False
        header = header_at(file)
        return header is not None and is_kohya(header)

    def read(self, path: Path, name: str | None) -> Adapter:
        """Return the adapter at `path`, named after the directory or the file unless told.

        Per module the delta is `alpha / rank · up @ down`, computed as Python does with
        `alpha.item()`; without an alpha it is `up @ down`. Both factors of a convolution are
        matrices here, see `unmerge.Factors`.

        Raises:
            AdapterError: There is no such file, it is damaged, a factor has no partner, the wrong
                shape or dtype, or the name is not allowed.
            UnsupportedAdapterError: A tensor that `REFUSED_NAMES` lists or that is unknown, an
                alpha of 0, or a training method that changes what the factors mean.
            NonFiniteError: A tensor holds NaN or an infinity.
        """
        file = require(only_file(path), path, self.looks_for)
        chosen = own_name(path) if file != path else file.stem
        name = adapter_name(chosen if name is None else name, path)
        tensors = load_safetensors(file)
        metadata = dict(read_header(file).metadata)
        _check_metadata(metadata, file)
        downs, ups, alphas = _sort_tensors(tensors, file)
        modules = {}
        for module in sorted(downs):
            down, up = downs[module], ups[module]
            # Not 0, by which alpha cannot be divided; such factors are refused just below.
            rank = max(1, down.shape[0] if down.ndim else 1)
            scaling = _scaling(alphas.get(module), rank)
            modules[module] = factors_of(down, up, scaling, path=module, adapter=name)
        # A file's name on somebody's disk is no id; sd-scripts writes either.
        named = metadata.get("ss_sd_model_name", "")
        return Adapter(
            name=name,
            modules=modules,
            config=FileRecord(file=file.name, metadata=metadata, alphas=alphas).text(),
            format=self.format,
            base_model=metadata.get(_BASE_MODEL) or (named if _HUB_ID.fullmatch(named) else None),
            revision=metadata.get(_REVISION) or None,
            source=str(path),
        )

    def write(self, adapter: Adapter, directory: Path) -> None:
        """Write one file: the one that was read, or the adapter of another format converted.

        Converting flattens module paths: `unet.…` becomes `lora_unet_…`, `transformer.…`
        `lora_transformer_…`, `text_encoder.…` `lora_te_…` (`lora_te1_…` beside others or a
        transformer), `text_encoder_2.…` `lora_te2_…`, `text_encoder_3.…` `lora_te3_…`, and paths
        that begin with no part of a pipeline `<prefix>_…`. Every module gets a float32 alpha.

        Raises:
            UnsupportedAdapterError: The adapter holds verbatim tensors or embeddings; a path
                begins with a part of a pipeline that the format has no name for; two paths are one
                name when flattened; a scaling is no float32 alpha over the rank.
            AdapterError: The configuration is not that of the adapter.
            OSError: The disk refuses.
        """
        check_convertible(adapter, self.format)
        if adapter.format == self.format:
            record = FileRecord.of(adapter)
            names = {path: path for path in adapter.modules}
        else:
            names = self._flattened(adapter)
            record = _converted_record(adapter)
        tensors: dict[str, torch.Tensor] = {}
        for path, factors in adapter.modules.items():
            alpha = record.alphas.get(path)
            check_scaling(adapter, path, _scaling(alpha, factors.rank))
            name = names[path]
            tensors[name + DOWN], tensors[name + UP] = tensors_of(factors, path)
            if alpha is not None:
                tensors[name + ALPHA] = alpha.tensor()
        save_tensors(tensors, directory / record.file, record.metadata)

    def _flattened(self, adapter: Adapter) -> dict[str, str]:
        parts = {path.partition(".")[0] for path in adapter.modules if "." in path}
        several = not parts.isdisjoint({"text_encoder_2", "text_encoder_3", "transformer"})
        prefixes = {**_COMPONENTS, "text_encoder": "lora_te1" if several else "lora_te"}
        names: dict[str, str] = {}
        taken: dict[str, str] = {}
        for path in adapter.modules:
            part, _, rest = path.partition(".")
            if part in COMPONENTS and part not in prefixes and rest:
                raise UnsupportedAdapterError(
                    f'adapter "{adapter.name}" cannot be written as {self.format}: {path} is of '
                    f"{part}, a part of a pipeline that the format has no name for; expected only "
                    f"{', '.join(prefixes)}; export it as diffusers",
                    feature=part,
                )
            if part not in prefixes or not rest:
                part, rest = "", path
            prefix = prefixes.get(part, self.prefix)
            name = f"{prefix}_{rest.replace('.', '_')}"
            if name in taken:
                raise UnsupportedAdapterError(
                    f'adapter "{adapter.name}" cannot be written as {self.format}: its modules '
                    f"{taken[name]} and {path} would both be called {name}; export it in its own "
                    "format",
                    feature="flattened names",
                )
            taken[name] = path
            names[path] = name
        return names


def is_kohya(header: Header) -> bool:
    """Return whether a file's tensors have names as sd-scripts gives them."""
    return any(name.endswith((DOWN, UP)) or _OUR_NAMES.match(name) for name in header.tensors)


def _sort_tensors(
    tensors: Mapping[str, torch.Tensor], file: Path
) -> tuple[dict[str, torch.Tensor], dict[str, torch.Tensor], dict[str, Alpha]]:
    downs: dict[str, torch.Tensor] = {}
    ups: dict[str, torch.Tensor] = {}
    alphas: dict[str, Alpha] = {}
    for key, tensor in tensors.items():
        # The leading dot lets a module's name be empty, which is then refused as such.
        dotted = f".{key}"
        if dotted.endswith(DOWN):
            downs[module_path(dotted[1 : -len(DOWN)], key, file)] = tensor
        elif dotted.endswith(UP):
            ups[module_path(dotted[1 : -len(UP)], key, file)] = tensor
        elif dotted.endswith(ALPHA):
            path = module_path(dotted[1 : -len(ALPHA)], key, file)
            alphas[path] = _alpha(tensor, path, file)
        else:
            raise _refusal(key, file)
    check_partners(downs, ups, file, names=f'"<module>{DOWN}" and "<module>{UP}"')
    for path in sorted(alphas.keys() - downs.keys()):
        raise AdapterError(
            f"{path}: alpha is there and both factors are missing in {file}; expected "
            f'"{excerpt(path)}{DOWN}" and "…{UP}"; the file is incomplete, get it again'
        )
    return downs, ups, alphas


def _alpha(tensor: torch.Tensor, path: str, file: Path) -> Alpha:
    alpha = Alpha.of(tensor, f"{file}: {path}: alpha")
    if alpha.value == 0:
        raise UnsupportedAdapterError(
            f"{file}: {path}: alpha is 0, on which programs differ: sd-scripts then takes the rank "
            "instead, ComfyUI and diffusers multiply by 0; expected another number; set it to what "
            "is meant",
            feature="alpha",
        )
    return alpha


def _scaling(alpha: Alpha | None, rank: int) -> float:
    return 1.0 if alpha is None else alpha.value / rank


def _converted_record(adapter: Adapter) -> FileRecord:
    alphas = {}
    for path, factors in adapter.modules.items():
        # An alpha that gives this scaling is the product, but for roundings far below float32's.
        product = torch.tensor(factors.scaling * factors.rank, dtype=torch.float32)
        alpha = float(product)
        # Not 0 either, which sd-scripts reads as "the rank".
        if alpha == 0 or alpha / factors.rank != factors.scaling:
            raise UnsupportedAdapterError(
                f'{path}: adapter "{adapter.name}" cannot be written as kohya: its scaling '
                f"{factors.scaling!r} is no float32 alpha other than 0, divided by the rank "
                f"{factors.rank}; export it in its own format",
                feature="scaling",
            )
        alphas[path] = Alpha(dtype="float32", shape=(), value=alpha)
    ranks = {factors.rank for factors in adapter.modules.values()}
    values = {alpha.value for alpha in alphas.values()}
    metadata = {
        "ss_network_module": "networks.lora",
        "ss_network_dim": str(ranks.pop()) if len(ranks) == 1 else "Dynamic",
        "ss_network_alpha": str(values.pop()) if len(values) == 1 else "Dynamic",
    }
    if adapter.base_model:
        known = _HUB_ID.fullmatch(adapter.base_model)
        metadata["ss_sd_model_name" if known else _BASE_MODEL] = adapter.base_model
    if adapter.revision:
        metadata[_REVISION] = adapter.revision
    return FileRecord(file=f"{adapter.name}.safetensors", metadata=metadata, alphas=alphas)


def _check_metadata(metadata: Mapping[str, str], file: Path) -> None:
    """Refuse what the header says of the training that would make the factors mean another delta.

    Programs that load these files look at the tensors only, and so does the reader: rank and alpha
    in the header are not compared with them. Only methods whose tensors could pass for plain LoRA
    matter here.
    """
    network = metadata.get("ss_network_module") or "networks.lora"
    if not (_PLAIN_NETWORK.fullmatch(network) or network in _LYCORIS):
        raise UnsupportedAdapterError(
            f"{file}: ss_network_module in the header is {excerpt(repr(network), 80)}; expected "
            "networks.lora or a variant of it, or lycoris.kohya; what another module's factors "
            "mean is unknown, use an adapter of one of these",
            feature="ss_network_module",
        )
    text = metadata.get("ss_network_args")
    if not text:
        return
    arguments = parse_json_object(text.encode(), f"{file} (ss_network_args in the header)")
    algorithm = arguments.get("algo") or "lora"
    if network in _LYCORIS and str(algorithm).lower() not in _PLAIN_ALGORITHMS:
        raise UnsupportedAdapterError(
            f"{file}: algo in the header's ss_network_args is {excerpt(repr(algorithm), 80)}; "
            "expected lora or locon; its update is no low-rank product, use an adapter trained "
            "with one of these",
            feature="algo",
        )
    flags = _CHANGING_ARGUMENTS if network in _LYCORIS else (*_CHANGING_ARGUMENTS, "rs_lora")
    for flag in flags:
        if _is_set(arguments.get(flag)):
            raise UnsupportedAdapterError(
                f"{file}: {flag} is set in the header's ss_network_args, which is not supported: "
                "the update may be more than alpha / rank times the factors' product; use an "
                "adapter trained without it",
                feature=flag,
            )


def _is_set(value: Any) -> bool:
    # Arguments come from a command line, so that a flag is the text "True" as often as true.
    return str(value).strip().lower() not in ("", "none", "false", "0", "no", "off")


def _refusal(key: str, file: Path) -> UnsupportedAdapterError:
    where = f'{file}: tensor "{excerpt(key)}"'
    parts = key.split(".")
    for name, because in REFUSED_NAMES.items():
        if any(part == name or (name[-1] == "_" and part.startswith(name)) for part in parts):
            return UnsupportedAdapterError(
                f"{where} holds {name}, which is not supported: {because}; use an adapter trained "
                "without it",
                feature=name,
            )
    return UnsupportedAdapterError(
        f"{where} is unknown; expected only <module>{DOWN}, <module>{UP} and <module>{ALPHA}; "
        "remove it if it has no effect",
        feature=key,
    )
