#!/usr/bin/env bash
# A boolean attention mask means "may see" to transformers' sdpa and is added as 0 and 1 in eager attention.
#
# Versions: transformers 5.23.0, torch 2.13.0 (CPU), numpy 2.4.6.
# Model: a tiny Llama, four tokens, the causal mask given as [1, 1, 4, 4], of booleans and of floats.
# Seen, as the difference of the logits to a call without a mask (causal by itself):
#     sdpa    booleans 0, floats 0
#     eager   booleans 0.03 where the largest logit is 0.14, without a warning; floats 0
# So in eager attention every token sees every other, with its score raised by one where it may.
set -euo pipefail
work=$(mktemp -d)
trap 'rm -rf "$work"' EXIT
python3 -m venv "$work/venv"
"$work/venv/bin/pip" install --quiet --disable-pip-version-check torch==2.13.0 transformers==5.23.0 numpy==2.4.6
cd "$work"
TRANSFORMERS_VERBOSITY=error "$work/venv/bin/python" -W ignore - <<'EOF'
import torch
from transformers import LlamaConfig, LlamaForCausalLM

torch.manual_seed(0)
config = LlamaConfig(
    vocab_size=16, hidden_size=16, intermediate_size=16, num_hidden_layers=1,
    num_attention_heads=2, num_key_value_heads=2,
)
model = LlamaForCausalLM(config).eval()
tokens = torch.arange(4)[None]
allowed = torch.ones(1, 1, 4, 4, dtype=torch.bool).tril()
added = torch.zeros(1, 1, 4, 4).masked_fill(~allowed, torch.finfo(torch.float32).min)
seen = {}
for name in ("sdpa", "eager"):
    model.set_attn_implementation(name)
    with torch.no_grad():
        right = model(tokens).logits
        for kind, mask in (("booleans", allowed), ("floats", added)):
            logits = model(tokens, attention_mask=mask).logits
            seen[name, kind] = ((logits - right).abs().max() / right.abs().max()).item()
        if name == "eager":
            ones = model(tokens, attention_mask=allowed.float()).logits
            booleans = model(tokens, attention_mask=allowed).logits
            assert torch.equal(ones, booleans)
print(seen)
assert seen.pop(("eager", "booleans")) > 0.05
assert all(difference < 1e-5 for difference in seen.values()), seen
EOF
