"""Configurations that are almost right: each is compiled rightly, or refused; none is wrong.

    python tests/mutations.py --count 300 --seed 0      # prints what is wrong, and a table

A mutant is a tiny checkpoint of a supported family of which one to three entries of config.json or
its quantization_config were removed, changed or added; its weights stay as they are. What it means
is what transformers makes of it in f32, on the weights dequantized in f64. Verdicts:

    right      dilu's logits are those of transformers
    refused    a DiluError that is not an internal one
    unjudged   compiled, but transformers itself refuses the configuration (for eyes)
    wrong      other logits than transformers', or weights that transformers would make up
    internal   any other exception
"""

from __future__ import annotations

import argparse
import copy
import json
import random
import shutil
import sys
import tempfile
import traceback
from collections import Counter
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import checkpoints
import numpy as np
import torch
from safetensors.torch import save_file

import dilu

FAMILIES = ("llama", "qwen2", "qwen3", "qwen3_moe", "glm4_moe", "deepseek_v3", "qwen3_sliding")
SMALL = {"num_hidden_layers": 2, "vocab_size": 96, "hidden_size": 96}
PROMPT = [(7 + 37 * i) % 90 for i in range(41)]  # longer than any window here
#: Entries that other families, older files and other tools have.
FOREIGN: dict[str, tuple[Any, ...]] = {
    "is_causal": (False, True),
    "use_bidirectional_attention": (True, False),
    "sliding_window": (8, None, 4096),
    "use_sliding_window": (True, False),
    "max_window_layers": (0, 1, 99),
    "layer_types": (
        ["full_attention", "full_attention"],
        ["sliding_attention", "full_attention"],
        ["chunked_attention", "full_attention"],
        ["linear_attention", "full_attention"],
        ["full_attention"],
    ),
    "attention_chunk_size": (8,),
    "attention_bias": (True, False),
    "mlp_bias": (True, False),
    "use_qk_norm": (True, False),
    "qk_layernorm": (True,),
    "tie_word_embeddings": (True, False),
    "hidden_act": ("silu", "gelu", "relu", "gelu_pytorch_tanh", "swish", "no_such_act"),
    "final_logit_softcapping": (30.0, None),
    "attn_logit_softcapping": (50.0,),
    "logit_scale": (0.5, 1.0),
    "logits_scaling": (4.0,),
    "embedding_multiplier": (2.0,),
    "residual_multiplier": (0.5,),
    "attention_multiplier": (0.1,),
    "query_pre_attn_scalar": (16,),
    "head_dim": (24, 48, None),
    "partial_rotary_factor": (0.5, 1.0),
    "rope_theta": (500000.0, 10000),
    "rope_scaling": (
        None,
        {"type": "linear", "factor": 2.0},
        {"rope_type": "linear", "factor": 2.0},
        {"rope_type": "dynamic", "factor": 2.0},
        {"rope_type": "yarn", "factor": 4.0, "original_max_position_embeddings": 64},
        {"rope_type": "yarn", "factor": 4.0, "attention_factor": 0.8},
        {"rope_type": "llama3", "factor": 8.0},
        {"rope_type": "no_such_rope", "factor": 8.0},
        {"rope_type": "mrope", "mrope_section": [4, 4, 4]},
    ),
    "rope_parameters": (
        {"rope_type": "default", "rope_theta": 500000.0},
        {"rope_type": "linear", "factor": 2.0, "rope_theta": 10000.0},
        {"full_attention": {"rope_type": "default", "rope_theta": 10000.0}},
    ),
    "rope_interleave": (False, True),
    "norm_topk_prob": (False, True),
    "routed_scaling_factor": (1.0, 2.5),
    "scoring_func": ("softmax", "sigmoid"),
    "topk_method": ("greedy", "noaux_tc"),
    "n_group": (1, 2),
    "topk_group": (1,),
    "num_experts_per_tok": (1, 2, 3),
    "first_k_dense_replace": (0, 1, 2),
    "decoder_sparse_step": (1, 2),
    "mlp_only_layers": ([], [0]),
    "moe_layer_freq": (1, 2),
    "n_shared_experts": (1, 2, 0),
    "rms_norm_eps": (1e-5, 1e-2),
    "num_nextn_predict_layers": (1,),
    "num_kv_shared_layers": (1,),
    "attention_dropout": (0.1, 0.0),
    "torch_dtype": ("float32", "bfloat16", "float16", "no_such_type"),
    "dtype": ("float32", "bfloat16"),
    "transformers_version": ("4.40.0",),
    "use_cache": (False, True),
    "pretraining_tp": (1, 2),
    "architectures": (["LlamaForCausalLM"], ["NoSuchForCausalLM"], None),
    "model_type": ("llama", "qwen3", "mistral", "kimi_k2", "no_such_type"),
    "auto_map": ({"AutoModelForCausalLM": "modeling_x.XForCausalLM"},),
    "a_key_nobody_knows": (True, 3, None),
}
FOREIGN_QUANTIZATION: dict[str, tuple[Any, ...]] = {
    "quant_method": ("fp8", "compressed-tensors", "gptq", "fbgemm_fp8", "no_such_method", None),
    "weight_block_size": ([128, 128], [64, 64], [64, 128], [1, 128], None, [128], "128"),
    "activation_scheme": ("dynamic", "static"),
    "fmt": ("e4m3", "e5m2", "float8_e4m3fn", "int8"),
    "scale_fmt": ("ue8m0", "float"),
    "modules_to_not_convert": (["lm_head"], ["q_proj"], ["model.layers.0"], [], None),
    "ignored_layers": (["lm_head"], ["down_proj"]),
    "transform_config": ({"config_groups": {"R1": {"type": "hadamard", "apply": []}}}, {}, None),
    "sparsity_config": ({"format": "dense"}, {"format": "sparse-24-bitmask"}),
    "kv_cache_scheme": (None, {"num_bits": 8, "type": "float"}),
    "dequantize": (True, False),
    "symmetric": (False, True),
    "zero_point": (True, False),
    "packing_format": ("auto_round:fp8",),
    "a_key_nobody_knows": (True, None),
}


