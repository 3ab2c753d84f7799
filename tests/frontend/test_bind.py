"""Binding of checkpoint tensors to parameters: forms of scales, prefixes, and what is refused."""

import json

import numpy as np
import pytest
import torch
from captured import CapturedModel
from checkpoints import E4M3_MAX, make_checkpoint
from safetensors.torch import load_file, save_file

from dilu.errors import DiluError
from dilu.frontend.language_model import capture_language_model

PROMPT = [0, 5, 100, 271, 42]


def rewrite(folder, change, **config):
    """Change the tensors of a single-file checkpoint and entries of its configuration."""
    file = folder / "model.safetensors"
    tensors = change(load_file(file))
    save_file({k: v.contiguous() for k, v in tensors.items()}, file)
    settings = json.loads((folder / "config.json").read_text()) | config
    (folder / "config.json").write_text(json.dumps(settings))


def compressed(strategy):
    """Return a change of plain weights to compressed-tensors', and the configuration."""

    def change(tensors):
        out = {}
        for name, weight in tensors.items():
            out[name] = weight
            if "_proj.weight" in name:
                wide = weight.float()
                largest = (
                    wide.abs().amax(1, keepdim=True) if strategy == "channel" else wide.abs().max()
                )
                scale = largest / E4M3_MAX
                out[name] = (wide / scale).clamp(-E4M3_MAX, E4M3_MAX).to(torch.float8_e4m3fn)
                out[f"{name}_scale"] = (
                    scale.reshape(-1, 1) if strategy == "channel" else scale[None]
                )
        return out

    weights = {"type": "float", "num_bits": 8, "strategy": strategy}
    groups = {"group_0": {"targets": ["Linear"], "weights": weights}}
    return change, {
        "quant_method": "compressed-tensors",
        "config_groups": groups,
        "ignore": ["lm_head"],
        "format": "float-quantized",
    }


@pytest.mark.parametrize("strategy", ["channel", "tensor"])
def test_a_scale_per_row_or_tensor(tmp_path, strategy):
    made = make_checkpoint(tmp_path, "llama", quantized=False, num_hidden_layers=2)
    change, settings = compressed(strategy)
    rewrite(tmp_path, change, quantization_config=settings)
    graph, _ = capture_language_model(tmp_path)
    weight = graph.weights["layers_0.mlp.gate_proj.weight.scales"]
    assert weight.type.shape == ((2, 200, 1) if strategy == "channel" else (2, 1, 1))
    (got,) = CapturedModel(graph, tmp_path).feed([PROMPT])
    want = made.logits(PROMPT).numpy()
    assert np.abs(got - want).max() < 0.3 * np.abs(want).max()  # one quantization apart
    exact = dequantized(tmp_path, strategy)
    made.model.load_state_dict(exact, strict=False)
    want = made.logits(PROMPT).numpy()
    assert np.abs(got - want).max() < 1e-5 * np.abs(want).max()


def dequantized(folder, strategy):
    tensors = load_file(folder / "model.safetensors")
    return {
        name: (w.double() * tensors[f"{name}_scale"].double()).float()
        for name, w in tensors.items()
        if f"{name}_scale" in tensors
    }


def test_names_without_the_prefix_of_the_model(tmp_path):
    made = make_checkpoint(tmp_path, "llama", tie_word_embeddings=True, num_hidden_layers=1)
    rewrite(tmp_path, lambda ts: {n.removeprefix("model."): t for n, t in ts.items()})
    graph, _ = capture_language_model(tmp_path)
    (got,) = CapturedModel(graph, tmp_path).feed([PROMPT])
    want = made.logits(PROMPT).numpy()
    assert np.abs(got - want).max() < 1e-5 * np.abs(want).max()


def test_more_tensors_than_the_model_has(tmp_path):
    make_checkpoint(tmp_path, "llama", num_hidden_layers=1)
    extra = {"model.layers.61.enorm.weight": torch.zeros(3), "rope.freqs": torch.zeros(2)}
    rewrite(tmp_path, lambda tensors: tensors | extra)
    graph, _ = capture_language_model(tmp_path)
    assert not any("61" in name for name in graph.weights)


def test_experts_that_are_stacked_in_the_file(tmp_path):
    made = make_checkpoint(tmp_path, "qwen3_moe", quantized=False, num_hidden_layers=1)
    state = made.model.state_dict()
    stacked = {n: t.bfloat16() for n, t in state.items() if ".experts." in n}

    def change(tensors):
        return {n: t for n, t in tensors.items() if ".experts." not in n} | stacked

    rewrite(tmp_path, change)
    graph, _ = capture_language_model(tmp_path)
    (got,) = CapturedModel(graph, tmp_path).feed([PROMPT])
    want = made.logits(PROMPT).numpy()
    assert np.abs(got - want).max() < 1e-5 * np.abs(want).max()


def test_a_missing_scale(tmp_path):
    make_checkpoint(tmp_path, "llama", num_hidden_layers=1)
    name = "model.layers.0.mlp.up_proj.weight_scale_inv"
    rewrite(tmp_path, lambda tensors: {n: t for n, t in tensors.items() if n != name})
    with pytest.raises(DiluError, match=r"no tensor 'model\.layers\.0\.mlp\.up_proj\.weight_scale"):
        capture_language_model(tmp_path)


def test_experts_of_different_types(tmp_path):
    make_checkpoint(tmp_path, "qwen3_moe", num_hidden_layers=1, exclude=("experts.3.up_proj",))
    with pytest.raises(DiluError, match=r"gate_up_proj' have different types: bf16, f8e4m3"):
        capture_language_model(tmp_path)
