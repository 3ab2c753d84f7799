"""What models say to the attention and experts interfaces: all of it is known, used or refused."""

import ast
import re
from dataclasses import dataclass, field
from pathlib import Path
from types import SimpleNamespace

import pytest
import saved
import torch
import transformers
from torch import nn

from dilu.errors import UnsupportedError
from dilu.frontend.language import interfaces
from dilu.frontend.language.masks import IRRELEVANT as IRRELEVANT_OF_MASKS
from dilu.frontend.language.masks import USED as USED_BY_MASKS
from dilu.frontend.language.masks import Mask

MODELS = Path(transformers.__file__).parent / "models"


def called(node: ast.AST) -> str:
    """Return the name of what a call calls, without the modules before it."""
    function = node.func if isinstance(node, ast.Call) else None
    return getattr(function, "id", None) or getattr(function, "attr", "")


@dataclass
class Code:
    """What the code of the installed transformers' models says to the interfaces."""

    keywords: dict[str, str] = field(default_factory=dict)  # of attention, each with a model
    experts: list[tuple[str, ast.ClassDef]] = field(default_factory=list)

    def read(self, model: str, text: str) -> None:
        """Parse only what matters of a file: there are hundreds."""
        for start in re.finditer(r"attention_interface\(", text):
            depth, at = 1, start.end()
            while depth:
                depth += {"(": 1, ")": -1}.get(text[at], 0)
                at += 1
            call = ast.parse("f(" + text[start.end() : at]).body[0]
            keywords = next(n for n in ast.walk(call) if isinstance(n, ast.Call)).keywords
            self.keywords |= {k.arg: model for k in keywords if k.arg}
        classes = r"^@use_experts_implementation[^\n]*\nclass .*?(?=^\S)"
        for found in re.finditer(classes, text, re.MULTILINE | re.DOTALL):
            (node,) = ast.parse(found.group()).body
            assert isinstance(node, ast.ClassDef)
            self.experts.append((f"{model}.{node.name}", node))


@pytest.fixture(scope="module")
def code() -> Code:
    found = Code()
    for file in sorted(MODELS.glob("*/modeling_*.py")):
        found.read(file.parent.name, file.read_text(encoding="utf-8"))
    return found


def test_every_keyword_of_attention_is_known(code):
    assert len(code.keywords) > 15
    positional = {"query", "key", "value"}
    known = interfaces.USED | set(interfaces.IRRELEVANT) | set(interfaces.REFUSED) | positional
    assert {k: m for k, m in code.keywords.items() if k not in known} == {}
    assert not set(interfaces.IRRELEVANT) & set(interfaces.REFUSED)


def test_every_argument_of_mask_interfaces_is_known():
    tree = ast.parse((MODELS.parent / "masking_utils.py").read_text(encoding="utf-8"))
    calls = [n for n in ast.walk(tree) if called(n) == "mask_interface"]
    found = {k.arg for call in calls for k in call.keywords}
    assert len(found) > 5
    assert found <= {*IRRELEVANT_OF_MASKS, *USED_BY_MASKS}


def test_every_attribute_of_experts_is_known(code):
    """Attributes that no one here knows are refused when they appear; this says which they are."""
    known = {*interfaces.FORM, *interfaces.SIZES, *interfaces.OF_THE_GATE}
    known |= {"gate_up_proj", "down_proj"}
    refused = {"up_proj", "gate_up_proj_bias", "down_proj_bias", "post_expert_norm"}
    assert len(code.experts) > 50
    for name, cls in code.experts:
        nodes = [n for n in ast.walk(cls) if isinstance(n, ast.Attribute)]
        stored = {n.attr for n in nodes if isinstance(n.ctx, ast.Store)}
        assert stored <= known | refused, name


def test_every_experts_class_computes_the_routed_sum_alone(code):
    """The forward of a class that is captured has no more in it: no other product or norm."""
    plain = {
        "zeros_like", "no_grad", "one_hot", "permute", "greater", "sum", "nonzero", "where",
        "linear", "chunk", "act_fn", "index_add_", "to", "_apply_gate",
    }  # fmt: skip
    ordinary = [(n, c) for n, c in code.experts if not ast.unparse(c.decorator_list[0]).count("=")]
    for name, cls in ordinary:
        forward = next(f for f in cls.body if getattr(f, "name", "") == "forward")
        assert {called(n) for n in ast.walk(forward) if isinstance(n, ast.Call)} <= plain, name


