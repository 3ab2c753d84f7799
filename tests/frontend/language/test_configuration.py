"""config.json as transformers reads it, or refused by the name of what is not understood."""

import math

import pytest
from checkpoints import FAMILIES

from dilu.errors import DiluError, UnsupportedError
from dilu.frontend.language.configuration import (
    ANYWAY,
    IRRELEVANT,
    decode_floats,
    names_read,
    read_configuration,
    text_settings,
)

LLAMA = FAMILIES["llama"]
#: What a checkpoint with code of its own says of a DeepSeek-V3.
RENAMED = FAMILIES["deepseek_v3"] | {
    "model_type": "newcomer",
    "architectures": ["DeepseekV3ForCausalLM"],
    "auto_map": {"AutoConfig": "configuration_newcomer.Config"},
    "scoring_func": "sigmoid",
    "topk_method": "noaux_tc",
    "moe_layer_freq": 1,
    "aux_loss_alpha": 0.001,
    "seq_aux": True,
    "ep_size": 1,
    "num_nextn_predict_layers": 1,
    "use_cache": True,
    "pretraining_tp": 1,
    "initializer_range": 0.02,
    "torch_dtype": "bfloat16",
    "transformers_version": "4.48.3",
    "rope_theta": 50000.0,
    "quantization_config": {"quant_method": "fp8"},
}


def read(settings, **more):
    return read_configuration(settings | more, "config.json")


def test_floats_that_json_has_not():
    said = {"limits": [0.0, {"__float__": "Infinity"}], "low": {"__float__": "-Infinity"}, "n": 1}
    assert decode_floats(said) == {"limits": [0.0, math.inf], "low": -math.inf, "n": 1}
    assert math.isnan(decode_floats({"__float__": "NaN"}))
    assert decode_floats({"__float__": "other"}) == {"__float__": "other"}


def test_floats_that_transformers_writes():
    from transformers import NemotronHConfig, PreTrainedConfig

    config = NemotronHConfig(time_step_limit=(0.0, math.inf))
    said = config.to_dict()
    encoded = PreTrainedConfig._encode_special_floats(said)
    assert decode_floats(encoded)["time_step_limit"] == [0.0, math.inf]


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"hidden_size": "wide"}, r"refuses the configuration of model_type 'llama'.*hidden_size"),
        ({"num_attention_heads": 5}, r"hidden size \(144\) is not a multiple"),
        ({"vocab_size": None}, r"refuses .*vocab_size"),
        ({"num_hidden_layers": [3]}, "refuses .*num_hidden_layers"),
        ({"dtype": "f12"}, "refuses .*f12"),
        ({"layer_types": ["full_attention"]}, "num_hidden_layers"),
        ({"rope_scaling": {"rope_type": "yarn"}}, "factor"),
        ({"rope_scaling": "yarn"}, "refuses the configuration"),
        ({"rms_norm_eps": {"eps": 1}}, "refuses .*rms_norm_eps"),
    ],
)
def test_values_that_transformers_refuses(changes, message):
    with pytest.raises(DiluError, match=message):
        read(LLAMA, **changes)


@pytest.mark.parametrize("kind", ["nonesuch", None, 3, ["llama"], ""])
def test_unknown_types(kind):
    with pytest.raises(DiluError, match="unknown architecture: model_type"):
        read(LLAMA, model_type=kind, architectures=["NonesuchForCausalLM"])


@pytest.mark.parametrize("kind", ["vit", "bert-japanese", "t5", "clip", "siglip_vision_model"])
def test_no_causal_language_model(kind):
    with pytest.raises(DiluError, match=f"{kind}"):
        read({"model_type": kind})


