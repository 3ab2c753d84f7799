"""Every causal language model of the installed transformers, tiny and random, against itself.

    python tests/every_model.py --out build/every.json            # all of them, about an hour
    python tests/every_model.py --only qwen3,gemma3 --captured

For each type: a checkpoint as `save_pretrained` writes it, compiled in a process of its own and
compared with transformers' eager model in f32: logits of a prompt longer than any window, and of a
ragged batch. The verdict is one of VERDICTS, with the message. With `--captured` the captured
graph is interpreted, and nothing is compiled.
"""

from __future__ import annotations

import argparse
import collections
import contextlib
import inspect
import json
import math
import os
import signal
import sys
import tempfile
import time
import traceback
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import numpy as np
import torch

#: right; refused (a DiluError); internal (any other exception); wrong (another result); late
#: (beyond the limit); impossible (transformers itself does not build, save or run the tiny model).
VERDICTS = ("right", "refused", "internal", "wrong", "late", "impossible")
PROMPTS = ([(7 + 37 * i) % 300 for i in range(41)], [5, 17, 260], [9 + 3 * i for i in range(20)])
ERROR = 2e-3  # of the largest logit: f32 rounding through a few layers, not another function

#: What makes a model tiny, by the names that configurations use for it.
SIZES: dict[str, Any] = {
    "vocab_size": 320, "vocab_size_per_layer_input": 320, "text_vocab_size": 320,
    **dict.fromkeys(("hidden_size", "d_model", "n_embd", "dim", "emb_dim"), 64),
    **dict.fromkeys(("intermediate_size", "ffn_dim", "d_ff", "n_inner", "ffn_hidden_size",
                     "encoder_ffn_dim", "decoder_ffn_dim", "intermediate_size_mlp",
                     "expert_ffn_hidden_size"), 96),
    **dict.fromkeys(("moe_intermediate_size", "shared_expert_intermediate_size",
                     "moe_shared_expert_intermediate_size", "shared_intermediate_size"), 48),
    **dict.fromkeys(("num_attention_heads", "n_head", "n_heads", "decoder_attention_heads",
                     "encoder_attention_heads", "num_heads", "linear_num_value_heads"), 4),
    **dict.fromkeys(("num_key_value_heads", "linear_num_key_heads"), 2),
    **dict.fromkeys(("head_dim", "kv_channels", "attention_head_dim", "linear_key_head_dim",
                     "linear_value_head_dim", "index_head_dim", "swa_head_dim", "v_head_dim",
                     "qk_nope_head_dim", "kda_head_dim", "global_head_dim"), 16),
    **dict.fromkeys(("qk_rope_head_dim", "lru_width_block"), 8),
    **dict.fromkeys(("q_lora_rank", "kv_lora_rank", "hidden_size_per_layer_input"), 32),
    **dict.fromkeys(("num_hidden_layers", "n_layer", "n_layers", "num_layers", "decoder_layers",
                     "encoder_layers"), 4),
    **dict.fromkeys(("num_experts", "num_local_experts", "n_routed_experts", "moe_num_experts"), 8),
    **dict.fromkeys(("num_experts_per_tok", "moe_k", "moe_topk", "top_k_experts"), 2),
    **dict.fromkeys(("n_shared_experts", "num_shared_experts", "moe_num_shared_experts"), 1),
    **dict.fromkeys(("n_group",), 4), **dict.fromkeys(("topk_group",), 2),
    **dict.fromkeys(("first_k_dense_replace", "moe_layer_start_index"), 1),
    **dict.fromkeys(("sliding_window", "attention_chunk_size", "index_topk", "local_attention",
                     "attention_window_size"), 16),
    **dict.fromkeys(("max_position_embeddings", "n_positions", "n_ctx", "max_seq_len",
                     "original_max_position_embeddings"), 512),
    "mamba_n_heads": 8, "mamba_d_head": 16, "mamba_d_state": 16, "mamba_n_groups": 1,
    "mamba_chunk_size": 16, "chunk_size": 16, "state_size": 16, "mamba_d_ssm": 128,
    "pad_token_id": 2, "bos_token_id": 0, "eos_token_id": 1, "embedding_size": 64,
    "rotary_dim": 8, "num_codebooks": 2, "embed_dim": 64, "altup_num_inputs": 2,
    "num_kv_shared_layers": 0, "laurel_rank": 8, "lru_width": 64,
}  # fmt: skip
#: What a type needs beside these.
SPECIAL: dict[str, dict[str, Any]] = {
    "exaone4": {"sliding_window_pattern": 4},
    "llama4_text": {"num_attention_heads": 4, "no_rope_layers": [1, 1, 1, 0]},
    "persimmon": {"qk_layernorm": True},
    "stablelm": {"num_key_value_heads": 4},
    "deepseek_v2": {"topk_method": "greedy", "norm_topk_prob": False},
    "big_bird": {"attention_type": "original_full"},
    "gpt_neo": {"num_layers": 4, "attention_types": [[["global", "local"], 2]], "window_size": 16},
    "dots3_note_text": {"num_key_value_heads": 4},
    "bigbird_pegasus": {"attention_type": "original_full"},
}
#: Set even where a configuration's own default is None.
_EVEN_IF_NONE = ("pad_token_id", "head_dim", "n_routed_experts", "n_shared_experts")


