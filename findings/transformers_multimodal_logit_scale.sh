#!/usr/bin/env bash
# transformers' multimodal classes drop the scale of logits that their text model's configuration asks for.
#
# Versions: transformers 5.23.0, torch 2.13.0 (CPU).
# Input: tiny random models of aya_vision, cohere2_vision and granite_speech, whose text parts say
# logit_scale 0.0625 (Cohere2) and logits_scaling 8.0 (Granite), asked for a text alone; and the text
# part's own class (…ForCausalLM) with the same weights.
# Seen: the logits of the multimodal class are 16, 16 and 8 times those of the text part's class. The
# likeliest token is the same; what is drawn at a temperature is not: temperature 1 of one is temperature
# 16 or 1/8 of the other.
set -euo pipefail
work=$(mktemp -d)
trap 'rm -rf "$work"' EXIT
python3 -m venv "$work/venv"
"$work/venv/bin/pip" install --quiet --disable-pip-version-check torch==2.13.0 transformers==5.23.0
cd "$work"
cat >scales.py <<'EOF'
import torch
from transformers import (
    AyaVisionConfig,
    AyaVisionForConditionalGeneration,
    Cohere2Config,
    Cohere2ForCausalLM,
    Cohere2VisionConfig,
    Cohere2VisionForConditionalGeneration,
    GraniteConfig,
    GraniteForCausalLM,
    GraniteSpeechConfig,
    GraniteSpeechForConditionalGeneration,
    SiglipVisionConfig,
)

small = dict(vocab_size=96, hidden_size=32, intermediate_size=48, num_hidden_layers=1,
             num_attention_heads=2, num_key_value_heads=2, head_dim=16)
cohere = Cohere2Config(**small, logit_scale=0.0625, pad_token_id=0)
granite = GraniteConfig(**{k: v for k, v in small.items() if k != "head_dim"}, logits_scaling=8.0, pad_token_id=0)
sight = SiglipVisionConfig(hidden_size=32, intermediate_size=48, num_hidden_layers=1,
                           num_attention_heads=2, image_size=28, patch_size=14)
hearing = dict(num_layers=1, hidden_dim=32, num_heads=2, dim_head=16, output_dim=8, input_dim=8,
               conv_kernel_size=3)
query = dict(model_type="blip_2_qformer", hidden_size=32, intermediate_size=48, num_hidden_layers=1,
             num_attention_heads=2, encoder_hidden_size=32, vocab_size=96)
cases = {
    "aya_vision": (AyaVisionForConditionalGeneration, AyaVisionConfig(vision_config=sight, text_config=cohere), Cohere2ForCausalLM, cohere, 16.0),
    "cohere2_vision": (Cohere2VisionForConditionalGeneration, Cohere2VisionConfig(vision_config=sight, text_config=cohere), Cohere2ForCausalLM, cohere, 16.0),
    "granite_speech": (GraniteSpeechForConditionalGeneration, GraniteSpeechConfig(text_config=granite, encoder_config=hearing, projector_config=query, has_lora_adapter=False), GraniteForCausalLM, granite, 8.0),
}
tokens = torch.tensor([[5, 17, 3, 90, 41]])
for name, (whole_class, config, text_class, text_config, factor) in cases.items():
    torch.manual_seed(0)
    whole = whole_class(config).eval()
    text = text_class(text_config).eval()
    text.model.load_state_dict(whole.model.language_model.state_dict())
    text.lm_head.load_state_dict(whole.lm_head.state_dict())
    with torch.no_grad():
        a, b = whole(input_ids=tokens).logits, text(input_ids=tokens).logits
    print(name, "logits of the whole over those of its text part:", (a / b).nanmedian().item())
    torch.testing.assert_close(a, b * factor, rtol=1e-4, atol=1e-5)
EOF
"$work/venv/bin/python" scales.py
