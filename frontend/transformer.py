"""transformers models as something to capture: built without weights, attention and experts opaque.

A model is built on fake tensors, so that its size costs nothing. Attention and experts are reached
through transformers' own interfaces, decoder layers are grouped into runs of equal ones, and each
run stands in the model as one opaque module: what is captured does not grow with depth.
"""

from __future__ import annotations

import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch._subclasses.fake_tensor import FakeTensorMode
from torch.utils import _pytree as pytree

from ..errors import DiluError, Loc, UnsupportedError
from .capture import export
from .formats import without_quantization

_NAME = "dilu"  # of our implementations in transformers' interfaces
_PLACE = re.compile(r"layer_?(idx|index|id|number)$")  # attributes that only say where a layer is
_ACTIVATIONS = {"silu": "silu", "swish": "silu", "gelu_pytorch_tanh": "gelu_tanh"}
_EXAMPLE = {"tokens": 7, "rows": 3}  # any sizes that are unlike each other and 0 and 1


def build_model(
    settings: Mapping[str, Any], dtype: torch.dtype, file: str
) -> tuple[Any, FakeTensorMode]:
    """Return the model of a config.json on fake tensors; raise DiluError when there is none."""
    from transformers import CONFIG_MAPPING, AutoModelForCausalLM
    from transformers.initialization import no_init_weights

    kind = str(settings.get("model_type"))
    if kind not in CONFIG_MAPPING:
        raise DiluError(
            f"unknown architecture: model_type {kind!r} of {settings.get('architectures')}",
            Loc(file),
            "a newer transformers may know it; code inside of a checkpoint is not run",
        )
    _register()
    plain = {k: v for k, v in without_quantization(settings).items() if k != "auto_map"}
    mode = FakeTensorMode(allow_non_fake_inputs=True)
    try:
        config = CONFIG_MAPPING[kind].from_dict(plain)
        with mode, no_init_weights():
            model = AutoModelForCausalLM.from_config(config, dtype=dtype, attn_implementation=_NAME)
            model.set_experts_implementation(_NAME)
            model.tie_weights()
            for name, tensor in [*model.named_parameters(), *model.named_buffers()]:
                if any(p in name for p in model._keep_in_fp32_modules_strict or ()):
                    tensor.data = tensor.data.float()
    except (ValueError, TypeError, KeyError, AttributeError) as error:
        text = str(error).strip().splitlines()[0] if str(error).strip() else type(error).__name__
        message = f"cannot build the model of model_type {kind!r}: {text}"
        raise DiluError(message, Loc(file), "is this config.json a language model's?") from error
    return model.eval(), mode


def real_buffers(model: Any) -> dict[str, torch.Tensor]:
    """Return the buffers that no checkpoint holds (rotary frequencies), computed for real."""
    stored = model.state_dict(keep_vars=True)
    buffers: dict[str, torch.Tensor] = {}
    for name, _ in model.named_buffers():
        if name in stored or name in buffers:
            continue
        prefix = name.rpartition(".")[0]
        module = model.get_submodule(prefix)
        try:
            rebuilt = type(module)(config=model.config)
        except TypeError as error:
            message = f"cannot compute the buffers of {prefix} ({type(module).__name__}): {error}"
            raise UnsupportedError(message) from error
        buffers |= {f"{prefix}.{n}": buffer for n, buffer in rebuilt.named_buffers()}
    return buffers


def check_rotary(model: torch.nn.Module) -> None:
    """Raise UnsupportedError where rotary frequencies change with a sequence's length."""
    for _, module in model.named_modules():
        kind = getattr(module, "rope_type", None)
        kinds = kind.values() if isinstance(kind, dict) else [kind]
        for one in kinds:
            if one == "longrope" or "dynamic" in str(one):
                raise UnsupportedError(
                    f"rotary embedding of type {one!r} is not supported: its frequencies depend "
                    "on the length of a sequence"
                )


# ----------------------------------------------------------------------- interfaces


def _register() -> None:
    from transformers import AttentionInterface
    from transformers.integrations.moe import ALL_EXPERTS_FUNCTIONS
    from transformers.masking_utils import AttentionMaskInterface

    AttentionInterface.register(_NAME, _attention)
    AttentionMaskInterface.register(_NAME, _no_mask)
    ALL_EXPERTS_FUNCTIONS.register(_NAME, _experts)


