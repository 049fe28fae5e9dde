"""One adapter's files in every format, made tensor by tensor, and how files are compared."""

from __future__ import annotations

import json
from collections.abc import Callable, Mapping
from pathlib import Path

import torch
from safetensors import safe_open
from safetensors.torch import save_file

from adapters import PREFIX, peft_config

D_IN, D_OUT, RANK = 6, 5, 3


def _pair(seed: int, dtype: torch.dtype) -> tuple[torch.Tensor, torch.Tensor]:
    generator = torch.Generator().manual_seed(seed)
    A = torch.randn(RANK, D_IN, generator=generator).to(dtype)
    return A, torch.randn(D_OUT, RANK, generator=generator).to(dtype)


def peft(folder: Path, seed: int, dtype: torch.dtype) -> None:
    """A directory of PEFT with a linear layer, an embedding, and a task head in float32."""
    A, B = _pair(seed, dtype)
    tensors = {
        f"{PREFIX}p.q.lora_A.weight": A,
        f"{PREFIX}p.q.lora_B.weight": B,
        f"{PREFIX}p.emb.lora_embedding_A": _pair(seed + 1, dtype)[0],
        f"{PREFIX}p.emb.lora_embedding_B": _pair(seed + 1, dtype)[1],
        f"{PREFIX}score.weight": torch.full((2, 4), 0.1 * seed),
    }
    config = peft_config(rank=RANK, targets=["q", "emb"], changes={"modules_to_save": ["score"]})
    # Spaced as no program spaces it: only a copy of the bytes gives it back.
    text = json.dumps(config, indent=3).replace(": ", " :  ") + "\r\n\n"
    (folder / "adapter_config.json").write_bytes(text.encode())
    save_file(tensors, folder / "adapter_model.safetensors", metadata={"format": "pt"})


def kohya(folder: Path, seed: int, dtype: torch.dtype) -> None:
    """A file of sd-scripts with a linear layer, a convolution without alpha, and a header."""
    A, B = _pair(seed, dtype)
    down = torch.randn(RANK, 2, 3, 3, generator=torch.Generator().manual_seed(seed + 1)).to(dtype)
    tensors = {
        "lora_unet_q.lora_down.weight": A,
        "lora_unet_q.lora_up.weight": B,
        "lora_unet_q.alpha": torch.tensor(0.1, dtype=torch.float16),
        "lora_unet_conv.lora_down.weight": down,
        "lora_unet_conv.lora_up.weight": _pair(seed + 2, dtype)[1].reshape(D_OUT, RANK, 1, 1),
    }
    metadata = {"ss_network_module": "networks.lora", "ss_note": "é\n\t"}
    save_file(tensors, folder / "My style-v2.safetensors", metadata=metadata)


def diffusers(folder: Path, seed: int, dtype: torch.dtype) -> None:
    """A file of diffusers with names of today and, in another part, of an older release."""
    A, B = _pair(seed, dtype)
    A2, B2 = _pair(seed + 1, dtype)
    tensors = {
        "unet.q.lora_A.weight": A,
        "unet.q.lora_B.weight": B,
        "text_encoder.q.lora_linear_layer.down.weight": A2,
        "text_encoder.q.lora_linear_layer.up.weight": B2,
    }
    save_file(tensors, folder / "pytorch_lora_weights.safetensors", metadata={"format": "pt"})


def mlx(folder: Path, seed: int, dtype: torch.dtype) -> None:
    """A directory of mlx-lm, factors transposed."""
    A, B = _pair(seed, dtype)
    tensors = {"m.q.lora_a": A.T.contiguous(), "m.q.lora_b": B.T.contiguous()}
    config = {
        "fine_tune_type": "lora",
        "lora_parameters": {"rank": RANK, "scale": 20.0, "dropout": 0.05},
        "model": "org/base",
        "iters": 600,
    }
    (folder / "adapter_config.json").write_text(json.dumps(config, indent=7), encoding="utf-8")
    save_file(tensors, folder / "adapters.safetensors", metadata={"format": "mlx"})


def peft_file(folder: Path, seed: int, dtype: torch.dtype) -> None:
    """A single file with PEFT's names, alphas, and a prefix of its own."""
    A, B = _pair(seed, dtype)
    tensors = {
        "diffusion_model.f.q.lora_A.weight": A,
        "diffusion_model.f.q.lora_B.weight": B,
        "diffusion_model.f.q.alpha": torch.tensor([2.5], dtype=torch.bfloat16),
    }
    save_file(tensors, folder / "style.safetensors", metadata={"who": "me"})


WRITERS: Mapping[str, Callable[[Path, int, torch.dtype], None]] = {
    "diffusers": diffusers,
    "kohya": kohya,
    "mlx": mlx,
    "peft": peft,
    "peft_file": peft_file,
}
"""What writes an adapter into a directory, by format: any seed, float32, float16 or bfloat16."""


def source(folder: Path, form: str, seed: int, dtype: torch.dtype) -> Path:
    """Write an adapter into `folder`, and return what a user would pass to `unmerge add`."""
    folder.mkdir(parents=True)
    WRITERS[form](folder, seed, dtype)
    return folder / "style.safetensors" if form == "peft_file" else folder


def contents(folder: Path) -> dict[str, object]:
    """Everything that files say: of safetensors the header and every bit, of others all bytes."""
    found: dict[str, object] = {}
    for path in sorted(p for p in folder.rglob("*") if p.is_file()):
        if path.suffix != ".safetensors":
            found[path.name] = path.read_bytes()
            continue
        with safe_open(path, framework="pt") as file:
            tensors = {key: file.get_tensor(key) for key in file.keys()}  # noqa: SIM118
            found[path.name] = (
                file.metadata(),
                {
                    key: (
                        t.dtype,
                        tuple(t.shape),
                        t.reshape(-1).view(torch.uint8).numpy().tobytes(),
                    )
                    for key, t in tensors.items()
                },
            )
    return found
