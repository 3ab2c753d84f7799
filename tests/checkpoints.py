"""Tiny random checkpoints in the file format of the real FP8 ones, and their exact references.

`make_checkpoint(folder, "deepseek_v3")` writes `config.json`, weights (codes and scales, experts as
separate tensors) and, when asked, a tokenizer; it returns the transformers model in f32 that
computes with the very values in the files, dequantized in f64. All sizes are ragged against the
128-row blocks of the scales.
"""

from __future__ import annotations

import copy
import json
import math
import re
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import save_file
from torch import Tensor, nn

E4M3_MAX = 448.0
VOCABULARY = 272

_COMMON: dict[str, Any] = {
    "vocab_size": VOCABULARY,
    "hidden_size": 144,
    "intermediate_size": 200,
    "num_hidden_layers": 3,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "max_position_embeddings": 512,
    "bos_token_id": 0,
    "eos_token_id": 1,
}
_EXPERTS: dict[str, Any] = {"moe_intermediate_size": 136, "num_experts_per_tok": 2}
_LATENT: dict[str, Any] = _EXPERTS | {
    "model_type": "deepseek_v3",
    "num_hidden_layers": 4,
    "num_key_value_heads": 4,
    "n_routed_experts": 8,
    "n_shared_experts": 1,
    "n_group": 4,
    "topk_group": 2,
    "first_k_dense_replace": 1,
    "kv_lora_rank": 128,
    "qk_nope_head_dim": 24,
    "qk_rope_head_dim": 16,
    "v_head_dim": 20,
    "routed_scaling_factor": 2.5,
}

#: The supported families and variants of them, by a short name; each a `config.json`.
FAMILIES: dict[str, dict[str, Any]] = {
    name: _COMMON | settings
    for name, settings in {
        "llama": {"model_type": "llama", "head_dim": 36},
        "llama_scaled": {
            "model_type": "llama",
            "tie_word_embeddings": True,
            "rope_theta": 500000.0,
            "rope_scaling": {
                "rope_type": "llama3",
                "factor": 8.0,
                "low_freq_factor": 1.0,
                "high_freq_factor": 4.0,
                "original_max_position_embeddings": 64,
            },
        },
        "qwen2": {"model_type": "qwen2"},
        "qwen3": {"model_type": "qwen3", "head_dim": 40},
        "qwen3_sliding": {
            "model_type": "qwen3",
            "head_dim": 40,
            "use_sliding_window": True,
            "sliding_window": 5,
            "max_window_layers": 1,
        },
        "qwen3_moe": _EXPERTS
        | {"model_type": "qwen3_moe", "head_dim": 40, "num_experts": 8, "norm_topk_prob": True},
        "glm4_moe": _EXPERTS
        | {
            "model_type": "glm4_moe",
            "head_dim": 40,
            "attention_bias": True,
            "use_qk_norm": True,
            "n_routed_experts": 8,
            "n_shared_experts": 1,
            "first_k_dense_replace": 1,
            "partial_rotary_factor": 0.5,
        },
        "deepseek_v3": _LATENT | {"q_lora_rank": 72},
        "deepseek_v3_yarn": _LATENT
        | {
            "q_lora_rank": None,
            "rope_scaling": {
                "type": "yarn",
                "factor": 4.0,
                "beta_fast": 32,
                "beta_slow": 1,
                "mscale": 1.0,
                "mscale_all_dim": 1.0,
                "original_max_position_embeddings": 128,
            },
        },
    }.items()
}

#: One name for each of the five families that the compiler promises.
FIVE = ("llama", "qwen3", "qwen3_moe", "glm4_moe", "deepseek_v3")


@dataclass(frozen=True)
class TinyCheckpoint:
    """A checkpoint on disk and the model that computes with exactly its weights, in f32."""

    path: Path
    model: nn.Module

    @torch.no_grad()
    def logits(self, tokens: list[int]) -> Tensor:
        """Return the reference's f32 logits [len(tokens), vocabulary] of one sequence."""
        return self.model(input_ids=torch.tensor([tokens])).logits[0]

    @torch.no_grad()
    def greedy(self, tokens: list[int], count: int) -> list[int]:
        """Return the `count` most likely tokens after `tokens`, one after another."""
        sequence = list(tokens)
        for _ in range(count):
            sequence.append(int(self.logits(sequence)[-1].argmax()))
        return sequence[len(tokens) :]


