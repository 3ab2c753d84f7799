"""Every form of 8-bit floats, bit by bit: what is bound is the exact product of codes and scales.

One tiny model for all: projections are stored in the form, the rest in bf16; the reference is
dequantized here, in f64.
"""

from __future__ import annotations

import json
from collections.abc import Callable
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from checkpoints import stack
from stored import Block, Tensors, bound, config_of, model_files, quantize, wide, write
from torch import Tensor

from dilu.errors import DiluError

E8M0 = torch.float8_e8m0fnu
FP8 = {"quant_method": "fp8", "activation_scheme": "dynamic", "weight_block_size": [128, 128]}
Namer = Callable[[str], str]


def group(strategy: str | None, targets: tuple[str, ...] = ("Linear",), **more: Any) -> dict:
    weights = {
        "num_bits": 8, "type": "float", "symmetric": True, "strategy": strategy, "dynamic": False,
        "group_size": None, "block_structure": None, "actorder": None, "observer": "minmax",
        "observer_kwargs": {},
    }  # fmt: skip
    return {"targets": list(targets), "weights": weights | more, "input_activations": None}


def compressed(*groups: dict, form: str = "float-quantized", **more: Any) -> dict[str, Any]:
    return {
        "quant_method": "compressed-tensors", "format": form, "ignore": ["lm_head"],
        "config_groups": {f"group_{i}": g for i, g in enumerate(groups)},
        "kv_cache_scheme": None, "quantization_status": "compressed",
    } | more  # fmt: skip


def modelopt(algo: str, **more: Any) -> dict[str, Any]:
    return {"quant_method": "modelopt", "quant_algo": algo, "ignore": ["lm_head"]} | more


def quark(scheme: str, **more: Any) -> dict[str, Any]:
    spec = {"dtype": "fp8_e4m3", "qscheme": scheme, "is_dynamic": False, "symmetric": True} | more
    return {
        "quant_method": "quark", "exclude": ["lm_head"], "layer_quant_config": {},
        "global_quant_config": {"weight": spec, "input_tensors": None, "bias": None},
        "export": {"kv_cache_group": [], "pack_method": "reorder"},
    }  # fmt: skip


def suffix(text: str) -> Namer:
    return lambda name: name.removesuffix("weight") + text


SCALE, INVERSE = suffix("weight_scale"), suffix("weight_scale_inv")


@dataclass(frozen=True)
class Case:
    """How weights are stored, and what config.json says of it."""

    settings: dict[str, Any] | None
    block: Block = (128, 128)
    scales: torch.dtype = torch.float32
    name: Namer = INVERSE
    shape: Callable[[Tensor], Tensor] = lambda s: s
    codes: torch.dtype = torch.float8_e4m3fn
    beside: dict[str, Tensor] = field(default_factory=dict)  # of each projection
    place: tuple[str, ...] = ("quantization_config",)