def _no_mask(*_: Any, **__: Any) -> None:
    """Attention over the cache is causal by itself."""


def _attention(
    module: torch.nn.Module,
    query: torch.Tensor,
    key: torch.Tensor,
    value: torch.Tensor,
    _mask: Any,
    scaling: float | None = None,
    sliding_window: int | None = None,
    **more: Any,
) -> tuple[torch.Tensor, None]:
    for name in ("softcap", "s_aux", "position_bias", "head_mask"):
        if more.get(name) is not None:
            raise UnsupportedError(f"attention with {name} ({type(module).__name__})")
    scale = query.shape[-1] ** -0.5 if scaling is None else scaling
    out = torch.ops.dilu.attention(query, key, value, float(scale), sliding_window)
    return out.transpose(1, 2), None


def _experts(
    module: Any, hidden: torch.Tensor, indices: torch.Tensor, weights: torch.Tensor
) -> torch.Tensor:
    gate = getattr(type(module), "_apply_gate", _experts)
    ordinary = module.is_concatenated and module.has_gate and not module.is_transposed
    ordinary = ordinary and not module.has_bias and gate.__name__ == "_default_apply_gate"
    if not ordinary or getattr(module, "has_post_expert_norm", False):
        raise UnsupportedError(f"experts of the form of {type(module).__name__}")
    config = module.config
    name = getattr(config, "hidden_act", None) or getattr(config, "hidden_activation", None)
    if name not in _ACTIVATIONS:
        raise UnsupportedError(f"experts with activation {name!r} ({type(module).__name__})")
    gate_up, down = module.gate_up_proj, module.down_proj
    return torch.ops.dilu.experts(hidden, indices, weights, gate_up, down, _ACTIVATIONS[name])


# ----------------------------------------------------------------------- runs of layers


class Record:
    """How a run was called; an object of its own, since export restores a module's attributes."""

    call: LayerCall | None = None


class Run(torch.nn.Module):
    """Consecutive equal decoder layers, opaque in the model that holds them."""

    def __init__(self, index: int, first: int, layers: Sequence[torch.nn.Module]) -> None:
        super().__init__()
        self.index = index
        self.first = first
        self.count = len(layers)
        self._held = (layers[0],)  # in a tuple: none of this module's parameters
        self.record = Record()

    def __getattr__(self, name: str) -> Any:
        try:
            return super().__getattr__(name)
        except AttributeError:
            return getattr(self.__dict__["_held"][0], name)

    def forward(self, hidden_states: torch.Tensor, *args: Any, **kwargs: Any) -> torch.Tensor:
        leaves, spec = pytree.tree_flatten((args, kwargs))
        invariants = [x for x in leaves if isinstance(x, torch.Tensor)]
        if any(x.shape[0] != 1 for x in invariants):
            raise UnsupportedError("a decoder layer takes a tensor that is not per token")
        self.record.call = LayerCall(
            self._held[0],
            hidden_states[0],
            [x[0] for x in invariants],
            _names(args, kwargs),
            [None if isinstance(x, torch.Tensor) else x for x in leaves],
            [i for i, x in enumerate(leaves) if isinstance(x, torch.Tensor)],
            spec,
        )
        out = torch.ops.dilu.layers(hidden_states[0], [x[0] for x in invariants], self.index)
        return out[None]


@dataclass
class LayerCall:
    """How a model calls a decoder layer: what varies per token by name, and all the rest."""

    layer: torch.nn.Module
    hidden: torch.Tensor
    invariants: list[torch.Tensor]
    names: list[str]
    leaves: list[Any]
    places: list[int]
    spec: Any

    def arguments(self, invariants: Sequence[torch.Tensor]) -> tuple[Any, Any]:
        """Return the layer's arguments with these invariants."""
        leaves = list(self.leaves)
        for place, x in zip(self.places, invariants, strict=True):
            leaves[place] = x[None]
        return pytree.tree_unflatten(leaves, self.spec)


def _names(args: Sequence[Any], kwargs: Mapping[str, Any]) -> list[str]:
    """Return a name for every tensor among a layer's arguments."""
    names: list[str] = []
    for key, value in [*((f"argument_{i}", a) for i, a in enumerate(args)), *kwargs.items()]:
        leaves = [x for x in pytree.tree_leaves(value) if isinstance(x, torch.Tensor)]
        if key == "position_embeddings" and len(leaves) == 2:
            names += ["cos", "sin"]
        else:
            names += [key] if len(leaves) == 1 else [f"{key}_{i}" for i in range(len(leaves))]
    return names


