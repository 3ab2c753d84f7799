"""Runs of layers: formed by what layers are and by what they are handed; all else is refused."""

import pytest
import saved
import torch
from torch import nn

from dilu.errors import UnsupportedError
from dilu.frontend.language.layer_call import Arguments, Returned
from dilu.frontend.language.runs import signature

GEMMA4 = {
    "num_hidden_layers": 4, "head_dim": 16, "global_head_dim": 16, "hidden_size_per_layer_input": 8,
    "vocab_size_per_layer_input": 96, "sliding_window": 8, "num_kv_shared_layers": 0,
    "layer_types": ["sliding_attention", "sliding_attention", "full_attention", "full_attention"],
}  # fmt: skip


@pytest.fixture
def llama(monkeypatch):
    """Return a function that replaces a method of llama's classes."""
    from transformers.models.llama import modeling_llama

    def replace(cls: str, name: str, value) -> None:
        monkeypatch.setattr(getattr(modeling_llama, cls), name, value)

    return replace


def original(cls: str, name: str = "forward"):
    from transformers.models.llama import modeling_llama

    return getattr(getattr(modeling_llama, cls), name)


# ----------------------------------------------------------------- which layers are a run


@pytest.mark.slow
def test_layers_with_tensors_of_their_own_are_runs_of_their_own(tmp_path):
    model = saved.save(tmp_path, "gemma4_text", **GEMMA4)
    assert saved.largest_error(tmp_path, model) < 1e-5
    graph = saved.capture_config(tmp_path, "gemma4_text", **GEMMA4)
    assert [times for times, _ in saved.calls(graph)] == [1, 1, 1, 1]
    assert saved.windows(graph) == [8, 8, None, None]


def model_with_rows(self, input_ids=None, position_ids=None, **_):
    """A llama that hands every layer a row of a table, by the layer's place in the list."""
    from transformers.modeling_outputs import BaseModelOutputWithPast
    from transformers.models.llama.modeling_llama import create_causal_mask

    hidden = self.embed_tokens(input_ids)
    if position_ids is None:
        position_ids = torch.arange(hidden.shape[1])[None]
    mask = create_causal_mask(self.config, hidden, None, None, position_ids=position_ids)
    tables = [self.rotary_emb(hidden, position_ids), self.rotary_emb(hidden, position_ids * 2)]
    for i, layer in enumerate(self.layers):
        hidden = layer(
            hidden, attention_mask=mask, position_embeddings=tables[self.config.tables[i]]
        )
    return BaseModelOutputWithPast(last_hidden_state=self.norm(hidden))


@pytest.mark.slow
def test_a_list_of_the_configuration_by_layer(tmp_path, llama):
    tables = {"num_hidden_layers": 5, "tables": [0, 0, 1, 1, 0]}
    llama("LlamaModel", "forward", model_with_rows)
    model = saved.save(tmp_path, "llama", **tables)
    assert saved.largest_error(tmp_path, model) < 1e-5
    graph = saved.capture_config(tmp_path, "llama", **tables)
    assert saved.calls(graph) == [(2, "layer_0"), (2, "layer_0"), (1, "layer_0")]


@pytest.mark.slow
def test_a_layer_that_computes_with_its_place(tmp_path, llama):
    forward = original("LlamaMLP")

    def by_place(self, x):
        return forward(self, x) * (1.0 + self.config.factors[self.layer_idx])

    factors = {"factors": [0.0, 1.0, 2.0]}
    build = original("LlamaDecoderLayer", "__init__")

    def with_place(self, config, layer_idx):
        build(self, config, layer_idx)
        self.mlp.layer_idx = layer_idx

    llama("LlamaDecoderLayer", "__init__", with_place)
    llama("LlamaMLP", "forward", by_place)
    model = saved.save(tmp_path, "llama", **factors)
    assert saved.largest_error(tmp_path, model) < 1e-5
    graph = saved.capture_config(tmp_path, "llama", **factors)
    assert saved.calls(graph) == [(1, "layer_0"), (1, "layer_1"), (1, "layer_2")]


def test_attributes_of_any_kind_tell_layers_apart():
    def layer(**attributes) -> nn.Module:
        made = nn.Linear(2, 2)
        for name, value in attributes.items():
            setattr(made, name, value)
        return made

    shared = object()
    same = {"layer_idx": 3, "sizes": [1, {"a": 2}], "_private": 1.5, "thing": shared}
    assert signature(layer(**same)) == signature(layer(**{**same, "layer_idx": 4}))
    for name, other in [
        ("sizes", [1, {"a": 3}]), ("_private", 2.5), ("thing", object()), ("_private", None),
    ]:  # fmt: skip
        assert signature(layer(**same)) != signature(layer(**{**same, name: other}))


