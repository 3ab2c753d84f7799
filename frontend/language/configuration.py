"""config.json → the configuration of transformers that a language model is built from.

Invariant: a configuration is read as transformers reads it. Where transformers does not know the
`model_type` but the file names an architecture that it has, every key must be one that this
architecture reads, or one that is known not to change what the model computes: else the file means
more than what would be compiled, and is refused by the name of the key.
"""

from __future__ import annotations

import importlib
import inspect
import math
import re
import sys
from collections.abc import Mapping
from dataclasses import dataclass, field, replace
from typing import Any

from ...errors import DiluError, Loc, UnsupportedError
from ..formats import without_quantization
from .heads import require_same_head

#: What is about files, or read by other parts of the compiler.
_ELSEWHERE = ("auto_map", "model_type")
_FLOATS = {"Infinity": math.inf, "-Infinity": -math.inf, "NaN": math.nan}
#: Where a configuration of several parts holds that of its text.
_TEXT_PARTS = ("text_config", "llm_config", "language_config", "language_model")

#: Keys that change nothing a model computes for tokens, of files that come with code of their own.
IRRELEVANT: dict[str, str] = {
    **dict.fromkeys(
        ("model_type", "architectures", "auto_map", "transformers_version", "_name_or_path",
         "name_or_path", "_commit_hash", "model_name", "model_version", "license", "unsloth_fixed",
         "unsloth_version"),
        "says where the file comes from",
    ),
    **dict.fromkeys(
        ("aux_loss_alpha", "seq_aux", "router_aux_loss_coef", "output_router_logits",
         "router_z_loss_coef", "initializer_range", "init_method", "initializer_std",
         "embed_pdrop", "resid_pdrop", "attn_pdrop", "attention_dropout", "hidden_dropout",
         "embd_pdrop", "hidden_dropout_prob", "attention_probs_dropout_prob",
         "gradient_checkpointing", "bias_update_speed", "fused_linear_cross_entropy",
         "fuse_cross_entropy", "fuse_norm", "fuse_swiglu"),
        "is for training, or how kernels are fused",
    ),
    **dict.fromkeys(
        ("use_cache", "use_flash_attn", "use_flash_attention", "use_flash_attention_2",
         "use_cache_quantization", "use_cache_kernel", "_attn_implementation", "attn_impl",
         "attn_implementation", "flash_attn_version", "use_fused_rms_norm", "use_fused_swiglu",
         "_attn_implementation_autoset", "_experts_implementation", "softmax_in_fp32"),
        "chooses an implementation of the same function",
    ),
    **dict.fromkeys(
        ("ep_size", "tp_size", "pretraining_tp", "tensor_parallel_size", "pipeline_parallel_size"),
        "divides the work among devices",
    ),
    **dict.fromkeys(
        ("num_nextn_predict_layers", "num_mtp_layers", "num_mtp_modules", "mtp_num_layers"),
        "is about layers that guess tokens ahead; what they guess is checked by the model itself",
    ),
    **dict.fromkeys(
        ("dtype", "torch_dtype", "quantization_config", "compression_config", "bf16", "fp16",
         "fp32"),
        "is about how weights are stored, which their own headers say",
    ),
    **dict.fromkeys(
        ("id2label", "label2id", "num_labels", "problem_type", "classifier_dropout",
         "summary_type", "task_specific_params", "finetuning_task"),
        "is for classification",
    ),
    **dict.fromkeys(
        ("seq_length", "max_sequence_length", "model_max_length", "max_length", "tokenizer_class",
         "user_token_id", "assistant_token_id", "onnx_safe", "return_dict",
         "output_hidden_states", "output_attentions", "is_decoder", "prefix"),
        "is about calling the model",
    ),
}  # fmt: skip

#: What an architecture does anyway, where its configuration class has no key for it.
ANYWAY: dict[str, dict[str, Any]] = {
    "deepseek_v2": {"moe_layer_freq": 1, "scoring_func": "softmax"},
    "deepseek_v3": {"moe_layer_freq": 1, "scoring_func": "sigmoid", "topk_method": "noaux_tc"},
    "glm4_moe": {"moe_layer_freq": 1, "scoring_func": "sigmoid", "topk_method": "noaux_tc"},
    "qwen3_moe": {"use_qk_norm": True},
    "qwen3": {"use_qk_norm": True},
}

#: Models whose text part, alone, is another function than the whole is of a text.
NOT_ALONE: dict[str, str] = {
    "paligemma": "it sees all of a prompt in both directions",
    "shieldgemma2": "it judges images, and does not continue a text",
}

#: What models do unless they are told not to, so that false means something.
ON_BY_DEFAULT = (
    "is_causal", "causal", "norm_topk_prob", "use_qk_norm", "qk_norm", "use_rope",
    "use_rotary_emb", "rotary", "use_pre_norm", "gated", "mlp_gated", "scale_attn_weights",
)  # fmt: skip