ACTIVATIONS = {"input_scale": torch.tensor(0.0123)}
CASES = {
    "blocks": Case(FP8),
    "blocks of 32 in bf16": Case(FP8 | {"weight_block_size": [32, 32]}, (32, 32), torch.bfloat16),
    "blocks of odd sizes in f16": Case(
        FP8 | {"weight_block_size": [48, 20]}, (48, 20), torch.float16
    ),
    "blocks, `weight_scale`": Case(FP8, name=SCALE),
    "blocks, `scale` in e8m0": Case(
        FP8 | {"scale_fmt": "ue8m0"}, scales=E8M0, name=suffix("scale")
    ),
    "blocks, `qscale_weight`": Case(FP8, name=suffix("qscale_weight")),
    "blocks whose size is not said": Case(
        {k: v for k, v in FP8.items() if k != "weight_block_size"}
    ),
    "e5m2": Case(FP8 | {"fmt": "e5m2"}, codes=torch.float8_e5m2),
    "a static scale []": Case(
        FP8 | {"weight_block_size": None, "activation_scheme": "static"},
        (None, None), name=SCALE, shape=lambda s: s.reshape(()), beside=ACTIVATIONS,
    ),
    "a static scale [1,1]": Case(FP8 | {"weight_block_size": None}, (None, None)),
    "no word of it": Case(None),
    "no word of it, per row": Case(None, (1, None)),
    "mxfp8": Case(
        FP8 | {"quant_method": "mxfp8", "weight_block_size": [1, 32]}, (1, 32), E8M0,
        shape=lambda s: s.view(torch.uint8),
    ),
    "mxfp8, no block said": Case(
        {"quant_method": "mxfp8"}, (1, 32), E8M0, shape=lambda s: s.view(torch.uint8)
    ),
    "exponents under fp8": Case(
        FP8 | {"scale_fmt": "ue8m0", "weight_block_size": [1, 64]}, (1, 64), E8M0,
        shape=lambda s: s.view(torch.uint8),
    ),
    "channels": Case(compressed(group("channel")), (1, None), torch.bfloat16, SCALE),
    "channels [N]": Case(
        compressed(group("channel")), (1, None), name=SCALE, shape=lambda s: s.reshape(-1)
    ),
    "tensors [1]": Case(
        compressed(group("tensor"), form="naive-quantized"), (None, None), name=SCALE,
        shape=lambda s: s.reshape(1),
    ),
    "a strategy that is inferred": Case(
        compressed(group(None, group_size=-1)), (1, None), name=SCALE
    ),
    "groups of 48": Case(compressed(group("group", group_size=48)), (1, 48), name=SCALE),
    "groups of 7": Case(compressed(group("group", group_size=7)), (1, 7), name=SCALE),
    "blocks of compressed-tensors": Case(
        compressed(group("block", block_structure="64x32")), (64, 32), name=SCALE
    ),
    "mxfp8 of compressed-tensors": Case(
        compressed(
            group("group", group_size=32, scale_dtype="torch.uint8"), form="mxfp8-quantized"
        ),
        (1, 32), E8M0, SCALE, lambda s: s.view(torch.uint8),
    ),
    "compression_config": Case(
        compressed(group("channel")), (1, None), name=SCALE, place=("compression_config",)
    ),
    "text_config": Case(FP8, place=("text_config", "quantization_config")),
    "modelopt": Case(
        modelopt("FP8"), (None, None), name=SCALE, shape=lambda s: s.reshape(()),
        beside=ACTIVATIONS | {"output_scale": torch.tensor(2.0)},
    ),
    "modelopt in lower case, blocks [n,1,k,1]": Case(
        modelopt("fp8_pb_wo"), name=SCALE, shape=lambda s: s[:, None, :, None]
    ),
    "modelopt per channel": Case(
        modelopt("FP8_PER_CHANNEL_PER_TOKEN"), (1, None), name=SCALE,
        shape=lambda s: s.reshape(-1),
    ),
    "modelopt mxfp8": Case(
        modelopt("MXFP8", group_size=32), (1, 32), E8M0, SCALE, lambda s: s.view(torch.uint8)
    ),
    "quark": Case(
        quark("per_tensor"), (None, None), name=SCALE, shape=lambda s: s.reshape(()),
        beside=ACTIVATIONS,
    ),
    "quark per channel": Case(
        quark("per_channel", ch_axis=0), (1, None), name=SCALE, shape=lambda s: s.reshape(-1)
    ),
    "quark per group": Case(
        quark("per_group", ch_axis=-1, group_size=16), (1, 16), name=SCALE
    ),
    "fbgemm": Case(
        {"quant_method": "fbgemm_fp8", "activation_scale_ub": 1200.0}, (1, None), name=SCALE
    ),
    "auto-round": Case(
        {
            "quant_method": "auto-round", "packing_format": "auto_round:fp8", "bits": 8,
            "data_type": "fp8", "group_size": -1, "sym": True, "act_bits": 8, "iters": 0,
        },
        (1, None), name=SCALE,
    ),
}  # fmt: skip


@pytest.fixture(scope="module")
def plain():
    """The configuration and the plain tensors of the model that all cases store."""
    config = config_of("qwen3_moe")
    return config, model_files(config)


def is_projection(name: str) -> bool:
    return "_proj" in name


def store(case: Case, tensors: Tensors) -> tuple[Tensors, Tensors]:
    """Return the files of a case, and what they are worth."""
    files: Tensors = {}
    values: Tensors = {}
    for name, tensor in tensors.items():
        if is_projection(name):
            codes, scales = quantize(tensor, case.block, case.scales, case.codes)
            files |= {name: codes, case.name(name): case.shape(scales)}
            module = name.removesuffix("weight")
            files |= {module + n: t.clone() for n, t in case.beside.items()}
            values[name] = wide(codes, scales, case.block)
        else:
            files[name] = tensor.bfloat16()
            values[name] = files[name].float()
    return files, values


def with_settings(config: dict, settings: Any, place: tuple[str, ...]) -> dict:
    for key in reversed(place):
        settings = {key: settings}
    return config | settings if settings is not None else config


