"""Masks: what a mask function says is what is captured, or refused by what it is."""

from functools import partial
from types import SimpleNamespace

import pytest
import saved
import torch
from transformers.masking_utils import (
    and_masks,
    bidirectional_mask_function,
    blockwise_overlay,
    causal_mask_function,
    chunked_causal_mask_function,
    or_masks,
    packed_sequence_mask_function,
    sliding_window_bidirectional_mask_function,
    sliding_window_causal_mask_function,
    sliding_window_overlay,
)

from dilu.errors import UnsupportedError
from dilu.frontend.language.masks import IRRELEVANT, USED, Mask, make_mask, read_mask

DOCUMENTS = torch.arange(2048)[None] // 7
ZERO = torch.zeros(1, dtype=torch.int64)


def config(**sizes) -> SimpleNamespace:
    return SimpleNamespace(**{"max_position_embeddings": 512, **sizes})


def inverted_window(_b, _h, q, k):  # written otherwise than transformers writes it
    return ((q - k) < 24) & ~(k > q)


def hidden_size(_b, _h, q, k):  # 300: no number of the configuration or of a closure says so
    return (k <= q) & (k > q - 3 * 10 * 10)


class Callable:
    """A mask function that is an object."""

    def __init__(self, size: int) -> None:
        self.size = size

    def __call__(self, _b, _h, q, k):
        return (k <= q) & (q - k < self.size)


READ = {
    "causal": (causal_mask_function, None),
    "window of 1": (sliding_window_causal_mask_function(1), 1),
    "window of 8": (sliding_window_causal_mask_function(8), 8),
    "window of 4096": (sliding_window_causal_mask_function(4096), 4096),
    "window as long as the context": (sliding_window_causal_mask_function(512), 512),
    "smaller of two windows": (
        and_masks(sliding_window_causal_mask_function(50), sliding_window_overlay(20)),
        20,
    ),
    "larger of two windows": (
        or_masks(sliding_window_causal_mask_function(5), sliding_window_causal_mask_function(60)),
        60,
    ),
    "causal or a window": (
        or_masks(causal_mask_function, sliding_window_causal_mask_function(5)),
        None,
    ),
    "both ways, and causal": (and_masks(bidirectional_mask_function, causal_mask_function), None),
    "another way of writing it": (inverted_window, 24),
    "a number that is nowhere": (hidden_size, 300),
    "an object": (Callable(9), 9),
    "a partial": (partial(lambda n, _b, _h, q, k: (k <= q) & (k > q - n), 33), 33),
}


@pytest.mark.parametrize("name", READ)
@pytest.mark.parametrize("use_vmap", [False, True])
def test_what_a_mask_function_says(name, use_vmap):
    function, window = READ[name]
    assert read_mask(function, config(), use_vmap=use_vmap) == Mask(window)


def test_a_window_is_seen_in_a_context_of_a_million():
    sizes = config(max_position_embeddings=1 << 20)
    assert read_mask(sliding_window_causal_mask_function(65536), sizes) == Mask(65536)
    assert read_mask(causal_mask_function, sizes) == Mask()


