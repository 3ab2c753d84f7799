"""Buffers that no checkpoint holds have the values that transformers gives them after loading."""

import pytest
import saved
import torch

from dilu.errors import UnsupportedError
from dilu.frontend.checkpoint.checkpoint import read_config
from dilu.frontend.language.buffers import real_buffers
from dilu.frontend.language.language_model import capture_language_model

YARN = {
    "rope_type": "yarn", "factor": 4.0, "original_max_position_embeddings": 64, "beta_fast": 16,
    "beta_slow": 2, "mscale": 0.8, "mscale_all_dim": 0.9, "truncate": False,
}  # fmt: skip
KINDS = {
    "default": ("llama", {"rope_theta": 5e5}),
    "linear": ("llama", {"rope_scaling": {"type": "linear", "factor": 3.0}}),
    "yarn": ("llama", {"rope_scaling": YARN}),
    "yarn with a factor": ("llama", {"rope_scaling": {**YARN, "attention_factor": 0.7}}),
    "partial": ("stablelm", {"partial_rotary_factor": 0.5, "num_key_value_heads": 4}),
    "by kind of layer": ("gemma3_text", {"head_dim": 16, "sliding_window": 8}),
    "scaled embedding": ("gemma", {"head_dim": 16}),
    "sinusoids": ("xglm", {"d_model": 64, "num_layers": 2, "attention_heads": 4, "ffn_dim": 96}),
}


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("name", KINDS)
def test_values_are_those_after_loading(tmp_path, name, dtype):
    from torch._subclasses.fake_tensor import FakeTensorMode
    from transformers import AutoModelForCausalLM

    kind, settings = KINDS[name]
    made = saved.save(tmp_path, kind, **settings)
    loaded = AutoModelForCausalLM.from_pretrained(tmp_path, dtype=dtype)
    with FakeTensorMode(allow_non_fake_inputs=True):
        fake = AutoModelForCausalLM.from_config(made.config, dtype=dtype)
    found = real_buffers(fake, dtype)
    want = {n: b for n, b in loaded.named_buffers() if n not in loaded.state_dict()}
    assert want and found.keys() == want.keys()
    for buffer, value in want.items():
        assert found[buffer].dtype == value.dtype
        torch.testing.assert_close(found[buffer], value, rtol=0, atol=0, msg=buffer)


def test_a_buffer_of_parameters_is_refused(monkeypatch):
    from torch._subclasses.fake_tensor import FakeTensorMode
    from transformers import AutoConfig, AutoModelForCausalLM
    from transformers.models.llama import modeling_llama

    build = modeling_llama.LlamaModel.__init__

    def with_buffer(self, config):
        build(self, config)
        table = self.embed_tokens.weight.detach().sum(1)
        self.register_buffer("sums", table, persistent=False)

    monkeypatch.setattr(modeling_llama.LlamaModel, "__init__", with_buffer)
    with FakeTensorMode(allow_non_fake_inputs=True):
        config = AutoConfig.for_model("llama", **saved.TINY)
        model = AutoModelForCausalLM.from_config(config, dtype=torch.float32)
    with pytest.raises(UnsupportedError, match=r"compute the buffer 'model\.sums' of Llama"):
        real_buffers(model, torch.float32)


@pytest.mark.slow
def test_buffers_of_layers_are_stacked(tmp_path, monkeypatch):
    from transformers.models.llama import modeling_llama

    cls = modeling_llama.LlamaDecoderLayer
    build, forward = cls.__init__, cls.forward

    def with_buffer(self, config, layer_idx):
        build(self, config, layer_idx)
        self.register_buffer("scale", torch.tensor(1.0 + layer_idx), persistent=False)

    monkeypatch.setattr(cls, "__init__", with_buffer)
    monkeypatch.setattr(cls, "forward", lambda self, x, **k: forward(self, x * self.scale, **k))
    model = saved.save(tmp_path, "llama")
    assert saved.largest_error(tmp_path, model) < 1e-5
    assert saved.calls(capture_language_model(tmp_path)[0]) == [(3, "layer_0")]


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({"rope_scaling": {"rope_type": "dynamic", "factor": 2.0}}, "of type 'dynamic' is not"),
        ({"rope_scaling": {**YARN, "beta_quick": 3}}, "with the key 'beta_quick', which nothing"),
        ({"rope_parameters": {"rope_type": "default", "theta": 5.0}}, "with the key 'theta'"),
    ],
)
def test_rotary_parameters_that_are_not_captured(tmp_path, settings, message):
    with pytest.raises(UnsupportedError, match=message):
        saved.capture_config(tmp_path, "llama", **settings)


@pytest.mark.slow
def test_rotary_parameters_that_are(tmp_path):
    saved.capture_config(tmp_path, "llama", rope_scaling={**YARN, "attention_factor": None})
    assert read_config(tmp_path / "config.json")["rope_scaling"]["mscale"] == 0.8


def test_rotary_keys_of_the_installed_transformers_are_known():
    from transformers.modeling_rope_utils import RopeParameters

    from dilu.frontend.language.buffers import ROTARY

    assert set(RopeParameters.__annotations__) <= ROTARY