def bare(call):
    """Return a llama model's forward that calls its layers by `call(layer, hidden, mask)`."""

    def forward(self, input_ids=None, **_):
        from transformers.modeling_outputs import BaseModelOutputWithPast
        from transformers.models.llama.modeling_llama import create_causal_mask

        hidden = self.embed_tokens(input_ids)
        mask = create_causal_mask(self.config, hidden, None, None)
        for layer in self.layers[: self.config.num_hidden_layers]:
            hidden = call(layer, hidden, mask)
        return BaseModelOutputWithPast(last_hidden_state=self.norm(hidden))

    return forward


def unrotated(self, hidden_states, attention_mask):
    """A decoder layer of llama without positions."""
    sin = torch.zeros(1, hidden_states.shape[1], 16)
    x = self.input_layernorm(hidden_states)
    return hidden_states + self.self_attn(x, (torch.ones_like(sin), sin), attention_mask)[0]


@pytest.mark.slow
def test_a_layer_that_is_handed_hidden_states_alone(tmp_path, llama):
    llama("LlamaDecoderLayer", "forward", unrotated)
    call = bare(lambda layer, hidden, mask: layer(hidden_states=hidden, attention_mask=mask))
    llama("LlamaModel", "forward", call)
    model = saved.save(tmp_path, "llama")
    assert saved.largest_error(tmp_path, model) < 1e-5
    assert saved.calls(saved.capture_config(tmp_path, "llama")) == [(3, "layer_0")]


@pytest.mark.slow
def test_a_vector_that_is_the_same_for_all_tokens(tmp_path, llama):
    def scaled(self, hidden_states, scale, attention_mask):
        return unrotated(self, hidden_states * scale, attention_mask)

    def call(layer, hidden, mask):
        return layer(hidden, torch.arange(64) / 64, attention_mask=mask)

    llama("LlamaDecoderLayer", "forward", scaled)
    llama("LlamaModel", "forward", bare(call))
    model = saved.save(tmp_path, "llama")
    assert saved.largest_error(tmp_path, model) < 1e-5


def test_a_tensor_that_is_not_per_token(tmp_path, llama):
    def biased(self, hidden_states, bias, attention_mask):
        return unrotated(self, hidden_states + bias.sum(-1)[..., None], attention_mask)

    def call(layer, hidden, mask):
        return layer(hidden, hidden @ hidden.transpose(1, 2), attention_mask=mask)

    llama("LlamaDecoderLayer", "forward", biased)
    llama("LlamaModel", "forward", bare(call))
    with pytest.raises(
        UnsupportedError, match=r"takes 'bias' \[1, \w+, \w+\], which is not one row"
    ):
        saved.capture_config(tmp_path, "llama")


# ----------------------------------------------------------------- what layers return


@pytest.mark.slow
def test_a_layer_may_return_its_hidden_states_first(tmp_path, llama):
    llama("LlamaDecoderLayer", "forward", lambda self, x, mask: (unrotated(self, x, mask), None))
    llama("LlamaModel", "forward", bare(lambda layer, hidden, mask: layer(hidden, mask)[0]))
    model = saved.save(tmp_path, "llama")
    assert saved.largest_error(tmp_path, model) < 1e-5


HIDDEN = torch.zeros(1, 5, 8)


@pytest.mark.parametrize("out", [HIDDEN + 1, (HIDDEN + 1,), (HIDDEN + 1, None), [HIDDEN, None, 3]])
def test_hidden_states_alone_or_first(out):
    returned = Returned.of(nn.Identity(), HIDDEN, out)
    made = returned.around(HIDDEN)
    assert type(made) is type(out)
    first = made if isinstance(made, torch.Tensor) else made[0]
    assert first is HIDDEN


@pytest.mark.parametrize(
    ("out", "message"),
    [
        ((HIDDEN, HIDDEN), "the decoder layer Identity hands on 2 tensors, more than its hidden"),
        ((None, HIDDEN), "does not return its hidden states first"),
        (None, "does not return its hidden states first"),
        (HIDDEN[:, :4], "returns hidden states of another shape or type"),
        (HIDDEN.half(), "returns hidden states of another shape or type"),
        ((HIDDEN, object()), "returns things that are not tensors"),
    ],
)
def test_what_else_a_layer_returns_is_refused(out, message):
    with pytest.raises(UnsupportedError, match=message):
        Returned.of(nn.Identity(), HIDDEN, out)


# ----------------------------------------------------------------- what layers are handed


@pytest.mark.parametrize(
    ("args", "kwargs", "message"),
    [
        ((), {}, "takes no hidden states"),
        ((torch.zeros(4, 1, 5, 8),), {}, r"takes no hidden states .*\[4, 1, 5, 8\]"),
        ((3,), {}, "takes no hidden states"),
    ],
)
def test_a_layer_that_takes_something_else(args, kwargs, message):
    with pytest.raises(UnsupportedError, match=message):
        Arguments.of(nn.Identity(), args, kwargs)


