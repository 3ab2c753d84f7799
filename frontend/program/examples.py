"""Example inputs of a module: what they may be, whose parameter each is, and copies of them.

Invariant: torch.export sees tensors that share nothing, dense and row-major, as the runtime gives
them, so that the program has an input for every tensor that the module takes.
"""

from __future__ import annotations

import inspect
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass
from typing import Any

import torch
from torch.export.graph_signature import InputKind
from torch.utils import _pytree as pytree

from ...errors import DiluError, Loc, UnsupportedError
from ..operators.context import TORCH_DTYPES

_PLAIN = (int, float, bool, str, type(None))


@dataclass(frozen=True)
class Examples:
    """The example inputs of a call, and the signature of what is called."""

    args: tuple[Any, ...]
    kwargs: dict[str, Any]
    signature: inspect.Signature | None = None

    def copied(self) -> Examples:
        """Return the same examples, every tensor a dense copy of its own."""
        args, kwargs = pytree.tree_map_only(torch.Tensor, _copy, (self.args, self.kwargs))
        return Examples(args, kwargs, self.signature)


def read_examples(
    call: Callable[..., Any], inputs: Any, keywords: Mapping[str, Any] | None
) -> Examples:
    """Check example inputs for `call`; a mapping as `inputs` is keyword inputs.

    Raises DiluError for what is no sequence of inputs, does not fit the signature, or holds
    anything but tensors and plain values.
    """
    loc = definition(call)
    if isinstance(inputs, Mapping):
        if keywords is not None:
            raise DiluError(
                "keyword inputs are given twice: by example_inputs and by example_kwargs", loc
            )
        inputs, keywords = (), inputs
    if inputs is None and keywords is None:
        raise DiluError("a module needs example inputs", hint="pass example_inputs=(tensor, …)")
    if not isinstance(inputs, (tuple, list, type(None))):
        raise DiluError(
            f"example_inputs is a {type(inputs).__name__}, not a tuple of inputs",
            loc,
            "pass a tuple, also for one input: example_inputs=(tensor,)",
        )
    if not _are_keywords(keywords):
        raise DiluError("example_kwargs is no dictionary of keyword inputs by their names", loc)
    examples = Examples(tuple(inputs or ()), dict(keywords or {}), _signature(call))
    if examples.signature is not None:
        try:
            examples.signature.bind(*examples.args, **examples.kwargs)
        except TypeError as error:
            raise DiluError(
                f"the example inputs do not fit {_name(call)}{examples.signature}: {error}", loc
            ) from error
    for path, value in leaves(examples):
        _check(path, value, loc)
    return examples


def _are_keywords(value: Any) -> bool:
    return value is None or (
        isinstance(value, Mapping) and all(isinstance(name, str) for name in value)
    )


def leaves(examples: Examples) -> Iterator[tuple[str, Any]]:
    """Yield each input that is no container, with its path, such as `args[0]['mask']`."""
    try:
        paths, _ = pytree.tree_flatten_with_path((examples.args, examples.kwargs))
    except ValueError as error:  # a container that torch was told of, but not of its keys
        raise DiluError(f"the example inputs cannot be taken apart: {error}") from error
    for path, value in paths:
        base = ("args", "kwargs")[path[0].idx]  # type: ignore[attr-defined]
        yield base + pytree.keystr(path[1:]), value


def definition(call: Callable[..., Any]) -> Loc | None:
    """Return the line on which a function is defined, None for one of torch's own."""
    code = getattr(inspect.unwrap(call), "__code__", None)
    if code is None or code.co_filename.startswith((str(torch.__path__[0]), "<")):
        return None
    return Loc(code.co_filename, code.co_firstlineno)


def combined(examples: Examples, args: Any, kwargs: Any) -> dict[str, Any]:
    """Return what stands in the examples' places by the names of the parameters, as
    `dynamic_shapes` names them: those of `*args` together, those of `**kwargs` each."""
    if examples.signature is None:
        return {**{str(i): value for i, value in enumerate(args)}, **kwargs}
    bound = examples.signature.bind(*args, **kwargs)
    values: dict[str, Any] = {}
    for name, value in bound.arguments.items():
        kind = examples.signature.parameters[name].kind
        values |= value if kind is inspect.Parameter.VAR_KEYWORD else {name: value}
    return values


def _copy(tensor: torch.Tensor) -> torch.Tensor:
    return tensor.detach().clone(memory_format=torch.contiguous_format)


def _signature(call: Callable[..., Any]) -> inspect.Signature | None:
    try:
        return inspect.signature(call)
    except (TypeError, ValueError):  # a builtin
        return None


def _name(call: Callable[..., Any]) -> str:
    return getattr(call, "__name__", type(call).__name__)


