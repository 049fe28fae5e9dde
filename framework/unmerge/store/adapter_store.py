"""`AdapterStore`: all adapters of one base model, lossless, versioned, readable by module."""

from __future__ import annotations

import builtins
import os
from collections.abc import Callable, Mapping, Sequence
from datetime import UTC, datetime
from pathlib import Path

import torch
import zarr

from unmerge.adapter import Adapter, Factors
from unmerge.errors import AdapterExistsError, ConfigError, StoreError, UnmergeError
from unmerge.store.checks import check_annotation, check_fits, check_free, own_copy
from unmerge.store.compact import GcReport, gc
from unmerge.store.diff import StoreDiff, diff
from unmerge.store.failures import backend
from unmerge.store.linking import check_unaltered, find_links
from unmerge.store.records import AdapterInfo, StoredAdapter, StoreIndex, Version
from unmerge.store.repository import StoreRepository
from unmerge.store.staging import Annotation, Changes, Spool, StagedAdapter
from unmerge.store.verify import StoreReport, verify
from unmerge.store.view import StoreView
from unmerge.store.writing import write_changes, write_index
from unmerge_bundle.names import check_name


class AdapterStore:
    """A versioned archive of adapters, in a local directory or on S3.

    A store object reads one version, the newest when it was opened, until its own `commit` moves
    it to the version written; what others commit meanwhile is seen by opening the store again.
    Several threads may read at once. Several processes may commit at once: in a local directory
    they queue, on S3 the one that comes second does its work again on top of the first's.
    """

    def __init__(self, repository: StoreRepository, version: str, *, read_only: bool) -> None:
        """Use `create` or `open` instead."""
        self._repository = repository
        self._view = StoreView(repository, version)
        self._read_only = read_only
        self._changes = Changes()
        self._spool: Spool | None = None

    @classmethod
    def create(
        cls,
        address: str | os.PathLike[str],
        *,
        base_model: str | None = None,
        revision: str | None = None,
    ) -> AdapterStore:
        """Create an empty store and open it.

        Args:
            address: Directory to create, with its parents; an empty one may exist. Or a place on
                S3, `s3://bucket/prefix`.
            base_model: Id of the base model; by default that of the first adapter that names one.
            revision: Revision of the base model; likewise.

        Raises:
            StoreExistsError: Something is there already.
            ConfigError: A revision without a base model.
            StoreError: The place cannot be written; nothing is left behind.
        """
        if revision and not base_model:
            raise ConfigError(f'revision "{revision}" without a base model; give base_model too')
        index = StoreIndex(
            base_model=base_model or None,
            revision=revision or None,
            adapters={},
            layers={},
            records=[],
            tables={},
        )
        repository = StoreRepository.create(address, lambda root: write_index(root, index))
        with backend(f"{address}: cannot read the store's versions"):
            version = repository.tip()
        return cls(repository, version, read_only=False)

    @classmethod
    def open(cls, address: str | os.PathLike[str], *, at: str | None = None) -> AdapterStore:
        """Open a store.

        Args:
            address: Its directory, or its place on S3.
            at: Version to read, as `resolve` takes it; such a store is read-only.

        Raises:
            StoreError: There is no store, or a damaged one, or one of another release.
            UnknownVersionError: There is no version `at`.
        """
        repository = StoreRepository.open(address)
        with backend(f"{address}: cannot read the store's versions"):
            version = repository.tip() if at is None else repository.resolve(at)
        return cls(repository, version, read_only=at is not None)

    def checkout(self, version: str) -> AdapterStore:
        """Return the store at another version, read-only.

        Args:
            version: As `resolve` takes it.

        Raises:
            UnknownVersionError: There is no such version.
        """
        return AdapterStore(self._repository, self.resolve(version), read_only=True)

    @property
    def address(self) -> str:
        """Where the store is, as the caller wrote it."""
        return self._repository.address

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
        """Names of the adapters that the next `commit` adds, removes or annotates, sorted."""
        return self._changes.names

    def add(
        self,
        adapter: Adapter,
        *,
        note: str = "",
        metadata: Mapping[str, str] | None = None,
        replace: bool = False,
        allow_duplicates: bool = False,
        link: Sequence[Path] | None = None,
    ) -> None:
        """Check an adapter and stage a copy of it for the next `commit`.

        Staged tensors wait in a temporary file, so that memory holds one adapter whatever their
        number. Factors may be float32, float16 or bfloat16; verbatim tensors also float64, an
        integer dtype or bool. When this raises, what is staged is as before.

        With `link` the factors stay in the files given, and the store only gets references to
        where they are. It hardly grows then; and once such a file is changed, moved or deleted,
        the adapter can no longer be read, which reading it says.

        Args:
            adapter: The adapter.
            note: Free text to keep with it.
            metadata: Keys and values to keep with it.
            replace: Take the place of a stored adapter of this name, which older versions keep.
            allow_duplicates: Take it even if it is there under another name, bit for bit.
            link: Absolute paths of safetensors files that hold the factors row by row; `None` to
                copy them.

        Raises:
            AdapterExistsError: The store or the staged set has one of that name.
            DuplicateAdapterError: One of them has the same tensors and scalings.
            AdapterError: A name, shape or dtype that is not allowed, or no modules; or a factor is
                in none of the files to link.
            NonFiniteError: A tensor or a scaling holds NaN or infinity.
            IncompatibleAdaptersError: A module's `(d_out, d_in)` or kind, or the base model,
                differs from what the store or the staged set has.
            StoreError: The store is read-only, or on S3, where nothing can be linked; or the
                temporary file cannot be written.
        """
        self._check_writable()
        if link is not None and not self._repository.is_local:
            raise StoreError(
                f"{self.address}: nothing can be linked to a store on S3, whose readers may not "
                "have the files; add adapters without --link"
            )
        changes = self._changes
        check_free(adapter.name, changes.added, holder="the staged set")
        self._check_unstaged(adapter.name)
        annotation = check_annotation(adapter.name, note, metadata or {})
        own = own_copy(adapter)
        links = None if link is None else find_links(own, link)
        if self._spool is None:
            self._spool = Spool(_scratch(self._repository))
        staged = self._spool.stage(
            own, annotation, replace=replace, duplicate=allow_duplicates, links=links
        )
        try:
            check_fits(
                staged,
                layers=changes.layers,
                base=changes.base,
                twins=changes.twins(staged.digest),
                holder="the staged set",
            )
            self._check_against(staged, self._view)
        except UnmergeError:
            self._spool.forget(staged)
            raise
        changes.add(staged)

    def remove(self, name: str) -> None:
        """Stage the removal of an adapter; the versions that have it keep it.

        Raises:
            AdapterNotInStoreError: There is no such adapter.
            AdapterExistsError: A change of it is staged already.
            StoreError: The store is read-only.
        """
        self._check_writable()
        self._check_unstaged(name)
        self._view.record(name)
        self._changes.removed.add(name)

    def annotate(
        self, name: str, *, note: str | None = None, metadata: Mapping[str, str] | None = None
    ) -> None:
        """Stage another note or other metadata of an adapter; what is not given stays.

        Raises:
            AdapterNotInStoreError: There is no such adapter.
            AdapterExistsError: A change of it is staged already.
            AdapterError: The note or the metadata cannot be stored.
            StoreError: The store is read-only.
        """
        self._check_writable()
        self._check_unstaged(name)
        record = self._view.record(name)
        before = Annotation(record.note, record.metadata)
        after = check_annotation(
            name,
            before.note if note is None else note,
            before.metadata if metadata is None else metadata,
        )
        self._changes.noted[name] = (before, after)

    def discard(self) -> None:
        """Forget what is staged."""
        self._changes = Changes()
        if self._spool is not None:
            self._spool.close()
            self._spool = None

    def commit(self, message: str, *, progress: Callable[[int, int], None] | None = None) -> str:
        """Write what is staged as one new version on top of the newest, and read that one.

        Waits while another process commits, or does the work again if it came second (see the
        class). When this raises, the store is at its last commit and what is staged is as before.

        Args:
            message: What was done, for the history.
            progress: Called with (steps done, of how many) as writing goes on; it begins again
                when the work is done again.

        Returns:
            The new version's id.

        Raises:
            AdapterExistsError: Somebody else committed an adapter of that name meanwhile.
            AdapterNotInStoreError: Somebody else removed an adapter meanwhile.
            DuplicateAdapterError: Somebody else committed the same tensors meanwhile.
            IncompatibleAdaptersError: Likewise with other shapes or another base model.
            StoreError: Nothing is staged, the store is read-only, or writing failed; or somebody
                else changed the same note or metadata meanwhile.
        """
        self._check_writable()
        changes = self._changes
        if not changes.names:
            raise StoreError(f"{self.address}: nothing to commit; add or remove an adapter first")
        time = datetime.now(UTC).isoformat(timespec="seconds")

        def write(root: zarr.Group, tip: str) -> None:
            for adapter in changes.added.values():
                check_unaltered(adapter)
            view = self._view if tip == self.version else StoreView(self._repository, tip)
            # Also against the version being read: `gc` may have moved to it since the staging.
            for name in changes.removed:
                view.record(name)
            for adapter in changes.added.values():
                self._check_against(adapter, view)
            noted = [
                _annotated(view.record(name), before, after, holder=f"store {self.address}")
                for name, (before, after) in sorted(changes.noted.items())
            ]
            write_changes(
                root, view.index, changes, noted, self._spool, time=time, progress=progress
            )

        # What the callers' progress raises is a failure to commit as well.
        with backend(f"{self.address}: cannot commit"):
            version, _ = self._repository.transact(write, message)
        self.discard()
        self._view = StoreView(self._repository, version)
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
        """Return one module's factors across adapters, in one read per segment.

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
        """Return what an adapter's source says beside its tensors; see `Adapter.config`.

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
        with backend(f"{self.address}: cannot read the history"):
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
            raise StoreError(f"{self.address}: {error}") from error
        self._repository.tag(name, self.version if version is None else self.resolve(version))

    def delete_tag(self, name: str) -> None:
        """Delete a tag, so that `gc` may forget its version.

        The name stays taken: it can never come to mean another version.

        Raises:
            StoreError: The store is read-only.
            UnknownVersionError: There is no such tag.
        """
        self._check_writable()
        self._repository.delete_tag(name)

    def tags(self) -> dict[str, str]:
        """Return the version id of every tag, sorted by tag."""
        with backend(f"{self.address}: cannot read the tags"):
            return self._repository.tags()

    def resolve(self, version: str) -> str:
        """Return the full id of a version.

        Args:
            version: A tag, an id, or at least 6 characters an id begins with.

        Raises:
            UnknownVersionError: There is no such version, or more than one.
        """
        with backend(f"{self.address}: cannot read the store's versions"):
            return self._repository.resolve(version)

    def diff(
        self,
        before: str,
        after: str | None = None,
        *,
        modules: bool = True,
        progress: Callable[[int, int], None] | None = None,
    ) -> StoreDiff:
        """Return what changed from one version to another.

        Tensors are read only of adapters whose digest changed, one module at a time.

        Args:
            before: A version, as `resolve` takes it.
            after: Another; by default the one being read.
            modules: Whether to compare the tensors of changed adapters, module by module.
            progress: Called with (modules compared, of how many).

        Raises:
            UnknownVersionError: There is no such version.
            StoreError: What is read is not what was written.
        """
        old = StoreView(self._repository, self.resolve(before))
        new = self._view if after is None else StoreView(self._repository, self.resolve(after))
        return diff(old, new, modules=modules, progress=progress)

    def verify(self, *, progress: Callable[[int, int], None] | None = None) -> StoreReport:
        """Read the version being read from the disk, all of it, and check every bit it consists of.

        That is its index, every record, every chunk of every table, the files of linked adapters,
        all verbatim tensors, and every adapter's digest, taken again in one pass. Memory holds a
        few chunks besides the records. Damage ends up in the report, and checking goes on behind
        it. Bits that change nothing of what is read (the text of a commit, say) cannot be told
        from others.

        Args:
            progress: Called with (chunks and adapters checked, of how many).
        """
        return verify(self._repository, self.version, progress=progress)

    def gc(
        self,
        *,
        forget_before: datetime | None = None,
        older_than: datetime | None = None,
        force: bool = False,
        dry_run: bool = False,
        progress: Callable[[int, int], None] | None = None,
    ) -> GcReport:
        """Delete what no version uses, and what is left of imports that were killed.

        With `forget_before`, versions written before it are forgotten first, for ever; the newest
        and the tagged stay, bit for bit. If the newest holds what no adapter uses any more (of
        removed or replaced adapters, old notes), a version without that is written before that,
        with the same adapters; but not where the newest is to be kept itself, by a tag or its
        age, and less than half of it is such, since that would take space instead of giving it
        back. The store then reads the newest version. Whoever has a forgotten version open cannot
        read on; what is being committed meanwhile is not lost.

        Args:
            forget_before: Forget older versions; with a time zone. By default none.
            older_than: Keep younger objects; see `StoreRepository.collect_garbage` for the
                default, which is nothing on a local disk and 24 hours on S3.
            force: Take a later `older_than` on S3 as well; whatever is being committed is lost.
            dry_run: Change nothing, and say what would be forgotten and left out.
            progress: Called with (tables rewritten, of how many).

        Returns:
            What was done. If there was nothing to do, nothing is written.

        Raises:
            ConfigError: A time without a zone, or an `older_than` that needs `force`.
            StoreError: The store is read-only, or a tag or something that has to be rewritten is
                damaged; nothing is forgotten or deleted then.
        """
        self._check_writable()
        report = gc(
            self._repository,
            forget_before=forget_before,
            older_than=older_than,
            force=force,
            dry_run=dry_run,
            progress=progress,
        )
        if forget_before is not None and not dry_run:
            with backend(f"{self.address}: cannot read the store's versions"):
                self._view = StoreView(self._repository, self._repository.tip())
        return report

    def _check_writable(self) -> None:
        if self._read_only:
            raise StoreError(
                f"{self.address}: opened at version {self.version}, which is read-only; "
                "open the store without a version to write"
            )

    def _check_unstaged(self, name: str) -> None:
        if name in self._changes:
            raise AdapterExistsError(
                f'{self.address}: a change of adapter "{name}" is staged already; commit it, or '
                "discard what is staged"
            )

    def _check_against(self, adapter: StagedAdapter, view: StoreView) -> None:
        holder = f"store {self.address}"
        going = {*self._changes.removed, *([adapter.name] if adapter.replace else [])}
        if adapter.name not in going:
            check_free(adapter.name, view.index.adapters, holder=holder)
        check_fits(
            adapter,
            layers=view.index.layers,
            base=(view.index.base_model, view.index.revision),
            twins=[twin for twin in view.twins.get(adapter.digest, ()) if twin not in going],
            holder=holder,
        )


def _annotated(
    record: StoredAdapter, before: Annotation, after: Annotation, *, holder: str
) -> StoredAdapter:
    """Return a record with what was staged for it, and with what others changed meanwhile.

    Raises:
        StoreError: That is the same.
    """
    changed = {}
    for what in ("note", "metadata"):
        found, old, new = (getattr(noted, what) for noted in (record, before, after))
        if new in (old, found):
            continue
        if found != old:
            raise StoreError(
                f'{holder}: somebody else changed the {what} of adapter "{record.name}" '
                "meanwhile; look at it, and change it again"
            )
        changed[what] = new
    return record.model_copy(update=changed)


def _scratch(repository: StoreRepository) -> Path | None:
    """Where large temporary files belong: beside the data, if that is on a local disk."""
    return repository.path if repository.is_local else None
