"""`compressed-tensors`: groups of modules, each with its own form.

Source: QuantizationConfig, QuantizationScheme and QuantizationArgs of compressed-tensors 0.20, and
the keys that earlier versions wrote.
"""

from __future__ import annotations

from ...errors import Loc, UnsupportedError
from .form import MX_BLOCK, ROW, TENSOR, Block, Form, Rule, Scheme, Unread, exact_or_class
from .settings import METADATA, PAST, WIDE, Keys, Neutral, Settings

#: Formats whose 8-bit floats are stored as they are, beside their scales. `dense` and `fakequant`
#: are models whose weights were not compressed: headers say that they hold no codes.
_FORMATS = (
    None, "float-quantized", "naive-quantized", "int-quantized", "mxfp8-quantized",
    "mixed-precision", "dense", "fakequant",
)  # fmt: skip

KEYS = Keys(
    used=frozenset({"quant_method", "config_groups", "ignore", "format"}),
    irrelevant={
        "kv_cache_scheme": WIDE,
        "quantization_status": METADATA,
        "global_compression_ratio": METADATA,
        "version": METADATA,
        "run_compressed": METADATA,
        "dequantize": METADATA,
        "use_optimized_inference": METADATA,
    },
    neutral={
        "transform_config": Neutral(
            "weights and activations are rotated", (None, {}, {"config_groups": {}})
        ),
        "moe_sparsity_config": Neutral("experts are left out"),
    },
)
SPARSITY_KEYS = Keys(
    used=frozenset({"format"}),
    irrelevant={
        "global_sparsity": METADATA,
        "sparsity_structure": METADATA,
        "registry_requires_subclass": METADATA,
        "targets": METADATA,
        "ignore": METADATA,
    },
)
GROUP_KEYS = Keys(
    used=frozenset({"targets", "weights", "format"}),
    irrelevant={"input_activations": WIDE, "output_activations": WIDE},
)
ARGS_KEYS = Keys(
    used=frozenset(
        {"num_bits", "type", "strategy", "group_size", "block_structure", "scale_dtype"}
    ),
    irrelevant={
        "observer": PAST,
        "observer_kwargs": PAST,
        "zp_dtype": "the type of zero points, which symmetric weights do not have",
    },
    neutral={
        "symmetric": Neutral("codes have a zero point", (None, True)),
        "actorder": Neutral("columns are reordered", (None, False)),
        "dynamic": Neutral("weights are quantized while running", (None, False)),
    },
)


def read_compressed(settings: Settings) -> Scheme:
    """Return the scheme of quant_method compressed-tensors."""
    sparsity = settings.child("sparsity_config")
    if sparsity is not None:
        sparsity.check(SPARSITY_KEYS)
        if sparsity.text("format") not in (None, "dense"):
            raise sparsity.refused("format", "weights are stored sparse")
    known = {k: v for k, v in settings.values.items() if k != "sparsity_config"}
    Settings(known, settings.place, settings.file).check(KEYS)
    rules = tuple(_rule(group, settings) for group in settings.children("config_groups").values())
    unread = [r.form for r in rules if isinstance(r.form, Unread)]
    if unread and len(unread) == len(rules):
        raise UnsupportedError(
            f"no group of {settings.place} is of 8-bit floats: {unread[0].said}",
            Loc(settings.file),
        )
    excluded = settings.patterns("ignore", exact_or_class)
    return Scheme("compressed-tensors", settings.place, rules, excluded=excluded)


def _rule(group: Settings, whole: Settings) -> Rule:
    group.check(GROUP_KEYS)
    return Rule(group.patterns("targets", exact_or_class), _form(group, whole))


def _form(group: Settings, whole: Settings) -> Form | Unread | None:
    args = group.child("weights")
    stored = group.text("format") or whole.text("format")
    if args is None:
        return None  # of activations or a cache only
    args.check(ARGS_KEYS)
    bits, kind = args.get("num_bits", 8), args.get("type", "int")
    if (bits, str(kind).lower()) != (8, "float") or stored not in _FORMATS:
        return Unread(f"{group.place}: {bits}-bit {kind}, stored as {stored}")
    exponents = stored == "mxfp8-quantized" or str(args.get("scale_dtype")) in _EXPONENTS
    return Form((block_of(args),), group.place, exponents=exponents)


_EXPONENTS = ("torch.uint8", "uint8", "torch.float8_e8m0fnu", "float8_e8m0fnu")


def block_of(args: Settings) -> Block:
    """Return what shares a scale, of QuantizationArgs; raise DiluError where they contradict."""
    size, block = args.size("group_size"), args.pair("block_structure")
    strategy = args.text("strategy")
    if strategy is None:  # as compressed-tensors infers it
        strategy = "tensor" if size is None else "channel" if size == -1 else "group"
    strategy = strategy.lower()
    if strategy == "block":
        if block is None:
            raise args.wrong("block_structure", "the block that strategy 'block' wants")
        return block
    if block is not None:
        raise args.wrong("block_structure", f"one that strategy {strategy!r} has")
    if strategy == "group":
        if size is None or size < 1:
            raise args.wrong("group_size", "the size that strategy 'group' wants")
        return MX_BLOCK if size == 32 else (1, size)
    if size not in (None, -1):
        raise args.wrong("group_size", f"one that strategy {strategy!r} has")
    if strategy not in ("tensor", "channel"):
        raise args.refused("strategy", "scales that are shared in another way")
    return TENSOR if strategy == "tensor" else ROW