def test_arguments_are_handed_on_as_they_were():
    class Layer(nn.Module):
        def forward(self, x, y, *, pair, flag, mask=None):
            return x, y, pair, flag, mask

    cos, sin, y = torch.ones(1, 5, 2), torch.zeros(1, 5, 2), torch.zeros(1, 5)
    found = Arguments.of(Layer(), (HIDDEN, y), {"pair": (cos, sin), "flag": 3, "mask": None})
    assert found.names == ["argument_0", "pair_0", "pair_1"]
    out = found.call(Layer(), HIDDEN, found.tensors)
    assert out[0] is HIDDEN and out[1] is y and out[2][1] is sin and out[3:] == (3, None)
    other = Arguments.of(Layer(), (HIDDEN, y), {"pair": (cos, sin), "flag": 3, "mask": None})
    assert found.equal(other)
    for changed in ({"flag": 4}, {"pair": (cos, sin.clone())}, {"flag": 3.0}):
        given = {"pair": (cos, sin), "flag": 3, "mask": None, **changed}
        assert not found.equal(Arguments.of(Layer(), (HIDDEN, y), given))


def shared_state(write: bool):
    """Return a llama model whose layers share a dictionary of keys, and read or write it."""
    forward = original("LlamaDecoderLayer")

    def layer(self, hidden_states, shared, **more):
        if write:
            shared[self.self_attn.layer_idx] = hidden_states
        elif 0 in shared:
            hidden_states = hidden_states + shared[0]
        return forward(self, hidden_states, **more)

    return layer


@pytest.mark.parametrize("write", [True, False])
def test_state_that_layers_share_is_refused(tmp_path, llama, write):
    llama("LlamaDecoderLayer", "forward", shared_state(write))
    build = original("LlamaModel")

    def with_state(self, **arguments):
        return build(self, shared={}, **arguments)

    llama("LlamaModel", "forward", with_state)
    message = r"argument 'shared' \(dict\): state that layers share"
    with pytest.raises(UnsupportedError, match=message):
        saved.capture_config(tmp_path, "llama")


def test_keys_and_values_of_other_layers(tmp_path):
    settings = {**GEMMA4, "num_kv_shared_layers": 2}
    settings["layer_types"] = ["sliding_attention", "full_attention"] * 2
    message = r"argument 'shared_kv_states' \(KVSharingDict\): state that layers share"
    with pytest.raises(UnsupportedError, match=message):
        saved.capture_config(tmp_path, "gemma4_text", **settings)


# ----------------------------------------------------------------- layers that are not captured


def test_a_layer_without_attention(tmp_path, llama):
    llama("LlamaDecoderLayer", "forward", lambda self, x, **_: x + self.mlp(x))
    with pytest.raises(UnsupportedError, match="LlamaDecoderLayer has no softmax attention over"):
        saved.capture_config(tmp_path, "llama")


def test_a_layer_with_two_attentions(tmp_path):
    with pytest.raises(UnsupportedError, match="DiffLlamaDecoderLayer has 2 attentions: one in"):
        saved.capture_config(tmp_path, "diffllama")


@pytest.mark.parametrize(
    "change",
    [
        lambda x: x[x > 0].sum() + x,
        lambda x: x if x.sum() > 0 else -x,
        lambda x: x * int(x.sum()),
    ],
    ids=["size", "decision", "number"],
)
def test_a_layer_that_looks_at_values(tmp_path, llama, change):
    forward = original("LlamaMLP")
    llama("LlamaMLP", "forward", lambda self, x: forward(self, change(x)))
    message = "LlamaDecoderLayer takes decisions or sizes from the values of tensors"
    with pytest.raises(UnsupportedError, match=message):
        saved.capture_config(tmp_path, "llama")


def test_what_torch_says_of_a_layer_is_told_with_the_layer(tmp_path, llama):
    llama("LlamaMLP", "forward", lambda self, x: self.gate_proj(x) @ x)
    with pytest.raises(UnsupportedError, match="LlamaDecoderLayer cannot be captured: ") as error:
        saved.capture_config(tmp_path, "llama")
    assert "depend on the values" not in str(error.value)


def test_a_layer_that_is_called_twice(tmp_path, llama):
    class Twice(nn.ModuleList):
        def __getitem__(self, index):
            return [*super().__getitem__(index)] * 2

    build = original("LlamaModel")

    def again(self, **arguments):
        before, self.layers.__class__ = self.layers.__class__, Twice
        try:
            return build(self, **arguments)
        finally:
            self.layers.__class__ = before

    llama("LlamaModel", "forward", again)
    with pytest.raises(UnsupportedError, match="LlamaDecoderLayer is called more than once"):
        saved.capture_config(tmp_path, "llama")


def test_layers_that_are_left_out(tmp_path, llama):
    build = original("LlamaModel")

    def shorter(self, **arguments):
        self.config.num_hidden_layers = 2
        return build(self, **arguments)

    llama("LlamaModel", "forward", shorter)
    with pytest.raises(UnsupportedError, match="does not call its decoder layers one by one"):
        saved.capture_config(tmp_path, "llama")
