"""Whole models whose modules are stored in many forms, on the CPU and as a GPU gets them, against
transformers in f32 on weights dequantized in f64."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import numpy as np
import pytest
import torch
from checkpoints import stack
from interpreted import INTERPRETED, bound, under_test
from stored import Block, Tensors, config_of, logits, model_files, quantize, wide, write
from torch import Tensor

import dilu
from dilu.codegen import targets

pytestmark = pytest.mark.slow

PROMPTS = ([5, 17, 3, 9, 12, 7, 25, 31, 8], [11])
E8M0 = torch.float8_e8m0fnu


def said(strategy: str, *targets: str, **more: Any) -> dict[str, Any]:
    weights = {"num_bits": 8, "type": "float", "symmetric": True, "strategy": strategy}
    return {"targets": list(targets), "weights": weights | more}


def grouped(size: int, *targets: str, **more: Any) -> dict[str, Any]:
    return said("group", *targets, group_size=size, **more)


def blocks(rows: int, columns: int, *targets: str) -> dict[str, Any]:
    return said("block", *targets, block_structure=[rows, columns])


#: Part of a name, what shares a scale, the scales' type and shape, and what is said of it.
Row = tuple[str, Block, torch.dtype, Callable[[Tensor], Tensor], dict[str, Any]]
MANY: list[Row] = [
    ("q_proj", (1, None), torch.float32, lambda s: s[:, 0], said("channel", "re:.*q_proj")),
    ("k_proj", (None, None), torch.bfloat16, lambda s: s[0, 0], said("tensor", "re:.*k_proj")),
    ("v_proj", (1, 64), torch.float16, lambda s: s, grouped(64, "re:.*v_proj")),
    ("o_proj", (48, 20), torch.float32, lambda s: s, blocks(48, 20, "re:.*o_proj")),
    ("experts", (1, 32), E8M0, lambda s: s.view(torch.uint8),
     grouped(32, "re:.*experts.*", scale_dtype="torch.uint8")),
    ("lm_head", (1, None), torch.float32, lambda s: s, said("channel", "lm_head")),
    ("embed_tokens", (1, None), torch.float32, lambda s: s, said("channel", "Embedding")),
]  # fmt: skip
STACKED: list[Row] = [
    ("q_proj", (1, 7), torch.float32, lambda s: s, grouped(7, "re:.*q_proj")),
    ("k_proj", (1, 32), E8M0, lambda s: s, grouped(32, "re:.*k_proj")),
    ("v_proj", (300, 16), torch.float32, lambda s: s, blocks(300, 16, "re:.*v_proj")),
    ("o_proj", (16, 300), torch.bfloat16, lambda s: s, blocks(16, 300, "re:.*o_proj")),
    ("gate_up_proj", (72, None), torch.float32, lambda s: s[..., 0], said("tensor", "re:.*gate")),
    ("down_proj", (None, None), torch.float32, lambda s: s[0, 0, 0], said("tensor", "re:.*down")),
]  # fmt: skip


def stored(rows: list[Row], tensors: Tensors) -> tuple[Tensors, Tensors, dict[str, Any]]:
    """Return the files, what they are worth, and the configuration."""
    files: Tensors = {}
    values: Tensors = {}
    for name, tensor in tensors.items():
        row = next((r for r in rows if r[0] in name), None)
        if row is None:
            files[name] = tensor.bfloat16()
            values[name] = files[name].float()
            continue
        _, block, dtype, shape, _ = row
        one = name.endswith("experts.down_proj")  # one scale for all of them
        flat = tensor.flatten(0, 1) if one else tensor
        codes, scales = quantize(flat, block, dtype)
        values[name] = wide(codes, scales, block).reshape(tensor.shape)
        if one:
            codes, scales = codes.reshape(tensor.shape), scales[None]
        files |= {name: codes, f"{name}_scale": shape(scales)}
    groups = {f"group_{i}": row[4] for i, row in enumerate(rows)}
    settings = {"quant_method": "compressed-tensors", "format": "mixed-precision"}
    return files, values, settings | {"config_groups": groups}


@pytest.mark.parametrize("form", ["many", "stacked"])
def test_modules_in_forms_of_their_own(tmp_path, monkeypatch, form):
    monkeypatch.setattr(targets, "TARGETS", (*targets.TARGETS, INTERPRETED))
    config = config_of("qwen3_moe", num_hidden_layers=2)
    tensors = model_files(config)
    rows, tensors = (MANY, tensors) if form == "many" else (STACKED, stack(tensors))
    files, values, settings = stored(rows, tensors)
    write(tmp_path / "model", config, files, quantization_config=settings)
    target, device = under_test()
    dilu.compile(tmp_path / "model", target=["cpu", target]).save(tmp_path / "m.dilu")
    want = [logits(config, values, prompt) for prompt in PROMPTS]
    for options in ({"device": "cpu"}, {"target": target, "device": device}):
        with dilu.load(tmp_path / "m.dilu", **options) as session:
            got = session.language.loop.logits([list(p) for p in PROMPTS])
        for a, b in zip(got, want, strict=True):
            assert np.abs(a - b).max() < bound(2e-5) * np.abs(b).max()
