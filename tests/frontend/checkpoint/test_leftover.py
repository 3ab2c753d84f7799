"""Tensors that nobody reads: known to mean nothing, of other modules, or refused by name."""

import re

import pytest
import torch
from stored import bound, config_of, model_files, write

from dilu.errors import DiluError

LAYER = "model.layers.0."
PROJECTION = f"{LAYER}self_attn.q_proj."


@pytest.fixture(scope="module")
def plain():
    config = config_of("llama")
    return config, {k: v.bfloat16() for k, v in model_files(config).items()}


#: Scales of activations and caches, what transformers passes over, what adds nothing, and what
#: is of modules that are not captured.
NOTHING = (
    f"{PROJECTION}input_scale", f"{PROJECTION}output_scale", f"{PROJECTION}activation_scale_inv",
    f"{PROJECTION}input_zero_point", f"{PROJECTION}qscale_act", f"{LAYER}self_attn.k_scale",
    f"{LAYER}self_attn.v_scale", f"{LAYER}self_attn.k_proj.k_scale", f"{LAYER}self_attn.kv_scale",
    f"{LAYER}self_attn.rotary_emb.inv_freq", "model.rotary_emb.inv_freq", "rope.freqs",
    f"{PROJECTION}bias", f"{PROJECTION}weight_zero_point",
    "model.layers.1.enorm.weight", "model.layers.61.mlp.experts.0.up_proj.weight_scale_inv",
    "mtp.layers.0.mlp.up_proj.weight", "model.mtp.norm.weight", "visual.blocks.0.attn.weight",
    "model.vision_tower.patch.weight", "multi_modal_projector.bias", "a strange\\name\n.weight", "",
)  # fmt: skip


def test_what_means_nothing_is_passed_over(tmp_path, plain):
    config, tensors = plain
    more = {n: torch.zeros(3) if n.endswith(("bias", "zero_point")) else torch.ones(3)
            for n in NOTHING}  # fmt: skip
    want = bound(write(tmp_path, config, tensors))
    got = bound(write(tmp_path, config, tensors | more))
    assert got.keys() == want.keys()
    assert all((got[n] == want[n]).all() for n in want)


REFUSED = {
    f"{PROJECTION}bias": "describes has no bias in model.layers.0.self_attn.q_proj",
    f"{PROJECTION}weight_zero_point": "belongs to model.layers.0.self_attn.q_proj (Linear)",
    f"{PROJECTION}weight_scale": "a scale of no weight that holds codes",
    f"{PROJECTION}weight_scale_2": "it may change what the module computes",
    f"{PROJECTION}pre_quant_scale": "a scale of no weight that holds codes",
    f"{PROJECTION}weight_g_idx": "nothing reads the tensor",
    f"{PROJECTION}lora_A.weight": "which belongs to model.layers.0.self_attn.q_proj (Linear)",
    f"{LAYER}self_attn.q_norm.weight": "which belongs to model.layers.0.self_attn (LlamaAttention)",
    f"{LAYER}self_attn.sinks": "which belongs to model.layers.0.self_attn",
    f"{LAYER}post_feedforward_layernorm.weight": "which belongs to model.layers.0 (",
    "layers.0.mlp.extra.weight": "which belongs to model.layers.0.mlp (LlamaMLP)",
    "model.norm.bias": "no bias in model.norm",
    "lm_head.bias": "no bias in lm_head",
    "model.embed_tokens.weight_scale": "which belongs to model.embed_tokens",
    "language_model.model.layers.0.self_attn.q_norm.weight": "belongs to model.layers.0.self_attn",
}


@pytest.mark.parametrize("name", REFUSED)
def test_what_a_module_would_compute_with_is_refused(tmp_path, plain, name):
    config, tensors = plain
    write(tmp_path, config, tensors | {name: torch.ones(3)})
    with pytest.raises(DiluError, match=re.escape(REFUSED[name])) as caught:
        bound(tmp_path)
    assert repr(name) in str(caught.value)


def test_what_the_model_says_it_ignores(tmp_path, plain):
    from stored import bind

    config, tensors = plain
    write(tmp_path, config, tensors | {f"{LAYER}self_attn.masked_bias": torch.ones(3)})

    def ignoring(model):
        model._keys_to_ignore_on_load_unexpected = [r"self_attn\.masked_bias"]

    bind(tmp_path, ignoring)
    with pytest.raises(DiluError, match="masked_bias"):
        bind(tmp_path)