def assert_same(got: dict[str, np.ndarray], want: Tensors) -> None:
    for name, tensor in stack(want).items():
        np.testing.assert_array_equal(got[name], tensor.numpy(), err_msg=name)


@pytest.mark.parametrize("name", CASES)
def test_a_form(tmp_path, plain, name):
    config, tensors = plain
    case = CASES[name]
    files, values = store(case, tensors)
    place = case.place if case.settings is not None else ()
    write(tmp_path, with_settings(config, case.settings, place), files)
    assert_same(bound(tmp_path), values)


def test_hf_quant_config_alone(tmp_path, plain):
    config, tensors = plain
    files, values = store(CASES["modelopt"], tensors)
    write(tmp_path, config, files)
    said = {"producer": {"name": "modelopt"}, "quantization": {"quant_algo": "FP8"}}
    (tmp_path / "hf_quant_config.json").write_text(json.dumps(said))
    assert_same(bound(tmp_path), values)


#: Modules in forms of their own: which, how, and what a group of compressed-tensors says of it.
GROUPS = (
    ("q_proj", (1, None), group("channel", ("re:.*q_proj$",))),
    ("k_proj", (None, None), group("tensor", ("re:.*self_attn.k_proj",))),
    ("v_proj", (1, 32), group("group", ("model.layers.0.self_attn.v_proj",), group_size=32)),
    ("o_proj", (64, 32), group("block", ("re:.*o_proj$",), block_structure=[64, 32])),
    ("experts", (128, 128), group("block", ("re:.*experts\\..*",), block_structure=[128, 128])),
)


def mixed(tensors: Tensors) -> tuple[Tensors, Tensors]:
    """Return the files of modules in forms of their own, and what they are worth."""
    files, values = store(Case(None), tensors)
    for part, block, _ in GROUPS:
        chosen = {n: t for n, t in tensors.items() if part in n}
        for name in chosen:
            files.pop(f"{name}_scale_inv", None)
        more, worth = store(Case(None, block, name=SCALE), chosen)
        files, values = files | more, values | worth
    return files, values


def test_each_module_by_its_own_group(tmp_path, plain):
    config, tensors = plain
    files, values = mixed(tensors)
    any_other = group("channel")  # by class, which is less specific than any name
    settings = compressed(any_other, *(g for _, _, g in GROUPS), form="mixed-precision")
    write(tmp_path, config, files, quantization_config=settings)
    assert_same(bound(tmp_path), values)


def test_two_groups_that_say_different_things_of_one_module(tmp_path, plain):
    config, tensors = plain
    files, _ = store(CASES["channels"], tensors)
    settings = compressed(group("channel", ("re:.*q_proj",)), group("tensor", ("re:.*attn.*",)))
    write(tmp_path, config, files, quantization_config=settings)
    with pytest.raises(DiluError, match=r"says two things of 'model\.layers\.0\.self_attn\.q_proj"):
        bound(tmp_path)


def test_layers_of_modelopt_and_quark(tmp_path, plain):
    config, tensors = plain
    files, values = store(CASES["channels [N]"], tensors)
    attention, other = (
        store(Case(None, (None, None), name=SCALE, shape=lambda s: s.reshape(())), part)
        for part in (
            {n: t for n, t in tensors.items() if "self_attn" in n and is_projection(n)}, {},
        )
    )  # fmt: skip
    files, values = files | attention[0] | other[0], values | attention[1]
    modules = sorted({n.rpartition(".")[0] for n in tensors if is_projection(n)})
    algo = {True: "FP8", False: "FP8_PER_CHANNEL_PER_TOKEN"}
    layers = {m: {"quant_algo": algo["self_attn" in m]} for m in modules}
    quarks = quark("per_channel", ch_axis=0)
    tensor = quark("per_tensor")["global_quant_config"]
    quarks |= {"layer_quant_config": {"*self_attn*": tensor}}
    for settings in (modelopt("MIXED_PRECISION", quantized_layers=layers), quarks):
        write(tmp_path, config, files, quantization_config=settings)
        assert_same(bound(tmp_path), values)


# ------------------------------------------------------------------- experts in one tensor

