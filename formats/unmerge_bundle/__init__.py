"""Reversible merge bundles: read and write `.rmb` directories with numpy alone.

`docs/spec/bundle-v1.md` defines the format; nothing here needs torch or the strategies.
"""

from unmerge_bundle.adapters import AdapterRecord, RecordedModule
from unmerge_bundle.append import Appended, append_adapter
from unmerge_bundle.documents import check_message
from unmerge_bundle.encodings import (
    AdapterFactorsEncoding,
    AffineBasisEncoding,
    DeltaEncoding,
    Encoding,
    FactorsEncoding,
    MaskedDeltaEncoding,
    QuantisedMatrix,
    Restores,
    RestoringEncoding,
    SharedFactorsEncoding,
)
from unmerge_bundle.errors import (
    AdapterInBundleError,
    AdapterNotInBundleError,
    BlobError,
    BlobSizeError,
    BundleBusyError,
    BundleError,
    DigestMismatchError,
    InvalidInputError,
    ManifestError,
    ManifestTooLargeError,
    MissingBlobError,
    NonFiniteError,
    NotABundleError,
    OutputExistsError,
    ReconstructionMismatchError,
    RefitError,
    TensorMismatchError,
    UnsupportedVersionError,
    WrongKindError,
)
from unmerge_bundle.fitting import Fit, fit_adapter
from unmerge_bundle.kinds import EMBEDDING, LINEAR, check_kernel, check_kind, kernel_of
from unmerge_bundle.measure import compare, measure, relative_errors
from unmerge_bundle.model import (
    FORMAT_VERSION,
    Amount,
    BaseModelId,
    BundleSize,
    ModuleErrors,
    Source,
    Strategy,
)
from unmerge_bundle.names import check_key, check_module_path, check_name
from unmerge_bundle.quantise import dequantise, quantise
from unmerge_bundle.reader import Bundle
from unmerge_bundle.reader import open_bundle as open  # noqa: A004 - unmerge_bundle.open(path)
from unmerge_bundle.reconstruct import reconstruct
from unmerge_bundle.restored import (
    MergedAdapter,
    Origin,
    RestoredAdapter,
    RestoredDelta,
    RestoredModule,
    SavedAdapter,
)
from unmerge_bundle.verify import Depth, Problem, VerifyReport, verify
from unmerge_bundle.writer import BundleWriter, GenerationInfo

__all__ = [
    "EMBEDDING",
    "FORMAT_VERSION",
    "LINEAR",
    "AdapterFactorsEncoding",
    "AdapterInBundleError",
    "AdapterNotInBundleError",
    "AdapterRecord",
    "AffineBasisEncoding",
    "Amount",
    "Appended",
    "BaseModelId",
    "BlobError",
    "BlobSizeError",
    "Bundle",
    "BundleBusyError",
    "BundleError",
    "BundleSize",
    "BundleWriter",
    "DeltaEncoding",
    "Depth",
    "DigestMismatchError",
    "Encoding",
    "FactorsEncoding",
    "Fit",
    "GenerationInfo",
    "InvalidInputError",
    "ManifestError",
    "ManifestTooLargeError",
    "MaskedDeltaEncoding",
    "MergedAdapter",
    "MissingBlobError",
    "ModuleErrors",
    "NonFiniteError",
    "NotABundleError",
    "Origin",
    "OutputExistsError",
    "Problem",
    "QuantisedMatrix",
    "ReconstructionMismatchError",
    "RecordedModule",
    "RefitError",
    "RestoredAdapter",
    "RestoredDelta",
    "RestoredModule",
    "Restores",
    "RestoringEncoding",
    "SavedAdapter",
    "SharedFactorsEncoding",
    "Source",
    "Strategy",
    "TensorMismatchError",
    "UnsupportedVersionError",
    "VerifyReport",
    "WrongKindError",
    "append_adapter",
    "check_kernel",
    "check_key",
    "check_kind",
    "check_message",
    "check_module_path",
    "check_name",
    "compare",
    "dequantise",
    "fit_adapter",
    "kernel_of",
    "measure",
    "open",
    "quantise",
    "reconstruct",
    "relative_errors",
    "verify",
]
