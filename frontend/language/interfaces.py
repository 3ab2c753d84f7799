"""Attention and experts as models reach them: through the interfaces of transformers.

Every argument is used, or irrelevant for a reason that stands here, or refused by name. What cannot
be seen in arguments is proved: the model's own attention function and its experts' gate are
evaluated on small real tensors and compared with what is captured for them.

Shapes: H heads, K heads of keys, T tokens, D values of a head, E experts, I inner width.
"""

from __future__ import annotations

import sys
from typing import Any

import torch
from torch.nn import functional as F

from ...errors import UnsupportedError
from .markers import place
from .masks import Mask, make_mask
from .reals import NotReal, compute, real

NAME = "dilu"  # of our implementations in transformers' interfaces

#: Keywords of attention that `attention` uses itself.
USED = frozenset({"scaling", "sliding_window", "dropout", "is_causal", "attention_mask"})
_FLASH = "how sequences are packed for flash attention; the runtime keeps sequences apart itself"
_CACHE = "about a cache of transformers, which is not used: keys and values are in pages"
_OUTPUT = "about what else the model returns; only logits are taken"
#: Keywords of attention that cannot change its result, and why.
IRRELEVANT = {
    "position_ids": "flash attention finds packed sequences by them; keys are rotated already",
    "deterministic": "of flash attention's backward pass",
    "output_attentions": _OUTPUT,
    "output_hidden_states": _OUTPUT,
    "output_router_logits": _OUTPUT,
    "return_dict": _OUTPUT,
    "logits_to_keep": _OUTPUT,
    "use_cache": _CACHE,
    "past_key_values": _CACHE,
    "past_key_value": _CACHE,
    "cache_position": _CACHE,
    "layer_idx": _CACHE,
}
#: Keywords of attention that change its result: refused unless they are None.
REFUSED = {
    "softcap": "scores that are capped",
    "s_aux": "sinks",
    "sinks": "sinks",
    "position_bias": "a bias by position",
    "head_mask": "heads that are masked",
    "layer_head_mask": "heads that are masked",
    "indices": "an indexer that chooses keys (sparse attention)",
    "block_indices": "an indexer that chooses blocks of keys (sparse attention)",
    "cu_seq_lens_q": _FLASH,
    "cu_seq_lens_k": _FLASH,
    "max_length_q": _FLASH,
    "max_length_k": _FLASH,
}

#: Attributes of an experts module that are known, beside its parameters: sizes, and what the
#: interface says of its form. Limits of the gate are proved irrelevant by evaluating it.
FORM = {
    "has_gate": True,
    "has_bias": False,
    "has_post_expert_norm": False,
    "is_transposed": False,
    "is_concatenated": True,
    "_is_expert_parallel": False,
}
SIZES = frozenset(
    {
        "num_experts", "hidden_dim", "hidden_size", "intermediate_dim", "intermediate_size",
        "expert_dim", "training", "config", "act_fn",
    }
)  # fmt: skip
OF_THE_GATE = frozenset({"limit", "alpha", "swiglu_limit", "swiglu_alpha"})

_PRODUCTS = {
    "silu": F.silu,
    "gelu_tanh": lambda x: F.gelu(x, approximate="tanh"),
}
#: Values of gate and up at which a gate is looked at: limits that models have, and beyond them.
_GRID = (0.0, 1e-3, 0.1, 0.5, 1.0, 2.0, 3.3, 6.0, 7.5, 11.0, 30.0, 100.0, 1e4)


def register() -> None:
    """Enter attention, masks and experts into transformers' interfaces, under `NAME`."""
    from transformers import AttentionInterface
    from transformers.integrations.moe import ALL_EXPERTS_FUNCTIONS
    from transformers.masking_utils import AttentionMaskInterface

    AttentionInterface.register(NAME, attention)
    AttentionMaskInterface.register(NAME, make_mask)
    ALL_EXPERTS_FUNCTIONS.register(NAME, experts)


# ----------------------------------------------------------------------- attention


def attention(
    module: torch.nn.Module,
    query: torch.Tensor,
    key: torch.Tensor,
    value: torch.Tensor,
    attention_mask: Any = None,
    scaling: float | None = None,
    sliding_window: int | None = None,
    dropout: float = 0.0,
    is_causal: bool | None = None,
    **more: Any,
) -> tuple[torch.Tensor, None]:
    """Attention of `query[1,H,T,D]` to `key[1,K,T,D]`, `value[1,K,T,Dv]` → `[1,T,H,Dv]`.

    The mask decides, as in the model's own (eager) attention; what else a model says of it has to
    agree. Raises UnsupportedError for everything that is not captured.
    """
    kind = type(module).__name__
    window = _window(module, attention_mask, sliding_window)
    if is_causal is False or getattr(module, "is_causal", True) is False:
        raise _unsupported(f"attention that is said not to be causal, with a causal mask ({kind})")
    if dropout:
        raise _unsupported(f"attention with dropout ({kind})")
    for name, given in more.items():
        if name not in IRRELEVANT and given is not None:
            what = REFUSED.get(name, "an unknown keyword")
            raise _unsupported(f"attention with {name}: {what} ({kind})")
    _check_shapes(kind, query, key, value)
    scale = float(query.shape[-1] ** -0.5 if scaling is None else scaling)
    options = {"sliding_window": sliding_window, "dropout": dropout, "is_causal": is_causal}
    given = {k: v for k, v in options.items() if v is not None} | more
    _prove_attention(module, query, key, value, scale, given)
    out = torch.ops.dilu.attention(query, key, value, scale, window)
    return out.transpose(1, 2).contiguous(), None