@dataclass(frozen=True)
class Configuration:
    """A configuration of a causal language model; `notes` are what its user should know.

    `inside` is the model_type of the checkpoint where the language model is a part of it.
    """

    config: Any
    kind: str
    settings: Mapping[str, Any] = field(default_factory=dict)
    inside: str | None = None
    notes: tuple[str, ...] = ()
    architecture: Any = None  # the class of the model, where the configuration's own has none


def decode_floats(value: Any) -> Any:
    """Return JSON with `{"__float__": "Infinity"}` as the float that transformers means by it."""
    if isinstance(value, dict):
        if value.keys() == {"__float__"} and value["__float__"] in _FLOATS:
            return _FLOATS[value["__float__"]]
        return {k: decode_floats(v) for k, v in value.items()}
    return [decode_floats(v) for v in value] if isinstance(value, list) else value


def text_settings(settings: Mapping[str, Any]) -> Mapping[str, Any]:
    """Return the part of a config.json that describes its text model: often all of it."""
    nested = [settings[k] for k in _TEXT_PARTS if isinstance(settings.get(k), dict)]
    return nested[0] if nested else settings


def read_configuration(settings: Mapping[str, Any], file: str) -> Configuration:
    """Return the configuration of the causal language model that a config.json describes.

    Of a model of several parts it is that of its text. Raises DiluError where transformers has no
    such model or refuses a value, UnsupportedError where the text part cannot stand alone.
    """
    from transformers import CONFIG_MAPPING

    kind = settings.get("model_type")
    if isinstance(kind, str) and kind in CONFIG_MAPPING:
        if kind == "mistral" and "layer_types" in settings:  # as AutoConfig does
            kind = "ministral"
        found = Configuration(_config(kind, settings, file), kind, settings)
    else:
        found = _by_architecture(settings, file)
    return _text_part(found, file)


def _by_architecture(settings: Mapping[str, Any], file: str) -> Configuration:
    """Return the configuration of a `model_type` that transformers does not know."""
    from transformers import CONFIG_MAPPING

    said, names = settings.get("model_type"), settings.get("architectures")
    kinds = [k for n in _strings(names) for k in _kinds_of(n)]
    if kinds:
        kind = kinds[0]
        config = _config(kind, settings, file)
        _refuse_unknown(settings, kind, config, file)
        note = (
            f"model_type {said!r} is unknown; it is read as {kind}, which is {_strings(names)[0]}"
        )
        return Configuration(config, kind, settings, notes=(note,))
    text = text_settings(settings)
    if text is not settings and text.get("model_type") in CONFIG_MAPPING:
        kind = str(text["model_type"])
        return Configuration(_config(kind, text, file), kind, text, str(said), (_note(said, kind),))
    raise DiluError(
        f"unknown architecture: model_type {said!r} of {names}",
        Loc(file),
        "a newer transformers may know it; code inside of a checkpoint is not run",
    )


def _text_part(found: Configuration, file: str) -> Configuration:
    """Return the configuration of the text, where a model has other parts as well."""
    from transformers.models.auto.modeling_auto import MODEL_FOR_CAUSAL_LM_MAPPING

    known: Any = MODEL_FOR_CAUSAL_LM_MAPPING
    try:
        text = found.config.get_text_config(decoder=True)
    except ValueError as error:
        raise UnsupportedError(
            f"model_type {found.kind!r} has several text parts: {error}", Loc(file)
        ) from error
    if text is found.config or type(text) is type(found.config):
        alone = _named(found)
        if type(found.config) in known or alone is not None:
            return replace(found, architecture=alone)
        raise UnsupportedError(
            f"cannot build the model of model_type {found.kind!r}: it is not a causal language "
            "model, or transformers has none of this type",
            Loc(file),
        )
    kind = str(getattr(text, "model_type", "") or "of no name")
    reason = NOT_ALONE.get(found.kind)
    if getattr(found.config, "is_encoder_decoder", False):
        reason = "it has an encoder, which the text part attends to"
    if reason is not None:
        raise UnsupportedError(f"model_type {found.kind!r} is not supported: {reason}", Loc(file))
    outer = known.get(type(found.config), None)
    alone = outer if getattr(outer, "config_class", None) is type(text) else None
    if type(text) not in known and alone is None:
        raise UnsupportedError(
            f"the text part ({kind}) of a multimodal checkpoint (model_type {found.kind!r}) is not "
            "supported: transformers has no causal language model for it alone",
            Loc(file),
        )
    if alone is None:
        require_same_head(found.config, text, found.settings, file)
    if alone is None and hasattr(found.config, "tie_word_embeddings"):
        text.tie_word_embeddings = found.config.tie_word_embeddings  # the head is the whole's
    note = _note(found.kind, kind)
    settings = text_settings(found.settings)
    inside = found.inside or found.kind
    return Configuration(text, kind, settings, inside, (*found.notes, note), alone)


