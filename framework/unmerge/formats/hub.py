"""Adapters in repositories of the Hugging Face hub: what is an id, and what is downloaded of it."""

from __future__ import annotations

import re
from dataclasses import dataclass
from glob import escape
from pathlib import Path, PurePosixPath
from urllib.parse import unquote

from unmerge.errors import AdapterError, ConfigError
from unmerge.formats.base import excerpt

__all__ = ["ADAPTER_FILES", "CHECKPOINT_FILES", "Download", "HubAddress", "download", "hub_address"]

ADAPTER_FILES = (
    "adapter_config.json",
    "adapter_model.safetensors",
    "adapters.safetensors",
    "pytorch_lora_weights.safetensors",
)
"""What is downloaded of a repository: the files of adapters, and no checkpoints or code."""

CHECKPOINT_FILES = (
    "config.json",
    "model.safetensors",
    "model.safetensors.index.json",
    "model-*.safetensors",
)
"""What is downloaded where the format asked for is "checkpoint"."""

_CONFIG_FILE = "adapter_config.json"
_PICKLE_FILE = "adapter_model.bin"
# A file of these names stands for the directory it is in, which the adapter is named after.
_WHOLE = frozenset({"adapter_model", "adapters", "pytorch_lora_weights"})

_SCHEME = "hf://"
_PART = r"[A-Za-z0-9][\w.-]{0,95}"
_ID = re.compile(rf"({_PART}/{_PART})(?:@([^\s@]+))?", re.ASCII)
_ADDRESS = re.compile(rf"({_PART}/{_PART})(?:@([^\s@/]+))?(?:/(.+))?", re.ASCII)


@dataclass(frozen=True, slots=True)
class HubAddress:
    """Where on the hub an adapter is.

    Attributes:
        text: What was given, for messages.
        repository: The repository's id, `org/name`.
        revision: Branch, tag or commit of the repository; `None` is its main branch.
        inside: Directory or file in the repository; empty is its top directory.
    """

    text: str
    repository: str
    revision: str | None = None
    inside: str = ""

    @property
    def name(self) -> str:
        """What the adapter is called by default: the last part of the address that is its own."""
        path = PurePosixPath(self.repository, self.inside)
        if path.suffix != ".safetensors":
            return path.name
        return path.parent.name if path.stem in _WHOLE else path.stem


@dataclass(frozen=True, slots=True)
class Download:
    """What was downloaded of an address.

    Attributes:
        path: The directory or file in the local cache.
        source: The address with the commit it stood for, `org/name@<commit>`.
    """

    path: Path
    source: str


def hub_address(
    text: str, revision: str | None = None, *, local: bool = False
) -> HubAddress | None:
    """Return the address that `text` is, or `None` if it is a local path.

    `hf://org/name`, `hf://org/name@revision` and `hf://org/name@revision/path/in/it` always are
    addresses; a slash in the revision is written `%2F`. `org/name` and `org/name@revision` are if
    nothing is at that local path, and no directory `org` that it could be a misspelt path in.

    Args:
        text: What the user gave.
        revision: The revision, if it was given apart.
        local: It was given as a path object, so that it is no address whatever it looks like.

    Raises:
        ConfigError: The revision is given twice, or for a local path.
        AdapterError: It begins with `hf://` and is no address.
    """
    explicit = text.startswith(_SCHEME) and not local
    address = text.removeprefix(_SCHEME).rstrip("/") if explicit else text
    match = (_ADDRESS if explicit else _ID).fullmatch(address)
    if explicit and (match is None or ".." in PurePosixPath(match[3] or "").parts):
        raise AdapterError(
            f"{excerpt(text)}: no address on the hub; expected {_SCHEME}org/name, with @revision "
            "and /path/in/the/repository where needed"
        )
    if match is None or local or (not explicit and _could_be_local(text)):
        if revision is not None:
            raise ConfigError(
                f"{excerpt(text)}: is a local path, which has no revision {excerpt(revision)}; "
                f"give the revision with an id on the hub, {_SCHEME}org/name"
            )
        return None
    named = match[2]
    if named is not None and revision is not None:
        raise ConfigError(
            f"{excerpt(text)}: the revision is given twice, as {excerpt(named)} and as "
            f"{excerpt(revision)}; give it once"
        )
    inside = match[3] or "" if explicit else ""
    decoded = unquote(named) if explicit and named is not None else named
    return HubAddress(text, match[1], revision if decoded is None else decoded, inside)


