#!/usr/bin/env bash
# Names in modules_to_not_convert end anywhere and begin at the root: neighbours match, containers do not.
#
# Versions: transformers 5.23.0, torch 2.13.0 (CPU), accelerate 1.15.0, numpy 2.4.6.
# Models: tiny Phi-3 (its gate_up_proj is one Linear) and Qwen2 on the meta device; FP8 by
# replace_with_fp8_linear, the function that from_pretrained uses for FP8 checkpoints.
# Seen, as what stays unquantized in layers 0 and 1:
#     Phi-3   up_proj          both gate_up_proj, which nobody named
#     Qwen2   model.layers.1   the seven Linears of layer 1
#     Qwen2   layers.1         none
#     Qwen2   mlp              none, while the suffix down_proj is found in both layers
# A name matches from the start of the path up to a dot, or at the end of the path in the middle of a word.
# So "visual" says nothing about model.visual.blocks.0, and "gate" catches shared_expert_gate.
set -euo pipefail
work=$(mktemp -d)
trap 'rm -rf "$work"' EXIT
python3 -m venv "$work/venv"
"$work/venv/bin/pip" install --quiet --disable-pip-version-check torch==2.13.0 transformers==5.23.0 accelerate==1.15.0 numpy==2.4.6
cd "$work"
TRANSFORMERS_VERBOSITY=error "$work/venv/bin/python" -W ignore - <<'EOF'
import torch
from transformers import FineGrainedFP8Config, Phi3Config, Phi3ForCausalLM, Qwen2Config, Qwen2ForCausalLM
from transformers.integrations.finegrained_fp8 import replace_with_fp8_linear
from transformers.quantizers.quantizers_utils import should_convert_module

sizes = dict(
    vocab_size=16, hidden_size=128, intermediate_size=128, num_hidden_layers=2,
    num_attention_heads=2, num_key_value_heads=2, pad_token_id=0,
)


def kept(model_class, config_class, name):
    with torch.device("meta"):
        model = model_class(config_class(**sizes))
    names = ["lm_head", name]
    model = replace_with_fp8_linear(model, names, FineGrainedFP8Config(), pre_quantized=True)
    plain = [n for n, m in model.named_modules() if type(m) is torch.nn.Linear and n != "lm_head"]
    print(name, "keeps", plain)
    return plain


layers = ["model.layers.0.", "model.layers.1."]
assert kept(Phi3ForCausalLM, Phi3Config, "up_proj") == [n + "mlp.gate_up_proj" for n in layers]
inside = kept(Qwen2ForCausalLM, Qwen2Config, "model.layers.1")
assert len(inside) == 7 and all(n.startswith(layers[1]) for n in inside), inside
assert kept(Qwen2ForCausalLM, Qwen2Config, "layers.1") == []
assert kept(Qwen2ForCausalLM, Qwen2Config, "mlp") == []
assert kept(Qwen2ForCausalLM, Qwen2Config, "down_proj") == [n + "mlp.down_proj" for n in layers]
assert should_convert_module("model.visual.blocks.0", ["visual"])
assert not should_convert_module("model.layers.0.mlp.shared_expert_gate", ["gate"])
EOF