# ----------------------------------------------------------------------- attention


class Attention(nn.Module):
    """What an attention module has that attention functions read."""

    def __init__(self, **attributes) -> None:
        super().__init__()
        self.num_key_value_groups = 2
        self.config = SimpleNamespace(max_position_embeddings=64)
        for name, value in attributes.items():
            setattr(self, name, value)
        self.eval()


def eager_attention_forward(module, query, key, value, attention_mask, scaling, **_):
    key = key.repeat_interleave(module.num_key_value_groups, 1)
    value = value.repeat_interleave(module.num_key_value_groups, 1)
    weights = (query @ key.transpose(2, 3) * scaling + attention_mask).softmax(-1)
    return (weights @ value).transpose(1, 2), weights


def attend(module=None, *, heads=4, keys=2, tokens=5, mask=None, **options):
    from torch._subclasses.fake_tensor import FakeTensorMode

    with FakeTensorMode():
        q = torch.zeros(options.pop("batch", 1), heads, tokens, 8)
        k = torch.zeros(1, keys, options.pop("key_tokens", tokens), 8)
        return interfaces.attention(
            module or Attention(), q, k, k, Mask() if mask is None else mask, **options
        )


def test_attention_is_captured():
    out, weights = attend(scaling=0.5, sliding_window=None, position_ids=torch.zeros(1, 5))
    assert tuple(out.shape) == (1, 5, 4, 8) and out.is_contiguous() and weights is None
    attend(mask=Mask(3), sliding_window=3)
    attend(mask=Mask(3))  # the mask alone says it
    attend(sliding_window=64)  # of a context of 64: no window


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"sliding_window": 8}, "whose mask is causal, while sliding_window is 8"),
        ({"mask": Mask(9), "sliding_window": 8}, "within a window of 9, while sliding_window is 8"),
        ({"mask": torch.zeros(1, 1, 5, 5)}, "a mask that the model makes itself"),
        ({"is_causal": False}, "said not to be causal"),
        ({"module": Attention(is_causal=False)}, "said not to be causal"),
        ({"dropout": 0.1}, "attention with dropout"),
        ({"softcap": 30.0}, r"with softcap: scores that are capped \(Attention\)"),
        ({"s_aux": torch.zeros(4)}, "with s_aux: sinks"),
        ({"sinks": torch.zeros(4)}, "with sinks: sinks"),
        ({"indices": torch.zeros(4)}, "with indices: an indexer that chooses keys"),
        ({"block_indices": torch.zeros(4)}, "with block_indices: an indexer that chooses blocks"),
        ({"position_bias": torch.zeros(4)}, "with position_bias"),
        ({"cu_seq_lens_q": torch.zeros(2)}, "with cu_seq_lens_q: how sequences are packed"),
        ({"temperature": 2.0}, "with temperature: an unknown keyword"),
        ({"batch": 2}, "attention in a batch that the model makes"),
        ({"key_tokens": 9}, "keys of other tokens than the queries'"),
        ({"heads": 3}, "heads of keys that no queries share evenly"),
    ],
)
def test_attention_that_is_not_captured_is_refused_by_name(options, message):
    with pytest.raises(UnsupportedError, match=message):
        attend(**options)


def test_no_mask_is_bidirectional():
    with pytest.raises(UnsupportedError, match="without a mask, where every token sees all"):
        interfaces.attention(Attention(), *[torch.zeros(1, 2, 5, 8)] * 3, None)


@pytest.mark.parametrize(
    "change",
    [
        lambda scores: 20 * torch.tanh(scores / 20),
        lambda scores: scores + torch.arange(scores.shape[-1]),
        lambda scores: scores * 1.01,
    ],
    ids=["capped", "biased", "scaled"],
)
def test_another_attention_function_is_refused(monkeypatch, change):
    def other(module, query, key, value, attention_mask, scaling, **more):
        key, value = (x.repeat_interleave(2, 1) for x in (key, value))
        scores = change(query @ key.transpose(2, 3) * scaling)
        return ((scores + attention_mask).softmax(-1) @ value).transpose(1, 2), None

    attend()
    monkeypatch.setitem(globals(), "eager_attention_forward", other)
    with pytest.raises(UnsupportedError, match="attention of another form than softmax"):
        attend()


