"""The bundled checkpoint has the format of the real FP8 DeepSeek-V3 ones; its writer is right."""

import json
import math
import sys
from collections.abc import Iterator
from pathlib import Path
from types import ModuleType

import pytest

torch = pytest.importorskip("torch")
safetensors = pytest.importorskip("safetensors")

EXAMPLES = Path(__file__).parents[2] / "examples"
MODEL = EXAMPLES / "stdlib-moe"
LARGEST_SIZE = 8_000_000


@pytest.fixture(scope="module")
def fp8() -> Iterator[ModuleType]:
    """The example's own writer and reader of checkpoints."""
    sys.path.insert(0, str(EXAMPLES))
    try:
        import fp8_checkpoint

        yield fp8_checkpoint
    finally:
        sys.path.remove(str(EXAMPLES))
        sys.modules.pop("fp8_checkpoint", None)


@pytest.fixture(scope="module")
def config() -> dict:
    return json.loads((MODEL / "config.json").read_text())


@pytest.fixture(scope="module")
def tensors() -> dict[str, tuple[str, list[int]]]:
    """Name → (dtype, shape), from the headers of the files that the index names."""
    index = json.loads((MODEL / "model.safetensors.index.json").read_text())
    found = {}
    for file_name in sorted(set(index["weight_map"].values())):
        with safetensors.safe_open(MODEL / file_name, "pt") as file:
            for name in file.keys():  # noqa: SIM118
                assert index["weight_map"][name] == file_name
                part = file.get_slice(name)
                found[name] = (part.get_dtype(), part.get_shape())
    assert found.keys() == index["weight_map"].keys()
    return found


def expected_weights(config: dict) -> dict[str, tuple[str, list[int]]]:
    """Every weight that the config implies, by DeepSeek-V3's names; no scales."""
    hidden, heads = config["hidden_size"], config["num_attention_heads"]
    nope, rope = config["qk_nope_head_dim"], config["qk_rope_head_dim"]
    q_rank, kv_rank, value = config["q_lora_rank"], config["kv_lora_rank"], config["v_head_dim"]
    experts, inner = config["n_routed_experts"], config["moe_intermediate_size"]

    def mlp(prefix: str, width: int) -> dict[str, tuple[str, list[int]]]:
        return {
            f"{prefix}.gate_proj.weight": ("F8_E4M3", [width, hidden]),
            f"{prefix}.up_proj.weight": ("F8_E4M3", [width, hidden]),
            f"{prefix}.down_proj.weight": ("F8_E4M3", [hidden, width]),
        }

    names = {
        "model.embed_tokens.weight": ("BF16", [config["vocab_size"], hidden]),
        "model.norm.weight": ("BF16", [hidden]),
        "lm_head.weight": ("BF16", [config["vocab_size"], hidden]),
    }
    for number in range(config["num_hidden_layers"]):
        layer = f"model.layers.{number}"
        attention = f"{layer}.self_attn"
        names |= {
            f"{layer}.input_layernorm.weight": ("BF16", [hidden]),
            f"{layer}.post_attention_layernorm.weight": ("BF16", [hidden]),
            f"{attention}.q_a_layernorm.weight": ("BF16", [q_rank]),
            f"{attention}.kv_a_layernorm.weight": ("BF16", [kv_rank]),
            f"{attention}.q_a_proj.weight": ("F8_E4M3", [q_rank, hidden]),
            f"{attention}.q_b_proj.weight": ("F8_E4M3", [heads * (nope + rope), q_rank]),
            f"{attention}.kv_a_proj_with_mqa.weight": ("F8_E4M3", [kv_rank + rope, hidden]),
            f"{attention}.kv_b_proj.weight": ("F8_E4M3", [heads * (nope + value), kv_rank]),
            f"{attention}.o_proj.weight": ("F8_E4M3", [hidden, heads * value]),
        }
        if number < config["first_k_dense_replace"]:
            names |= mlp(f"{layer}.mlp", config["intermediate_size"])
            continue
        names[f"{layer}.mlp.gate.weight"] = ("BF16", [experts, hidden])
        names[f"{layer}.mlp.gate.e_score_correction_bias"] = ("F32", [experts])
        names |= mlp(f"{layer}.mlp.shared_experts", inner * config["n_shared_experts"])
        for expert in range(experts):
            names |= mlp(f"{layer}.mlp.experts.{expert}", inner)
    return names


