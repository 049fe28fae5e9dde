"""Every error the framework raises, in one tree; each derives from a built-in one as well."""

from __future__ import annotations

from collections.abc import Sequence


class UnmergeError(Exception):
    """Root of the framework's errors; the command line prints it as one line and exits 1."""


class ConfigError(UnmergeError, ValueError):
    """A recipe, option or field has a wrong value; the command line exits 2."""


class AdapterError(UnmergeError, ValueError):
    """An adapter is malformed: a factor is missing, a shape is wrong, a file is truncated."""


class UnsupportedAdapterError(AdapterError):
    """An adapter uses a feature that changes its delta and is not supported: refused by name.

    Attributes:
        feature: The configuration field or tensor that is refused.
    """

    def __init__(self, message: str, *, feature: str) -> None:
        super().__init__(message)
        self.feature = feature


class IncompatibleAdaptersError(AdapterError):
    """Adapters cannot be merged together: base model, shapes or ranks differ."""


class ImportRefusedError(AdapterError):
    """Of several adapters some cannot be added to a store, so that none was.

    Attributes:
        refused: Each source that is refused, and why.
        of: How many sources there were.
    """

    def __init__(self, refused: Sequence[tuple[str, str]], *, of: int) -> None:
        self.refused = tuple(refused)
        self.of = of
        shown = "; ".join(self.reasons[:20])
        more = f"; and {len(refused) - 20} more" if len(refused) > 20 else ""
        super().__init__(f"{self.summary}: {shown}{more}")

    @property
    def summary(self) -> str:
        """How many are refused."""
        return f"{len(self.refused)} of {self.of} adapters cannot be added, so that none was"

    @property
    def reasons(self) -> list[str]:
        """One line for each source that is refused; it begins with the source."""
        return [
            reason if reason.startswith(source.rstrip("/")) else f"{source}: {reason}"
            for source, reason in self.refused
        ]


class ModuleNotInAdapterError(AdapterError, LookupError):
    """No adapter, or not the one asked for, has that module path."""


class PluginError(UnmergeError):
    """A plugin cannot be used."""


class UnknownMergerError(PluginError, LookupError):
    """No registered strategy has that name."""


class UnknownFormatError(PluginError, LookupError):
    """No registered adapter format has that name."""


class DuplicateMergerError(PluginError):
    """Two distributions register one strategy name."""


class CapabilityError(PluginError):
    """A strategy is used for something it does not declare."""


class StoreError(UnmergeError):
    """The store cannot be opened, read or written."""


class StoreExistsError(StoreError, FileExistsError):
    """A store is to be created where something already is."""


class UnknownVersionError(StoreError, LookupError):
    """The store has no version or tag of that name."""


class AdapterExistsError(StoreError, ValueError):
    """The store already holds an adapter of that name."""


class DuplicateAdapterError(StoreError, ValueError):
    """The store already holds an adapter with the same tensors and scalings."""


class AdapterNotInStoreError(StoreError, LookupError):
    """The store, at that version, holds no adapter of that name."""


class NumericalError(UnmergeError, ArithmeticError):
    """A computation has no meaningful result."""


class NonFiniteError(NumericalError):
    """A NaN or an infinity where only finite numbers have a meaning."""


class MemoryBudgetError(UnmergeError, MemoryError):
    """The memory budget is too small for the smallest unit of work.

    Attributes:
        required: Smallest budget that works, in bytes.
    """

    def __init__(self, message: str, *, required: int) -> None:
        super().__init__(message)
        self.required = required
