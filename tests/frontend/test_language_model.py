"""Language models of every family: captured, bound to files, and equal to transformers."""

import json
import shutil
from pathlib import Path

import numpy as np
import pytest
import torch
from captured import CapturedModel
from checkpoints import FAMILIES, make_checkpoint

from dilu.errors import DiluError
from dilu.frontend.language_model import LanguageModelInfo, capture_language_model
from dilu.ir.text import parse_graph, print_graph
from dilu.ir.verify import verify

PROMPT = [0, 5, 100, 271, 42, 7, 99, 12, 250]
OTHER = [3, 3, 200, 17]


def relative_error(got, want) -> float:
    want = np.asarray(want)
    return float(np.abs(got - want).max() / np.abs(want).max())


@pytest.fixture(scope="module", params=sorted(FAMILIES))
def captured(request, tmp_path_factory):
    folder = tmp_path_factory.mktemp(request.param)
    scales = torch.bfloat16 if request.param in ("qwen3", "qwen3_moe") else torch.float32
    shards = 2 if "deepseek" in request.param else 1
    made = make_checkpoint(folder, request.param, scale_dtype=scales, shards=shards)
    graph, info = capture_language_model(folder)
    return made, graph, info


def test_the_graph_is_valid_and_its_text_complete(captured):
    _, graph, _ = captured
    verify(graph)
    assert parse_graph(print_graph(graph)) == graph
    main = graph.function("main")
    assert set(graph.weights) == {c.name for c in main.constants}
    assert [p.name for p in main.parameters] == [
        "tokens", "positions", "sequence", "slots", "pages", "rows",
    ]  # fmt: skip
    assert all(
        n.loc is not None for c in main.nodes if c.op.name == "call" for n in c.op.body.nodes
    )


def test_logits_of_prompt_and_decoding_are_those_of_transformers(captured):
    made, graph, _ = captured
    model = CapturedModel(graph, made.path)
    want = made.logits(PROMPT)
    (first,) = model.feed([PROMPT[:6]])
    rest = [model.feed([[token]])[0] for token in PROMPT[6:]]
    assert relative_error(np.concatenate([first, *rest]), want) < 1e-5


def test_a_ragged_batch_is_each_sequence_alone(captured):
    made, graph, _ = captured
    both = CapturedModel(graph, made.path)
    got = both.feed([PROMPT[:6], OTHER])
    more = both.feed([PROMPT[6:7], PROMPT[:2]])
    for batch, tokens in zip(zip(got, more, strict=True), (PROMPT[:7], [*OTHER, *PROMPT[:2]])):
        assert relative_error(np.concatenate(batch), made.logits(tokens)) < 1e-5


def test_info(captured):
    made, _, info = captured
    assert info.architecture == type(made.model).__name__
    assert (info.vocab_size, info.max_positions, info.eos_token_ids) == (272, 512, (1,))
    assert info.parameters == sum(p.numel() for p in made.model.parameters())
    assert LanguageModelInfo.from_dict(json.loads(json.dumps(info.to_dict()))) == info


def test_equal_layers_are_one_call(tmp_path):
    make_checkpoint(tmp_path, "deepseek_v3", num_hidden_layers=6)
    graph, _ = capture_language_model(tmp_path)
    calls = [n for n in graph.function("main").nodes if n.op.name == "call"]
    assert [c.op.times for c in calls] == [1, 5]
    weight = graph.weights["layers_1.mlp.experts.gate_up_proj"]
    assert weight.grid_shape == (5, 8, 2)
    assert weight.pieces[2 * 3 + 1].tensor == "model.layers.1.mlp.experts.3.up_proj.weight"
    scales = graph.weights["layers_1.mlp.experts.gate_up_proj.scales"]
    assert scales.pieces[17].tensor == "model.layers.2.mlp.experts.0.up_proj.weight_scale_inv"


def test_a_layer_stored_differently_is_a_kind_of_its_own(tmp_path):
    made = make_checkpoint(tmp_path, "llama", exclude=("layers.1.mlp",))
    graph, _ = capture_language_model(tmp_path)
    calls = [n for n in graph.function("main").nodes if n.op.name == "call"]
    assert [(c.op.times, c.op.body.name) for c in calls] == [
        (1, "layer_0"), (1, "layer_1"), (1, "layer_0"),
    ]  # fmt: skip
    (got,) = CapturedModel(graph, tmp_path).feed([PROMPT])
    assert relative_error(got, made.logits(PROMPT)) < 1e-5