def tiny_config(kind: str, **settings: Any) -> Any:
    """Return a configuration of `kind` with small sizes and every kind of layer it has."""
    from transformers import CONFIG_MAPPING

    return _tiny(CONFIG_MAPPING[kind], SPECIAL.get(kind, {}) | settings)


def _tiny(cls: Any, settings: Mapping[str, Any]) -> Any:
    nested = {
        name: _tiny(type(part), settings.get(name, {}))
        for name in getattr(cls, "sub_configs", {})
        if (part := getattr(cls(), name, None)) is not None
    }
    known = set(inspect.signature(cls.__init__).parameters)
    for base in cls.__mro__:
        known |= set(vars(base).get("__annotations__", {}))
    default = {} if nested else vars(cls())
    given = {
        name: size
        for name, size in SIZES.items()
        if name in known and (default.get(name) is not None or name in _EVEN_IF_NONE)
    }
    if "kv_lora_rank" in known:  # latent attention has no groups of heads
        given["num_key_value_heads"] = SIZES["num_attention_heads"]
    given |= {k: v for k, v in settings.items() if k not in nested}
    return cls(**given, **nested)


def tiny_model(config: Any, seed: int = 0) -> Any:
    """Return the model of transformers in f32 with random, lively weights."""
    from transformers import AutoModelForCausalLM, AutoModelForImageTextToText
    from transformers.models.auto.modeling_auto import MODEL_FOR_CAUSAL_LM_MAPPING

    auto: Any = AutoModelForCausalLM
    if type(config) not in MODEL_FOR_CAUSAL_LM_MAPPING:
        auto = AutoModelForImageTextToText
    torch.manual_seed(seed)
    model = auto.from_config(config, dtype=torch.float32, attn_implementation="eager")
    with contextlib.suppress(Exception):
        model.set_experts_implementation("eager")
    with torch.no_grad():
        for name, p in model.named_parameters():
            if p.dim() >= 2:
                p.normal_(0, 1 / math.sqrt(p.shape[-1]))
            elif "norm" in name:
                p.add_(0.1 * torch.randn_like(p))
            elif p.is_floating_point():
                p.add_(0.05 * torch.randn_like(p))
    return model.eval()


@torch.no_grad()
def reference(model: Any) -> list[np.ndarray]:
    """Return transformers' logits f32[tokens, V] of each prompt."""
    return [
        model(input_ids=torch.tensor([p]), use_cache=False).logits[0].float().numpy()
        for p in PROMPTS
    ]


def attempt(kind: str, folder: Path, *, captured: bool) -> tuple[str, str]:
    """Return the verdict on a type, and the message."""
    try:
        model = tiny_model(tiny_config(kind))
        want = reference(model)
        model.save_pretrained(folder)
        if not all(np.isfinite(w).all() for w in want):
            raise ValueError("logits that are not finite")
    except Exception as error:
        return _default(kind, folder, _last_line(error))
    return compare(folder, want, captured=captured)


def _default(kind: str, folder: Path, why: str) -> tuple[str, str]:
    """Return the verdict on a type of which there is no tiny model: its own sizes, captured."""
    from transformers import CONFIG_MAPPING

    from dilu.errors import DiluError
    from dilu.frontend.language.language_model import capture_language_model

    try:
        CONFIG_MAPPING[kind]().save_pretrained(folder)
    except Exception:
        return "impossible", why
    try:
        capture_language_model(folder / "config.json", config_only=True)
    except DiluError as error:
        return "refused", str(error)
    except Exception as error:
        return "internal", _last_line(error)
    return "impossible", f"captured from its configuration; {why}"