STACKED: dict[str, tuple[dict, Block, str, Callable[[Tensor], Tensor]]] = {
    "blocks": (FP8, (128, 128), "_scale_inv", lambda s: s),
    "rows [E,N,1]": (compressed(group("channel")), (1, None), "_scale", lambda s: s),
    "rows [E,N]": (compressed(group("channel")), (1, None), "_scale", lambda s: s[..., 0]),
    "one [E,1,1]": (compressed(group("tensor")), (None, None), "_scale", lambda s: s),
    "one [E]": (compressed(group("tensor")), (None, None), "_weight_scale", lambda s: s[:, 0, 0]),
    "one [E,1]": (compressed(group("tensor")), (None, None), ".weight_scale", lambda s: s[:, 0]),
    "groups": (compressed(group("group", group_size=24)), (1, 24), "_scale", lambda s: s),
    "exponents": (
        FP8 | {"quant_method": "mxfp8", "weight_block_size": [1, 32]}, (1, 32), "_scale_inv",
        lambda s: s.to(E8M0).view(torch.uint8),
    ),
}  # fmt: skip


@pytest.mark.parametrize("name", STACKED)
def test_experts_in_one_tensor(tmp_path, plain, name):
    settings, block, ending, shape = STACKED[name]
    config, tensors = plain
    exact = E8M0 if name == "exponents" else torch.float32
    files, values = stacked(tensors, block, exact, ending, shape)
    write(tmp_path, config, files, quantization_config=settings)
    assert_same(bound(tmp_path), values)


def stacked(
    tensors: Tensors,
    block: Block,
    exact: torch.dtype,
    ending: str,
    shape: Callable[[Tensor], Tensor],
) -> tuple[Tensors, Tensors]:
    files: Tensors = {}
    values: Tensors = {}
    for name, tensor in stack(tensors).items():
        if ".experts." in name:
            codes, scales = quantize(tensor, block, exact)
            files |= {name: codes, name + ending: shape(scales)}
            values[name] = wide(codes, scales, block)
        else:
            files[name] = tensor.bfloat16()
            values[name] = files[name].float()
    return files, values


def test_one_scale_for_all_experts_and_one_for_each_half(tmp_path, plain):
    """A scalar serves a whole stack; `[E,2]` beside gate_up_proj is one for gate, one for up."""
    config, tensors = plain
    files: Tensors = {}
    values: Tensors = {}
    for name, tensor in stack(tensors).items():
        files[name] = tensor.bfloat16()
        values[name] = files[name].float()
        if name.endswith("down_proj"):
            scale = tensor.abs().max() / 448
            files |= {name: (tensor / scale).to(torch.float8_e4m3fn), f"{name}_scale": scale}
            values[name] = (files[name].double() * scale.double()).float()
        elif name.endswith("gate_up_proj"):
            half = tensor.shape[1] // 2
            codes, scales = quantize(tensor, (half, None))
            files |= {name: codes, f"{name}_scale": scales[..., 0]}
            values[name] = wide(codes, scales, (half, None))
    write(tmp_path, config, files, quantization_config=compressed(group("tensor")))
    assert_same(bound(tmp_path), values)


def test_a_quantized_head_and_embedding(tmp_path, plain):
    config, tensors = plain
    files, values = store(CASES["channels"], tensors)
    for name in ("lm_head.weight", "model.embed_tokens.weight"):
        codes, scales = quantize(tensors[name], (1, None))
        files |= {name: codes, f"{name}_scale": scales}
        values[name] = wide(codes, scales, (1, None))
    write(tmp_path, config, files, quantization_config=compressed(group("channel")))
    assert_same(bound(tmp_path), values)


# ------------------------------------------------------------------------------ refused


def refused(folder: Path, plain, case: Case, change: Callable[[Tensors], Any] | None = None) -> str:
    config, tensors = plain
    files, _ = store(case, tensors)
    if change is not None:
        change(files)
    place = case.place if case.settings is not None else ()
    write(folder, with_settings(config, case.settings, place), files)
    with pytest.raises(DiluError) as caught:
        bound(folder)
    return str(caught.value)