def find_layers(model: Any) -> Any:
    """Return the part of a model that holds its decoder layers; raise UnsupportedError if none."""
    base = model.base_model
    layers = getattr(base, "layers", None)
    if not isinstance(layers, torch.nn.ModuleList) or not len(layers):
        raise UnsupportedError(f"{type(model).__name__} has no list of decoder layers")
    return base


def signature(layer: torch.nn.Module) -> tuple[Any, ...]:
    """Return what makes two decoder layers the same program: classes, shapes and attributes."""
    parts: list[Any] = []
    for name, module in layer.named_modules():
        attributes = {
            k: v
            for k, v in vars(module).items()
            if not k.startswith("_") and not _PLACE.search(k) and _is_plain(v)
        }
        parts.append((name, type(module), tuple(sorted(attributes.items(), key=lambda i: i[0]))))
    tensors = [*layer.named_parameters(), *layer.named_buffers()]
    parts += [(name, tuple(t.shape), t.dtype) for name, t in tensors]
    return tuple(parts)


def _is_plain(value: Any) -> bool:
    if isinstance(value, tuple):
        return all(_is_plain(v) for v in value)
    return value is None or isinstance(value, (bool, int, float, str))


# ----------------------------------------------------------------------- export


class Outer(torch.nn.Module):
    """The model around its decoder layers: tokens to the logits of the rows that are wanted."""

    def __init__(self, model: Any) -> None:
        super().__init__()
        self.model = model

    def forward(
        self, tokens: torch.Tensor, positions: torch.Tensor, rows: torch.Tensor
    ) -> torch.Tensor:
        out = self.model(
            input_ids=tokens[None],
            position_ids=positions[None],
            use_cache=False,
            logits_to_keep=rows,
        )
        return out.logits[0].float()


class Layer(torch.nn.Module):
    """A decoder layer as a function of `hidden[T,H]` and invariants, all of them per token."""

    def __init__(self, call: LayerCall) -> None:
        super().__init__()
        self.layer = call.layer
        self._call = (call,)

    def forward(self, hidden: torch.Tensor, *invariants: torch.Tensor) -> torch.Tensor:
        args, kwargs = self._call[0].arguments(invariants)
        return self.layer(hidden[None], *args, **kwargs)[0]


def export_outer(
    model: Any, runs: Sequence[Run], mode: FakeTensorMode
) -> torch.export.ExportedProgram:
    """Export the model with its layers replaced by runs, which learn how they are called."""
    base = find_layers(model)
    config = model.config
    base.layers = torch.nn.ModuleList(runs)
    if getattr(config, "layer_types", None):
        config.layer_types = [config.layer_types[r.first] for r in runs]
    with mode:
        tokens = torch.zeros(_EXAMPLE["tokens"], dtype=torch.int64)
        positions = torch.zeros(_EXAMPLE["tokens"], dtype=torch.int64)
        rows = torch.zeros(_EXAMPLE["rows"], dtype=torch.int64)
    shapes = ({0: torch.export.Dim.DYNAMIC},) * 3
    return export(Outer(model), (tokens, positions, rows), shapes)


def export_layer(call: LayerCall, mode: FakeTensorMode) -> torch.export.ExportedProgram:
    """Export one decoder layer with a symbolic number of tokens."""
    inputs = [_example(x, mode) for x in (call.hidden, *call.invariants)]
    per_token = {0: torch.export.Dim.DYNAMIC}
    shapes = {"hidden": per_token, "invariants": (per_token,) * (len(inputs) - 1)}
    return export(Layer(call), tuple(inputs), shapes)


def _example(x: torch.Tensor, mode: FakeTensorMode) -> torch.Tensor:
    shape = x.shape[1:]
    if not isinstance(x.shape[0], torch.SymInt) or any(isinstance(d, torch.SymInt) for d in shape):
        raise UnsupportedError("a decoder layer takes a tensor that is not per token")
    with mode:
        return torch.empty((_EXAMPLE["tokens"], *shape), dtype=x.dtype)
