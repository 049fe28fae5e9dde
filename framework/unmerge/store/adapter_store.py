"""`AdapterStore`: all adapters of one base model, lossless, versioned, readable by module."""

from __future__ import annotations

import builtins
import os
import re
from collections.abc import Callable, Sequence
from datetime import UTC, datetime
from pathlib import Path

import torch

from unmerge.adapter import Adapter, Factors
from unmerge.errors import ConfigError, StoreError
from unmerge.store.append import append, write_index
from unmerge.store.checks import check_base, check_free, check_shapes, own_copy
from unmerge.store.records import AdapterInfo, StoreIndex, Version
from unmerge.store.repository import StoreRepository, backend
from unmerge.store.view import StoreView
from unmerge_bundle.names import check_name

# `pathlib.Path` makes `s3:/bucket` of `s3://bucket`. One letter would be a drive of Windows.
_ADDRESS = re.compile(r"[A-Za-z][A-Za-z0-9+.-]+:/")


class AdapterStore:
    """A versioned archive of adapters in a local directory.

    A store object reads one version, the newest when it was opened, until its own `commit` moves
    it to the version written; what others commit meanwhile is seen by opening the store again.
    Several threads may read at once. Several processes may commit at once: they queue.
    """

    def __init__(self, repository: StoreRepository, version: str, *, read_only: bool) -> None:
        """Use `create` or `open` instead."""
        self._repository = repository
        self._view = StoreView(repository, version)
        self._read_only = read_only
        self._staged: dict[str, Adapter] = {}
        self._digests: dict[str, str] = {}

    @classmethod
    def create(
        cls,
        path: str | os.PathLike[str],
        *,
        base_model: str | None = None,
        revision: str | None = None,
    ) -> AdapterStore:
        """Create an empty store and open it.

        Args:
            path: Directory to create; its parents are created as well. An empty one may exist.
            base_model: Id of the base model; by default that of the first adapter that names one.
            revision: Revision of the base model.

        Raises:
            StoreExistsError: `path` exists and is not an empty directory.
            ConfigError: A revision without a base model.
            StoreError: The directory cannot be written; nothing is left behind.
        """
        if revision and not base_model:
            raise ConfigError(f'revision "{revision}" without a base model; give base_model too')
        index = StoreIndex(base_model=base_model or None, revision=revision or None, adapters={})
        repository = StoreRepository.create(_local(path), lambda root: write_index(root, index))
        with backend(f"{path}: cannot read the store's versions"):
            version = repository.tip()
        return cls(repository, version, read_only=False)

    @classmethod
    def open(cls, path: str | os.PathLike[str], *, at: str | None = None) -> AdapterStore:
        """Open a store.

        Args:
            path: Its directory.
            at: Version to read, as `resolve` takes it; such a store is read-only.

        Raises:
            StoreError: `path` holds no store, or a damaged one, or one of a later release.
            UnknownVersionError: There is no version `at`.
        """
        repository = StoreRepository.open(_local(path))
        with backend(f"{path}: cannot read the store's versions"):
            version = repository.tip() if at is None else repository.resolve(at)
        return cls(repository, version, read_only=at is not None)

    @property
    def path(self) -> Path:
        """The store's directory."""
        return self._repository.path

    @property
    def base_model(self) -> str | None:
        """Id of the base model, if known."""
        return self._view.index.base_model

    @property
    def revision(self) -> str | None:
        """Revision of the base model, if known."""
        return self._view.index.revision

    @property
    def version(self) -> str:
        """Id of the version being read."""
        return self._view.version

    @property
    def read_only(self) -> bool:
        """Whether the store was opened at a version."""
        return self._read_only

    @property
    def staged(self) -> tuple[str, ...]:
        """Names of the adapters that the next `commit` writes, sorted."""
        return tuple(sorted(self._staged))

    def add(self, adapter: Adapter) -> None:
        """Check an adapter and stage a copy of it in memory for the next `commit`.

        Memory holds every staged adapter until `commit` or `discard`: commit in between where
        they are many.

        Factors may be float32, float16 or bfloat16; verbatim tensors also float64, an integer
        dtype or bool. When this raises, the staged set is as before.

        Raises:
            AdapterExistsError: The store or the staged set has one of that name.
            AdapterError: A name, shape or dtype that is not allowed, or no modules.
            NonFiniteError: A tensor or a scaling holds NaN or infinity.
            IncompatibleAdaptersError: A module's `(d_out, d_in)`, or the base model, differs from
                what the store or the staged set has.
            StoreError: The store is read-only.
        """
        self._check_writable()
        check_free(adapter.name, self._staged, holder="the staged set")
        check_free(adapter.name, self._view.names, holder=f"store {self.path}")
        own = own_copy(adapter)
        for other in self._staged.values():
            holder = f'staged adapter "{other.name}"'
            shapes = {path: (f.d_out, f.d_in) for path, f in other.modules.items()}
            check_shapes(own, shapes, holder=holder)
            check_base(own, other.base_model, other.revision, holder=holder)
        self._check_against(own, self._view)
        self._digests[own.name] = own.digest()
        self._staged[own.name] = own

    def discard(self) -> None:
        """Empty the staged set."""
        self._staged = {}
        self._digests = {}

    def commit(self, message: str, *, progress: Callable[[int, int], None] | None = None) -> str:
        """Write the staged adapters as one new version on top of the newest, and read that one.

        Waits while another process commits. All staged adapters of one array are written at once;
        of what was there, at most the last chunk of each array is rewritten. When this raises, the
        store is at its last commit and the staged set as before.

        Args:
            message: What was done, for the history.
            progress: Called with (steps done, of how many) as writing goes on.

        Returns:
            The new version's id.

        Raises:
            AdapterExistsError: Somebody else committed an adapter of that name meanwhile.
            IncompatibleAdaptersError: Likewise one with other shapes or another base model.
            StoreError: Nothing is staged, the store is read-only, or writing failed.
        """
        self._check_writable()
        if not self._staged:
            raise StoreError(f"{self.path}: nothing to commit; add an adapter first")
        repository = self._repository
        with backend(f"{self.path}: cannot commit"), repository.lock():
            view = self._view
            if (tip := repository.tip()) != view.version:
                view = StoreView(repository, tip)
                for adapter in self._staged.values():
                    self._check_against(adapter, view)
            session = repository.session()
            append(
                repository.root(session),
                view.index,
                self._staged,
                digests=self._digests,
                added=datetime.now(UTC).isoformat(timespec="seconds"),
                progress=progress,
            )
            version = session.commit(message)
        self.discard()
        self._view = StoreView(repository, version)
        return version

    def names(self) -> tuple[str, ...]:
        """Return the names of all adapters, sorted."""
        return self._view.names

    def info(self, name: str) -> AdapterInfo:
        """Return what is known of an adapter without reading its tensors.

        Raises:
            AdapterNotInStoreError: There is no such adapter.
            StoreError: Its record is damaged.
        """
        return self._view.record(name).info()

    # Below, inside the class, `list` is this method: annotations say `builtins.list`.
    def list(self) -> builtins.list[AdapterInfo]:
        """Return `info` of every adapter, sorted by name."""
        return [record.info() for record in self._view.records.values()]

    def modules(self) -> dict[str, tuple[int, int]]:
        """Return `(d_out, d_in)` of every module path that any adapter has, sorted by path."""
        return self._view.shapes()

    def read_module(
        self, path: str, names: Sequence[str] | None = None
    ) -> builtins.list[tuple[str, Factors]]:
        """Return one module's factors across adapters, in one read per array.

        Args:
            path: Module path.
            names: Adapters to read, all by default; those without the module are left out.

        Returns:
            Adapter name and factors, sorted by name; CPU tensors in the dtype they were added in.

        Raises:
            ModuleNotInAdapterError: None of them has the module.
            AdapterNotInStoreError: A name that is not in the store.
            StoreError: What is read is not what was written; names module, factor, adapters.
        """
        return self._view.read_module(path, names)

    def read_adapter(self, name: str) -> Adapter:
        """Return an adapter bit for bit as it was added, its digest checked.

        Raises:
            AdapterNotInStoreError: There is no such adapter.
            StoreError: What is read is not what was written.
        """
        return self._view.read_adapter(name)

    def read_config(self, name: str) -> str:
        """Return the text of an adapter's configuration file, or "".

        Raises:
            AdapterNotInStoreError: There is no such adapter.
            StoreError: Its record is damaged.
        """
        return self._view.record(name).config

    def read_verbatim(self, name: str) -> dict[str, torch.Tensor]:
        """Return an adapter's verbatim tensors by key, sorted.

        Raises:
            AdapterNotInStoreError: There is no such adapter.
            StoreError: What is read is not what was written.
        """
        return self._view.read_verbatim(name)

    def history(self) -> builtins.list[Version]:
        """Return the version being read and those before it, newest first."""
        with backend(f"{self.path}: cannot read the history"):
            return self._repository.history(self.version)

    def tag(self, name: str, version: str | None = None) -> None:
        """Name a version for ever.

        Args:
            name: The tag; the rules are those for adapter names.
            version: Version to tag, as `resolve` takes it; by default the one being read.

        Raises:
            StoreError: The tag exists or is no valid name, or the store is read-only.
            UnknownVersionError: There is no such version.
        """
        self._check_writable()
        try:
            check_name(name, what="tag")
        except ValueError as error:
            raise StoreError(f"{self.path}: {error}") from error
        with backend(f'{self.path}: cannot write tag "{name}"'), self._repository.lock():
            tags = self._repository.tags()
            if name in tags:
                raise StoreError(
                    f'{self.path}: tag "{name}" already names version {tags[name]}; '
                    "tags never move: choose another name"
                )
            target = self.version if version is None else self._repository.resolve(version)
            self._repository.tag(name, target)

    def tags(self) -> dict[str, str]:
        """Return the version id of every tag, sorted by tag."""
        with backend(f"{self.path}: cannot read the tags"):
            return self._repository.tags()

    def resolve(self, version: str) -> str:
        """Return the full id of a version.

        Args:
            version: A tag, an id, or at least 6 characters an id begins with.

        Raises:
            UnknownVersionError: There is no such version, or more than one.
        """
        with backend(f"{self.path}: cannot read the store's versions"):
            return self._repository.resolve(version)

    def _check_writable(self) -> None:
        if self._read_only:
            raise StoreError(
                f"{self.path}: opened at version {self.version}, which is read-only; "
                "open the store without a version to write"
            )

    def _check_against(self, adapter: Adapter, view: StoreView) -> None:
        holder = f"store {self.path}"
        check_free(adapter.name, view.names, holder=holder)
        check_shapes(adapter, view.shapes(), holder=holder)
        check_base(adapter, view.index.base_model, view.index.revision, holder=holder)


def _local(path: str | os.PathLike[str]) -> Path:
    text = os.fspath(path)
    if "://" in text or _ADDRESS.match(text):
        raise StoreError(f"{text}: is an address, expected a local directory")
    try:
        usable = b"\0" not in os.fsencode(text)
    except UnicodeEncodeError:
        usable = False
    if not usable:
        raise StoreError(
            f"{text!r}: no path can hold a NUL or a character that the file system's encoding "
            "lacks, expected a local directory"
        )
    return Path(path)
