"""Merge LoRA adapters, reversibly: public names of the framework."""

from unmerge.adapter import Adapter, Factors
from unmerge.appending import append
from unmerge.basis import BasisMerger, InBasis
from unmerge.elementwise import ElementwiseMerger, InnerRule, SignEquivariantRule
from unmerge.errors import UnmergeError
from unmerge.formats import AdapterFormat, read_adapter
from unmerge.hookspecs import hookimpl
from unmerge.linear import LinearMerger
from unmerge.matrices import Block, Blocks, Matrices, PartWeights, module_matrices
from unmerge.merger import (
    Absent,
    Capabilities,
    MergeContext,
    Merger,
    OutputSize,
    Passes,
    ReversibleMerger,
)
from unmerge.pipeline import MergePipeline, RunReport
from unmerge.plan import Plan
from unmerge.plugins import get_plugin_manager
from unmerge.recipe import Recipe
from unmerge.registry import Registry, default_registry
from unmerge.stack import FactorStack, ModuleShape, StackModule
from unmerge.store import AdapterStore
from unmerge.trimming import Scope, TrimmingMerger
from unmerge_bundle.encodings import (
    AdapterFactorsEncoding,
    AffineBasisEncoding,
    DeltaEncoding,
    Encoding,
    FactorsEncoding,
    MaskedDeltaEncoding,
    QuantisedMatrix,
    SharedFactorsEncoding,
)

__all__ = [
    "Absent",
    "Adapter",
    "AdapterFactorsEncoding",
    "AdapterFormat",
    "AdapterStore",
    "AffineBasisEncoding",
    "BasisMerger",
    "Block",
    "Blocks",
    "Capabilities",
    "DeltaEncoding",
    "ElementwiseMerger",
    "Encoding",
    "FactorStack",
    "Factors",
    "FactorsEncoding",
    "InBasis",
    "InnerRule",
    "LinearMerger",
    "MaskedDeltaEncoding",
    "Matrices",
    "MergeContext",
    "MergePipeline",
    "Merger",
    "ModuleShape",
    "OutputSize",
    "PartWeights",
    "Passes",
    "Plan",
    "QuantisedMatrix",
    "Recipe",
    "Registry",
    "ReversibleMerger",
    "RunReport",
    "Scope",
    "SharedFactorsEncoding",
    "SignEquivariantRule",
    "StackModule",
    "TrimmingMerger",
    "UnmergeError",
    "append",
    "default_registry",
    "get_plugin_manager",
    "hookimpl",
    "module_matrices",
    "read_adapter",
]