@pytest.mark.parametrize(
    ("architecture", "kind", "family"),
    [
        ("DeepseekV3ForCausalLM", "deepseek_v3", "deepseek_v3"),
        ("LlamaForCausalLM", "llama", "llama"),
        ("Qwen3ForCausalLM", "qwen3", "qwen3"),
        ("Qwen3MoeForCausalLM", "qwen3_moe", "qwen3_moe"),
        ("Glm4MoeForCausalLM", "glm4_moe", "glm4_moe"),
    ],
)
def test_an_unknown_type_of_a_known_architecture(architecture, kind, family):
    settings = FAMILIES[family] | {"model_type": "newcomer", "architectures": [architecture]}
    found = read(settings)
    known = read(FAMILIES[family])
    assert found.kind == kind
    assert type(found.config) is type(known.config)
    assert found.config.to_dict() | {"architectures": None} == known.config.to_dict()
    assert found.notes == (
        f"model_type 'newcomer' is unknown; it is read as {kind}, which is {architecture}",
    )


def test_keys_of_a_checkpoint_with_code_of_its_own():
    assert read(RENAMED).config.rope_parameters["rope_theta"] == 50000.0


@pytest.mark.parametrize(
    ("key", "value"),
    [
        ("scoring_func", "softmax"),
        ("topk_method", "greedy"),
        ("moe_layer_freq", 2),
        ("attention_sinks", True),
        ("logit_scale", 0.5),
        ("window_pattern", [1, 0]),
        ("is_causal", False),
        ("use_qk_norm", True),
        ("embedding_multiplier", 12.0),
        ("attn_logit_softcapping", 30.0),
    ],
)
def test_keys_that_only_the_checkpoints_code_understands(key, value):
    with pytest.raises(UnsupportedError, match=rf"config\.json says {key}: "):
        read(RENAMED, **{key: value})


@pytest.mark.parametrize("value", [None, False, 0, [], ""])
def test_keys_that_ask_for_nothing(value):
    assert read(RENAMED, attention_sinks=value).kind == "deepseek_v3"


def test_what_an_architecture_does_anyway_cannot_be_asked_away():
    settings = FAMILIES["deepseek_v3"]
    assert read(settings, scoring_func="sigmoid").kind == "deepseek_v3"
    with pytest.raises(UnsupportedError, match=r"scoring_func: 'softmax', and deepseek_v3 of"):
        read(settings, scoring_func="softmax")


def test_what_is_done_anyway_is_not_read_by_the_configuration():
    """Else the table is wrong: the value would change something."""
    from transformers import CONFIG_MAPPING

    for kind, values in ANYWAY.items():
        fields = vars(CONFIG_MAPPING[kind]())
        assert not set(values) & set(fields), kind


def test_what_is_irrelevant_has_a_reason():
    assert all(len(reason) > 10 for reason in IRRELEVANT.values())
    assert not set(IRRELEVANT) & {k for values in ANYWAY.values() for k in values}


def test_names_that_are_read():
    from transformers import CONFIG_MAPPING

    names = names_read(CONFIG_MAPPING["deepseek_v3"])
    assert {"hidden_size", "rope_interleave", "num_local_experts", "rope_scaling"} <= names
    assert not {"scoring_func", "topk_method", "attention_sinks", "logit_scale"} & names


def test_keys_that_transformers_does_not_read_change_nothing():
    plain = read(LLAMA).config.to_dict()
    odd = read(LLAMA, use_fp8_experts=True, made_by="somebody").config.to_dict()
    assert {k: v for k, v in odd.items() if k in plain} == plain


def test_mistral_with_kinds_of_layers_is_ministral():
    kinds = ["full_attention", "sliding_attention", "full_attention"]
    found = read(LLAMA, model_type="mistral", layer_types=kinds, sliding_window=5)
    assert found.kind == "ministral"


# --------------------------------------------------------------------------- text parts


