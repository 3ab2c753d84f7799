"""Every key of every quantization configuration is accounted for: used, irrelevant, or refused."""

import inspect
from dataclasses import fields

import pytest
from transformers.quantizers.auto import AUTO_QUANTIZATION_CONFIG_MAPPING

from dilu.errors import DiluError
from dilu.frontend.formats import (
    METHODS,
    autoround,
    compressed,
    fbgemm,
    fp8,
    modelopt,
    quark,
    read_quantization,
    without_quantization,
)
from dilu.frontend.formats.settings import Keys

KEYS: dict[str, Keys] = {
    "fp8": fp8.KEYS,
    "mxfp8": fp8.KEYS,
    "compressed-tensors": compressed.KEYS,
    "quark": quark.KEYS,
    "fbgemm_fp8": fbgemm.KEYS,
    "auto-round": autoround.KEYS,
}
#: What transformers knows and no reader here does; a method that is new to it fails the test.
UNREAD = {
    "awq", "bitsandbytes_4bit", "bitsandbytes_8bit", "gptq", "aqlm", "quanto", "eetq", "higgs",
    "hqq", "fp_quant", "torchao", "bitnet", "vptq", "spqr", "mxfp4", "nvfp4", "metal", "sinq",
    "gemma", "gguf", "fouroversix",
}  # fmt: skip


def test_every_method_of_transformers_is_read_or_known_not_to_be():
    known = set(AUTO_QUANTIZATION_CONFIG_MAPPING)
    assert known - UNREAD == set(METHODS) - {"modelopt"}  # which transformers does not have


@pytest.mark.parametrize("method", KEYS)
def test_every_key_that_transformers_knows_is_accounted_for(method):
    made = AUTO_QUANTIZATION_CONFIG_MAPPING[method]
    parameters = inspect.signature(made.__init__).parameters.values()
    named = {p.name for p in parameters if p.kind is not p.VAR_KEYWORD} - {"self"}
    assert named - {"sparsity_config"} <= KEYS[method].known


#: The fields of the classes of compressed-tensors 0.20 that configurations are written from.
CONFIG = """config_groups quant_method kv_cache_scheme format quantization_status
    global_compression_ratio ignore moe_sparsity_config"""
SCHEME = "targets weights input_activations output_activations format"
ARGS = """num_bits type symmetric group_size strategy block_structure dynamic actorder scale_dtype
    zp_dtype observer observer_kwargs"""
FIELDS = [
    (compressed.KEYS, CONFIG),
    (compressed.GROUP_KEYS, SCHEME),
    (compressed.ARGS_KEYS, ARGS),
]


@pytest.mark.parametrize(("keys", "names"), FIELDS)
def test_every_field_of_compressed_tensors_is_accounted_for(keys, names):
    assert set(names.split()) <= keys.known


def test_no_key_is_in_two_lists():
    every = [getattr(m, n) for m in (autoround, compressed, fbgemm, fp8, modelopt, quark)
             for n in dir(m) if isinstance(getattr(m, n), Keys)]  # fmt: skip
    assert len(every) > 10
    for keys in every:
        lists = [set(getattr(keys, f.name)) for f in fields(keys)]
        assert sum(map(len, lists)) == len(keys.known)


# ---------------------------------------------------------------------------- refused

FP8 = {"quant_method": "fp8", "weight_block_size": [128, 128]}
WEIGHTS = {"num_bits": 8, "type": "float", "strategy": "channel", "symmetric": True}
SPEC = {"dtype": "fp8_e4m3", "qscheme": "per_tensor"}
ROUND = {"quant_method": "auto-round", "packing_format": "auto_round:fp8", "bits": 8}
MODELOPT = {"quant_method": "modelopt", "quant_algo": "FP8"}


def ct(weights=None, group=None, **more):
    weights = WEIGHTS | (weights or {})
    groups = {"g": {"targets": ["Linear"], "weights": weights} | (group or {})}
    return {"quant_method": "compressed-tensors", "config_groups": groups} | more


def amd(spec=None, **more):
    layer = {"weight": SPEC | (spec or {})}
    return {"quant_method": "quark", "global_quant_config": layer} | more


