"""`auto-round` where the bytes are 8-bit floats (`packing_format: auto_round:fp8`).

Source: AutoRoundConfig of transformers, and the configuration that AutoRound writes.
"""

from __future__ import annotations

from .form import ROW, TENSOR, Block, Form, Scheme, listed
from .settings import METADATA, PAST, WIDE, Keys, Neutral, Settings

_PACKING = "auto_round:fp8"
_FLOATS = ("fp", "fp8", "fp8_e4m3", "float8_e4m3fn")

KEYS = Keys(
    used=frozenset(
        {"quant_method", "packing_format", "bits", "data_type", "group_size", "weight_block_size",
         "modules_to_not_convert", "ignored_layers", "extra_config", "fmt"}
    ),
    irrelevant={
        **dict.fromkeys(
            ("act_bits", "act_dynamic", "act_data_type", "act_group_size", "act_sym",
             "activation_scheme", "static_kv_dtype", "static_attention_dtype", "kv_cache_scheme"),
            WIDE,
        ),
        **dict.fromkeys(
            ("iters", "lr", "minmax_lr", "nsamples", "seqlen", "batch_size", "dataset",
             "low_gpu_mem_usage", "gradient_accumulate_steps", "enable_quanted_input",
             "enable_minmax_tuning", "enable_norm_bias_tuning", "enable_alg_ext", "amp",
             "scale_dtype", "model_free", "sampler", "not_use_best_mse", "dynamic_max_gap"),
            PAST,
        ),
        **dict.fromkeys(
            ("autoround_version", "backend", "quant_block_list", "block_name_to_quantize",
             "to_quant_block_names", "quant_lm_head", "provider"),
            METADATA,
        ),
    },
    neutral={
        "sym": Neutral("codes have a zero point", (None, True)),
        "super_bits": Neutral("scales are quantized"),
        "super_group_size": Neutral("scales are quantized"),
        "transform_config": Neutral("weights and activations are rotated"),
        "hadamard_config": Neutral("weights and activations are rotated"),
        "rotation_config": Neutral("weights and activations are rotated"),
    },
)  # fmt: skip


def read_autoround(settings: Settings) -> Scheme:
    """Return the scheme of quant_method auto-round, of 8-bit floats."""
    if settings.text("packing_format") != _PACKING:
        raise settings.refused("packing_format", f"only {_PACKING} is read")
    settings.check(KEYS)
    if settings.get("bits", 8) != 8:
        raise settings.refused("bits", "codes of another width")
    if settings.get("data_type", "fp") not in _FLOATS:
        raise settings.refused("data_type", "codes in another format")
    if settings.get("fmt", "e4m3") != "e4m3":
        raise settings.refused("fmt", "codes in another format")
    _check_extra(settings)
    form = Form((_block(settings),), settings.place)
    lists = [settings.patterns(k, listed) for k in ("modules_to_not_convert", "ignored_layers")]
    return Scheme("auto-round", settings.place, default=form, excluded=(*lists[0], *lists[1]))


def _check_extra(settings: Settings) -> None:
    """Raise unless settings of single modules only say that they are not quantized."""
    for module in settings.children("extra_config").values():
        if module.get("bits") not in (16, 32):
            raise settings.refused("extra_config", "single modules in another form")


def _block(settings: Settings) -> Block:
    block = settings.pair("weight_block_size")
    size = settings.get("group_size")
    if isinstance(size, list):
        sizes = settings.pair("group_size")
        if block is not None and block != sizes:
            raise settings.refused("group_size", "which is not what weight_block_size says")
        return sizes or TENSOR
    if block is not None:
        return block
    size = settings.size("group_size")
    if size in (None, -1):
        return ROW
    if size == 0:
        return TENSOR
    if size < 0:
        raise settings.wrong("group_size", "a size")
    return (1, size)
