"""What a checkpoint says about making text: end tokens, sampling, and what is not applied.

Invariant: every setting of transformers' GenerationConfig is used, needs no use (with the reason),
or is named to the user when it asks for other tokens than dilu makes.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from ...errors import DiluError, Loc
from ..checkpoint.checkpoint import CONFIG, read_config
from .configuration import decode_floats, text_settings

GENERATION = "generation_config.json"

#: Settings that are used.
USED = ("eos_token_id", "bos_token_id", "do_sample", "temperature", "top_k", "top_p")
#: Settings that change no token, and why.
IRRELEVANT: dict[str, str] = {
    **dict.fromkeys(
        ("max_length", "max_new_tokens", "max_time"),
        "how much text is made is asked for with every run",
    ),
    "pad_token_id": "sequences of a batch are not padded",
    **dict.fromkeys(
        ("use_cache", "cache_implementation", "cache_config", "max_cache_len",
         "return_legacy_cache", "compile_config", "disable_compile",
         "continuous_batching_config", "low_memory", "prefill_chunk_size", "use_mtp"),
        "is about speed and memory",
    ),
    **dict.fromkeys(
        ("num_return_sequences", "output_attentions", "output_hidden_states", "output_scores",
         "output_logits", "return_dict_in_generate", "is_assistant"),
        "is about what is returned beside the tokens",
    ),
    **dict.fromkeys(
        ("num_assistant_tokens", "num_assistant_tokens_schedule", "assistant_confidence_threshold",
         "prompt_lookup_num_tokens", "max_matching_ngram_size", "assistant_early_exit",
         "assistant_lookbehind", "target_lookbehind", "speculation_type"),
        "guesses tokens, which the model itself accepts or not",
    ),
    **dict.fromkeys(
        ("encoder_no_repeat_ngram_size", "encoder_repetition_penalty", "decoder_start_token_id"),
        "is for models with an encoder",
    ),
    **dict.fromkeys(
        ("early_stopping", "length_penalty", "diversity_penalty", "num_beam_groups"),
        "is for a search with several beams, which num_beams asks for",
    ),
    **dict.fromkeys(
        ("remove_invalid_values", "renormalize_logits", "assistant_ensemble_weight"),
        "changes no choice where logits are finite and nothing else is set",
    ),
    **dict.fromkeys(
        ("transformers_version", "_from_model_config", "_original_object_hash", "_commit_hash",
         "trust_remote_code", "chat_format", "max_window_size", "user_token_id",
         "assistant_token_id"),
        "is no setting of generation",
    ),
}  # fmt: skip
#: Settings that choose other tokens, and the values with which they do not.
NOT_APPLIED: dict[str, tuple[Any, ...]] = {
    "num_beams": (1,),
    "penalty_alpha": (0,),
    "repetition_penalty": (1,),
    "no_repeat_ngram_size": (0,),
    "min_length": (0,),
    "min_new_tokens": (0,),
    "guidance_scale": (1,),
    "dola_layers": (),
    "min_p": (0,),
    "top_h": (1,),
    "typical_p": (1,),
    "epsilon_cutoff": (0,),
    "eta_cutoff": (0,),
    "token_healing": (),
    **dict.fromkeys(
        ("stop_strings", "bad_words_ids", "force_words_ids", "constraints", "forced_bos_token_id",
         "forced_eos_token_id", "exponential_decay_length_penalty", "suppress_tokens",
         "begin_suppress_tokens", "sequence_bias", "watermarking_config"),
        (),
    ),
}  # fmt: skip
#: Of those, what only matters when tokens are drawn at random.
_OF_SAMPLING = ("min_p", "top_h", "typical_p", "epsilon_cutoff", "eta_cutoff")
#: What transformers takes where sampling is asked for and nothing said.
_DEFAULTS = {"temperature": 1.0, "top_k": 50, "top_p": 1.0}


@dataclass(frozen=True)
class Generation:
    """Tokens that begin and end a text, the sampling that the checkpoint suggests, and notes."""

    eos: tuple[int, ...]
    bos: int | None
    sampling: dict[str, float]
    notes: tuple[str, ...]


def read_generation(folder: Path, settings: Mapping[str, Any], config: Any) -> Generation:
    """Return what a checkpoint's files say about making text.

    As in transformers, the settings are those of generation_config.json, and config.json's own
    where there is no such file. A text also ends at the end tokens of config.json where the file
    names none.
    """
    file = folder / GENERATION
    own = file.is_file()
    said = decode_floats(read_config(file)) if own else {**text_settings(settings), **settings}
    name = GENERATION if own else CONFIG
    eos = said.get("eos_token_id")
    if eos is None:
        eos = getattr(config, "eos_token_id", None)
    bos = said.get("bos_token_id")
    if bos is None:
        bos = getattr(config, "bos_token_id", None)
    ends = _tokens(eos, "eos_token_id", folder / name)
    begins = _tokens(bos, "bos_token_id", folder / name)
    known = {*NOT_APPLIED, *USED, *IRRELEVANT}
    notes = [*_not_applied(said, name)]
    if own:
        notes += [f"{name}: {k} is not known, and not applied" for k in said if k not in known]
    return Generation(
        ends, begins[0] if begins else None, _sampling(said, folder / name), tuple(notes)
    )


def _not_applied(said: Mapping[str, Any], name: str) -> Iterable[str]:
    samples = said.get("do_sample") is True
    for key, neutral in NOT_APPLIED.items():
        value = said.get(key)
        if value is None or value is False or value in ([], {}) or value in neutral:
            continue
        if key in _OF_SAMPLING and not samples:
            continue
        yield f"{name} asks for {key}: {value!r}, which is not applied"


def _sampling(said: Mapping[str, Any], file: Path) -> dict[str, float]:
    """Return temperature, top_k and top_p where the checkpoint wants tokens drawn at random."""
    if said.get("do_sample") is not True:
        return {}
    found: dict[str, float] = {}
    for key, default in _DEFAULTS.items():
        value = said.get(key)
        value = default if value is None else value
        if isinstance(value, bool) or not isinstance(value, (int, float)):
            raise DiluError(f"{key} is {value!r}, which is no number", Loc(str(file)))
        found[key] = value
    if found["top_k"] <= 0:
        del found["top_k"]
    if found["top_p"] >= 1:
        del found["top_p"]
    return found


def _tokens(value: Any, key: str, file: Path) -> tuple[int, ...]:
    """Return one token, or several, as a tuple."""
    found = value if isinstance(value, list) else [] if value is None else [value]
    for token in found:
        if isinstance(token, bool) or not isinstance(token, int):
            raise DiluError(f"{key} is {value!r}, which is no token", Loc(str(file)))
    return tuple(t for t in found if t >= 0)  # -1 is said where there is none
