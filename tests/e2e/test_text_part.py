"""A quantized language model that is a part of a model that sees."""

from __future__ import annotations

import json
from pathlib import Path

import checkpoints
import numpy as np
import pytest
from captured import CapturedModel
from safetensors.torch import load_file, save_file

from dilu.frontend.language.language_model import capture_language_model

TOKENS = [5, 17, 3, 99, 42, 7, 250]
VISION = {"model_type": "pixtral", "hidden_size": 16, "intermediate_size": 16, "head_dim": 8}


@pytest.mark.slow
def test_names_and_lists_are_those_of_the_files(tmp_path: Path):
    """Tensors and the list of plain modules go by where the text part lies in the files."""
    mistral = checkpoints.FAMILIES["llama"] | {"model_type": "mistral", "sliding_window": None}
    plain = ("layers.0.self_attn.q_proj",)
    model = checkpoints.make_checkpoint(tmp_path, mistral, exclude=plain, num_hidden_layers=2)
    file = tmp_path / "model.safetensors"
    inner = {f"language_model.{name}": tensor for name, tensor in load_file(file).items()}
    save_file(inner, file, metadata={"format": "pt"})
    text = json.loads((tmp_path / "config.json").read_text())
    said = text.pop("quantization_config")
    said["modules_to_not_convert"] = [f"language_model.model.{name}" for name in plain]
    config = {
        "model_type": "mistral3",
        "architectures": ["Mistral3ForConditionalGeneration"],
        "text_config": text,
        "vision_config": VISION,
        "quantization_config": said,
    }
    (tmp_path / "config.json").write_text(json.dumps(config))
    graph, info = capture_language_model(tmp_path)
    (got,) = CapturedModel(graph, tmp_path).feed([TOKENS])
    np.testing.assert_allclose(got, model.logits(TOKENS), rtol=1e-4, atol=1e-4)
    assert "only the text part" in info.notes[0]