def test_tensors_are_those_of_the_format(config: dict, tensors: dict) -> None:
    expected = expected_weights(config)
    for name, (dtype, shape) in list(expected.items()):
        if dtype == "F8_E4M3":
            expected[f"{name}_scale_inv"] = ("F32", [math.ceil(size / 128) for size in shape])
    assert tensors == expected


def test_weights_are_sharded_and_small() -> None:
    assert len(list(MODEL.glob("model-*-of-00002.safetensors"))) == 2
    assert sum(path.stat().st_size for path in MODEL.iterdir()) <= LARGEST_SIZE
    assert (MODEL / "heldout.txt").stat().st_size <= 100_000


def test_ragged_blocks_are_present(tensors: dict) -> None:
    dtype, shape = tensors["model.layers.0.self_attn.kv_a_proj_with_mqa.weight"]
    assert dtype == "F8_E4M3"
    assert shape[0] > 128
    assert shape[0] % 128 != 0
    dtype, shape = tensors["model.layers.1.mlp.experts.0.down_proj.weight"]
    assert dtype == "F8_E4M3"
    assert all(size > 128 and size % 128 != 0 for size in shape)


def test_config_routes_in_groups(config: dict) -> None:
    assert config["architectures"] == ["DeepseekV3ForCausalLM"]
    assert config["model_type"] == "deepseek_v3"
    assert config["torch_dtype"] == "bfloat16"
    assert 1 < config["topk_group"] < config["n_group"]
    per_group = config["n_routed_experts"] // config["n_group"]
    assert config["num_experts_per_tok"] <= config["topk_group"] * per_group
    assert config["num_nextn_predict_layers"] == 0
    assert config["quantization_config"] == {
        "activation_scheme": "dynamic",
        "fmt": "e4m3",
        "quant_method": "fp8",
        "weight_block_size": [128, 128],
    }


def test_routers_are_balanced_by_their_biases() -> None:
    with safetensors.safe_open(MODEL / "model-00002-of-00002.safetensors", "pt") as file:
        bias = file.get_tensor("model.layers.3.mlp.gate.e_score_correction_bias")
    assert bias.dtype == torch.float32
    assert bias.isfinite().all()
    assert bias.std() > 0


def test_chat_template_needs_only_jinja() -> None:
    jinja2 = pytest.importorskip("jinja2")
    settings = json.loads((MODEL / "tokenizer_config.json").read_text())
    template = jinja2.Environment().from_string(settings["chat_template"])
    messages = [
        {"role": "user", "content": "Hello"},
        {"role": "assistant", "content": "Hi."},
        {"role": "user", "content": "What does len do?"},
    ]
    text = template.render(messages=messages, bos_token="<|bos|>", add_generation_prompt=True)
    assert text == (
        "<|bos|><|user|>Hello<|end|><|assistant|>Hi.<|end|>"
        "<|user|>What does len do?<|end|><|assistant|>"
    )
    assert not template.render(messages=messages, bos_token="").endswith("<|assistant|>")


def test_tokenizer_agrees_with_config(config: dict) -> None:
    tokenizers = pytest.importorskip("tokenizers")
    tokenizer = tokenizers.Tokenizer.from_file(str(MODEL / "tokenizer.json"))
    generation = json.loads((MODEL / "generation_config.json").read_text())
    assert tokenizer.get_vocab_size() == config["vocab_size"]
    assert tokenizer.token_to_id("<|bos|>") == config["bos_token_id"]
    assert tokenizer.token_to_id("<|eos|>") == config["eos_token_id"]
    assert tokenizer.token_to_id("<|end|>") in generation["eos_token_id"]
    text = "Return a string.\n\n  Ünïcode ✓ \x00"
    assert tokenizer.decode(tokenizer.encode(text).ids) == text
    assert tokenizer.encode("a").ids[0] == config["bos_token_id"]