def _named(found: Configuration) -> Any:
    """Return the class that `architectures` names, where only that says which model it is."""
    import transformers
    from transformers.models.auto.modeling_auto import MODEL_FOR_CAUSAL_LM_MAPPING

    if type(found.config) in MODEL_FOR_CAUSAL_LM_MAPPING:
        return None
    names = [n for n in _strings(found.settings.get("architectures")) if _kinds_of(n)]
    classes = [getattr(transformers, n, None) for n in names]
    fitting = [c for c in classes if getattr(c, "config_class", None) is type(found.config)]
    return fitting[0] if fitting else None


def _note(outer: Any, kind: str) -> str:
    return (
        f"only the text part ({kind}) of this {outer} checkpoint is compiled: it takes text alone"
    )


def _config(kind: str, settings: Mapping[str, Any], file: str) -> Any:
    from transformers import CONFIG_MAPPING

    _refuse_other(settings, kind, file)
    plain = {k: v for k, v in without_quantization(settings).items() if k not in _ELSEWHERE}
    try:
        return CONFIG_MAPPING[kind].from_dict(plain)
    except Exception as error:  # each configuration class raises what it likes
        raise DiluError(
            f"transformers refuses the configuration of model_type {kind!r}: {one_line(error)}",
            Loc(file),
        ) from error


def one_line(error: BaseException) -> str:
    """Return what an error says, with its type, on one line."""
    text = " ".join(str(error).split())
    return f"{type(error).__name__}: {text}" if text else type(error).__name__


def _strings(value: Any) -> list[str]:
    return [v for v in value if isinstance(v, str)] if isinstance(value, list) else []


def _kinds_of(architecture: str) -> list[str]:
    """Return the model types whose causal language model is the class of this name."""
    from transformers.models.auto.modeling_auto import MODEL_FOR_CAUSAL_LM_MAPPING_NAMES

    found = [
        kind
        for kind, names in MODEL_FOR_CAUSAL_LM_MAPPING_NAMES.items()
        if architecture in ([names] if isinstance(names, str) else names)
    ]
    plain = re.sub(r"(ForCausalLM|LMHeadModel)$", "", architecture).lower()
    return sorted(found, key=lambda kind: kind.replace("_", "") != plain)


# --------------------------------------------------------------------- what a key means


def _refuse_unknown(settings: Mapping[str, Any], kind: str, config: Any, file: str) -> None:
    """Raise UnsupportedError for a key that only code inside of the checkpoint understands."""
    known = {*names_read(type(config)), *IRRELEVANT, *ANYWAY.get(kind, {})}
    for key, value in settings.items():
        silent = not value and (value is None or key not in ON_BY_DEFAULT)
        if key not in known and not silent:
            raise UnsupportedError(
                f"config.json says {key}: {value!r}, which {kind} of transformers does not read "
                f"(model_type {settings.get('model_type')!r} is read as {kind})",
                Loc(file),
                f"take the key out if it changes nothing, and say model_type {kind!r}",
            )


def _refuse_other(settings: Mapping[str, Any], kind: str, file: str) -> None:
    """Raise UnsupportedError for a key that asks for another function than the architecture's."""
    for key, value in ANYWAY.get(kind, {}).items():
        if settings.get(key, value) not in (value, None):
            raise UnsupportedError(
                f"config.json says {key}: {settings[key]!r}, and {kind} of transformers computes "
                f"with {value!r} whatever is said",
                Loc(file),
            )


def names_read(cls: type) -> set[str]:
    """Return every name that a configuration class, or the model's code, may read.

    These are attributes of the class, and the words of its source and of the file that holds the
    model: more than what is read, which only makes the rule milder.
    """
    known: set[str] = set()
    for base in cls.__mro__[:-1]:
        known |= set(vars(base)) | set(vars(base).get("__annotations__", {}))
        known |= set(vars(base).get("attribute_map", {}))
    known |= _words(cls.__module__, r"(?:config|self)\.(\w+)")
    known |= _words(cls.__module__.replace(".configuration_", ".modeling_"), r"config\.(\w+)")
    return known | _generation_keys() | {"rope_theta", "rope_scaling", "rope_parameters"}


def _words(module: str, pattern: str) -> set[str]:
    """Return the names in a module's code that match a pattern, or stand in quotes."""
    try:
        source = inspect.getsource(sys.modules.get(module) or importlib.import_module(module))
    except (ImportError, OSError, TypeError):
        return set()
    source = re.sub(r'"""[\s\S]*?"""|#.*', "", source)
    pairs = re.findall(pattern + r"|[\"'](\w+)[\"']", source)
    return {a or b for a, b in pairs}


def _generation_keys() -> set[str]:
    """Return the settings of text generation, which generation.py reads."""
    from transformers import GenerationConfig

    return set(vars(GenerationConfig()))
