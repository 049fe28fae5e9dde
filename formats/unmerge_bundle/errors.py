"""Errors of the bundle format: one class per way a bundle can be bad, each with a stable code."""

from __future__ import annotations

from typing import ClassVar


class BundleError(Exception):
    """A bundle cannot be read, written or trusted.

    Attributes:
        code: Stable, machine-readable reason, the same in every release of format version 1.
        path: File or place inside the bundle the error is about, or "".
    """

    code: ClassVar[str] = "bundle"

    def __init__(self, message: str, *, path: str = "") -> None:
        super().__init__(f"{path}: {message}" if path else message)
        self.path = path


class NotABundleError(BundleError, ValueError):
    """The path holds no `bundle.json`, or one that is not a bundle's."""

    code = "not-a-bundle"


class UnsupportedVersionError(BundleError, ValueError):
    """The bundle's format version is not one this reader knows."""

    code = "unsupported-version"


class ManifestError(BundleError, ValueError):
    """`bundle.json` or a generation document is malformed or contradicts itself."""

    code = "manifest"


class ManifestTooLargeError(ManifestError):
    """A JSON document is larger than the format allows."""

    code = "manifest-too-large"


class MissingBlobError(BundleError, LookupError):
    """A blob that the manifest names is not there."""

    code = "missing-blob"


class BlobSizeError(BundleError, ValueError):
    """A blob's size differs from its descriptor."""

    code = "blob-size"


class DigestMismatchError(BundleError, ValueError):
    """Bytes do not have the sha256 they are stored or recorded under."""

    code = "digest-mismatch"


class BlobError(BundleError, ValueError):
    """A blob is no well-formed safetensors file."""

    code = "malformed-blob"


class TensorMismatchError(BundleError, ValueError):
    """A tensor is missing, or its shape or dtype contradicts the manifest."""

    code = "tensor-mismatch"


class ReconstructionMismatchError(BundleError, ValueError):
    """A restored adapter does not have the error the bundle records for it."""

    code = "reconstruction-mismatch"


class AdapterNotInBundleError(BundleError, LookupError):
    """The bundle holds no adapter of that name."""

    code = "adapter-not-in-bundle"


class AdapterInBundleError(BundleError, ValueError):
    """The bundle holds an adapter of that name already."""

    code = "adapter-in-bundle"


class RefitError(BundleError, ValueError):
    """An adapter does not fit the bundle's shared tensors: merge again with it."""

    code = "refit"


class BundleBusyError(BundleError, TimeoutError):
    """Another writer is at work on the bundle, or has changed it meanwhile."""

    code = "busy"


class WrongKindError(BundleError, ValueError):
    """`restore` on a bundle that holds one merged adapter, `export` on one that restores."""

    code = "wrong-kind"


class OutputExistsError(BundleError, FileExistsError):
    """The output path exists; nothing is overwritten unless asked."""

    code = "output-exists"


class InvalidInputError(BundleError, ValueError):
    """What is to be written contradicts itself or the format; nothing is written."""

    code = "invalid-input"


class NonFiniteError(InvalidInputError, ArithmeticError):
    """A NaN or an infinity where only finite numbers have a meaning, or after rounding."""

    code = "non-finite"