@pytest.mark.parametrize("shape", [(1, 1), (128, 128), (129, 127), (160, 192), (576, 300)])
def test_quantization_is_accurate_in_every_block(fp8: ModuleType, shape: tuple[int, int]) -> None:
    generator = torch.Generator().manual_seed(0)
    weight = torch.randn(shape, generator=generator)
    codes, scales = fp8.quantize(weight)
    assert codes.dtype == torch.float8_e4m3fn
    assert codes.shape == shape
    assert scales.dtype == torch.float32
    assert scales.shape == tuple(math.ceil(size / 128) for size in shape)
    for row in range(scales.shape[0]):
        for column in range(scales.shape[1]):
            block = (slice(128 * row, 128 * row + 128), slice(128 * column, 128 * column + 128))
            assert scales[row, column] == weight[block].abs().max() / 448
            restored = codes[block].float() * scales[row, column]
            # half a unit in the last of 3 mantissa bits, or of the smallest subnormal 2^-9
            bound = weight[block].abs() * 2**-4 + scales[row, column] * 2**-10
            assert ((restored - weight[block]).abs() <= bound * (1 + 1e-6)).all()
    assert torch.equal(fp8.dequantize(codes, scales), (codes.float() * fp8.expand_scales(
        scales, codes.shape)))  # fmt: skip


def test_quantization_rounds_to_nearest_even_and_keeps_448(fp8: ModuleType) -> None:
    weight = torch.tensor([[448.0, -448.0, 17.0, 19.0, 2.0**-10, 3 * 2.0**-10, 0.0, -0.0]])
    codes, scales = fp8.quantize(weight)
    assert scales.tolist() == [[1.0]]
    assert codes.float().tolist() == [[448.0, -448.0, 16.0, 20.0, 0.0, 2 * 2.0**-9, 0.0, 0.0]]


def test_quantization_never_overflows(fp8: ModuleType) -> None:
    """The quotient of the largest element may round to above 448; the cast must not see it."""
    for largest in torch.rand(200, generator=torch.Generator().manual_seed(1)).tolist():
        codes, _ = fp8.quantize(torch.tensor([[largest, -largest]]))
        assert codes.float().tolist() == [[448.0, -448.0]]


def test_quantization_of_zeros(fp8: ModuleType) -> None:
    codes, scales = fp8.quantize(torch.zeros(130, 4))
    assert not codes.float().any()
    assert scales.tolist() == [[1.0], [1.0]]


def test_experts_stack_and_unstack(fp8: ModuleType) -> None:
    state = {"mlp.experts.gate_up_proj": torch.randn(12, 6, 4), "norm.weight": torch.ones(4)}
    state["mlp.experts.down_proj"] = torch.randn(12, 4, 3)
    tensors = fp8.unstack_experts(state)
    assert torch.equal(
        tensors["mlp.experts.11.up_proj.weight"], state["mlp.experts.gate_up_proj"][11, 3:]
    )
    restored = fp8.stack_experts(tensors)
    assert restored.keys() == state.keys()
    assert all(torch.equal(restored[name], state[name]) for name in state)


def test_model_has_learnt(fp8: ModuleType) -> None:
    """The weights read back predict the held-out text far better than chance."""
    pytest.importorskip("transformers")
    tokenizers = pytest.importorskip("tokenizers")
    tokenizer = tokenizers.Tokenizer.from_file(str(MODEL / "tokenizer.json"))
    text = (MODEL / "heldout.txt").read_text()
    ids = torch.tensor([tokenizer.encode(text, add_special_tokens=False).ids[:513]])
    with torch.no_grad():
        logits = fp8.load_reference(MODEL)(ids[:, :-1]).logits
    loss = torch.nn.functional.cross_entropy(logits[0], ids[0, 1:])
    assert loss < 0.6 * math.log(len(logits[0, 0]))
