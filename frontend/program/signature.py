"""What a captured program takes and returns, as plain data that a manifest carries.

The runtime reads it (`runtime/call/signature.py`, which says what it looks like) and needs neither
torch nor the classes of the model to do so.
"""

from __future__ import annotations

import collections
import inspect
from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import Any

import sympy
import torch
from torch import fx
from torch.export.graph_signature import InputKind, OutputKind, OutputSpec, TensorArgument
from torch.utils import _pytree as pytree

from ...errors import UnsupportedError
from ...ir.graph import Value
from ...ir.types import dim, print_dim
from .examples import Examples
from .nodes import location

Tree = dict[str, Any]


class Leaf:
    """A place in a tree of inputs or results, described by plain data."""

    def __init__(self, tree: Tree) -> None:
        self.tree = tree


def input_slots(
    program: torch.export.ExportedProgram, inputs: Sequence[Tree], examples: Examples | None
) -> list[dict[str, Any]]:
    """Return the parameters of a call in order, each with its name and what it holds.

    `inputs` describes the program's inputs one by one. The signature is that of `examples`, or of
    the program alone, which knows names but no defaults.
    """
    called = program.module_call_graph[0].signature
    assert called is not None
    args, kwargs = pytree.tree_unflatten([Leaf(tree) for tree in inputs], called.in_spec)
    if examples is not None and examples.signature is not None:
        return list(_bound(examples.signature, list(args), dict(kwargs)))
    known = called.forward_arg_names or []
    names = known[: len(args)] if len(known) == len(args) + len(kwargs) else [None] * len(args)
    positional = [
        _slot(name, "either" if name else "positional", value)
        for name, value in zip(names, args, strict=True)
    ]
    return positional + [_slot(name, "keyword", value) for name, value in kwargs.items()]


def _bound(
    signature: inspect.Signature, args: list[Any], kwargs: dict[str, Any]
) -> Sequence[dict[str, Any]]:
    """Return a slot for every parameter of a signature, also for those that were left out."""
    slots: list[dict[str, Any]] = []
    for p in signature.parameters.values():
        if p.kind is p.VAR_POSITIONAL:
            slots += [_slot(None, "positional", value) for value in args]
            args = []
        elif p.kind is p.VAR_KEYWORD:
            slots += [_slot(name, "keyword", value) for name, value in kwargs.items()]
        else:
            how = "keyword" if p.kind is p.KEYWORD_ONLY else "either"
            how = "positional" if p.kind is p.POSITIONAL_ONLY else how
            if args and how != "keyword":
                value = args.pop(0)
            elif p.name in kwargs and how != "positional":
                value = kwargs.pop(p.name)
            else:
                slots.append(_slot(p.name, how, Leaf(_left_out(p.default)), optional=True))
                continue
            slot = _slot(p.name, how, value)
            optional = "constant" in slot["value"] and slot["value"] == _left_out(p.default)
            slots.append({**slot, "optional": optional})
    return slots


def _slot(name: str | None, how: str, value: Any, *, optional: bool = False) -> dict[str, Any]:
    what = f"the input {name or 'among *args'}"
    return {"name": name, "how": how, "value": tree_of(value, what), "optional": optional}


def _left_out(default: Any) -> Tree:
    """Describe a parameter that the examples left out: it has its default, and nothing else."""
    plain = isinstance(default, (int, float, str, type(None))) and not isinstance(default, type)
    return constant(default) if plain else {"left_out": True}


def constant(value: Any) -> Tree:
    """Describe a plain value; floats are text, since JSON has neither infinities nor NaN."""
    if isinstance(value, float):
        return {"constant": repr(float(value)), "type": "float"}
    kind = next(k for k in (bool, int, str, type(None)) if isinstance(value, k))
    return {"constant": value, "type": "none" if value is None else kind.__name__}


