"""Rank and alpha patterns against PEFT's own layers: whatever the patterns, the same numbers."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import peft
import pytest
from hypothesis import example, given, settings
from hypothesis import strategies as st
from torch import nn

from adapters import peft_config
from unmerge.formats import read_peft
from unmerge.formats.peft_config import parse_config

# PEFT's own, about patterns that match nothing.
pytestmark = pytest.mark.filterwarnings("ignore:The following .* keys did not match:RuntimeWarning")

PATHS = (
    "q",
    "out",
    "layers.0.q",
    "layers.0.out",
    "layers.1.q",
    "layers.1.mlp.q",
    "layers.1.mlp.in-out",
    "layers.10.q_2",
    "embed",
)


def model() -> nn.Module:
    """Return a model whose layers end alike and contain each other's names."""
    root = nn.Module()
    for path in PATHS:
        *parents, last = path.split(".")
        place = root
        for name in parents:
            if not hasattr(place, name):
                place.add_module(name, nn.Module())
            place = getattr(place, name)
        place.add_module(last, nn.Embedding(4, 2) if last == "embed" else nn.Linear(3, 2))
    return root


# Endings, whole paths, expressions with and without anchors, some of which match nothing.
KEYS = st.one_of(
    st.sampled_from(PATHS),
    st.sampled_from([path.partition(".")[2] or path for path in PATHS]),
    st.sampled_from([f"^{path}" for path in PATHS]),
    st.sampled_from(
        [
            *(".*", "q.*", ".*q", "^q", "^q$", "[qo].*", "q|out", "(layers.)?0.q", r"\d+\.q"),
            *(r"layers\.1\..*", "layers.1", "mlp", r"in\-out", ".+_2", "e?", "nothing", r"q_\d$"),
            *("layers.[01].q", "(?:q)", r"\w+", "layers.(0|10).*", "base_model.model.q", ""),
        ]
    ),
)


# Alternatives are one expression, and the first key that matches decides.
@example(rank_pattern={"q|out": 2}, alpha_pattern={"q|out": 3}, rank=4, alpha=5, rslora=False)
@example(
    rank_pattern={"mlp.in-out": 2}, alpha_pattern={".*": 3, "q": 7}, rank=4, alpha=5, rslora=True
)
@settings(max_examples=60, deadline=None)
@given(
    rank_pattern=st.dictionaries(KEYS, st.integers(1, 6), max_size=5),
    alpha_pattern=st.dictionaries(
        KEYS, st.integers(-8, 64) | st.sampled_from([0.5, 2.25, 1 / 3]), max_size=5
    ),
    rank=st.integers(1, 5),
    alpha=st.integers(1, 9),
    rslora=st.booleans(),
)
def test_ranks_and_scalings_are_those_of_peft(
    tmp_path_factory: pytest.TempPathFactory,
    rank_pattern: dict[str, int],
    alpha_pattern: dict[str, float],
    rank: int,
    alpha: int,
    rslora: bool,
) -> None:
    changes: dict[str, Any] = {
        "rank_pattern": rank_pattern,
        "alpha_pattern": alpha_pattern,
        "use_rslora": rslora,
    }
    config = peft_config(
        rank=rank, alpha=alpha, targets=list(PATHS), base_model=None, changes=changes
    )
    directory = tmp_path_factory.mktemp("drawn")
    # As text, because the order of the keys in the file counts.
    text = json.dumps(config)
    (directory / "adapter_config.json").write_text(text)
    adapted = peft.get_peft_model(model(), peft.LoraConfig.from_pretrained(directory))
    ours = parse_config(json.loads(text), "c.json")
    for path in PATHS:
        layer = adapted.base_model.model.get_submodule(path)
        assert ours.rank_of(path) == layer.r["default"], path
        assert ours.scaling_of(path) == layer.scaling["default"], path


TARGETS: dict[str, dict[str, Any]] = {
    "exclude_modules": {"target_modules": ["q", "out"], "exclude_modules": ["mlp.q", "^out"]},
    "exclude_modules as an expression": {
        "target_modules": ["q", "out"],
        "exclude_modules": r".*layers\.1\..*",
    },
    "target_modules as an expression": {"target_modules": r"layers\.\d+\.(q|out)"},
    "layers_to_transform": {
        "target_modules": ["q"],
        "layers_to_transform": [1, 10],
        "layers_pattern": "layers",
    },
    "one layer": {"target_modules": ["q"], "layers_to_transform": 0},
}


@pytest.mark.parametrize("case", TARGETS)
def test_the_tensors_say_which_modules_are_adapted(case: str, tmp_path: Path) -> None:
    adapted = peft.get_peft_model(model(), peft.LoraConfig(r=2, **TARGETS[case]))
    adapted.save_pretrained(tmp_path / "task")
    layers = {
        path
        for path, layer in adapted.base_model.model.named_modules()
        if isinstance(layer, peft.tuners.lora.LoraLayer)
    }
    assert 0 < len(layers) < len(PATHS)
    assert set(read_peft(tmp_path / "task").modules) == layers
