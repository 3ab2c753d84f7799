"""Tiny random models of any architecture, saved as transformers saves them, and their captures."""

from __future__ import annotations

import json
import math
from pathlib import Path
from typing import Any

import numpy as np
import torch
from captured import CapturedModel

from dilu.frontend.language.language_model import capture_language_model

TINY: dict[str, Any] = {
    "vocab_size": 96,
    "hidden_size": 64,
    "intermediate_size": 80,
    "num_hidden_layers": 3,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "max_position_embeddings": 256,
    "bos_token_id": 0,
    "eos_token_id": 1,
    "pad_token_id": 2,
}
PROMPT = [(5 + 37 * i) % 93 for i in range(40)]
OTHER = [7, 90, 33]


def save(folder: Path, kind: str, **settings: Any) -> Any:
    """Save a random model of the type with these settings; return it, in f32 and eager."""
    from transformers import AutoConfig, AutoModelForCausalLM

    config = AutoConfig.for_model(kind, **{**TINY, **settings})
    torch.manual_seed(0)
    model = AutoModelForCausalLM.from_config(
        config, dtype=torch.float32, attn_implementation="eager"
    )
    with torch.no_grad():
        for name, p in model.named_parameters():
            if p.dim() >= 2:
                p.normal_(0, 1 / math.sqrt(p.shape[-1]))
            elif "norm" in name:
                p.add_(0.1 * torch.randn_like(p))
            else:
                p.normal_(0, 0.05)
    model.eval().save_pretrained(folder)
    return model


def write_config(folder: Path, kind: str, **settings: Any) -> Path:
    """Write the config.json of a tiny model; return it."""
    file = folder / "config.json"
    file.write_text(json.dumps({**TINY, "model_type": kind, **settings}))
    return file


def capture_config(folder: Path, kind: str, **settings: Any) -> Any:
    """Return the graph of a tiny model's configuration, without weights."""
    return capture_language_model(write_config(folder, kind, **settings), config_only=True)[0]


@torch.no_grad()
def largest_error(folder: Path, model: Any) -> float:
    """Return the captured model's largest error, of the largest logit: a prompt, and a batch."""
    graph, _ = capture_language_model(folder)
    prompts = [PROMPT, OTHER]
    got = CapturedModel(graph, folder, wide=True).feed(prompts)
    want = [model(input_ids=torch.tensor([p])).logits[0].numpy() for p in prompts]
    return max(float(np.abs(g - w).max() / np.abs(w).max()) for g, w in zip(got, want, strict=True))


def calls(graph: Any) -> list[tuple[int, str]]:
    """Return how many layers each run of a graph has, and the kind of its layers."""
    nodes = [n for n in graph.function("main").nodes if n.op.name == "call"]
    return [(n.op.times, n.op.body.name) for n in nodes]


def windows(graph: Any) -> list[int | None]:
    """Return the attention window of every run of a graph."""
    found: list[int | None] = []
    for node in graph.function("main").nodes:
        if node.op.name == "call":
            found += [n.op.window for n in node.op.body.nodes if n.op.name == "attention"]
    return found