@dataclass(frozen=True)
class Mutant:
    """A changed configuration and what was changed in it."""

    family: str
    changes: tuple[str, ...]
    config: dict[str, Any]

    def __str__(self) -> str:
        return f"{self.family}: {'; '.join(self.changes)}"


@dataclass(frozen=True)
class Verdict:
    """What became of a mutant; `kind` is one of those that the module names."""

    kind: str
    detail: str


class Nursery:
    """The checkpoints that mutants are made of, one for each family, in `folder`."""

    def __init__(self, folder: Path, families: tuple[str, ...] = FAMILIES) -> None:
        self.folder = folder
        self.made: dict[str, checkpoints.TinyCheckpoint] = {}
        for family in families:
            settings = SMALL | ({"sliding_window": 8} if "sliding" in family else {})
            block = {"block": (64, 32)}  # two rows of blocks also for small weights
            self.made[family] = checkpoints.make_checkpoint(
                folder / family, family, **block, **settings
            )
            plain = folder / f"{family}.plain"
            plain.mkdir()
            state = checkpoints.unstack(self.made[family].model.state_dict())
            kept = {k: v.contiguous().clone() for k, v in state.items()}
            save_file(kept, plain / "model.safetensors", metadata={"format": "pt"})

    def mutants(self, count: int, seed: int) -> Iterator[Mutant]:
        """Yield `count` mutants, of the families in turn; the same for the same seed."""
        generator = random.Random(seed)
        families = list(self.made)
        for i in range(count):
            family = families[i % len(families)]
            config = json.loads((self.folder / family / "config.json").read_text())
            changes = tuple(
                mutate(config, generator) for _ in range(generator.choice((1, 1, 2, 3)))
            )
            yield Mutant(family, changes, config)

    def judge(self, mutant: Mutant) -> Verdict:
        """Compile a mutant, run it, and compare with transformers."""
        folder = self.folder / "mutant"
        shutil.copytree(self.folder / mutant.family, folder, dirs_exist_ok=True)
        (folder / "config.json").write_text(json.dumps(mutant.config))
        try:
            with dilu.load(dilu.compile(folder), threads=1) as session:
                got = np.asarray(session.language.logits([PROMPT])[0])
        except dilu.DiluError as error:
            text = " | ".join(str(error).splitlines())
            internal = "bug" in text or "internal" in text or not text.strip()
            return Verdict("internal" if internal else "refused", text)
        except Exception as error:
            place = traceback.extract_tb(error.__traceback__)[-1]
            text = f"{type(error).__name__}: {error} at {place.filename}:{place.lineno}"
            return Verdict("internal", text)
        want = self.reference(mutant)
        if isinstance(want, str):
            made_up = want.startswith("made up")
            return Verdict("wrong" if made_up else "unjudged", want)
        row = got[-1] if got.ndim == 2 else got
        off = float(np.abs(row - want).max() / max(np.abs(want).max(), 1e-9))
        return Verdict("right" if off < 1e-3 else "wrong", f"relative error {off:.1e}")

    def reference(self, mutant: Mutant) -> np.ndarray | str:
        """Return the logits of the last token by transformers, or why there are none."""
        from transformers import AutoModelForCausalLM

        folder = self.folder / f"{mutant.family}.plain"
        config = {k: v for k, v in mutant.config.items() if k != "quantization_config"}
        (folder / "config.json").write_text(json.dumps(config))
        try:
            model, info = AutoModelForCausalLM.from_pretrained(
                folder, dtype=torch.float32, attn_implementation="eager", output_loading_info=True
            )
            with torch.no_grad():
                logits = model.eval()(torch.tensor([PROMPT])).logits[0, -1].numpy()
        except Exception as error:
            return f"transformers refuses: {type(error).__name__} {str(error)[:120]}"
        if info["missing_keys"] or info["mismatched_keys"]:
            lost = sorted(map(str, [*info["missing_keys"], *info["mismatched_keys"]]))
            return f"made up by transformers: {', '.join(lost)[:160]}"
        return logits