def make_checkpoint(
    folder: Path,
    family: str | dict[str, Any],
    *,
    seed: int = 0,
    quantized: bool = True,
    block: tuple[int, int] = (128, 128),
    scale_dtype: torch.dtype = torch.float32,
    plain_dtype: torch.dtype = torch.bfloat16,
    exclude: tuple[str, ...] = (),
    shards: int = 1,
    tokenizer: bool = False,
    **settings: Any,
) -> TinyCheckpoint:
    """Write a random checkpoint of `family` (a name in FAMILIES, or a config) into `folder`.

    `settings` replace entries of the config. Projections become e4m3 codes with scales of
    `scale_dtype` per `block`, except modules whose name contains one of `exclude`; everything
    else is stored as `plain_dtype`. With `shards` > 1 the files have an index.
    """
    folder = Path(folder)
    folder.mkdir(parents=True, exist_ok=True)
    config = copy.deepcopy(FAMILIES[family] if isinstance(family, str) else family) | settings
    model = random_model(config, seed)
    files: dict[str, Tensor] = {}
    values: dict[str, Tensor] = {}
    for name, tensor in unstack(model.state_dict()).items():
        if name == "lm_head.weight" and config.get("tie_word_embeddings"):
            continue
        skipped = any(part in name for part in exclude)
        if quantized and not skipped and re.search(r"_proj(_with_mqa)?\.weight$", name):
            codes, scales = quantize(tensor, block, scale_dtype)
            files |= {name: codes, f"{name}_scale_inv": scales}
            values[name] = dequantize(codes, scales, block)
        else:
            kept = torch.float32 if name.endswith("e_score_correction_bias") else plain_dtype
            files[name] = tensor.to(kept).contiguous()
            values[name] = files[name].float()
    model.load_state_dict(stack(values), strict=not config.get("tie_word_embeddings"))
    _write(folder, files, shards)
    config["architectures"] = [type(model).__name__]
    config["torch_dtype"] = str(plain_dtype).removeprefix("torch.")
    if quantized:
        config["quantization_config"] = {
            "activation_scheme": "dynamic",
            "fmt": "e4m3",
            "quant_method": "fp8",
            "weight_block_size": list(block),
            **({"modules_to_not_convert": list(exclude)} if exclude else {}),
        }
    (folder / "config.json").write_text(json.dumps(config, indent=2) + "\n")
    if tokenizer:
        write_tokenizer(folder)
    return TinyCheckpoint(folder, model)


def random_model(config: dict[str, Any], seed: int = 0) -> nn.Module:
    """Return the transformers model of a config in f32 with random, lively weights."""
    from transformers import AutoConfig, AutoModelForCausalLM

    settings = {k: v for k, v in copy.deepcopy(config).items() if k != "model_type"}
    made = AutoConfig.for_model(config["model_type"], **settings)
    model = AutoModelForCausalLM.from_config(made, dtype=torch.float32, attn_implementation="eager")
    model.set_experts_implementation("eager")
    generator = torch.Generator().manual_seed(seed)
    for name, tensor in model.state_dict().items():
        noise = torch.randn(tensor.shape, generator=generator)
        if "norm" in name:
            tensor.copy_(1 + 0.1 * noise)
        elif tensor.ndim == 1:
            tensor.copy_(0.1 * noise)
        else:
            tensor.copy_(noise / math.sqrt(tensor.shape[-1]))
    with torch.no_grad():
        model.get_input_embeddings().weight.mul_(math.sqrt(made.hidden_size))
    return model.eval()


def spread(scales: Tensor, shape: torch.Size, block: tuple[int, int]) -> Tensor:
    """Return the scale of every element of a weight of `shape`; edge blocks may be ragged."""
    rows = scales.repeat_interleave(block[0], 0)[: shape[0]]
    return rows.repeat_interleave(block[1], 1)[:, : shape[1]]