def test_576_rows_have_5_rows_of_scales(tmp_path):
    sizes = {"kv_lora_rank": 512, "qk_rope_head_dim": 64, "num_hidden_layers": 1}
    made = make_checkpoint(tmp_path, "deepseek_v3", **sizes)
    graph, _ = capture_language_model(tmp_path)
    name = "layers_0.self_attn.kv_a_proj_with_mqa.weight"
    assert graph.weights[name].type.shape == (1, 576, 144)
    assert graph.weights[name + ".scales"].type.shape == (1, 5, 2)
    (got,) = CapturedModel(graph, tmp_path).feed([PROMPT])
    assert relative_error(got, made.logits(PROMPT)) < 1e-5


@pytest.mark.parametrize("options", [{"quantized": False}, {"block": (32, 32)}])
def test_other_forms_of_weights(tmp_path, options):
    made = make_checkpoint(tmp_path, "qwen3_moe", num_hidden_layers=1, **options)
    graph, _ = capture_language_model(tmp_path)
    (got,) = CapturedModel(graph, tmp_path).feed([PROMPT])
    assert relative_error(got, made.logits(PROMPT)) < 1e-5


def test_bf16_computation(tmp_path):
    made = make_checkpoint(tmp_path, "deepseek_v3", num_hidden_layers=2)
    graph, info = capture_language_model(tmp_path, dtype="bf16")
    verify(graph)
    assert info.dtype == "bf16"
    assert {str(s.type.dtype) for s in graph.function("main").states} == {"bf16"}
    model = CapturedModel(graph, tmp_path, wide=True)  # unrounded: the same function
    (got,) = model.feed([PROMPT])
    assert relative_error(got, made.logits(PROMPT)) < 1e-5


def test_config_only(captured):
    made, full, info = captured
    graph, same = capture_language_model(made.path / "config.json", config_only=True)
    verify(graph)
    assert same == info
    assert all(not w.pieces for w in graph.weights.values())
    bf16 = print_graph(full).replace("bf16", "f32")
    assert print_graph(graph).replace("bf16", "f32") == bf16  # scales' type is the files' secret


# ------------------------------------------------------------------------------ errors


def edit_config(folder: Path, **changes) -> None:
    file = folder / "config.json"
    file.write_text(json.dumps(json.loads(file.read_text()) | changes))


@pytest.fixture
def broken(tmp_path_factory, tmp_path):
    """A copy of a checkpoint, to break."""
    folder = tmp_path_factory.getbasetemp() / "good"
    if not folder.exists():
        make_checkpoint(folder, "qwen3_moe", num_hidden_layers=1)
    return Path(shutil.copytree(folder, tmp_path / "broken"))


def test_unknown_architecture(broken):
    edit_config(broken, model_type="nonesuch", architectures=["NonesuchForCausalLM"])
    with pytest.raises(DiluError, match=r"unknown architecture: model_type 'nonesuch'"):
        capture_language_model(broken)


def test_not_a_language_model(broken):
    edit_config(broken, model_type="vit")
    with pytest.raises(DiluError, match="cannot build the model of model_type 'vit'"):
        capture_language_model(broken)


def test_wrong_shapes(broken):
    edit_config(broken, hidden_size=176)
    message = r"wrong shape: the model wants \[272, 176\], the file has \[272, 144\]"
    with pytest.raises(DiluError, match=message):
        capture_language_model(broken)


def test_wrong_shape_of_scales(broken):
    config = json.loads((broken / "config.json").read_text())["quantization_config"]
    edit_config(broken, quantization_config=config | {"weight_block_size": [64, 64]})
    with pytest.raises(DiluError, match=r"wrong shape: the model wants \[3, 3\][\s\S]*_scale_inv"):
        capture_language_model(broken)


def test_missing_tensors(broken):
    edit_config(broken, num_hidden_layers=2)
    with pytest.raises(DiluError, match=r"the checkpoint has no tensor for 'model\.layers\.1\."):
        capture_language_model(broken)


def test_missing_expert(broken):
    edit_config(broken, num_experts=9)
    with pytest.raises(DiluError, match=r"no tensor for expert 8, part 0 of '.*gate_up_proj'"):
        capture_language_model(broken)


def test_codes_without_quantization_config(broken):
    edit_config(broken, quantization_config=None)
    with pytest.raises(DiluError, match="holds 8-bit codes, but config.json has no"):
        capture_language_model(broken)


def test_dynamic_rotary_embedding(broken):
    scaling = {"rope_type": "dynamic", "factor": 2.0}
    edit_config(broken, rope_scaling=scaling)
    with pytest.raises(DiluError, match="rotary embedding of type 'dynamic' is not supported"):
        capture_language_model(broken)


def test_unknown_element_type(broken):
    with pytest.raises(DiluError, match="unknown element type 'f12'"):
        capture_language_model(broken, dtype="f12")
