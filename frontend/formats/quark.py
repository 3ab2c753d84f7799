"""`quark`: AMD's Quark, 8-bit floats.

Source: the configuration classes of AMD Quark (quark.torch.quantization.config), and how vLLM reads
what they write.
"""

from __future__ import annotations

from collections.abc import Callable

from ...errors import DiluError, Loc
from .form import (
    ELEMENTS,
    NO_PATTERN,
    ROW,
    TENSOR,
    Block,
    Form,
    Pattern,
    Rule,
    Scheme,
    Unread,
    exact_or_class,
    glob,
    glob_within,
)
from .settings import METADATA, PAST, WIDE, Keys, Neutral, Settings

_FOLDED = ("awq", "gptq", "smooth", "smoothquant", "autosmoothquant")

KEYS = Keys(
    used=frozenset(
        {"quant_method", "global_quant_config", "layer_quant_config", "layer_type_quant_config",
         "exclude", "algo_config", "export"}
    ),
    irrelevant={
        "kv_cache_quant_config": WIDE,
        "kv_cache_post_rope": WIDE,
        "softmax_quant_spec": WIDE,
        "quant_mode": METADATA,
        "version": METADATA,
        "log_severity_level": METADATA,
        "modules_to_not_convert": "exclude says it",
    },
    neutral={"pre_quant_opt_config": Neutral("weights were changed before", (None, []))},
)  # fmt: skip
EXPORT_KEYS = Keys(
    used=frozenset({"weight_format"}),
    irrelevant={
        "pack_method": "the order of integers in a word, which 8-bit floats do not share",
        "kv_cache_group": WIDE,
        "min_kv_scale": WIDE,
    },
    neutral={"weight_merge_groups": Neutral("weights are merged", (None, []))},
)
LAYER_KEYS = Keys(
    used=frozenset({"weight"}),
    irrelevant={
        "input_tensors": WIDE,
        "output_tensors": WIDE,
        "target_device": METADATA,
    },
    neutral={"bias": Neutral("biases are quantized", (None,))},
)
SPEC_KEYS = Keys(
    used=frozenset({"dtype", "qscheme", "group_size", "ch_axis", "block_size", "scale_format"}),
    irrelevant={
        "observer_cls": PAST,
        "round_method": PAST,
        "scale_type": PAST,
        "scale_calculation_mode": PAST,
        "zero_point_type": "symmetric weights have no zero point",
        "qat_spec": PAST,
        "mx_element_dtype": "8-bit floats by themselves have none",
    },
    neutral={
        "symmetric": Neutral("codes have a zero point", (None, True)),
        "is_dynamic": Neutral("weights are quantized while running", (None, False)),
        "is_scale_quant": Neutral("scales are quantized", (None, False)),
    },
)


def read_quark(settings: Settings) -> Scheme:
    """Return the scheme of quant_method quark."""
    settings.check(KEYS)
    export = settings.child("export")
    if export is not None:
        export.check(EXPORT_KEYS)
        if export.text("weight_format") not in (None, "real_quantized"):
            raise export.refused("weight_format", "weights that are not stored as codes")
    _check_algorithms(settings)
    layers = settings.children("layer_quant_config")
    classes = settings.children("layer_type_quant_config")
    rules = [Rule(_patterns(glob, n, settings), _form(s)) for n, s in layers.items()]
    rules += [Rule(_patterns(exact_or_class, n, settings), _form(s)) for n, s in classes.items()]
    overall = settings.child("global_quant_config")
    default = _form(overall) if overall is not None else None
    excluded = settings.patterns("exclude", glob_within)
    return Scheme("quark", settings.place, tuple(rules), default, excluded)


def _patterns(
    make: Callable[[str], tuple[Pattern, ...]], name: str, settings: Settings
) -> tuple[Pattern, ...]:
    """Return what the key of a table of modules means."""
    try:
        return make(name)
    except NO_PATTERN as error:
        raise DiluError(
            f"{settings.place} has {name!r}, which is no pattern: {error}", Loc(settings.file)
        ) from None


def _check_algorithms(settings: Settings) -> None:
    """Raise for an algorithm that leaves something to do at run time, such as a rotation; those
    that are known leave scales in the weights."""
    said = settings.get("algo_config", [])
    for algorithm in said if isinstance(said, list) else [said]:
        known = isinstance(algorithm, dict) and not algorithm.get("desc_act")
        if not known or str(algorithm.get("name")).lower() not in _FOLDED:
            raise settings.refused("algo_config", "weights that are to be used in another way")


def _form(layer: Settings) -> Form | Unread | None:
    layer.check(LAYER_KEYS)
    if isinstance(layer.get("weight"), list):
        return Unread(f"{layer.place}.weight: quantized in stages")
    spec = layer.child("weight")
    if spec is None:
        return None  # of activations or a cache only
    spec.check(SPEC_KEYS)
    element = ELEMENTS.get(str(spec.get("dtype")))
    if element is None:
        return Unread(f"{spec.place}: {spec.get('dtype')}")
    scale_format = spec.text("scale_format")
    if scale_format not in (None, "float", "float32", "e8m0"):
        raise spec.refused("scale_format", "scales in an unknown format")
    return Form((_block(spec),), spec.place, (element,), exponents=scale_format == "e8m0")


def _block(spec: Settings) -> Block:
    scheme, axis, size = spec.text("qscheme"), spec.size("ch_axis"), spec.size("group_size")
    if scheme == "per_tensor":
        return TENSOR
    if scheme == "per_channel" and axis in (None, 0):
        return ROW
    if scheme == "per_group" and axis in (None, 1, -1) and size is not None and size > 0:
        return (1, size)
    block = spec.pair("block_size")
    if scheme == "per_block" and block is not None:
        return block
    raise spec.refused("qscheme", f"scales that are shared in another way: axis {axis}, {size}")