BYTES = {"shape": lambda s: s.to(E8M0).view(torch.uint8), "scales": E8M0, "block": (1, 32)}
REFUSED: dict[str, tuple[Case, str]] = {
    "bytes that nothing calls exponents": (
        Case(FP8 | {"weight_block_size": [1, 32]}, **BYTES), "scales of type u8 in",
    ),
    "scales that are shared otherwise": (
        Case(FP8, (64, 64)), r"wants [2, 2] scales (quantization_config: one per 128x128 block)",
    ),
    "a row's scales for a tensor's": (
        Case(compressed(group("tensor")), (1, None), name=SCALE), "one for the whole weight",
    ),
    "columns' scales": (
        Case(compressed(group("channel")), (None, 1), name=SCALE), "one per row), the file has [1,",
    ),
    "codes of another type": (
        Case(FP8 | {"fmt": "e4m3"}, codes=torch.float8_e5m2), "holds f8e5m2 codes, where",
    ),
    "other names when nothing is said": (
        Case(None, name=SCALE), "holds 8-bit codes, but config.json has no quantization_config",
    ),
    "a group that is not read": (
        Case(
            compressed(group("channel", ("re:.*mlp.*",)), group("channel", type="int")),
            (1, None), name=SCALE,
        ),
        "holds f8e4m3 codes, and quantization_config.config_groups.group_1: 8-bit int",
    ),
    "no group": (
        Case(
            compressed(group("channel", ("re:.*mlp.*",)), group("tensor", ("re:.*o_proj",))),
            (1, None), name=SCALE,
        ),
        "nothing in the configuration is about its module",
    ),
}  # fmt: skip


@pytest.mark.parametrize("name", REFUSED)
def test_what_is_refused(tmp_path, plain, name):
    case, message = REFUSED[name]
    assert message in refused(tmp_path, plain, case)


def test_two_tensors_that_may_be_the_scales(tmp_path, plain):
    name = "model.layers.0.self_attn.q_proj.weight"

    def twice(files: Tensors) -> None:
        files[f"{name}_scale"] = files[f"{name}_scale_inv"].clone()

    assert "two tensors that may be its scales" in refused(tmp_path, plain, Case(FP8), twice)


def test_parts_with_a_scale_each_of_other_sizes(tmp_path):
    """q, k and v in one tensor with three scales: no block says that, and none is guessed."""
    config = config_of("llama") | {"model_type": "phi3", "pad_token_id": 0}
    files = {k: v.bfloat16() for k, v in model_files(config).items()}
    name = "model.layers.0.self_attn.qkv_proj.weight"
    files |= {name: files[name].to(torch.float8_e4m3fn), f"{name}_scale": torch.ones(3)}
    write(tmp_path, config, files, quantization_config=compressed(group("tensor")))
    with pytest.raises(DiluError, match=r"one for the whole weight\), the file has \[3\]"):
        bound(tmp_path)


def test_the_weights_of_another_format(tmp_path, plain):
    config, tensors = plain
    files = {k: v.bfloat16() for k, v in tensors.items()}
    name = "model.layers.0.self_attn.q_proj.weight"
    files[name] = torch.zeros(files[name].shape, dtype=torch.int8)
    write(tmp_path, config, files)
    with pytest.raises(DiluError, match=r"holds integers \(i8\), where the model has numbers"):
        bound(tmp_path)
    files[name.replace("weight", "weight_packed")] = files.pop(name)
    write(tmp_path, config, files, quantization_config=compressed(group("channel")))
    with pytest.raises(DiluError, match=r"no tensor for '.*q_proj\.weight'[\s\S]*weight_packed"):
        bound(tmp_path)
    other = group("group", type="int", num_bits=4)
    settings = compressed(group("channel", ("re:.*mlp.*",)), other)
    write(tmp_path, config, files, quantization_config=settings)
    with pytest.raises(DiluError, match=r"weight_packed instead: [\w.]*group_1: 4-bit int"):
        bound(tmp_path)


def test_config_only_says_what_files_would_hold(plain):
    config, _ = plain
    from dilu.frontend.checkpoint.bind import Binder
    from dilu.frontend.formats import read_quantization
    from dilu.frontend.language.configuration import read_configuration
    from dilu.frontend.language.model import build_model

    def storage(settings: dict, name: str):
        model, _ = build_model(read_configuration(config, "config.json"), torch.float32)
        scheme = read_quantization({"quantization_config": settings})
        return Binder(model, None, scheme).storage(f"model.layers.0.{name}")

    form = storage(CASES["mxfp8"].settings, "mlp.experts.down_proj")
    assert (form.scales.dtype.name, form.format.block) == ("f8e8m0", (1, 32))
    form = storage(modelopt("FP8"), "self_attn.q_proj.weight")
    assert (form.scales.shape, form.format.block) == ((1, 1), (160, 144))
    skipped = modelopt("FP8", ignore=["lm_head", "*self_attn*"])
    assert storage(skipped, "self_attn.q_proj.weight").scales is None
    assert storage(skipped, "mlp.experts.down_proj").scales is not None