def tree_of(value: Any, what: str) -> Tree:
    """Describe a container of leaves; raise UnsupportedError for one of an unknown kind."""

    def each(values: Sequence[Any]) -> list[Tree]:
        return [tree_of(v, what) for v in values]

    kind = type(value)
    if isinstance(value, Leaf):
        return value.tree
    if hasattr(value, "__dataclass_fields__"):
        names = list(value.__dataclass_fields__)
        parts = [getattr(value, name) for name in names]
        parts = [Leaf(constant(None)) if part is None else part for part in parts]
        return {"fields": names, "class": _class(kind), "values": each(parts)}
    fields = getattr(kind, "_fields", None)
    if issubclass(kind, tuple) and fields is not None:
        return {"fields": list(fields), "class": _class(kind), "values": each(value)}
    if kind in (tuple, list, torch.Size):
        return {"list" if kind is list else "tuple": each(list(value))}
    if kind.__module__ == "torch.return_types":
        return {"tuple": each(list(value))}
    if kind in (dict, collections.OrderedDict, collections.defaultdict):
        return {"dict": [[_key(key, what), tree_of(v, what)] for key, v in value.items()]}
    raise UnsupportedError(
        f"{what} is a {kind.__module__}.{kind.__qualname__}, which is not supported",
        hint="use tuples, lists, dictionaries, named tuples or dataclasses",
    )


def _class(kind: type) -> str:
    return f"{kind.__module__}:{kind.__qualname__}"


def _key(key: Any, what: str) -> str | int:
    if isinstance(key, (str, int)):
        return key
    raise UnsupportedError(
        f"{what} is a dictionary with the key {key!r}", hint="use strings or numbers as keys"
    )


def input_trees(program: torch.export.ExportedProgram) -> list[Tree]:
    """Describe the program's inputs one by one: parameters in order, and plain values."""
    trees: list[Tree] = []
    parameters = 0
    for spec in program.graph_signature.input_specs:
        if spec.kind is InputKind.USER_INPUT and isinstance(spec.arg, TensorArgument):
            trees.append({"parameter": parameters})
            parameters += 1
        elif spec.kind is InputKind.USER_INPUT:
            trees.append(constant(getattr(spec.arg, "value", None)))
    return trees


@dataclass
class Results:
    """What a program returns: the values to compute, the tree they stand in, and which of them go
    into the caller's own arrays, as pairs of parameter and result."""

    values: list[Value] = field(default_factory=list)
    trees: list[Tree] = field(default_factory=list)
    writes: list[list[int]] = field(default_factory=list)

    def number(self, value: Value) -> int:
        """Return the number of a result; equal ones are one."""
        if value not in self.values:
            self.values.append(value)
        return self.values.index(value)


def read_results(
    program: torch.export.ExportedProgram, outputs: Sequence[tuple[OutputSpec, Any, Any]]
) -> Results:
    """Return what becomes of the program's outputs (see `Importer.outputs`).

    An input that is returned as it is, also after being written to, is the caller's own array.
    Raises UnsupportedError where the model writes to its own parameters or buffers, or returns
    what is neither a tensor nor a plain value.
    """
    specs = [s for s in program.graph_signature.input_specs if s.kind is InputKind.USER_INPUT]
    tensors = [s.arg.name for s in specs if isinstance(s.arg, TensorArgument)]
    own = {name: i for i, name in enumerate(tensors)}
    results = Results()
    for spec, node, value in outputs:
        if spec.kind is OutputKind.USER_INPUT_MUTATION and isinstance(value, Value):
            parameter = own[str(spec.target)]
            results.writes.append([parameter, results.number(value)])
            own[node.name] = parameter
        elif spec.kind is not OutputKind.USER_OUTPUT:
            raise _stateful(spec, node)
        elif isinstance(node, fx.Node) and node.name in own:
            results.trees.append({"parameter": own[node.name]})
        elif isinstance(value, Value):
            results.trees.append({"result": results.number(value)})
        elif isinstance(value, sympy.Expr):
            results.trees.append({"size": print_dim(dim(value))})
        elif value is None or isinstance(value, (bool, int, float, str)):
            results.trees.append(constant(value))
        else:
            raise UnsupportedError(
                f"the model returns {value!r}, which is neither a tensor nor a plain value"
            )
    return results


def _stateful(spec: OutputSpec, node: Any) -> UnsupportedError:
    kind = "parameter" if "PARAMETER" in spec.kind.name else "buffer"
    return UnsupportedError(
        f"the model writes to its {kind} {spec.target!r}",
        location(node) if isinstance(node, fx.Node) else None,
        "a compiled model keeps nothing from call to call: return the new value instead, "
        "and pass it as an input",
    )


def result_tree(program: torch.export.ExportedProgram, leaves: Sequence[Tree]) -> Tree:
    """Describe what the program returns, of leaves in order."""
    called = program.module_call_graph[0].signature
    assert called is not None
    made = pytree.tree_unflatten([Leaf(tree) for tree in leaves], called.out_spec)
    return tree_of(made, "the result")
