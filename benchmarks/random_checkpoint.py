"""Write a random FP8 checkpoint of a Llama shape, in the file format of real ones.

    python benchmarks/random_checkpoint.py build/llama-1b

The default shape has 1.1 billion parameters (hidden 2048, 22 layers, ffn 5632, vocab 32000).
Weights are normal with deviation 0.02, in e4m3 with 128×128 blocks of f32 scales; embedding,
norms and the output head are bf16, as in published FP8 checkpoints.
"""

from __future__ import annotations

import argparse
import json
from math import prod
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import save_file

BLOCK = 128
DEVIATION = 0.02


def quantized(rows: int, columns: int, rng: torch.Generator) -> tuple[torch.Tensor, torch.Tensor]:
    """Return random codes f8e4m3[rows, columns] and their scales f32[rows/128, columns/128]."""
    scales = torch.full((-(-rows // BLOCK), -(-columns // BLOCK)), DEVIATION / 100)
    codes = torch.randn(rows, columns, generator=rng).mul_(100).clamp_(-448, 448)
    return codes.to(torch.float8_e4m3fn), scales


def write(
    folder: Path,
    *,
    hidden: int = 2048,
    layers: int = 22,
    ffn: int = 5632,
    vocab: int = 32000,
    heads: int = 32,
    kv_heads: int = 4,
    experts: int = 0,
    seed: int = 0,
) -> None:
    """Write `config.json` and `model.safetensors` into `folder`.

    With `experts`, it is a Qwen3-MoE: every token has 8 of them, of inner size `ffn`.
    """
    rng = torch.Generator().manual_seed(seed)
    width = hidden // heads
    linears = {
        "self_attn.q_proj": (hidden, hidden),
        "self_attn.k_proj": (kv_heads * width, hidden),
        "self_attn.v_proj": (kv_heads * width, hidden),
        "self_attn.o_proj": (hidden, hidden),
    }
    for block in [f"mlp.experts.{e}" for e in range(experts)] or ["mlp"]:
        linears |= {
            f"{block}.gate_proj": (ffn, hidden),
            f"{block}.up_proj": (ffn, hidden),
            f"{block}.down_proj": (hidden, ffn),
        }
    ones = torch.ones(hidden, dtype=torch.bfloat16)
    tensors = {
        "model.embed_tokens.weight": torch.randn(vocab, hidden, generator=rng).bfloat16(),
        "lm_head.weight": (torch.randn(vocab, hidden, generator=rng) * DEVIATION).bfloat16(),
        "model.norm.weight": ones.clone(),
    }
    for layer in range(layers):
        prefix = f"model.layers.{layer}."
        for name, (rows, columns) in linears.items():
            codes, scales = quantized(rows, columns, rng)
            tensors[f"{prefix}{name}.weight"] = codes
            tensors[f"{prefix}{name}.weight_scale_inv"] = scales
        for norm in ("input_layernorm", "post_attention_layernorm"):
            tensors[f"{prefix}{norm}.weight"] = ones.clone()
        if experts:
            router = torch.randn(experts, hidden, generator=rng) * DEVIATION
            tensors[f"{prefix}mlp.gate.weight"] = router.bfloat16()
            for norm in ("q_norm", "k_norm"):
                tensors[f"{prefix}self_attn.{norm}.weight"] = ones[:width].clone()
    config: dict[str, Any] = {
        "architectures": ["LlamaForCausalLM"],
        "model_type": "llama",
        "hidden_size": hidden,
        "intermediate_size": ffn,
        "num_hidden_layers": layers,
        "num_attention_heads": heads,
        "num_key_value_heads": kv_heads,
        "head_dim": width,
        "hidden_act": "silu",
        "max_position_embeddings": 2048,
        "rms_norm_eps": 1e-5,
        "rope_theta": 10000.0,
        "vocab_size": vocab,
        "tie_word_embeddings": False,
        "bos_token_id": 1,
        "eos_token_id": 2,
        "dtype": "bfloat16",
        "quantization_config": {
            "quant_method": "fp8",
            "fmt": "e4m3",
            "activation_scheme": "dynamic",
            "weight_block_size": [BLOCK, BLOCK],
        },
    }
    if experts:
        config |= {
            "architectures": ["Qwen3MoeForCausalLM"],
            "model_type": "qwen3_moe",
            "num_experts": experts,
            "num_experts_per_tok": 8,
            "moe_intermediate_size": ffn,
            "norm_topk_prob": True,
            "decoder_sparse_step": 1,
            "mlp_only_layers": [],
        }
    folder.mkdir(parents=True, exist_ok=True)
    save_file(tensors, folder / "model.safetensors", metadata={"format": "pt"})
    (folder / "config.json").write_text(json.dumps(config, indent=2))


def matmul_weights(checkpoint: Path) -> tuple[int, int, int]:
    """Return the weights a token is multiplied with, those of the head, and all their bytes."""
    with open(checkpoint / "model.safetensors", "rb") as file:
        header = json.loads(file.read(int.from_bytes(file.read(8), "little")))
    header.pop("__metadata__", None)
    count = head = size = 0
    for name, entry in header.items():
        if len(entry["shape"]) == 2 and "embed" not in name:
            begin, end = entry["data_offsets"]
            size += end - begin
            weights = 0 if name.endswith("scale_inv") else prod(entry["shape"])
            count += weights
            head += weights if name.startswith("lm_head") else 0
    return count, head, size


if __name__ == "__main__":
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("folder", type=Path)
    write(parser.parse_args().folder)
