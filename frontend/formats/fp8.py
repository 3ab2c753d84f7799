"""`fp8` and `mxfp8`: codes of a float8 type with scales per block, per row or per tensor.

Source: FineGrainedFP8Config of transformers, and the configurations of released checkpoints
(DeepSeek-V3 to V4, Qwen3, GLM-4.5 to 5, MiniMax-M2 and M3, Mistral 3 and 4).
"""

from __future__ import annotations

from .form import (
    DEFAULT_BLOCK,
    ELEMENTS,
    FLOAT8,
    MX_BLOCK,
    ROW,
    TENSOR,
    Block,
    Form,
    Scheme,
    listed,
)
from .settings import METADATA, WIDE, Keys, Neutral, Settings

LOADING = "how a loader is to treat the weights, which are as they are"

KEYS = Keys(
    used=frozenset(
        {
            "quant_method", "weight_block_size", "modules_to_not_convert", "ignored_layers",
            "fmt", "scale_fmt",
        }
    ),
    irrelevant={
        "activation_scheme": WIDE,
        "kv_cache_scheme": WIDE,
        "kv_cache_quant_method": WIDE,
        "modules_to_convert": "whether an embedding holds codes is seen in its header",
        "dequantize": LOADING,
        "export": "Quark's, of how integers are packed and of the cache",
        "quantization_status": METADATA,
        "producer": METADATA,
    },
    neutral={
        "expert_dtype": Neutral("experts in another format", (None, "fp8")),
        "bits": Neutral("codes of another width", (None, 8)),
        "num_bits": Neutral("codes of another width", (None, 8)),
        "transform_config": Neutral("weights and activations are rotated"),
        "sparsity_config": Neutral("weights are stored sparse"),
    },
)  # fmt: skip


def read_fp8(settings: Settings) -> Scheme:
    """Return the scheme of quant_method fp8 or mxfp8."""
    settings.check(KEYS)
    mx = settings.text("quant_method") == "mxfp8"
    scale_fmt = settings.text("scale_fmt")
    if scale_fmt not in (None, "float", "ue8m0"):
        raise settings.refused("scale_fmt", "scales in an unknown format")
    said = settings.text("fmt")
    if said is not None and said not in ELEMENTS:
        raise settings.refused("fmt", "codes in an unknown format")
    form = Form(
        _blocks(settings, mx),
        settings.place,
        (ELEMENTS[said],) if said else FLOAT8,
        exponents=mx or scale_fmt == "ue8m0",
    )
    excluded = [settings.patterns(k, listed) for k in ("modules_to_not_convert", "ignored_layers")]
    return Scheme("fp8", settings.place, default=form, excluded=(*excluded[0], *excluded[1]))


def _blocks(settings: Settings, mx: bool) -> tuple[Block, ...]:
    """Return the block; where null says that there is none, or nothing is said, what may be."""
    block = settings.pair("weight_block_size")
    if block is not None:
        return (block,)
    if mx:
        return (MX_BLOCK,)
    whole = (TENSOR, ROW)
    return whole if "weight_block_size" in settings.values else (DEFAULT_BLOCK, *whole)


def unsaid(place: str) -> Scheme:
    """Return the scheme of files whose configuration says nothing: DeepSeek's names alone say what
    scales mean, and their shape says what shares one."""
    form = Form(
        (DEFAULT_BLOCK, TENSOR, ROW),
        f"{place}, which says nothing of quantization",
        FLOAT8,
        suffixes=("weight_scale_inv", "scale_inv"),
    )
    return Scheme("none", place, default=form)
