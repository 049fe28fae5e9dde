"""PT-SVD of a checkpoint: the best factors of what changed, and everything else accounted for."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from huggingface_hub import constants
from pydantic import ValidationError
from safetensors.torch import save_file

from adapters import make_adapter, write_peft_directory
from checkpoints import Tensors, delta, distance, gaussian, save_model
from unmerge.adapter import Adapter
from unmerge.errors import (
    AdapterError,
    ConfigError,
    IncompatibleAdaptersError,
    NonFiniteError,
    UnsupportedAdapterError,
)
from unmerge.formats import CheckpointFormat, read_adapter
from unmerge.store import AdapterStore
from unmerge.testing.memory import peak_bytes

Q, UP = "model.layers.0.self_attn.q_proj", "model.layers.0.mlp.up_proj"
NORM = "model.norm.weight"


def base_tensors() -> dict[str, torch.Tensor]:
    return {
        "model.embed_tokens.weight": gaussian(30, 12, seed=1),
        f"{Q}.weight": gaussian(12, 12, seed=2),
        f"{UP}.weight": gaussian(20, 12, seed=3),
        f"{UP}.bias": gaussian(20, seed=4),
        NORM: torch.ones(12),
        "lm_head.weight": gaussian(30, 12, seed=5),
    }


def change(*shape: int, seed: int) -> torch.Tensor:
    """A full-rank change with a decaying spectrum, small beside the weights."""
    U, S, Vh = torch.linalg.svd(gaussian(*shape, seed=seed), full_matrices=False)
    return (U * (0.05 * 0.6 ** torch.arange(len(S)))) @ Vh


def plus(tensors: Tensors, **changes: torch.Tensor) -> dict[str, torch.Tensor]:
    return {**tensors, **{name: tensors[name] + by for name, by in changes.items()}}


def read(
    place: Path,
    tuned: Tensors,
    base: Tensors | None = None,
    *,
    config: dict[str, Any] | None = None,
    base_config: dict[str, Any] | None = None,
    shards: int = 1,
    **options: Any,
) -> Adapter:
    tuned_to = save_model(place / "sql", tuned, config=config, shards=shards)
    base_to = save_model(place / "base", base or base_tensors(), config=base_config)
    if options.keys().isdisjoint({"rank", "energy", "error"}):
        options["rank"] = 4
    return CheckpointFormat(base=str(base_to), **options).read(tuned_to, None)


def record(adapter: Adapter) -> Any:
    return json.loads(adapter.config)


# -- what is kept of a change ----------------------------------------------------------------


@pytest.mark.parametrize("shards", [1, 3])
def test_the_best_factors_of_a_rank(tmp_path: Path, shards: int) -> None:
    by = change(20, 12, seed=7)
    adapter = read(tmp_path, plus(base_tensors(), **{f"{UP}.weight": by}), rank=3, shards=shards)
    assert list(adapter.modules) == [UP]
    factors = adapter.modules[UP]
    assert (factors.A.shape, factors.B.shape) == ((3, 12), (20, 3))
    assert (factors.scaling, factors.kind, factors.A.dtype) == (1.0, "linear", torch.float32)
    stored = (base_tensors()[f"{UP}.weight"] + by).double() - base_tensors()[f"{UP}.weight"]
    U, S, Vh = np.linalg.svd(stored.numpy())
    best = torch.from_numpy(U[:, :3] * S[:3] @ Vh[:3])
    assert distance(delta(factors), best) < 1e-6
    # Balanced: both sides carry the roots of the singular values.
    assert np.allclose((factors.A @ factors.A.T).diagonal(), S[:3], rtol=1e-5)
    assert np.allclose((factors.B.T @ factors.B).diagonal(), S[:3], rtol=1e-5)
    kept = record(adapter)["modules"][UP]
    assert kept["rank"] == 3
    assert kept["error"] == pytest.approx(np.sqrt(np.square(S[3:]).sum() / np.square(S).sum()))


@pytest.mark.parametrize("shape", [(20, 12), (300, 280)])  # full SVD, and Gram matrix with QR
@pytest.mark.parametrize("error", [0.5, 0.1, 0.01])
def test_the_smallest_rank_within_an_error(
    tmp_path: Path, shape: tuple[int, int], error: float
) -> None:
    base = {f"{Q}.weight": torch.zeros(shape)}
    tuned = {f"{Q}.weight": change(*shape, seed=8)}
    adapter = read(tmp_path, tuned, base, error=error)
    S = np.linalg.svd(tuned[f"{Q}.weight"].double().numpy(), compute_uv=False)
    tails = np.sqrt(np.cumsum(np.square(S)[::-1])[::-1] / np.square(S).sum())
    smallest = int(np.argmax(tails <= error))  # tails[k]: the error of rank k
    factors = adapter.modules[Q]
    assert factors.rank == smallest
    assert distance(delta(factors), tuned[f"{Q}.weight"]) <= error
    assert record(adapter)["modules"][Q]["error"] == pytest.approx(tails[smallest], rel=1e-4)


def test_the_smallest_rank_with_an_energy(tmp_path: Path) -> None:
    values = torch.tensor([3.0, 2.0, 1.0, 1.0])  # energies 9, 4, 1, 1 of 15
    tuned = {f"{Q}.weight": torch.diag(values)}
    base = {f"{Q}.weight": torch.zeros(4, 4)}
    for energy, rank in ((0.6, 1), (0.61, 2), (13 / 15 + 1e-9, 3), (1.0, 4)):
        place = tmp_path / f"{rank}"
        assert read(place, tuned, base, energy=energy).modules[Q].rank == rank


def test_no_error_keeps_the_change_to_float32(tmp_path: Path) -> None:
    by = change(20, 12, seed=9)
    base = {f"{UP}.weight": torch.zeros(20, 12)}
    adapter = read(tmp_path, {f"{UP}.weight": by}, base, error=0)
    assert adapter.modules[UP].rank == 12
    assert distance(delta(adapter.modules[UP]), by) < 2e-7


def test_an_error_of_zero_finds_the_rank_of_an_adapter(tmp_path: Path) -> None:
    lora = make_adapter("x", seed=0, modules={Q: (12, 12)}, rank=2).modules[Q]
    base = {f"{Q}.weight": torch.zeros(12, 12, dtype=torch.float64)}
    tuned = {f"{Q}.weight": delta(lora)}
    assert read(tmp_path, tuned, base, error=0).modules[Q].rank == 2


def test_a_rank_above_the_dimensions_is_theirs(tmp_path: Path) -> None:
    tuned = plus(base_tensors(), **{f"{UP}.weight": change(20, 12, seed=7)})
    assert read(tmp_path, tuned, rank=64).modules[UP].rank == 12


# -- dtypes ----------------------------------------------------------------------------------


def test_bfloat16_is_subtracted_in_float32(tmp_path: Path) -> None:
    # 1 + 2^-7 and 2^-9 are bfloat16 numbers, their difference needs two more bits.
    base = {f"{Q}.weight": torch.full((2, 2), 2.0**-9).bfloat16()}
    tuned = {f"{Q}.weight": torch.full((2, 2), 1 + 2.0**-7).bfloat16()}
    adapter = read(tmp_path, tuned, base, rank=1)
    expected = torch.full((2, 2), 1 + 2.0**-7 - 2.0**-9)
    assert distance(delta(adapter.modules[Q]), expected) < 1e-6
    assert adapter.modules[Q].A.dtype == torch.float32


def test_models_of_two_dtypes(tmp_path: Path) -> None:
    base = {f"{Q}.weight": gaussian(4, 4, seed=1), NORM: torch.ones(4)}
    tuned = {name: tensor.to(torch.float16) for name, tensor in base.items()}
    adapter = read(tmp_path, tuned, base, error=0)
    # All that differs is the rounding, and that is what the record says.
    assert distance(delta(adapter.modules[Q]), tuned[f"{Q}.weight"] - base[f"{Q}.weight"]) < 1e-6
    assert record(adapter)["modules"][Q]["rounding"] == pytest.approx(1, rel=0.6)
    assert not adapter.verbatim  # ones are ones in both


def test_the_share_of_rounding(tmp_path: Path) -> None:
    # Units in the last place of bfloat16: 2^-7 for 1 and 1.5, 2^-8 for 0.75, none for 0.
    tuned = {f"{Q}.weight": torch.tensor([[1.0, 1.5], [0.75, 0.0]]).bfloat16()}
    base = {f"{Q}.weight": torch.tensor([[0.0, 1.5], [0.75, 0.0]])}
    adapter = read(tmp_path, tuned, base, rank=1)
    expected = np.sqrt((2 * 2.0**-14 + 2.0**-16) / 12)  # against a change of norm 1
    assert record(adapter)["modules"][Q]["rounding"] == pytest.approx(expected)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_narrow_factors(tmp_path: Path, dtype: torch.dtype) -> None:
    name = str(dtype).removeprefix("torch.")
    tuned = plus(base_tensors(), **{f"{UP}.weight": change(20, 12, seed=7)})
    adapter = read(tmp_path, tuned, error=0.1, dtype=name)
    factors = adapter.modules[UP]
    assert factors.A.dtype == factors.B.dtype == dtype
    stored = tuned[f"{UP}.weight"] - base_tensors()[f"{UP}.weight"]
    measured = distance(delta(factors), stored)
    assert measured <= 0.1
    assert record(adapter)["modules"][UP]["error"] == pytest.approx(measured)


def test_factors_too_narrow_for_the_error(tmp_path: Path) -> None:
    tuned = plus(base_tensors(), **{f"{UP}.weight": change(20, 12, seed=7)})
    with pytest.raises(ConfigError, match=r"relative error of 0\.00.*more than the 0 asked for"):
        read(tmp_path, tuned, error=0, dtype="bfloat16")


def test_factors_beyond_the_range_of_float16(tmp_path: Path) -> None:
    tuned = {f"{Q}.weight": torch.tensor([[1e12, 0.0], [0.0, 1.0]])}
    base = {f"{Q}.weight": torch.zeros(2, 2)}
    with pytest.raises(NonFiniteError, match=r"q_proj: factors.*exceeds the range of float16"):
        read(tmp_path, tuned, base, dtype="float16")


def test_a_change_beyond_the_range_of_float32(tmp_path: Path) -> None:
    name = "layers.0.q.weight"
    base, tuned = ({name: torch.full((2, 3), value)} for value in (3e38, -3e38))
    with pytest.raises(NonFiniteError, match=rf'"{name}": its change from the base exceeds'):
        read(tmp_path, tuned, base=base, rank=1)


# -- tensors that are no layer's weight -------------------------------------------------------


def test_what_did_not_change_is_not_there(tmp_path: Path) -> None:
    adapter = read(tmp_path, plus(base_tensors(), **{f"{Q}.weight": change(12, 12, seed=7)}))
    assert list(adapter.modules) == [Q]
    assert not adapter.verbatim


def test_two_equal_models(tmp_path: Path) -> None:
    with pytest.raises(AdapterError, match=r"sql: no tensor differs from the base .*base;"):
        read(tmp_path, base_tensors())


def test_norms_and_biases_are_kept_whole(tmp_path: Path) -> None:
    by = {NORM: gaussian(12, seed=3), f"{UP}.bias": gaussian(20, seed=4)}
    tuned = plus(base_tensors(), **by)
    adapter = read(tmp_path, tuned)
    assert not adapter.modules
    assert list(adapter.verbatim) == [f"{UP}.bias", NORM]
    for key, tensor in adapter.verbatim.items():
        assert torch.equal(tensor, tuned[key])
    assert record(adapter)["whole"] == dict.fromkeys(by, "no layer's weight")


def test_layers_that_modules_leaves_out_are_kept_whole(tmp_path: Path) -> None:
    by = {f"{Q}.weight": change(12, 12, seed=7), f"{UP}.weight": change(20, 12, seed=8)}
    tuned = plus(base_tensors(), **by)
    adapter = read(tmp_path, tuned, modules=("*.q_proj", "*.k_proj"))
    assert list(adapter.modules) == [Q]
    assert list(adapter.verbatim) == [f"{UP}.weight"]
    assert torch.equal(adapter.verbatim[f"{UP}.weight"], tuned[f"{UP}.weight"])
    assert record(adapter)["whole"] == {f"{UP}.weight": "not in modules"}


def test_embeddings_are_low_rank_by_token(tmp_path: Path) -> None:
    by = torch.zeros(30, 12)
    by[[4, 17]] = gaussian(2, 12, seed=7)
    name = "model.embed_tokens.weight"
    tuned = plus(base_tensors(), **{name: by})
    adapter = read(tmp_path, tuned, error=1e-3)
    factors = adapter.modules["model.embed_tokens"]
    assert factors.kind == "embedding"
    assert (factors.A.shape, factors.B.shape) == ((2, 30), (12, 2))
    assert distance(delta(factors).T, tuned[name] - base_tensors()[name]) < 1e-6


@pytest.mark.parametrize(("shape", "kind"), [((6, 4, 3, 2), "conv2d:3x2"), ((6, 4, 3), "conv1d:3")])
def test_convolutions_are_low_rank_as_row_major_matrices(
    tmp_path: Path, shape: tuple[int, ...], kind: str
) -> None:
    by = change(shape[0], int(np.prod(shape[1:])), seed=7)
    base = {"conv.weight": torch.zeros(shape), "conv.bias": torch.zeros(6)}
    tuned = {**base, "conv.weight": by.reshape(shape)}
    factors = read(tmp_path, tuned, base, error=0).modules["conv"]
    assert factors.kind == kind
    assert factors.d_in == by.shape[1]
    assert distance(delta(factors), by) < 1e-6


@pytest.mark.parametrize(
    ("name", "shape"),
    [
        ("model.experts.gate_up_proj", (2, 4, 6)),  # a bare parameter
        ("model.experts.weight", (2, 4, 200)),  # no kernel is that wide
        ("model.norm.weight", (4, 6)),  # its bias is no bias of outputs
    ],
)
def test_weights_of_unknown_layers_are_kept_whole(
    tmp_path: Path, name: str, shape: tuple[int, ...]
) -> None:
    base = {name: torch.zeros(shape), "model.norm.bias": torch.zeros(6)}
    tuned = {**base, name: gaussian(*shape)}
    adapter = read(tmp_path, tuned, base)
    assert not adapter.modules
    assert torch.equal(adapter.verbatim[name], tuned[name])


def test_counters_are_kept_whole(tmp_path: Path) -> None:
    base = {"norm.num_batches_tracked": torch.tensor(3), "norm.weight": torch.ones(2)}
    tuned = {**base, "norm.num_batches_tracked": torch.tensor(9)}
    assert read(tmp_path, tuned, base).verbatim == {"norm.num_batches_tracked": torch.tensor(9)}


# -- tensors of one model only ----------------------------------------------------------------


def without(tensors: Tensors, *names: str) -> dict[str, torch.Tensor]:
    return {name: tensor for name, tensor in tensors.items() if name not in names}


def test_a_new_head_is_kept_whole_and_the_old_one_left_out(tmp_path: Path) -> None:
    head = {"score.weight": gaussian(3, 12), "score.bias": torch.zeros(3)}
    tuned = without(base_tensors(), "lm_head.weight") | head
    config = {"architectures": ["LlamaForSequenceClassification"]}
    adapter = read(tmp_path, tuned, config=config)
    assert list(adapter.verbatim) == ["score.bias", "score.weight"]
    assert torch.equal(adapter.verbatim["score.weight"], head["score.weight"])
    assert record(adapter)["whole"] == dict.fromkeys(head, "new head")
    assert record(adapter)["base_only"] == {"lm_head.weight": "head of another task"}


def test_a_head_of_ones_own(tmp_path: Path) -> None:
    tuned = base_tensors() | {"model.my_probe.weight": gaussian(2, 12)}
    with pytest.raises(
        UnsupportedAdapterError, match=r'"model\.my_probe\.weight" is not in .*base,'
    ):
        read(tmp_path, tuned)
    adapter = read(tmp_path, tuned, heads=("my_probe",))
    assert list(adapter.verbatim) == ["model.my_probe.weight"]


def test_a_tensor_that_the_checkpoint_lost(tmp_path: Path) -> None:
    with pytest.raises(UnsupportedAdapterError, match=r'q_proj\.weight" is not in .*sql') as caught:
        read(tmp_path, without(base_tensors(), f"{Q}.weight"))
    assert caught.value.feature == f"{Q}.weight"


@pytest.mark.parametrize("where", ["tuned", "base"])
def test_buffers_of_one_model_are_left_out(tmp_path: Path, where: str) -> None:
    buffers = {
        "model.rotary_emb.inv_freq": torch.ones(3),
        "model.position_ids": torch.arange(4)[None],
        "model.h.0.attn.bias": torch.ones(1, 1, 4, 4).tril().bool(),
    }
    tuned = plus(base_tensors(), **{f"{Q}.weight": change(12, 12, seed=7)})
    base = base_tensors()
    adapter = read(
        tmp_path, tuned | buffers if where == "tuned" else tuned,
        base | buffers if where == "base" else base,
    )  # fmt: skip
    assert not adapter.verbatim
    listed = record(adapter)["left_out" if where == "tuned" else "base_only"]
    assert listed == dict.fromkeys(buffers, "follows from the configuration")


def test_a_mask_that_is_no_mask(tmp_path: Path) -> None:
    tuned = base_tensors() | {"model.h.0.attn.bias": torch.ones(2, 1, 4, 4)}
    with pytest.raises(UnsupportedAdapterError, match=r"attn\.bias"):
        read(tmp_path, tuned)


@pytest.mark.parametrize("name", ["model.embed_tokens.weight", "lm_head.weight"])
def test_a_resized_vocabulary_is_kept_whole(tmp_path: Path, name: str) -> None:
    tuned = base_tensors() | {name: gaussian(33, 12)}
    adapter = read(tmp_path, tuned)
    assert torch.equal(adapter.verbatim[name], tuned[name])
    assert record(adapter)["whole"] == {name: "was (30, 12)"}


def test_a_layer_of_another_size(tmp_path: Path) -> None:
    tuned = base_tensors() | {f"{Q}.weight": gaussian(12, 13)}
    with pytest.raises(AdapterError, match=r"has shape \(12, 13\), in the base \(12, 12\)"):
        read(tmp_path, tuned)


# -- tied embeddings --------------------------------------------------------------------------

EMBEDDING, OUTPUT = "model.embed_tokens.weight", "lm_head.weight"


def tie(tensors: Tensors) -> dict[str, torch.Tensor]:
    return {**tensors, OUTPUT: tensors[EMBEDDING].clone()}


def tuned_embedding() -> dict[str, torch.Tensor]:
    return plus(base_tensors(), **{EMBEDDING: change(30, 12, seed=7)})


def test_tied_embeddings_saved_twice_are_one_module(tmp_path: Path) -> None:
    adapter = read(tmp_path, tie(tuned_embedding()), tie(base_tensors()))
    assert list(adapter.modules) == ["model.embed_tokens"]
    assert record(adapter)["left_out"] == {OUTPUT: f"tied to {EMBEDDING}"}


@pytest.mark.parametrize("twice", ["tuned", "base"])
def test_tied_embeddings_saved_twice_in_one_model(tmp_path: Path, twice: str) -> None:
    tuned, base = tie(tuned_embedding()), tie(base_tensors())
    if twice == "tuned":
        base = without(base, OUTPUT)
    else:
        tuned = without(tuned, OUTPUT)
    adapter = read(tmp_path, tuned, base, config={"architectures": ["LlamaForCausalLM"]})
    assert list(adapter.modules) == ["model.embed_tokens"]
    assert not adapter.verbatim


def test_embeddings_that_only_the_checkpoint_ties(tmp_path: Path) -> None:
    tuned = without(tuned_embedding(), OUTPUT)
    with pytest.raises(UnsupportedAdapterError, match="ties its output embedding") as caught:
        read(tmp_path, tuned, config={"architectures": ["LlamaForCausalLM"]})
    assert caught.value.feature == "tie_word_embeddings"


def test_embeddings_that_only_the_base_ties(tmp_path: Path) -> None:
    adapter = read(tmp_path, tuned_embedding(), without(base_tensors(), OUTPUT))
    assert list(adapter.modules) == ["model.embed_tokens"]
    assert list(adapter.verbatim) == [OUTPUT]


def test_embeddings_that_the_base_unties_are_two_modules(tmp_path: Path) -> None:
    adapter = read(tmp_path, tie(tuned_embedding()))
    assert list(adapter.modules) == ["lm_head", "model.embed_tokens"]


def test_of_several_copies_the_one_in_both_models_stands(tmp_path: Path) -> None:
    base = {"shared.weight": gaussian(30, 12, seed=1)}
    tuned = {"shared.weight": base["shared.weight"] + 1}
    tuned["decoder.embed_tokens.weight"] = tuned["shared.weight"]
    adapter = read(tmp_path, tuned, base)
    assert list(adapter.modules) == ["shared"]
    assert record(adapter)["left_out"] == {"decoder.embed_tokens.weight": "tied to shared.weight"}


def test_embeddings_untied_by_training_are_two_modules(tmp_path: Path) -> None:
    adapter = read(tmp_path, tuned_embedding(), tie(base_tensors()))
    assert list(adapter.modules) == ["lm_head", "model.embed_tokens"]
    assert {f.kind for f in adapter.modules.values()} == {"linear", "embedding"}


# -- the record -------------------------------------------------------------------------------


def test_where_it_comes_from(tmp_path: Path) -> None:
    tuned = plus(base_tensors(), **{f"{Q}.weight": change(12, 12, seed=7)})
    config = {"_name_or_path": "org/llama", "rope_theta": 1e6, "own": 1}
    adapter = read(
        tmp_path, tuned, config=config, base_config={"rope_theta": 1e4, "other": 2}, error=0.25
    )
    assert (adapter.name, adapter.format) == ("sql", "checkpoint")
    assert (adapter.base_model, adapter.revision) == ("org/llama", None)
    assert adapter.source == str(tmp_path / "sql")
    found = record(adapter)
    assert found["keep"] == {"error": 0.25}
    assert found["dtype"] == "float32"
    assert found["base"]["source"] == str(tmp_path / "base")
    assert found["settings"] == {"rope_theta": [1e4, 1e6]}
    assert found["checkpoint"]["config"] == (tmp_path / "sql" / "config.json").read_text()


def test_a_base_on_the_hub(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    commit = "c" * 40
    cached = tmp_path / "cache" / "models--org--llama"
    save_model(cached / "snapshots" / commit, base_tensors(), shards=2)
    (cached / "refs").mkdir()
    (cached / "refs" / "v2").write_text(commit)
    monkeypatch.setattr(constants, "HF_HUB_CACHE", str(tmp_path / "cache"))
    monkeypatch.setattr(constants, "HF_HUB_OFFLINE", True)
    by = change(12, 12, seed=7)
    tuned = save_model(tmp_path / "sql", plus(base_tensors(), **{f"{Q}.weight": by}))
    adapter = CheckpointFormat(base="org/llama@v2", error=0).read(tuned, None)
    assert distance(delta(adapter.modules[Q]), by) < 1e-5
    assert record(adapter)["base"]["source"] == f"org/llama@{commit}"
    assert adapter.base_model == "org/llama"
    with pytest.raises(AdapterError, match="org/other"):
        CheckpointFormat(base="org/other", error=0).read(tuned, None)


def test_a_base_model_that_is_given(tmp_path: Path) -> None:
    tuned = plus(base_tensors(), **{f"{Q}.weight": change(12, 12, seed=7)})
    config = {"_name_or_path": "./checkpoint-500"}
    adapter = read(tmp_path, tuned, config=config, base_model="org/llama", revision="abc")
    assert (adapter.base_model, adapter.revision) == ("org/llama", "abc")


def test_sharding_changes_nothing(tmp_path: Path) -> None:
    tuned = plus(base_tensors(), **{f"{Q}.weight": change(12, 12, seed=7)})
    whole, sharded = (read(tmp_path / str(n), tuned, shards=n) for n in (1, 4))
    assert whole.digest() == sharded.digest()
    assert record(whole)["checkpoint"]["digest"] == record(sharded)["checkpoint"]["digest"]
    assert record(whole)["checkpoint"]["digest"] != record(whole)["base"]["digest"]


def test_it_cannot_be_written_as_a_checkpoint(tmp_path: Path) -> None:
    tuned = plus(base_tensors(), **{f"{Q}.weight": change(12, 12, seed=7)})
    adapter = read(tmp_path, tuned)
    with pytest.raises(UnsupportedAdapterError, match="can only be read"):
        CheckpointFormat().write(adapter, tmp_path / "out")


# -- refusals ---------------------------------------------------------------------------------


def test_what_reading_needs(tmp_path: Path) -> None:
    tuned = save_model(tmp_path / "sql", base_tensors())
    with pytest.raises(ConfigError, match=r"needs base .* and one of rank, energy and error"):
        read_adapter(tuned)
    with pytest.raises(ConfigError, match=r"needs base \(the model it was"):
        CheckpointFormat(rank=4).read(tuned, None)
    with pytest.raises(ConfigError, match="needs one of rank, energy and error"):
        CheckpointFormat(base="somewhere").read(tuned, None)
    with pytest.raises(AdapterError, match=r"somewhere: no base model; .* found nothing there"):
        CheckpointFormat(base="somewhere", rank=4).read(tuned, None)
    (tmp_path / "empty").mkdir()
    with pytest.raises(AdapterError, match=r"no fine-tuned model; .* found an empty directory"):
        CheckpointFormat(base=str(tuned), rank=4).read(tmp_path / "empty", None)


def test_one_way_to_choose_a_rank() -> None:
    with pytest.raises(ValidationError, match=r"rank 4 and error 0\.1 are alternatives"):
        CheckpointFormat(rank=4, error=0.1)


def test_a_base_of_another_type(tmp_path: Path) -> None:
    tuned = plus(base_tensors(), **{f"{Q}.weight": change(12, 12, seed=7)})
    with pytest.raises(AdapterError, match=r"model_type is llama, that of the base .* is opt"):
        read(tmp_path, tuned, base_config={"model_type": "opt"})


def test_a_base_of_other_names(tmp_path: Path) -> None:
    with pytest.raises(
        AdapterError, match=r'sql: no tensor is in both: .*"a\.weight".*"b\.weight"'
    ):
        read(tmp_path, {"a.weight": torch.ones(2, 2)}, {"b.weight": torch.ones(2, 2)})


@pytest.mark.parametrize("field", ["quantization_config", "quantization"])
@pytest.mark.parametrize("which", ["config", "base_config"])
def test_quantised_models(tmp_path: Path, field: str, which: str) -> None:
    with pytest.raises(UnsupportedAdapterError, match=f"{field} is set") as caught:
        read(tmp_path, base_tensors(), **{which: {field: {"bits": 4}}})
    assert caught.value.feature == field


@pytest.mark.parametrize("dtype", [torch.uint8, torch.int32, torch.float8_e4m3fn])
@pytest.mark.parametrize(
    ("name", "shape"),
    [(f"{Q}.weight", (12, 12)), (f"{Q}.weight", (144,)), (f"{Q}.qzeros", (12, 12))],
)
@pytest.mark.parametrize("which", ["sql", "base", "both"])
def test_quantised_tensors(
    tmp_path: Path, dtype: torch.dtype, name: str, shape: tuple[int, ...], which: str
) -> None:
    tuned, base = base_tensors(), base_tensors()
    tuned[name], base[name] = torch.ones(shape), torch.ones(shape)
    if which != "base":
        tuned[name] = tuned[name].to(dtype)
    if which != "sql":
        base[name] = base[name].to(dtype)
    with pytest.raises(UnsupportedAdapterError, match="as quantised weights are") as caught:
        read(tmp_path, tuned, base)
    assert caught.value.feature == "quantization"


@pytest.mark.parametrize("value", [float("nan"), float("-inf")])
@pytest.mark.parametrize(
    ("which", "name"),
    [("sql", f"{Q}.weight"), ("sql", NORM), ("sql", EMBEDDING), ("base", f"{Q}.weight")],
)
def test_numbers_that_are_none(tmp_path: Path, which: str, name: str, value: float) -> None:
    models = {"sql": base_tensors(), "base": base_tensors()}
    models[which][name].view(-1)[3] = value
    with pytest.raises(NonFiniteError, match=rf'{which}/.*"{name}" holds 1 entries'):
        read(tmp_path, models["sql"], models["base"])


@pytest.mark.parametrize("name", ["a\nb.weight", "a/b.weight", ".weight"])
def test_names_that_cannot_be_stored(tmp_path: Path, name: str) -> None:
    with pytest.raises(AdapterError, match="names no module that can be stored") as caught:
        read(tmp_path, {name: torch.ones(2, 2)}, {name: torch.zeros(2, 2)})
    assert str(caught.value).isprintable()


def test_keys_that_cannot_be_stored(tmp_path: Path) -> None:
    with pytest.raises(AdapterError, match=r"a\\nb.*rename it") as caught:
        read(tmp_path, {"a\nb": torch.ones(2)}, {"a\nb": torch.zeros(2)})
    assert str(caught.value).isprintable()


# -- recognition ------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("shards", "stem"), [(1, "model"), (2, "model"), (2, "diffusion_pytorch_model")]
)
def test_models_are_recognised(tmp_path: Path, shards: int, stem: str) -> None:
    place = save_model(tmp_path / "sql", base_tensors(), shards=shards, stem=stem)
    assert CheckpointFormat().recognises(place)
    (place / "config.json").unlink()
    assert not CheckpointFormat().recognises(place)


def test_adapters_are_not(tmp_path: Path) -> None:
    place = write_peft_directory(make_adapter("x", seed=0), tmp_path / "x")
    save_model(place, base_tensors())
    assert not CheckpointFormat().recognises(place)
    assert read_adapter(place).format == "peft"
    lora = save_model(tmp_path / "lora", base_tensors())
    save_file({"x": torch.ones(1)}, lora / "pytorch_lora_weights.safetensors")
    assert not CheckpointFormat().recognises(lora)


@pytest.mark.parametrize("path", ["a\0b", "missing", "x" * 300])
def test_nothing_is_not(path: str) -> None:
    assert not CheckpointFormat().recognises(Path(path))


# -- memory -----------------------------------------------------------------------------------


def test_one_matrix_at_a_time(tmp_path: Path) -> None:
    def peak(layers: int) -> int:
        names = [f"model.layers.{n}.up_proj.weight" for n in range(layers)]
        base = save_model(tmp_path / f"base-{layers}", dict.fromkeys(names, torch.zeros(600, 400)))
        tuned = {name: change(600, 400, seed=n) for n, name in enumerate(names)}
        place = save_model(tmp_path / f"tuned-{layers}", tuned)
        reader = CheckpointFormat(base=str(base), rank=2)
        return peak_bytes(lambda: reader.read(place, None))

    # Mapped files are not counted; what is made takes no more for many layers than for one,
    # but for their factors.
    few, many = peak(2), peak(12)
    matrix, factors = 4 * 600 * 400, 4 * 2 * (600 + 400)
    assert few > matrix
    assert many <= few + 10 * factors


def test_a_base_without_a_name_is_known_by_its_digest(tmp_path: Path) -> None:
    tuned = plus(base_tensors(), **{f"{Q}.weight": change(12, 12, seed=7)})
    adapter = read(tmp_path, tuned)
    assert adapter.base_model == record(adapter)["base"]["digest"]
    store = AdapterStore.create(tmp_path / "zoo")
    store.add(adapter)
    other = {key: tensor + 1 for key, tensor in base_tensors().items()}
    base = save_model(tmp_path / "other", other)
    stranger = CheckpointFormat(base=str(base), rank=1).read(tmp_path / "sql", "stranger")
    with pytest.raises(IncompatibleAdaptersError, match=r'base model "sha256:'):
        store.add(stranger)