def compare(folder: Path, want: list[np.ndarray], *, captured: bool) -> tuple[str, str]:
    """Return the verdict on a checkpoint: compile it, run it, compare its logits."""
    from dilu.errors import DiluError

    try:
        got = _interpreted(folder) if captured else _compiled(folder)
    except DiluError as error:
        internal = "internal" in error.message or isinstance(error.__cause__, AssertionError)
        return "internal" if internal else "refused", str(error)
    except Exception as error:
        return "internal", _last_line(error)
    errors = [np.abs(g - w).max() / np.abs(w).max() for g, w in zip(got, want, strict=True)]
    text = f"largest error {max(errors):.1e} of the largest logit"
    return ("right" if max(errors) < ERROR else "wrong"), text


def _compiled(folder: Path) -> list[np.ndarray]:
    import dilu

    with dilu.load(dilu.compile(folder), threads=1) as session:
        return session.language.logits(PROMPTS)


def _interpreted(folder: Path) -> list[np.ndarray]:
    from captured import CapturedModel

    from dilu.frontend.language.language_model import capture_language_model

    graph, _ = capture_language_model(folder)
    return CapturedModel(graph, folder).feed(PROMPTS)


def _last_line(error: Exception) -> str:
    frame = traceback.extract_tb(error.__traceback__)[-1]
    text = " ".join(str(error).split())[:300]
    return f"{type(error).__name__}: {text} ({frame.filename}:{frame.lineno})"


def in_a_process(kind: str, limit: float, *, captured: bool) -> tuple[str, str]:
    """Return `attempt`'s verdict, made in a process that ends with the limit (in seconds)."""
    read, write = os.pipe()
    with tempfile.TemporaryDirectory() as folder:
        process = os.fork()
        if not process:
            with contextlib.suppress(BaseException):
                quiet = os.open(os.devnull, os.O_WRONLY)
                os.dup2(quiet, 1)
                os.dup2(quiet, 2)
                found = attempt(kind, Path(folder), captured=captured)
                os.write(write, json.dumps(found).encode()[:60_000])
            os._exit(0)
        os.close(write)
        text = _read_until(read, time.monotonic() + limit)
        with contextlib.suppress(ProcessLookupError):
            os.kill(process, signal.SIGKILL)
        os.waitpid(process, 0)
        os.close(read)
    if text is None:
        return "late", f"not done after {limit:.0f} s"
    verdict, said = json.loads(text or b'["internal", "the process died"]')
    return verdict, said


def _read_until(file: int, end: float) -> bytes | None:
    import select

    parts: list[bytes] = []
    while True:
        if not select.select([file], [], [], max(0.0, end - time.monotonic()))[0]:
            return None
        part = os.read(file, 65536)
        if not part:
            return b"".join(parts)
        parts.append(part)


def all_kinds() -> list[str]:
    """Return every type that has a causal language model, or one inside of a multimodal model."""
    from transformers.models.auto import modeling_auto as auto

    found = [*auto.MODEL_FOR_CAUSAL_LM_MAPPING_NAMES]
    found += auto.MODEL_FOR_IMAGE_TEXT_TO_TEXT_MAPPING_NAMES
    return list(dict.fromkeys(found))


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--only", help="types, separated by commas")
    parser.add_argument("--captured", action="store_true", help="interpret the captured graph")
    parser.add_argument("--limit", type=float, default=90.0, help="seconds for a type")
    parser.add_argument("--out", type=Path, help="write the verdicts to this JSON file")
    options = parser.parse_args()
    import transformers

    import dilu.compiler
    import dilu.frontend.language.language_model
    import dilu.runtime.session  # noqa: F401  (once, not in every process)

    transformers.logging.set_verbosity_error()
    verdicts: dict[str, dict[str, Any]] = {}
    for kind in options.only.split(",") if options.only else all_kinds():
        begun = time.monotonic()
        verdict, text = in_a_process(kind, options.limit, captured=options.captured)
        seconds = round(time.monotonic() - begun, 1)
        verdicts[kind] = {"verdict": verdict, "text": text, "seconds": seconds}
        print(f"{verdict:10} {kind:24} {seconds:5} s  {text.splitlines()[0]}", flush=True)
        if options.out:
            options.out.write_text(json.dumps(verdicts, indent=1))
    print(dict(collections.Counter(v["verdict"] for v in verdicts.values())))


if __name__ == "__main__":
    sys.path.insert(0, str(Path(__file__).parent))
    main()