REFUSED = {
    "unknown method": ({"quant_method": "gptq"}, r"unknown quantization method 'gptq'[\s\S]*fp8, "),
    "no method": ({"bits": 8}, "unknown quantization method None"),
    "unknown key": (FP8 | {"rows_first": 1}, r"unknown key in quantization_config: 'rows_first'"),
    "block": (FP8 | {"weight_block_size": "x"}, "weight_block_size 'x' is not a pair of sizes"),
    "block of 0": (FP8 | {"weight_block_size": [0, 128]}, "is not a pair of sizes"),
    "block of 1": (FP8 | {"weight_block_size": [128]}, "is not a pair of sizes"),
    "block of true": (FP8 | {"weight_block_size": [True, 128]}, "is not a pair of sizes"),
    "scale_fmt": (FP8 | {"scale_fmt": "log"}, r"scale_fmt is not supported: 'log'"),
    "fmt": (FP8 | {"fmt": "e3m4"}, r"fmt is not supported: 'e3m4'"),
    "experts": (FP8 | {"expert_dtype": "fp4"}, r"expert_dtype is not supported: 'fp4' \(experts"),
    "list": (FP8 | {"modules_to_not_convert": "lm_head"}, "is not a list of names"),
    "list of numbers": (FP8 | {"ignored_layers": [1]}, "is not a list of names"),
    "rotated": (ct(transform_config={"config_groups": {"R4": {}}}), r"transform_config is not sup"),
    "sparse": (ct(sparsity_config={"format": "sparse-24-bitmask"}), "weights are stored sparse"),
    "pruned": (ct(moe_sparsity_config={"method": "prune"}), "moe_sparsity_config is not supported"),
    "sparse key": (ct(sparsity_config={"mask": 1}), r"key in quantization_config\.sparsity_config"),
    "asymmetric": (ct({"symmetric": False}), r"symmetric is not supported: False \(codes have a z"),
    "order": (ct({"actorder": "group"}), r"weights\.actorder is not supported: 'group'"),
    "dynamic": (ct({"dynamic": True}), r"dynamic is not supported: True"),
    "argument": (ct({"offset": 3}), r"config_groups\.g\.weights: 'offset' \(3\)"),
    "group": (ct(group={"inputs": 1}), r"unknown key in quantization_config\.config_groups\.g"),
    "all int": (ct({"type": "int"}), r"no group of quantization_config is of 8-bit floats: .*8"),
    "packed": (ct(format="pack-quantized"), "stored as pack-quantized"),
    "strategy": (ct({"strategy": "attn_head"}), r"strategy is not supported: 'attn_head'"),
    "group size": (ct({"strategy": "group"}), r"group_size None is not the size"),
    "group size for channels": (ct({"group_size": 64}), r"group_size 64 is not one that strategy"),
    "no structure": (ct({"strategy": "block"}), r"block_structure None is not the block"),
    "structure": (ct({"block_structure": [8, 8]}), r"block_structure \[8, 8\] is not one that"),
    "pattern": (ct(group={"targets": ["re:("]}), "is not a list of names and patterns"),
    "large": (ct(group={"targets": ["re:a{99999999999}"]}), "is not a list of names and patterns"),
    "targets": (ct(group={"targets": 3}), "targets 3 is not a list of names"),
    "preset": (
        {"quant_method": "compressed-tensors", "config_groups": {"FP8": ["Linear"]}},
        "is not an object",
    ),
    "groups": ({"quant_method": "compressed-tensors", "config_groups": 3}, "is not an object"),
    "algorithm": (MODELOPT | {"quant_algo": "NVFP4"}, r"quant_algo is not supported: 'NVFP4'"),
    "no algorithm": ({"quant_method": "modelopt"}, "quant_algo None is not an algorithm's name"),
    "smoothed": (MODELOPT | {"pre_quant_scale": True}, "unknown key .*'pre_quant_scale'"),
    "group size of a tensor": (MODELOPT | {"group_size": 16}, "group_size 16 is not one that FP8"),
    "groups that differ": (
        MODELOPT | {"config_groups": {"g": {"targets": ["Linear"], "weights": {"num_bits": 4}}}},
        "not what quant_algo says",
    ),
    "rotation": (amd(algo_config=[{"name": "rotation"}]), "algo_config is not supported"),
    "desc_act": (amd(algo_config={"name": "gptq", "desc_act": True}), "algo_config is not"),
    "columns": (amd({"qscheme": "per_channel", "ch_axis": 1}), "qscheme is not supported: 'per_c"),
    "zero point": (amd({"symmetric": False}), "symmetric is not supported: False"),
    "fake": (amd(export={"weight_format": "fake_quantized"}), "weight_format is not supported"),
    "spec": (amd({"rounding_bias": 1}), r"global_quant_config\.weight: 'rounding_bias'"),
    "bias": (
        {"quant_method": "quark", "global_quant_config": {"weight": SPEC, "bias": SPEC}},
        "biases are quantized",
    ),
    "glob": (amd(layer_quant_config={"re:(": {"weight": SPEC}}), r"has 're:\(', which is no p"),
    "packing": (ROUND | {"packing_format": "auto_round:auto_gptq"}, "only auto_round:fp8 is read"),
    "bits": (ROUND | {"bits": 4}, "bits is not supported: 4"),
    "asymmetric rounding": (ROUND | {"sym": False}, "sym is not supported: False"),
    "data": (ROUND | {"data_type": "int"}, "data_type is not supported: 'int'"),
    "single": (ROUND | {"extra_config": {"a": {"bits": 4}}}, "extra_config is not supported"),
    "two blocks": (
        ROUND | {"weight_block_size": [64, 64], "group_size": [128, 128]}, "group_size is not supp",
    ),
    "rotated rounding": (ROUND | {"hadamard_config": {"n": 2}}, "hadamard_config is not supported"),
}  # fmt: skip


