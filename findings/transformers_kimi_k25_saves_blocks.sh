#!/usr/bin/env bash
# save_pretrained of a Kimi-K2.5 calls the layers of its text model "blocks".
#
# Versions: transformers 5.23.0, torch 2.13.0 (CPU), safetensors 0.8.0, numpy 2.4.6.
# Model: a tiny Kimi_K25ForConditionalGeneration with a DeepSeek-V3 text part of two layers.
# Seen:
#     in the module   model.language_model.layers.0.…
#     in the file     language_model.model.blocks.0.…, none under language_model.model.layers
#     a file with language_model.model.layers.0.…, as released ones have it, loads as well
# The renaming that reads the vision tower's blocks as layers is undone for every "layers" on saving.
# transformers reads such a file again; a reader that knows the released names finds no layer in it.
set -euo pipefail
work=$(mktemp -d)
trap 'rm -rf "$work"' EXIT
python3 -m venv "$work/venv"
"$work/venv/bin/pip" install --quiet --disable-pip-version-check torch==2.13.0 transformers==5.23.0 safetensors==0.8.0 numpy==2.4.6
cd "$work"
TRANSFORMERS_VERBOSITY=error "$work/venv/bin/python" -W ignore - <<'EOF'
from safetensors.torch import load_file, save_file
from transformers import Kimi_K25Config, Kimi_K25ForConditionalGeneration

text = dict(
    model_type="deepseek_v3", vocab_size=32, hidden_size=32, intermediate_size=32,
    moe_intermediate_size=16, num_hidden_layers=2, num_attention_heads=2, num_key_value_heads=2,
    n_routed_experts=4, num_experts_per_tok=2, n_group=1, topk_group=1, n_shared_experts=1,
    first_k_dense_replace=1, kv_lora_rank=8, q_lora_rank=8, qk_rope_head_dim=4,
    qk_nope_head_dim=4, v_head_dim=4,
)
vision = dict(hidden_size=32, intermediate_size=32, num_hidden_layers=1, num_attention_heads=2)
config = Kimi_K25Config(text_config=text, vision_config=vision)
model = Kimi_K25ForConditionalGeneration(config)
model.save_pretrained(".")
tensors = load_file("model.safetensors")
norm = "0.input_layernorm.weight"
print([n for n in tensors if n.endswith(norm)])
assert f"model.language_model.layers.{norm}" in model.state_dict()
assert f"language_model.model.blocks.{norm}" in tensors
assert not any(n.startswith("language_model.model.layers.") for n in tensors)

old, new = "language_model.model.blocks.", "language_model.model.layers."
for there, back in ((old, old), (old, new)):
    renamed = {n.replace(there, back): t for n, t in tensors.items()}
    save_file(renamed, "model.safetensors", {"format": "pt"})
    _, info = Kimi_K25ForConditionalGeneration.from_pretrained(".", output_loading_info=True)
    print(back, "missing:", len(info["missing_keys"]))
    assert not info["missing_keys"] and not info["unexpected_keys"], info
EOF
