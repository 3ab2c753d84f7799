"""`modelopt`: NVIDIA's Model-Optimizer, in config.json or only in hf_quant_config.json.

Source: get_quant_config and convert_hf_quant_config_format of Model-Optimizer, and how vLLM reads
what they write.
"""

from __future__ import annotations

from ...errors import DiluError, Loc
from .compressed import ARGS_KEYS
from .form import (
    DEFAULT_BLOCK,
    MX_BLOCK,
    ROW,
    TENSOR,
    Block,
    Form,
    Rule,
    Scheme,
    Unread,
    glob_within,
)  # fmt: skip
from .settings import METADATA, WIDE, Keys, Settings

FILE = "hf_quant_config.json"

_BLOCKS: dict[str, Block] = {
    "FP8": TENSOR,
    "FP8_PER_CHANNEL_PER_TOKEN": ROW,
    "FP8_PB_WO": DEFAULT_BLOCK,
    "MXFP8": MX_BLOCK,
}
_MIXED = "MIXED_PRECISION"

#: As config.json has it, and as the object `quantization` of hf_quant_config.json.
KEYS = Keys(
    used=frozenset(
        {"quant_method", "quant_algo", "quantized_layers", "ignore", "exclude_modules",
         "group_size", "config_groups"}
    ),
    irrelevant={
        "producer": METADATA,
        "kv_cache_scheme": WIDE,
        "kv_cache_quant_algo": WIDE,
        "kv_cache_quantized_layers": WIDE,
        "input_activations": WIDE,
    },
)  # fmt: skip
TWIN_KEYS = Keys(used=frozenset({"quantization"}), irrelevant={"producer": METADATA})
LAYER_KEYS = Keys(used=frozenset({"quant_algo", "group_size"}))
GROUP_KEYS = Keys(
    used=frozenset({"weights", "targets"}),
    irrelevant={"input_activations": WIDE, "output_activations": WIDE},
)


def read_modelopt(settings: Settings) -> Scheme:
    """Return the scheme of quant_method modelopt."""
    if "quantization" in settings.values:
        settings = inner(settings)
    settings.check(KEYS)
    algo = settings.text("quant_algo")
    if algo is None:
        raise settings.wrong("quant_algo", "an algorithm's name")
    layers = settings.children("quantized_layers")
    if algo.upper() == _MIXED:
        rules = tuple(_layer(name, layer) for name, layer in layers.items())
        default = None
    else:
        rules, default = (), _form(settings)
        _check_groups(settings, default)
        if isinstance(default, Unread):
            raise settings.refused("quant_algo", "a form of weights that is not read")
    lists = [settings.patterns(k, glob_within) for k in ("ignore", "exclude_modules")]
    return Scheme("modelopt", settings.place, rules, default, (*lists[0], *lists[1]))


def inner(settings: Settings) -> Settings:
    """Return the object that says it all of a hf_quant_config.json."""
    method = {"quant_method"} if "quant_method" in settings.values else set()
    settings.check(Keys(TWIN_KEYS.used | method, TWIN_KEYS.irrelevant))
    found = settings.child("quantization")
    if found is None:
        raise settings.wrong("quantization", "an object")
    return found


def check_twin(settings: Settings, twin: Settings) -> None:
    """Raise DiluError where config.json and hf_quant_config.json name different algorithms."""
    ours = inner(settings) if "quantization" in settings.values else settings
    theirs = inner(twin) if "quantization" in twin.values else twin
    a, b = ours.text("quant_algo"), theirs.text("quant_algo")
    if a is not None and b is not None and a.upper() != b.upper():
        raise DiluError(
            f"{ours.place}.quant_algo is {a!r}, and {FILE} says {b!r}",
            Loc(settings.file),
            f"remove {FILE} if it is not of these weights",
        )


def _layer(name: str, layer: Settings) -> Rule:
    layer.check(LAYER_KEYS)
    return Rule(glob_within(name), _form(layer))


def _form(settings: Settings) -> Form | Unread:
    algo = (settings.text("quant_algo") or "").upper()
    block, size = _BLOCKS.get(algo), settings.size("group_size")
    if block is None:
        return Unread(f"{settings.place}: quant_algo {algo}")
    if size is not None and (block[1] is None or size != block[1]):
        raise settings.wrong("group_size", f"one that {algo} has")
    return Form((block,), settings.place, exponents=algo == "MXFP8")


def _check_groups(settings: Settings, form: Form | Unread) -> None:
    """Raise where groups, which say again what the algorithm says, say something else."""
    for group in settings.children("config_groups").values():
        group.check(GROUP_KEYS)
        args = group.child("weights")
        if args is None or not isinstance(form, Form):
            continue
        args.check(ARGS_KEYS)
        if (args.get("num_bits", 8), args.get("type", "float")) != (8, "float"):
            raise args.refused("num_bits", "which is not what quant_algo says")
        size = args.size("group_size")
        if size is not None and (size, 1) != (form.blocks[0][1], form.blocks[0][0]):
            raise args.refused("group_size", "which is not what quant_algo says")
