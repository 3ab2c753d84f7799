"""The tests' own checkpoints have the names and formats that transformers reads."""

import pytest
import torch
from checkpoints import FAMILIES, make_checkpoint


@pytest.mark.parametrize("family", sorted(FAMILIES))
def test_transformers_loads_the_plain_checkpoint_to_the_same_model(tmp_path, family):
    from transformers import AutoModelForCausalLM

    made = make_checkpoint(tmp_path, family, quantized=False, shards=2)
    loaded = AutoModelForCausalLM.from_pretrained(
        tmp_path, dtype=torch.float32, attn_implementation="eager"
    )
    tokens = [0, 5, 100, 271, 42]
    with torch.no_grad():
        logits = loaded(input_ids=torch.tensor([tokens])).logits[0]
    assert torch.allclose(logits, made.logits(tokens), rtol=1e-5, atol=1e-5)
    assert logits.std() > 0.1