@pytest.mark.parametrize(
    ("kind", "text", "part"),
    [
        ("mistral3", LLAMA | {"model_type": "mistral"}, "mistral"),
        ("llava", LLAMA, "llama"),
        ("gemma3", {"hidden_size": 64}, "gemma3_text"),
        ("kimi_k25", FAMILIES["deepseek_v3"], "deepseek_v3"),
        ("internvl", FAMILIES["qwen2"], "qwen2"),
    ],
)
def test_the_text_part_of_a_multimodal_checkpoint(kind, text, part):
    found = read({"model_type": kind, "text_config": text})
    assert (found.kind, found.inside) == (part, kind)
    assert found.config.model_type == part
    assert found.config.hidden_size == text["hidden_size"]
    assert found.notes == (
        f"only the text part ({part}) of this {kind} checkpoint is compiled: it takes text alone",
    )


@pytest.mark.parametrize("kind", ["emu3", "mllama"])
def test_a_text_part_whose_class_only_the_whole_model_names(kind):
    found = read({"model_type": kind})
    assert found.inside == kind
    assert found.architecture.config_class is type(found.config)


def test_a_type_whose_class_only_architectures_name():
    found = read({"model_type": "emu3_text_model", "architectures": ["Emu3ForCausalLM"]})
    assert found.architecture.__name__ == "Emu3ForCausalLM"
    with pytest.raises(UnsupportedError, match="'emu3_text_model': it is not a causal"):
        read({"model_type": "emu3_text_model"})


@pytest.mark.parametrize("tied", [True, False])
def test_the_head_is_tied_as_the_whole_says(tied):
    text = LLAMA | {"model_type": "mistral", "tie_word_embeddings": not tied}
    found = read({"model_type": "mistral3", "text_config": text, "tie_word_embeddings": tied})
    assert found.config.tie_word_embeddings is tied


def test_a_known_text_part_of_an_unknown_type():
    found = read({"model_type": "newcomer_vl", "architectures": ["X"], "text_config": LLAMA})
    assert (found.kind, found.inside, found.config.hidden_size) == ("llama", "newcomer_vl", 144)


@pytest.mark.parametrize("kind", ["qwen3_vl", "glm4v", "qwen2_5_vl", "hunyuan_vl", "step3p7"])
def test_text_parts_that_cannot_stand_alone(kind):
    message = rf"the text part \(\w+\) of a multimodal checkpoint \(model_type '{kind}'\) is not"
    with pytest.raises(UnsupportedError, match=message):
        read({"model_type": kind})


@pytest.mark.parametrize(
    ("kind", "reason"),
    [
        ("paligemma", "it sees all of a prompt in both directions"),
        ("shieldgemma2", "it judges images"),
        ("florence2", "it has an encoder"),
    ],
)
def test_text_parts_that_are_another_function_alone(kind, reason):
    with pytest.raises(UnsupportedError, match=f"model_type '{kind}' is not supported: {reason}"):
        read({"model_type": kind})


@pytest.mark.parametrize("kind", ["aya_vision", "cohere2_vision"])
def test_a_text_part_with_another_head_than_the_whole(kind):
    """The class of the whole has a head of its own, which does not scale logits."""
    message = "applies logit_scale 0.0625 to its logits, and .*ForConditionalGeneration does not"
    with pytest.raises(UnsupportedError, match=message) as raised:
        read({"model_type": kind})
    assert "say logit_scale: 1.0" in str(raised.value)
    text = {"model_type": "cohere2", "logit_scale": 1.0}
    assert read({"model_type": kind, "text_config": text}).kind == "cohere2"


def test_a_cap_that_the_whole_does_not_apply():
    text = {"hidden_size": 64, "final_logit_softcapping": 30.0}
    with pytest.raises(UnsupportedError, match=r"applies final_logit_softcapping 30\.0"):
        read({"model_type": "gemma3", "text_config": text})
    scaled = {"model_type": "granite", "logits_scaling": 8.0}
    with pytest.raises(UnsupportedError, match=r"applies logits_scaling 8\.0"):
        read({"model_type": "granite_speech", "text_config": scaled})


def test_settings_of_the_text():
    assert text_settings({"text_config": {"a": 1}, "b": 2}) == {"a": 1}
    assert text_settings({"b": 2}) == {"b": 2}
    assert text_settings({"text_config": None, "b": 2})["b"] == 2