def test_an_attention_function_with_weights_of_its_own_is_refused(monkeypatch):
    def other(module, query, key, value, attention_mask, scaling, **more):
        return query.transpose(1, 2) * module.missing, None

    monkeypatch.setitem(globals(), "eager_attention_forward", other)
    with pytest.raises(UnsupportedError, match="cannot be proved to be softmax attention"):
        attend()


# ----------------------------------------------------------------------- experts


class Experts(nn.Module):
    """An experts module as transformers' decorator makes it."""

    has_gate, has_bias, has_post_expert_norm = True, False, False
    is_transposed, is_concatenated = False, True

    def __init__(self, act_fn=torch.nn.functional.silu, **attributes) -> None:
        super().__init__()
        self.config = SimpleNamespace(hidden_act="silu")
        self.act_fn = act_fn
        self.gate_up_proj = nn.Parameter(torch.zeros(4, 6, 5))
        self.down_proj = nn.Parameter(torch.zeros(4, 5, 3))
        for name, value in attributes.items():
            setattr(self, name, value)

    def _apply_gate(self, x):
        gate, up = x.chunk(2, -1)
        return self.act_fn(gate) * up


class Clamped(Experts):
    def _apply_gate(self, x):
        gate, up = x.chunk(2, -1)
        return self.act_fn(gate.clamp(max=self.limit)) * up.clamp(-self.limit, self.limit)


class Shifted(Experts):
    def _apply_gate(self, x):
        gate, up = x.chunk(2, -1)
        return gate * torch.sigmoid(gate * self.alpha) * (up + 1)


class Interleaved(Experts):
    def _apply_gate(self, x):
        return self.act_fn(x[..., ::2]) * x[..., 1::2]


def route(module):
    from torch._subclasses.fake_tensor import FakeTensorMode

    with FakeTensorMode(allow_non_fake_inputs=True):
        x, weights = torch.zeros(7, 5), torch.zeros(7, 2)
        return interfaces.experts(module, x, weights.long(), top_k_weights=weights)


@pytest.mark.parametrize(
    ("act_fn", "name"),
    [
        (torch.nn.functional.silu, "silu"),
        (nn.SiLU(), "silu"),
        (lambda x: x * torch.sigmoid(x), "silu"),
        (nn.GELU(approximate="tanh"), "gelu_tanh"),
    ],
)
def test_the_activation_of_experts_is_what_they_compute(act_fn, name):
    assert interfaces.activation_of(Experts(act_fn)) == name
    assert tuple(route(Experts(act_fn)).shape) == (7, 5)


def test_a_limit_that_is_never_reached():
    route(Clamped(limit=1e9))


@pytest.mark.parametrize(
    ("module", "message"),
    [
        (Experts(nn.GELU()), r"another gate than activation\(gate\) \* up \(Experts"),
        (Experts(torch.relu), "another gate"),
        (Clamped(limit=7.0), "another gate .*Clamped"),
        (Shifted(alpha=1.702), "another gate"),
        (Interleaved(), "another gate"),
        (Experts(has_bias=True), "experts of the form of Experts: has_bias is True"),
        (Experts(has_gate=False), "has_gate is False"),
        (Experts(is_transposed=True), "is_transposed is True"),
        (Experts(is_concatenated=False), "is_concatenated is False"),
        (Experts(has_post_expert_norm=True), "has_post_expert_norm is True"),
        (Experts(output_multiplier=2.0), "the unknown attribute 'output_multiplier'"),
        (Experts(scales=nn.Parameter(torch.ones(4))), r"experts with 'scales' \(Experts\)"),
    ],
)
def test_experts_of_another_form_are_refused(module, message):
    with pytest.raises(UnsupportedError, match=message):
        route(module)


def test_a_model_with_sinks(tmp_path):
    more = {"num_local_experts": 4, "num_experts_per_tok": 2, "head_dim": 16, "sliding_window": 8}
    with pytest.raises(UnsupportedError, match=r"attention with s_aux: sinks \(GptOssAttention\)"):
        saved.capture_config(tmp_path, "gpt_oss", **more)