@pytest.mark.parametrize("name", REFUSED)
def test_what_changes_the_meaning_of_weights_is_refused_by_name(name):
    settings, message = REFUSED[name]
    with pytest.raises(DiluError, match=message):
        read_quantization({"quantization_config": settings})


@pytest.mark.parametrize("value", [3, "fp8", [1], True])
def test_what_is_no_object(value):
    with pytest.raises(DiluError, match="quantization_config is not an object"):
        read_quantization({"quantization_config": value})


def test_values_that_say_nothing_are_passed_over():
    for settings in (
        ct(transform_config=None, sparsity_config={}, moe_sparsity_config=None),
        ct(sparsity_config={"format": "dense"}, kv_cache_scheme={"num_bits": 8}),
        ct({"actorder": None, "observer": "mse", "observer_kwargs": {"n": 1}, "zp_dtype": None}),
        amd(algo_config=[{"name": "smooth"}], pre_quant_opt_config=[], quant_mode="eager_mode"),
        ROUND | {"extra_config": {"lm_head": {"bits": 16}}, "iters": 200, "act_bits": 8},
        MODELOPT | {"kv_cache_scheme": {"type": "float"}, "producer": {"name": "modelopt"}},
    ):
        assert read_quantization({"quantization_config": settings}) is not None


def test_two_places_that_say_different_things():
    config = {"quantization_config": FP8, "text_config": {"quantization_config": MODELOPT}}
    with pytest.raises(DiluError, match=r"and text_config\.quantization_config say different"):
        read_quantization(config)
    assert read_quantization(config | {"text_config": {"quantization_config": FP8}}) is not None
    assert read_quantization({"quantization_config": None, "text_config": None}) is None


def test_a_configuration_without_it():
    text = {"hidden_size": 8}
    config = {
        "a": 1,
        "text_config": text | {"quantization_config": FP8},
        "compression_config": ct(),
    }
    assert without_quantization(config) == {"a": 1, "text_config": text}
    alone = {"a": 1, "text_config": {"quantization_config": FP8}, "quantization_config": FP8}
    assert without_quantization(alone) == {"a": 1}


def test_the_twin_of_modelopt(tmp_path):
    file, twin = str(tmp_path / "config.json"), tmp_path / "hf_quant_config.json"
    twin.write_text('{"quantization": {"quant_algo": "FP8_PB_WO", "exclude_modules": ["lm_head"]}}')
    with pytest.raises(DiluError, match=r"quant_algo is 'FP8', and hf_quant_config\.json"):
        read_quantization({"quantization_config": MODELOPT}, file)
    found = read_quantization({}, file)
    assert found is not None
    assert found.method == "modelopt"
    for text, message in (
        ("[", "not a configuration"),
        ("[]", "no JSON object"),
        ("{}", "quant_a"),
    ):
        twin.write_text(text)
        with pytest.raises(DiluError, match=message):
            read_quantization({}, file)


# ------------------------------------------------------------------------- lists of modules


def excluded(settings: dict, name: str) -> bool:
    from dilu.frontend.formats import Module

    scheme = read_quantization({"quantization_config": settings})
    assert scheme is not None
    return scheme.expected(Module((name,))) is None


@pytest.mark.parametrize(
    ("settings", "named", "others"),
    [
        (FP8 | {"modules_to_not_convert": ["layers.1", r"h\.\d+\.fc", "gate"]},
         ("layers.1.attn", "model.layers.1", "h.3.fc", "mlp.gate"),
         ("layers.11.attn", "h.x.fc", "mlp.gate_proj")),
        (FP8 | {"ignored_layers": ["a(b"]}, ("x.a(b",), ("x.ab",)),
        (ct(ignore=["lm_head", "re:.*gate$", "Norm"]), ("lm_head", "mlp.gate"), ("x.lm_head",)),
        (MODELOPT | {"ignore": ["model.layers.0*", "*gate"]},
         ("model.layers.0.mlp", "model.layers.3.gate"), ("model.layers.3.mlp",)),
        (amd(exclude=["*attn*", "re:.*up$"]), ("self_attn.q", "mlp.up"), ("mlp.down",)),
    ],
)  # fmt: skip
def test_lists_of_modules_mean_what_their_libraries_mean(settings, named, others):
    assert all(excluded(settings, name) for name in named)
    assert not any(excluded(settings, name) for name in others)
