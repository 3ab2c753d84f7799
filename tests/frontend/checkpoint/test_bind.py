"""Binding of checkpoint tensors to parameters: grids, stacks of layers, and what is refused.

Forms of weights are tested beside their readers (formats/), names beside theirs.
"""

import numpy as np
import pytest
import torch
from captured import CapturedModel
from checkpoints import make_checkpoint
from safetensors.torch import load_file, save_file
from stored import bind, bound, config_of, model_files, quantize, write

from dilu.errors import DiluError
from dilu.frontend.language.language_model import capture_language_model

PROMPT = [0, 5, 100, 271, 42]
FP8 = {"quant_method": "fp8", "weight_block_size": [128, 128]}


@pytest.fixture(scope="module")
def moe():
    config = config_of("qwen3_moe", num_hidden_layers=2)
    files = {}
    for name, tensor in model_files(config).items():
        files[name] = tensor.bfloat16()
        if "_proj" in name:
            files[name], files[f"{name}_scale_inv"] = quantize(tensor, (128, 128))
    return config | {"quantization_config": FP8}, files


def test_codes_and_scales_are_grids_of_pieces(tmp_path, moe):
    binder, checkpoint = bind(write(tmp_path, *moe))
    names = [f"model.layers.{i}.mlp.experts.gate_up_proj" for i in range(2)]
    storage = binder.storage(names[0])
    assert (storage.type.shape, storage.format.block) == ((3, 2, 72, 144), (128, 128))
    assert storage.scales is not None
    assert storage.scales.shape == (3, 2, 1, 2)
    for scales, suffix in ((False, "weight"), (True, "weight_scale_inv")):
        weight = binder.weight(names, scales=scales, stacked=True)
        assert (weight.grid_shape, len(weight.pieces)) == ((2, 3, 2), 12)
        piece = weight.pieces[7]  # of the second layer, the first expert's second projection
        assert piece.tensor == f"model.layers.1.mlp.experts.0.up_proj.{suffix}"
        assert piece.offset == checkpoint.header(piece.tensor).offset


@pytest.mark.slow
def test_a_scale_per_row_in_a_captured_model(tmp_path):
    made = make_checkpoint(tmp_path, "llama", quantized=False, num_hidden_layers=2)
    file = tmp_path / "model.safetensors"
    tensors, exact = load_file(file), {}
    for name in [n for n in tensors if "_proj" in n]:
        codes, scales = quantize(tensors[name].float(), (1, None))
        tensors |= {name: codes, f"{name}_scale": scales}
        exact[name] = (codes.double() * scales.double()).float()
    config = made.model.config.to_dict() | {"quantization_config": {"quant_method": "fbgemm_fp8"}}
    write(tmp_path, {k: v for k, v in config.items() if v is not None}, tensors)
    graph, _ = capture_language_model(tmp_path)
    weight = graph.weights["layers_0.mlp.gate_proj.weight.scales"]
    assert weight.type.shape == (2, 200, 1)
    (got,) = CapturedModel(graph, tmp_path).feed([PROMPT])
    made.model.load_state_dict(exact, strict=False)
    want = made.logits(PROMPT).numpy()
    assert np.abs(got - want).max() < 1e-5 * np.abs(want).max()


def test_a_missing_scale(tmp_path, moe):
    config, files = moe
    name = "model.layers.0.mlp.experts.1.up_proj.weight"
    write(tmp_path, config, {k: v for k, v in files.items() if k != f"{name}_scale_inv"})
    with pytest.raises(DiluError, match=rf"'{name}' holds 8-bit codes, and the checkpoint has no"):
        bound(tmp_path)


def test_a_missing_expert_whose_scale_is_there(tmp_path, moe):
    config, files = moe
    name = "model.layers.0.mlp.experts.1.up_proj.weight"
    write(tmp_path, config, {k: v for k, v in files.items() if k != name})
    with pytest.raises(DiluError, match=r"no tensor for expert 1, part 1 of '.*gate_up_proj'"):
        bound(tmp_path)


def test_experts_of_different_types(tmp_path, moe):
    config, files = moe
    name = "model.layers.0.mlp.experts.1.up_proj.weight"
    plain = {k: v for k, v in files.items() if k != f"{name}_scale_inv"}
    write(tmp_path, config, plain | {name: torch.zeros(72, 144, dtype=torch.bfloat16)})
    with pytest.raises(DiluError, match=r"gate_up_proj' have different types: bf16, f8e4m3"):
        bound(tmp_path)


def test_experts_whose_scales_are_of_different_blocks(tmp_path, moe):
    config, files = moe
    name = "model.layers.0.mlp.experts.1.up_proj.weight"
    settings = {k: v for k, v in FP8.items() if k != "weight_block_size"}
    rows = {f"{name}_scale_inv": torch.ones(72, 1)}
    write(tmp_path, config | {"quantization_config": settings}, files | rows)
    with pytest.raises(DiluError, match=r"gate_up_proj' have scales of different blocks"):
        bound(tmp_path)


def test_wrong_shapes_say_what_may_be_the_cause(tmp_path, moe):
    config, files = moe
    write(tmp_path, config | {"head_dim": 48}, files)
    with pytest.raises(DiluError, match=r"wants \[192, 144\], the file has \[160, 144\]") as caught:
        bound(tmp_path)
    assert "it is of another model, or the weight is stored in a form" in str(caught.value)
    assert "download" not in str(caught.value)


def test_an_unknown_element_type_is_refused_where_it_is_bound(tmp_path):
    """F4 and its like in a tensor that nobody reads are no reason to refuse."""
    config = config_of("llama")
    folder = write(tmp_path, config, {k: v.bfloat16() for k, v in model_files(config).items()})
    unread, read = "vision.weight", "model.norm.weight"
    for name, fails in ((unread, False), (read, True)):
        tensors = load_file(folder / "model.safetensors")
        tensors[name] = torch.zeros(144, dtype=torch.uint8)
        save_file(tensors, folder / "model.safetensors")
        data = (folder / "model.safetensors").read_bytes()
        old = data.index(b'"' + name.encode() + b'":{"dtype":"U8"')
        changed = data[:old] + data[old:].replace(b'"U8"', b'"F4"', 1)
        (folder / "model.safetensors").write_bytes(changed)
        if fails:
            with pytest.raises(DiluError, match=r"unknown element type 'F4'[\s\S]*'model\.norm"):
                bound(folder)
        else:
            bound(folder)
            del tensors[name]
            save_file(tensors, folder / "model.safetensors")