def download(address: HubAddress, *, checkpoint: bool = False) -> Download:
    """Bring the files of an adapter into the hub's local cache, or find them there.

    Only files that a format reads are downloaded: `ADAPTER_FILES`, the file that the address
    names, or `adapter_model.bin` where a PEFT adapter has nothing else.

    Args:
        address: Where the adapter is.
        checkpoint: Download `CHECKPOINT_FILES` instead.

    Raises:
        AdapterError: huggingface_hub is not installed, the hub cannot be reached, or repository,
            revision or files are not there, or not for everyone.
    """
    inside = PurePosixPath(address.inside)
    single = inside.suffix == ".safetensors"
    files = CHECKPOINT_FILES if checkpoint else ADAPTER_FILES
    # What is asked for are patterns, so names with brackets are escaped.
    folder = PurePosixPath(escape(str(inside.parent if single else inside)))
    wanted = [str(folder / file) for file in ((_CONFIG_FILE,) if single else files)]
    if single:
        wanted.append(escape(str(inside)))
    snapshot = _fetch(address, wanted)
    path = snapshot / inside
    if (path / _CONFIG_FILE).is_file() and not any(path.glob("*.safetensors")):
        _fetch(address, [str(folder / _PICKLE_FILE)], commit=snapshot.name)
    # Of an earlier download other files may be there.
    found = [file for pattern in wanted for file in snapshot.glob(pattern)]
    if not (path.is_file() if single else found):
        raise AdapterError(
            f"{address.text}: holds none of {inside if single else ', '.join(wanted)} at commit "
            f"{snapshot.name}{_others(address, snapshot.name)}; pass the adapter's file or "
            f"directory as {_SCHEME}{address.repository}/path/in/the/repository"
        )
    suffix = f"/{inside}" if address.inside else ""
    return Download(path, f"{address.repository}@{snapshot.name}{suffix}")


def _could_be_local(text: str) -> bool:
    path = Path(text)
    # A path in a directory that is there is a misspelt path, and none of the hub's business.
    return path.exists() or path.parent.is_dir()


def _fetch(address: HubAddress, wanted: list[str], commit: str | None = None) -> Path:
    """Return the directory of the address's commit in the cache, with the files wanted in it."""
    try:
        # Not everyone reads from the hub, and importing its client takes a moment.
        from huggingface_hub import errors, snapshot_download
    except ImportError as error:
        raise AdapterError(
            f"{address.text}:{_not_local(address)} reading from the hub needs huggingface_hub, "
            "which is not installed; install it with pip install 'unmerge[hub]'"
        ) from error
    where = f"{address.text}:{_not_local(address)} the repository {address.repository} on the hub"
    at = "" if address.revision is None else f" with revision {excerpt(address.revision)}"
    try:
        folder = snapshot_download(
            address.repository, revision=commit or address.revision, allow_patterns=wanted
        )
    except errors.HFValidationError as error:
        raise AdapterError(
            f"{address.text}: {excerpt(str(error))}; expected an id of the form org/name"
        ) from error
    except errors.GatedRepoError as error:
        raise AdapterError(
            f"{where} is gated; accept its conditions on its page, then log in with "
            "`hf auth login` or set HF_TOKEN"
        ) from error
    except errors.RepositoryNotFoundError as error:
        raise AdapterError(
            f"{where} does not exist or is private; check the id, and log in with "
            "`hf auth login` or set HF_TOKEN if it is private"
        ) from error
    except errors.RevisionNotFoundError as error:
        raise AdapterError(
            f"{where} has no revision {excerpt(address.revision or '')}; expected one of its "
            "branches, tags or commits; check its page"
        ) from error
    except errors.LocalEntryNotFoundError as error:
        raise AdapterError(
            f"{where} cannot be reached, and{at} it is not (or not whole) in the local cache; "
            "check the connection and HF_HUB_OFFLINE, or download it elsewhere and pass its "
            "directory"
        ) from error
    except Exception as error:
        # The client's transports raise classes of their own, which differ between its releases.
        reason = excerpt(str(error).strip().partition("\n")[0]) or type(error).__name__
        raise AdapterError(
            f"{where} could not be downloaded: {reason}; try again, or download it elsewhere and "
            "pass its directory"
        ) from error
    return Path(folder)


def _not_local(address: HubAddress) -> str:
    return "" if address.text.startswith(_SCHEME) else " nothing is at that local path, and"


def _others(address: HubAddress, commit: str) -> str:
    """Return which other files could be meant, to go on with "holds none of …"."""
    from huggingface_hub import HfApi

    try:
        files = HfApi().list_repo_files(address.repository, revision=commit)
    except Exception:  # noqa: BLE001 - a hint less is no reason for another error
        return ""
    tensors = [file for file in files if file.endswith(".safetensors")]
    return f"; it holds {excerpt(', '.join(tensors))}" if tensors else "; it holds no safetensors"