def _window(module: torch.nn.Module, mask: Any, sliding_window: int | None) -> int | None:
    """Return the window that a mask says; raise UnsupportedError where there is another."""
    kind = type(module).__name__
    if mask is None:
        raise _unsupported(f"attention without a mask, where every token sees all ({kind})")
    if not isinstance(mask, Mask):
        raise _unsupported(f"attention with a mask that the model makes itself ({kind})")
    mask.check()
    longest = getattr(getattr(module, "config", None), "max_position_embeddings", None)
    beyond = mask.window is None and isinstance(longest, int) and (sliding_window or 0) >= longest
    if sliding_window not in (None, mask.window) and not beyond:
        raise _unsupported(
            f"attention whose mask is {mask}, while sliding_window is {sliding_window} ({kind})"
        )
    return mask.window


def _check_shapes(kind: str, query: torch.Tensor, key: torch.Tensor, value: torch.Tensor) -> None:
    if query.dim() != 4 or query.shape[0] != 1 or key.shape[0] != 1:
        raise _unsupported(f"attention in a batch that the model makes ({kind})")
    if key.shape[2] != query.shape[2] or value.shape[2] != query.shape[2]:
        raise _unsupported(f"attention to keys of other tokens than the queries' ({kind})")
    if query.shape[1] % key.shape[1] or key.shape[1] != value.shape[1]:
        raise _unsupported(f"attention with heads of keys that no queries share evenly ({kind})")


def _prove_attention(
    module: torch.nn.Module,
    query: torch.Tensor,
    key: torch.Tensor,
    value: torch.Tensor,
    scale: float,
    options: dict[str, Any],
) -> None:
    """Raise UnsupportedError when the model's own attention is another function than ours."""
    own = getattr(sys.modules[type(module).__module__], "eager_attention_forward", None)
    if own is None:
        return
    group, width, wide = query.shape[1] // key.shape[1], key.shape[3], value.shape[3]
    kind = type(module).__name__

    def largest_error() -> float:
        tokens, seed = 6, torch.Generator().manual_seed(0)
        q = torch.randn((1, 2 * group, tokens, width), generator=seed)
        k = torch.randn((1, 2, tokens, width), generator=seed)
        v = torch.randn((1, 2, tokens, wide), generator=seed)
        mask = torch.full((tokens, tokens), torch.finfo(q.dtype).min).triu(1)
        mask = mask + torch.full((tokens, tokens), torch.finfo(q.dtype).min).tril(-4)
        got = real(own(module, q, k, v, mask[None, None], scaling=scale, **options)[0])
        scores = q @ k.repeat_interleave(group, 1).transpose(2, 3) * scale + mask
        want = (scores.softmax(-1) @ v.repeat_interleave(group, 1)).transpose(1, 2)
        return float((got - want).abs().max() / want.abs().max())

    try:
        error = compute(largest_error)
    except NotReal:
        error = float("inf")
    except Exception as reason:
        text = str(reason).strip().partition("\n")[0]
        what = f"attention of a form that cannot be proved to be softmax attention ({kind})"
        raise _unsupported(f"{what}: {type(reason).__name__}: {text}") from reason
    if not error < 1e-4:
        raise _unsupported(f"attention of another form than softmax(q·k·scale + mask)·v ({kind})")


# ----------------------------------------------------------------------- experts


def experts(
    module: Any,
    hidden_states: torch.Tensor,
    top_k_index: torch.Tensor,
    top_k_weights: torch.Tensor,
) -> torch.Tensor:
    """Routed experts: `hidden_states[T,H]`, `top_k_index[T,k]`, `top_k_weights[T,k]` → `[T,H]`.

    Raises UnsupportedError for experts of another form than `act(gate·x) * (up·x)`.
    """
    kind = type(module).__name__
    for name, ordinary in FORM.items():
        if getattr(module, name, ordinary) != ordinary:
            raise _unsupported(f"experts of the form of {kind}: {name} is {not ordinary}")
    tensors = {name for name, _ in (*module.named_parameters(), *module.named_buffers())}
    for name in sorted(tensors - {"gate_up_proj", "down_proj"}):
        raise _unsupported(f"experts with {name!r} ({kind})")
    known = {*FORM, *SIZES, *OF_THE_GATE}
    for name in sorted(vars(module)):
        if name not in known and not name.startswith("_") and vars(module)[name] is not None:
            raise _unsupported(f"experts with the unknown attribute {name!r} ({kind})")
    activation = activation_of(module)
    gate_up, down = module.gate_up_proj, module.down_proj
    return torch.ops.dilu.experts(
        hidden_states, top_k_index, top_k_weights, gate_up, down, activation
    )


def activation_of(module: Any) -> str:
    """Return the name of the activation by which an experts module's gate is `act(gate) * up`."""

    def found() -> str | None:
        grid = torch.tensor(_GRID)
        values = torch.cat([-grid.flip(0), grid])
        gate, up = (x.flatten() for x in torch.meshgrid(values, values, indexing="ij"))
        got = real(module._apply_gate(torch.cat([gate, up])[None]))[0]
        for name, function in _PRODUCTS.items():
            if torch.allclose(got, function(gate) * up, rtol=1e-5, atol=1e-7):
                return name
        return None

    try:
        name = compute(found)
    except Exception:  # whatever it needs, it is no function of gate and up alone
        name = None
    if name is None:
        config = module.config
        said = getattr(config, "hidden_act", None) or getattr(config, "hidden_activation", None)
        raise _unsupported(
            f"experts with another gate than activation(gate) * up ({type(module).__name__}; "
            f"the configuration's activation is {said!r}, known ones are {', '.join(_PRODUCTS)})"
        )
    return name


def _unsupported(what: str) -> UnsupportedError:
    return UnsupportedError(f"{what} is not supported", place())