def mutate(config: dict[str, Any], generator: random.Random) -> str:
    """Change one entry of a configuration in place; return what was done."""
    where, pool, name = config, FOREIGN, ""
    if "quantization_config" in config and generator.random() < 0.35:
        where, pool = config["quantization_config"], FOREIGN_QUANTIZATION
        name = "quantization_config."
    elif isinstance(config.get("rope_scaling"), dict) and generator.random() < 0.2:
        where, pool, name = config["rope_scaling"], {}, "rope_scaling."
    known = [k for k in where if k != "quantization_config"]
    kind = generator.choice(("remove", "change", "add") if pool else ("remove", "change"))
    if kind == "add" or not known:
        key = generator.choice(list(pool or {"a_key_nobody_knows": ()}))
        where[key] = copy.deepcopy(generator.choice(pool.get(key, (1,))))
        return f"{name}{key} = {json.dumps(where[key])}"
    key = generator.choice(known)
    if kind == "remove":
        del where[key]
        return f"{name}{key} removed"
    where[key] = changed(where[key], generator)
    return f"{name}{key} → {json.dumps(where[key])}"


def changed(value: Any, generator: random.Random) -> Any:
    """Return something like `value` that is not it."""
    if isinstance(value, bool):
        return generator.choice((not value, None, "true"))
    if isinstance(value, int):
        return generator.choice((value * 2, value // 2, value + 1, 0, -1, None, str(value)))
    if isinstance(value, float):
        return generator.choice((value * 2, 0.0, -value, None, float("inf"), str(value)))
    if isinstance(value, str):
        return generator.choice((value + "x", value.upper(), "", None, 1))
    if isinstance(value, list):
        return generator.choice((value[:-1], value * 2, value[::-1], None, {}, "x"))
    return generator.choice((None, {}, [], 1, "x"))


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--count", type=int, default=300)
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--verbose", action="store_true", help="print every mutant")
    options = parser.parse_args()
    torch.set_num_threads(1)
    counts: Counter[str] = Counter()
    with tempfile.TemporaryDirectory() as folder:
        nursery = Nursery(Path(folder))
        for mutant in nursery.mutants(options.count, options.seed):
            verdict = nursery.judge(mutant)
            counts[verdict.kind] += 1
            if options.verbose or verdict.kind not in ("right", "refused"):
                print(f"{verdict.kind:9s} {mutant}\n          {verdict.detail[:400]}", flush=True)
    print(", ".join(f"{count} {kind}" for kind, count in sorted(counts.items())))
    return 1 if counts["wrong"] or counts["internal"] else 0


if __name__ == "__main__":
    sys.exit(main())
