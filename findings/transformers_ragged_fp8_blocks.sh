#!/usr/bin/env bash
# transformers dequantizes FP8 weights whose last block is short with blocks of another size.
#
# Versions: transformers 5.23.0, accelerate 1.15.0, safetensors 0.8.0, torch 2.13.0 (CPU), numpy 2.4.6.
# Checkpoint: a tiny Llama with weight_block_size [128, 128], one scale for each block, and 256, 144
# or 576 rows in gate_proj (2, 2 and 5 blocks, the last of 128, 16 and 64 rows).
# Seen on a machine without FP8, where from_pretrained dequantizes:
#     256 rows   right
#     144 rows   rows 72 to 127 have the second block's scale, without a warning: its block is
#                rows / scale rows = 72, whatever the configuration says
#     576 rows   RuntimeError: "We encountered some issues during automatic conversion of the weights"
# 576 rows are those of kv_a_proj_with_mqa in DeepSeek-V3. So it cannot judge such weights.
set -euo pipefail
work=$(mktemp -d)
trap 'rm -rf "$work"' EXIT
python3 -m venv "$work/venv"
"$work/venv/bin/pip" install --quiet --disable-pip-version-check torch==2.13.0 transformers==5.23.0 accelerate==1.15.0 safetensors==0.8.0 numpy==2.4.6
cd "$work"
TRANSFORMERS_VERBOSITY=error "$work/venv/bin/python" -W ignore - <<'EOF'
import json
import math

import torch
from safetensors.torch import save_file
from transformers import LlamaConfig, LlamaForCausalLM

gate = "model.layers.0.mlp.gate_proj.weight"


def load(rows):
    config = LlamaConfig(
        vocab_size=16, hidden_size=128, intermediate_size=rows, num_hidden_layers=1,
        num_attention_heads=2, num_key_value_heads=2, architectures=["LlamaForCausalLM"],
        quantization_config={
            "quant_method": "fp8", "weight_block_size": [128, 128], "activation_scheme": "dynamic",
        },
    )
    tensors = {}
    for name, tensor in LlamaForCausalLM(config).state_dict().items():
        if ".layers." in name and tensor.dim() == 2:
            blocks = [math.ceil(n / 128) for n in tensor.shape]
            scales = torch.arange(1, 1 + math.prod(blocks), dtype=torch.float32)
            tensors[name + "_scale_inv"] = scales.reshape(blocks)
            tensor = torch.ones(tensor.shape).to(torch.float8_e4m3fn)
        tensors[name] = tensor.detach().clone()
    save_file(tensors, "model.safetensors", {"format": "pt"})
    with open("config.json", "w") as file:
        json.dump(config.to_dict(), file)
    weight = LlamaForCausalLM.from_pretrained(".", dtype=torch.float32).state_dict()[gate]
    assert (weight == weight[:, :1]).all()
    return weight[:, 0]


for rows, start in ((256, 128), (144, 72)):
    scales = load(rows)
    print(rows, "rows: the second scale from row", scales.tolist().index(2))
    right = torch.arange(rows) // 128 + 1
    assert scales.tolist() == (torch.arange(rows) // start + 1).tolist(), scales
    assert (scales == right).all() == (start == 128)
try:
    message = str(load(576))
except RuntimeError as error:
    message = str(error)
print(576, "rows:", message[:80])
assert "automatic conversion of the weights" in message, message
EOF
