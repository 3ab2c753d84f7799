"""Tiny checkpoints in many forms, and what the compiler binds of them: values, without a capture.

    files = model_files("qwen3_moe")           # plain tensors by the names of the files
    write(folder, config, tensors)
    bound(folder)                              # parameter → its values, read through the binder

`quantize` makes codes and scales per block, `wide` what they are worth, in f64 rounded once.
"""

from __future__ import annotations

import json
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import torch
from captured import load_weight
from checkpoints import E4M3_MAX, FAMILIES, random_model, stack, unstack
from safetensors.torch import save_file
from torch import Tensor

from dilu.frontend.checkpoint.bind import Binder
from dilu.frontend.checkpoint.checkpoint import Checkpoint, read_checkpoint
from dilu.frontend.language.configuration import read_configuration
from dilu.frontend.language.model import build_model
from dilu.ir.dtypes import F32
from dilu.ir.ops.quantize import Dequantize

#: Ragged against every block; one layer, so that binding takes no time.
SIZES: dict[str, Any] = {
    "vocab_size": 40, "hidden_size": 144, "intermediate_size": 200, "num_hidden_layers": 1,
    "moe_intermediate_size": 72, "num_experts": 3,
}  # fmt: skip
Block = tuple[int | None, int | None]
Tensors = dict[str, Tensor]


def config_of(family: str, **settings: Any) -> dict[str, Any]:
    """Return the configuration of a tiny model of a family."""
    known = FAMILIES[family]
    sizes = {k: v for k, v in SIZES.items() if k in known or not k.startswith(("moe", "num_ex"))}
    return known | sizes | {"torch_dtype": "bfloat16"} | settings


def model_files(config: dict[str, Any], seed: int = 0) -> Tensors:
    """Return the tensors of a random model as files have them, in f32."""
    return unstack({k: v.clone() for k, v in random_model(config, seed).state_dict().items()})


def sized(block: Block, shape: torch.Size) -> tuple[int, int]:
    return (block[0] or shape[-2], block[1] or shape[-1])


def spread(scales: Tensor, shape: torch.Size, block: Block) -> Tensor:
    """Return the scale of every element of a weight of `shape`."""
    rows, columns = sized(block, shape)
    each = scales.double().repeat_interleave(rows, -2)[..., : shape[-2], :]
    return each.repeat_interleave(columns, -1)[..., : shape[-1]]


def quantize(
    weight: Tensor,
    block: Block,
    dtype: torch.dtype = torch.float32,
    codes: torch.dtype = torch.float8_e4m3fn,
) -> tuple[Tensor, Tensor]:
    """Return codes of `weight[…, N, K]` and its scales `[…, n, k]`, one per block."""
    rows, columns = sized(block, weight.shape)
    n, k = weight.shape[-2:]
    padded = torch.nn.functional.pad(weight.abs(), (0, -k % columns, 0, -n % rows))
    tiles = padded.unflatten(-1, (-1, columns)).unflatten(-3, (-1, rows))
    scales = tiles.amax((-3, -1)).clamp(min=1e-12) / E4M3_MAX
    if dtype == torch.float8_e8m0fnu:
        scales = torch.exp2(torch.ceil(torch.log2(scales)))
    scales = scales.to(dtype)
    quotient = weight / spread(scales, weight.shape, block)
    return quotient.float().clamp(-E4M3_MAX, E4M3_MAX).to(codes), scales


def wide(codes: Tensor, scales: Tensor, block: Block) -> Tensor:
    """Return what codes are worth: the exact product, rounded once to f32."""
    return (codes.double() * spread(scales, codes.shape, block)).float()


def write(folder: Path, config: dict[str, Any], tensors: Tensors, **more: Any) -> Path:
    """Write a checkpoint of one file."""
    folder.mkdir(parents=True, exist_ok=True)
    (folder / "config.json").write_text(json.dumps(config | more))
    save_file({k: v.contiguous() for k, v in tensors.items()}, folder / "model.safetensors")
    return folder


@torch.no_grad()
def logits(config: dict[str, Any], values: Tensors, prompt: Sequence[int]) -> np.ndarray:
    """Return what transformers computes in f32 with tensors of files that are worth `values`."""
    model = random_model(config)
    model.load_state_dict(stack(values))
    return model(input_ids=torch.tensor([list(prompt)])).logits[0].numpy()


def bind(folder: Path, change: Callable[[Any], Any] | None = None) -> tuple[Binder, Checkpoint]:
    """Return what binds a checkpoint's tensors to its model."""
    checkpoint = read_checkpoint(folder)
    found = read_configuration(checkpoint.config, str(folder / "config.json"))
    model, _ = build_model(found, torch.float32)
    if change is not None:
        change(model)
    return Binder(model, checkpoint, checkpoint.quantization), checkpoint


def bound(folder: Path) -> dict[str, np.ndarray]:
    """Return the values of every parameter of a checkpoint's model, as the compiler reads them."""
    binder, _ = bind(folder)
    return {name: value_of(binder, name, folder) for name in binder.shapes}


def value_of(binder: Binder, name: str, folder: Path) -> np.ndarray:
    """Return the values of one parameter."""
    storage = binder.storage(name)
    values = load_weight(binder.weight([name], scales=False, stacked=False), folder)
    if storage.scales is not None:
        scales = load_weight(binder.weight([name], scales=True, stacked=False), folder)
        values = Dequantize(storage.format.block, F32).reference(values, scales.astype(np.float32))
    return np.asarray(values, np.float32).reshape(binder.shapes[name])