def blocks(size: int):
    return or_masks(causal_mask_function, blockwise_overlay((torch.arange(2048) // size)[None]))


REFUSED = {
    "chunks": (chunked_causal_mask_function(8, ZERO), "attention in chunks of 8 tokens"),
    "large chunks": (chunked_causal_mask_function(200, ZERO), "attention in chunks of 200 tokens"),
    "both ways": (bidirectional_mask_function, "a bidirectional mask, by which every token sees"),
    "both ways in a window": (
        sliding_window_bidirectional_mask_function(4),
        "the token at 0 sees later ones",
    ),
    "blocks": (blocks(6), "the token at 0 sees later ones"),
    "a prefix": (lambda _b, _h, q, k: (k <= q) | (k < 10), "the token at 0 sees later ones"),
    "a window with sinks": (
        lambda _b, _h, q, k: (k <= q) & ((k > q - 16) | (k < 4)),
        "a window that keeps the first 4 tokens",
    ),
    "not itself": (lambda _b, _h, q, k: k < q, "the token at 0 sees no token"),
    "every other key": (
        lambda _b, _h, q, k: (k <= q) & ((q - k) % 2 == 0),
        "neither causal nor a window: of 2 places up to its own, the token at 1 sees 1",
    ),
    "another window from a place on": (
        lambda _b, _h, q, k: (k <= q) & ((q < 100) | (k > q - 100)) & ((q < 300) | (k > q - 30)),
        "neither causal nor a window",
    ),
    "documents": (
        and_masks(causal_mask_function, packed_sequence_mask_function(DOCUMENTS)),
        "attention in chunks of 7 tokens|neither causal nor a window",
    ),
    "numbers": (lambda _b, _h, q, k: (k <= q).float(), "depends on the tokens, or on how"),
    "an error": (lambda _b, _h, q, k: torch.zeros(3)[q] <= k, "cannot be evaluated by itself"),
}  # fmt: skip


@pytest.mark.parametrize("name", REFUSED)
def test_a_mask_that_says_something_else_is_refused_where_it_is_used(name):
    function, message = REFUSED[name]
    mask = read_mask(function, config(sizes_in_chunks=8))
    with pytest.raises(UnsupportedError, match=message):
        mask.check()


def test_a_mask_of_values_that_are_not_there():
    from torch._subclasses.fake_tensor import FakeTensorMode

    with FakeTensorMode(allow_non_fake_inputs=True):
        kinds = torch.zeros((1, 4096), dtype=torch.int64)
    by_kind = or_masks(causal_mask_function, lambda b, _h, q, k: kinds[b, q] == kinds[b, k])
    with pytest.raises(UnsupportedError, match="a mask that depends on the tokens, or on how"):
        read_mask(by_kind, config()).check()


# ----------------------------------------------------------------- arguments and markers


def asked(**arguments) -> Mask:
    given = {"batch_size": 1, "q_length": 7, "kv_length": 7, "config": config()}
    return make_mask(**{**given, "mask_function": causal_mask_function, **arguments})


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ({"attention_mask": torch.ones(1, 7)}, "a mask that hides padding"),
        ({"kv_length": 9}, "other keys than those of the queries' own tokens"),
        ({"q_offset": 2}, "other keys than those of the queries' own tokens"),
        ({"batch_size": 2}, "other keys than those of the queries' own tokens"),
        ({"mask_function": None}, "a mask interface without a mask function"),
        ({"block_indices": [1]}, "a mask with the argument 'block_indices'"),
    ],
)
def test_an_argument_that_is_not_understood_is_refused(arguments, message):
    with pytest.raises(UnsupportedError, match=message):
        asked(**arguments).check()


def test_arguments_that_change_nothing():
    assert asked(local_size=3, dtype=torch.float32, allow_is_causal_skip=True, later=None) == Mask()


def test_every_argument_of_the_installed_mask_functions_is_known():
    import inspect

    from transformers import masking_utils

    for name in ("sdpa_mask", "eager_mask"):
        parameters = inspect.signature(getattr(masking_utils, name)).parameters
        assert set(parameters) - {"kwargs"} <= {*IRRELEVANT, *USED}


@pytest.mark.parametrize(
    ("use", "message"),
    [
        (lambda m: m[:, :, :3], "the model indexes its attention mask"),
        (lambda m: m.shape, r"the model reads \.shape of its attention mask"),
        (lambda m: m + 1, "the model computes with its attention mask"),
        (lambda m: 2 - m, "the model computes with its attention mask"),
        (lambda m: ~m, "the model inverts its attention mask"),
        (bool, "the model decides by its attention mask"),
        (lambda m: m == 0, "the model compares its attention mask"),
        (lambda m: torch.where(m, 1.0, 0.0), "the model computes where of its attention mask"),
        (lambda m: torch.cat([torch.ones(2), m]), "the model computes cat of its attention mask"),
        (lambda m: torch.ones(2) * m, "of its attention mask"),
    ],
)
def test_a_model_that_looks_into_its_mask_is_told(use, message):
    with pytest.raises(UnsupportedError, match=message) as error:
        use(Mask())
    assert error.value.loc.file == __file__


# ----------------------------------------------------------------- models


@pytest.mark.slow
def test_the_mask_alone_says_the_window(tmp_path):
    more = {"num_local_experts": 4, "num_experts_per_tok": 2, "intermediate_size": 48}
    graph = saved.capture_config(tmp_path, "phimoe", sliding_window=8, **more)
    assert saved.windows(graph) == [8]
    graph = saved.capture_config(tmp_path, "phimoe", sliding_window=None, **more)
    assert saved.windows(graph) == [None]


LLAMA4 = {
    "attention_chunk_size": 8, "num_local_experts": 4, "intermediate_size_mlp": 80,
    "moe_layers": [], "head_dim": 16, "no_rope_layers": [1, 1, 0],
}  # fmt: skip


@pytest.mark.parametrize(
    ("kind", "settings", "message"),
    [
        ("llama", {"is_causal": False}, "a bidirectional mask, by which every token sees all"),
        ("qwen3", {"is_causal": False, "use_sliding_window": True, "sliding_window": 8,
                   "max_window_layers": 0}, "sees later ones"),
        ("llama4_text", LLAMA4, r"how they are packed \(.*chunked_overlay"),
        ("gemma3_text", {"use_bidirectional_attention": True}, "bidirectional"),
        ("doge", {"sliding_window": 8}, r"DogeAttention reads \.dtype of its attention mask"),
    ],
)  # fmt: skip
def test_models_whose_masks_have_more_in_them(tmp_path, kind, settings, message):
    with pytest.raises(UnsupportedError, match=message) as error:
        saved.capture_config(tmp_path, kind, **settings)
    assert "/transformers/models/" in error.value.loc.file


def test_a_mask_that_the_model_makes_itself(tmp_path, monkeypatch):
    from transformers.models.llama import modeling_llama

    def made(config, inputs_embeds, **_):
        length = inputs_embeds.shape[1]
        return torch.full((1, 1, length, length), -1e9).triu(1)

    monkeypatch.setattr(modeling_llama, "create_causal_mask", made)
    message = "attention with a mask that the model makes itself|which is not one row per token"
    with pytest.raises(UnsupportedError, match=message):
        saved.capture_config(tmp_path, "llama")


def test_no_mask_at_all(tmp_path, monkeypatch):
    from transformers.models.llama import modeling_llama

    monkeypatch.setattr(modeling_llama, "create_causal_mask", lambda **_: None)
    with pytest.raises(UnsupportedError, match="attention without a mask, where every token sees"):
        saved.capture_config(tmp_path, "llama")


def overlaid(**functions):
    """Return a maker of llama's masks with more mask functions."""
    from transformers.masking_utils import create_causal_mask

    return lambda **arguments: create_causal_mask(**arguments, **functions)


@pytest.mark.parametrize(
    ("functions", "message"),
    [
        ({"or_mask_function": lambda _b, _h, q, k: k < 5}, "the token at 0 sees later ones"),
        ({"and_mask_function": lambda _b, _h, q, k: k // 16 == q // 16}, "in chunks of 16 tokens"),
        ({"block_sequence_ids": torch.zeros((1, 7))}, "depends on the tokens|cannot be evaluated"),
    ],
)
def test_overlays_of_the_causal_mask(tmp_path, monkeypatch, functions, message):
    from transformers.models.llama import modeling_llama

    monkeypatch.setattr(modeling_llama, "create_causal_mask", overlaid(**functions))
    with pytest.raises(UnsupportedError, match=message):
        saved.capture_config(tmp_path, "llama")


@pytest.mark.slow
def test_an_overlay_that_is_a_window(tmp_path, monkeypatch):
    from transformers.models.llama import modeling_llama

    model = saved.save(tmp_path, "llama")
    made = overlaid(and_mask_function=sliding_window_overlay(6))
    monkeypatch.setattr(modeling_llama, "create_causal_mask", made)
    assert saved.largest_error(tmp_path, model) < 1e-5


@pytest.mark.slow
@pytest.mark.parametrize(
    ("made", "message"),
    [
        (lambda tokens: torch.ones(tokens.shape), None),
        (lambda tokens: torch.ones_like(tokens).bool(), None),
        (torch.zeros_like, "a mask that hides padding"),
        (lambda tokens: (tokens != 2).long(), "a mask that hides padding"),
        (lambda tokens: torch.ones_like(tokens).mul_(tokens), "a mask that hides padding"),
    ],
    ids=["ones", "like", "zeros", "values", "changed"],
)
def test_a_padding_mask_that_the_model_makes(tmp_path, monkeypatch, made, message):
    from transformers.models.llama import modeling_llama

    forward = modeling_llama.LlamaModel.forward

    def with_padding(self, input_ids=None, **arguments):
        return forward(self, input_ids, **{**arguments, "attention_mask": made(input_ids)})

    monkeypatch.setattr(modeling_llama.LlamaModel, "forward", with_padding)
    if message is None:
        assert saved.windows(saved.capture_config(tmp_path, "llama")) == [None]
    else:
        with pytest.raises(UnsupportedError, match=message):
            saved.capture_config(tmp_path, "llama")
