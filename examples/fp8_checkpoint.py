"""The file format of FP8 DeepSeek-V3 checkpoints: writing one from a module, reading it back.

A projection's weight is stored as e4m3 codes with one f32 scale per block of 128 x 128, the last
block of a row or column being smaller where the shape is not a multiple of 128. Embeddings, the
output head, norms and routers stay in BF16, the routers' correction biases in F32. Experts are
separate tensors in the files and stacked in the module.
"""

import json
import re
from pathlib import Path

import torch
from safetensors.torch import load_file, save_file
from torch import Tensor, nn

BLOCK = 128
E4M3_MAX = 448.0
QUANTIZATION_CONFIG = {
    "activation_scheme": "dynamic",
    "fmt": "e4m3",
    "quant_method": "fp8",
    "weight_block_size": [BLOCK, BLOCK],
}
INDEX_NAME = "model.safetensors.index.json"
SCALE_SUFFIX = "_scale_inv"


def expand_scales(scales: Tensor, shape: torch.Size) -> Tensor:
    """Repeat the scales of the blocks for every element of a weight of `shape`."""
    rows = scales.repeat_interleave(BLOCK, 0)[: shape[0]]
    return rows.repeat_interleave(BLOCK, 1)[:, : shape[1]]


def quantize(weight: Tensor) -> tuple[Tensor, Tensor]:
    """Return the e4m3 codes of a weight [out, in] and its scales, f32 [out/128, in/128] rounded up.

    A scale maps the largest magnitude of its block to 448, the largest e4m3 value; a block of
    zeros has scale 1. The quotient is clamped before the cast, because what a cast does beyond
    448 depends on the version of torch.
    """
    rows, columns = weight.shape
    padded = nn.functional.pad(weight.float().abs(), (0, -columns % BLOCK, 0, -rows % BLOCK))
    largest = padded.unflatten(1, (-1, BLOCK)).unflatten(0, (-1, BLOCK)).amax((1, 3))
    scales = torch.where(largest > 0, largest / E4M3_MAX, 1.0)
    quotient = weight.float() / expand_scales(scales, weight.shape)
    return quotient.clamp(-E4M3_MAX, E4M3_MAX).to(torch.float8_e4m3fn), scales


def dequantize(codes: Tensor, scales: Tensor) -> Tensor:
    """Return codes times scales, computed in f64 and rounded once, to f32."""
    return (codes.double() * expand_scales(scales.double(), codes.shape)).float()


def is_quantized(name: str) -> bool:
    """Whether the format stores the tensor `name` in FP8: all projections, nothing else."""
    return re.search(r"_proj(_with_mqa)?\.weight$", name) is not None


def unstack_experts(state: dict[str, Tensor]) -> dict[str, Tensor]:
    """Rename a module's tensors as in the files: one gate, up and down tensor per expert."""
    tensors: dict[str, Tensor] = {}
    for name, tensor in state.items():
        if name.endswith("experts.gate_up_proj"):
            for expert, both in enumerate(tensor):
                prefix = f"{name.removesuffix('gate_up_proj')}{expert}."
                gate, up = both.chunk(2)
                tensors |= {f"{prefix}gate_proj.weight": gate, f"{prefix}up_proj.weight": up}
        elif name.endswith("experts.down_proj"):
            for expert, down in enumerate(tensor):
                tensors[f"{name.removesuffix('down_proj')}{expert}.down_proj.weight"] = down
        else:
            tensors[name] = tensor
    return tensors


def stack_experts(tensors: dict[str, Tensor]) -> dict[str, Tensor]:
    """Undo `unstack_experts`."""
    state: dict[str, Tensor] = {}
    stacks: dict[str, dict[int, dict[str, Tensor]]] = {}
    for name, tensor in tensors.items():
        match = re.fullmatch(r"(.*\.experts\.)(\d+)\.(\w+)_proj\.weight", name)
        if match:
            prefix, expert, projection = match.groups()
            stacks.setdefault(prefix, {}).setdefault(int(expert), {})[projection] = tensor
        else:
            state[name] = tensor
    for prefix, experts in stacks.items():
        ordered = [experts[number] for number in range(len(experts))]
        gate_up = [torch.cat([expert["gate"], expert["up"]]) for expert in ordered]
        state[f"{prefix}gate_up_proj"] = torch.stack(gate_up)
        state[f"{prefix}down_proj"] = torch.stack([expert["down"] for expert in ordered])
    return state


def write_weights(model: nn.Module, folder: Path, shards: int = 2) -> None:
    """Quantize the weights of a module and write them as `shards` files with their index."""
    files: list[dict[str, Tensor]] = [{} for _ in range(shards)]
    tensors = unstack_experts({name: t.detach() for name, t in model.state_dict().items()})
    total = sum(t.numel() * (1 if is_quantized(name) else 2) for name, t in tensors.items())
    written = 0
    for name, tensor in tensors.items():
        file = files[min(written * shards // total, shards - 1)]
        if is_quantized(name):
            file[name], file[name + SCALE_SUFFIX] = quantize(tensor)
        elif name.endswith("e_score_correction_bias"):
            file[name] = tensor.float().contiguous()
        else:
            file[name] = tensor.bfloat16().contiguous()
        written += file[name].nbytes

    weight_map: dict[str, str] = {}
    size = 0
    for number, file in enumerate(files, 1):
        file_name = f"model-{number:05d}-of-{shards:05d}.safetensors"
        save_file(file, folder / file_name, metadata={"format": "pt"})
        weight_map |= dict.fromkeys(file, file_name)
        size += sum(tensor.nbytes for tensor in file.values())
    index = {"metadata": {"total_size": size}, "weight_map": dict(sorted(weight_map.items()))}
    (folder / INDEX_NAME).write_text(json.dumps(index, indent=2) + "\n")


def read_weights(folder: Path) -> dict[str, Tensor]:
    """Read all tensors of a checkpoint as f32, dequantized, under the names of the files."""
    index = json.loads((folder / INDEX_NAME).read_text())
    raw: dict[str, Tensor] = {}
    for file_name in sorted(set(index["weight_map"].values())):
        raw |= load_file(folder / file_name)
    return {
        name: dequantize(tensor, raw[name + SCALE_SUFFIX]) if is_quantized(name) else tensor.float()
        for name, tensor in raw.items()
        if not name.endswith(SCALE_SUFFIX)
    }


def load_reference(folder: Path) -> nn.Module:
    """Return the f32 `DeepseekV3ForCausalLM` that computes with the weights of a checkpoint."""
    from transformers import DeepseekV3Config, DeepseekV3ForCausalLM

    settings = json.loads((folder / "config.json").read_text())
    for key in ("quantization_config", "torch_dtype"):
        settings.pop(key)
    model = DeepseekV3ForCausalLM(DeepseekV3Config(**settings))
    model.load_state_dict(stack_experts(read_weights(folder)))
    return model.eval()