def quantize(
    weight: Tensor, block: tuple[int, int], scale_dtype: torch.dtype
) -> tuple[Tensor, Tensor]:
    """Return the e4m3 codes of `weight[N, K]` and the scales of its blocks."""
    n, k = weight.shape
    padded = nn.functional.pad(weight.abs(), (0, -k % block[1], 0, -n % block[0]))
    largest = padded.unflatten(1, (-1, block[1])).unflatten(0, (-1, block[0])).amax((1, 3))
    scales = (largest.clamp(min=1e-12) / E4M3_MAX).to(scale_dtype)
    quotient = weight / spread(scales.float(), weight.shape, block)
    return quotient.clamp(-E4M3_MAX, E4M3_MAX).to(torch.float8_e4m3fn), scales


def dequantize(codes: Tensor, scales: Tensor, block: tuple[int, int]) -> Tensor:
    """Return codes times scales, computed in f64 and rounded once, to f32."""
    return (codes.double() * spread(scales.double(), codes.shape, block)).float()


def unstack(state: dict[str, Tensor]) -> dict[str, Tensor]:
    """Return a module's tensors under the names of the files: one per expert and projection."""
    tensors: dict[str, Tensor] = {}
    for name, tensor in state.items():
        prefix, _, last = name.rpartition(".experts.")
        if last == "gate_up_proj":
            for e, both in enumerate(tensor):
                gate, up = both.chunk(2)
                tensors[f"{prefix}.experts.{e}.gate_proj.weight"] = gate
                tensors[f"{prefix}.experts.{e}.up_proj.weight"] = up
        elif last == "down_proj":
            for e, down in enumerate(tensor):
                tensors[f"{prefix}.experts.{e}.down_proj.weight"] = down
        else:
            tensors[name] = tensor
    return tensors


def stack(tensors: dict[str, Tensor]) -> dict[str, Tensor]:
    """Undo `unstack`."""
    state: dict[str, Tensor] = {}
    parts: dict[str, dict[int, dict[str, Tensor]]] = {}
    for name, tensor in tensors.items():
        match = re.fullmatch(r"(.*\.experts\.)(\d+)\.(gate|up|down)_proj\.weight", name)
        if match:
            prefix, expert, projection = match.groups()
            parts.setdefault(prefix, {}).setdefault(int(expert), {})[projection] = tensor
        else:
            state[name] = tensor
    for prefix, experts in parts.items():
        ordered = [experts[e] for e in sorted(experts)]
        both = [torch.cat([e["gate"], e["up"]]) for e in ordered]
        state[f"{prefix}gate_up_proj"] = torch.stack(both)
        state[f"{prefix}down_proj"] = torch.stack([e["down"] for e in ordered])
    return state


def write_tokenizer(folder: Path) -> None:
    """Write a tokenizer of single bytes: ids 0 and 1 begin and end a text, 2… are the bytes."""
    from tokenizers import Tokenizer, decoders, models, pre_tokenizers

    alphabet = sorted(pre_tokenizers.ByteLevel.alphabet())
    special = ["<s>", "</s>"]
    vocabulary = {token: i for i, token in enumerate(special + alphabet)}
    tokenizer = Tokenizer(models.BPE(vocabulary, []))
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.decoder = decoders.ByteLevel()
    tokenizer.add_special_tokens(special)
    tokenizer.save(str(folder / "tokenizer.json"))
    settings = {
        "tokenizer_class": "PreTrainedTokenizerFast",
        "bos_token": special[0],
        "eos_token": special[1],
        "chat_template": "{% for m in messages %}{{ m['role'] }}: {{ m['content'] }}\n{% endfor %}",
    }
    (folder / "tokenizer_config.json").write_text(json.dumps(settings, indent=2) + "\n")


def _write(folder: Path, files: dict[str, Tensor], shards: int) -> None:
    if shards == 1:
        save_file(files, folder / "model.safetensors", metadata={"format": "pt"})
        return
    names = list(files)
    step = -(-len(names) // shards)
    weight_map: dict[str, str] = {}
    for i in range(shards):
        part = {n: files[n] for n in names[i * step : (i + 1) * step]}
        file = f"model-{i + 1:05d}-of-{shards:05d}.safetensors"
        save_file(part, folder / file, metadata={"format": "pt"})
        weight_map |= dict.fromkeys(part, file)
    size = sum(t.nbytes for t in files.values())
    index = {"metadata": {"total_size": size}, "weight_map": weight_map}
    (folder / "model.safetensors.index.json").write_text(json.dumps(index, indent=2) + "\n")