def _check(path: str, value: Any, loc: Loc | None) -> None:
    """Raise DiluError for an example that a compiled program cannot take."""
    kind = type(value)
    if not isinstance(value, torch.Tensor):
        if kind not in _PLAIN:
            hint = "inputs are tensors, plain numbers and strings, and containers of them"
            if hasattr(value, "__array__"):
                hint = "pass torch.from_numpy(array)"
            raise UnsupportedError(
                f"the example input {path} is a {kind.__module__}.{kind.__qualname__}", loc, hint
            )
        return
    what = None
    if value.is_nested or value.layout != torch.strided:
        what = "nested" if value.is_nested else str(value.layout).removeprefix("torch.")
    elif value.is_quantized:
        what = "quantized"
    if what is not None:
        hint = "pass dense tensors of plain numbers"
        raise UnsupportedError(f"the example input {path} is a tensor that is {what}", loc, hint)
    if value.dtype not in TORCH_DTYPES:
        message = f"the example input {path} is of {value.dtype}, which is not supported"
        raise UnsupportedError(message, loc)
    if kind not in (torch.Tensor, torch.nn.Parameter, torch.nn.Buffer) and not is_fake(value):
        raise UnsupportedError(
            f"the example input {path} is a {kind.__module__}.{kind.__qualname__}",
            loc,
            "pass plain tensors, without a class of their own",
        )


def is_fake(value: torch.Tensor) -> bool:
    """Whether a tensor is one of torch's that have a type and no values."""
    from torch._subclasses.fake_tensor import FakeTensor

    return isinstance(value, FakeTensor)


def require_no_merged_inputs(program: torch.export.ExportedProgram) -> None:
    """Raise DiluError where torch made one input of several, which were the same tensor."""
    examples = program.example_inputs
    if examples is None:
        return
    values = pytree.tree_leaves(examples)
    specs = [s for s in program.graph_signature.input_specs if s.kind is InputKind.USER_INPUT]
    nodes = {n.name: n for n in program.graph_module.graph.find_nodes(op="placeholder")}
    for i, (spec, value) in enumerate(zip(specs, values, strict=False)):
        twin = next((j for j, other in enumerate(values) if j != i and other is value), None)
        node = nodes.get(getattr(spec.arg, "name", ""))
        if isinstance(value, torch.Tensor) and twin is not None and node and not node.users:
            raise DiluError(
                f"torch.export made one of the inputs {node.name!r} and {specs[twin].arg.name!r}: "
                "their examples were the same tensor",
                hint="export it with a tensor of its own for each input, or compile the module",
            )


# ------------------------------------------------------------------ sizes of dynamic_shapes


@dataclass(frozen=True)
class _Leaf:
    index: int


def dynamic_sizes(examples: Examples, shapes: Any) -> dict[tuple[int, int], Any]:
    """Return what `dynamic_shapes` says of the examples' sizes, by tensor and axis.

    Tensors count in the order of the program's inputs, plain values among them.
    """
    values, spec = pytree.tree_flatten((examples.args, examples.kwargs))
    marked = pytree.tree_unflatten([_Leaf(i) for i in range(len(values))], spec)
    places = combined(examples, *marked)
    if not isinstance(shapes, Mapping):
        places = list(places.values())  # type: ignore[assignment]
    found: dict[tuple[int, int], Any] = {}
    _walk(places, shapes, found)
    for (index, axis), size in found.items():
        rank = values[index].dim() if isinstance(values[index], torch.Tensor) else 0
        if not 0 <= axis < rank and size is not None:
            raise DiluError(
                f"dynamic_shapes names axis {axis} of an input that has {rank}",
                hint="axes count from 0",
            )
    return found


def _walk(place: Any, shapes: Any, found: dict[tuple[int, int], Any]) -> None:
    if isinstance(place, _Leaf):
        if isinstance(shapes, Mapping):
            found.update({(place.index, a): d for a, d in shapes.items() if isinstance(a, int)})
        elif isinstance(shapes, (list, tuple)):
            found.update({(place.index, a): d for a, d in enumerate(shapes)})
    elif hasattr(place, "__dataclass_fields__"):
        names = list(place.__dataclass_fields__)
        parts = [getattr(shapes, n, None) for n in names]
        if isinstance(shapes, (list, tuple)):
            parts = list(shapes)
        for name, part in zip(names, parts, strict=False):
            _walk(getattr(place, name), part, found)
    elif isinstance(place, Mapping) and isinstance(shapes, Mapping):
        for key in place.keys() & shapes.keys():
            _walk(place[key], shapes[key], found)
    elif isinstance(place, (list, tuple)) and isinstance(shapes, (list, tuple)):
        for inner, part in zip(place, shapes, strict=False):
            _walk(inner, part, found)
