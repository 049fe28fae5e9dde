"""Numbers that say how adapters interfere, before anything is merged; see docs/diagnostics.md."""

from unmerge.diagnostics.analysis import Analysis, ModuleAnalysis, analyze
from unmerge.diagnostics.connectivity import (
    Interpolation,
    ModeConnectivity,
    interpolate,
    mode_connectivity,
)
from unmerge.diagnostics.interference import (
    DirectMergeInterference,
    MatchedNoise,
    direct_merge_interference,
    interference_term,
)
from unmerge.diagnostics.plot import plot_analysis
from unmerge.diagnostics.spaces import (
    DeltaSpaces,
    PairwiseGeometry,
    SubspaceGeometry,
    compare_deltas,
    cosine,
    delta_spaces,
    principal_angles,
)

__all__ = [
    "Analysis",
    "DeltaSpaces",
    "DirectMergeInterference",
    "Interpolation",
    "MatchedNoise",
    "ModeConnectivity",
    "ModuleAnalysis",
    "PairwiseGeometry",
    "SubspaceGeometry",
    "analyze",
    "compare_deltas",
    "cosine",
    "delta_spaces",
    "direct_merge_interference",
    "interference_term",
    "interpolate",
    "mode_connectivity",
    "plot_analysis",
    "principal_angles",
]
