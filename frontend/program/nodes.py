"""What a node of a captured program says: its line, its tensors, what it cannot be."""

from __future__ import annotations

import re
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import torch
from torch import fx
from torch._ops import HigherOrderOperator

from ...errors import Loc, UnsupportedError
from ...ir.graph import Node, Value

_OURS = str(Path(__file__).parent.parent)
_TORCH = str(Path(torch.__file__).parent)
_FRAME = re.compile(r'File "([^"]+)", line (\d+)')


def live(nodes: Sequence[Node], wanted: Sequence[Value]) -> tuple[tuple[Node, ...], set[str]]:
    """Return the nodes that `wanted` needs, and the names of all values that are used."""
    used = {v.name for v in wanted}
    kept: list[Node] = []
    for node in reversed(nodes):
        if any(v.name in used for v in node.outputs):
            used.update(v.name for v in node.inputs)
            kept.append(node)
    return tuple(reversed(kept)), used


def object_text(value: Any) -> str:
    """Return what an object among a program's inputs is, in words."""
    name = (
        getattr(value, "class_fqn", None) or f"{type(value).__module__}.{type(value).__qualname__}"
    )
    return f"an object of {name.replace('torch._C.', 'torch.')}"


def unknown_operator(node: fx.Node, operator: str, loc: Loc | None) -> UnsupportedError:
    """Return the error for an operator that has no lowering."""
    if torch.Tag.nondeterministic_seeded in getattr(node.target, "tags", ()):
        message = f"{operator}: a random number inside of a model is not supported"
        return UnsupportedError(message, loc, "make the numbers outside, and pass them as an input")
    hint = "rewrite this line with other operators, or add a lowering for it"
    if isinstance(node.target, HigherOrderOperator):
        hint = (
            "a compiled model has no control flow: compute all branches and choose by torch.where"
        )
    origin = _origin(node)
    if origin not in (None, operator):
        operator = f"{origin}, of which torch makes {operator},"
    return UnsupportedError(f"the operator {operator} is not supported", loc, hint)


def _origin(node: fx.Node) -> str | None:
    """Return the operator of the exported program that a node is a part of, where torch knows."""
    known = node.meta.get("from_node") or ()
    name = str(getattr(known[0], "target", "")) if known else ""
    return name if name.startswith(("aten.", "prims.")) else None


def location(node: fx.Node) -> Loc | None:
    """Return the innermost line of the user's model that made a node."""
    frames = _FRAME.findall(node.meta.get("stack_trace") or "")
    frames = [f for f in frames if not f[0].startswith((_TORCH, _OURS)) and f[0][0] != "<"]
    return Loc(frames[-1][0], int(frames[-1][1])) if frames else None


def modules_of(node: fx.Node) -> tuple[str, ...]:
    """Return the classes of the modules that a node was called in, the outermost first."""
    stack = node.meta.get("nn_module_stack") or {}
    return tuple(
        getattr(kind, "__name__", str(kind)).rpartition(".")[2] for _, kind in stack.values()
    )


def tensors_of(value: Any) -> list[torch.Tensor]:
    """Return the tensors of a value that a node has: one, those of a list, or none."""
    if isinstance(value, torch.Tensor):
        return [value]
    return (
        [t for v in value or () for t in tensors_of(v)] if isinstance(value, (list, tuple)) else []
    )


def values_of(out: Any) -> tuple[Value, ...]:
    """Return what a lowering returned as a tuple."""
    return (out,) if isinstance(out, Value) else tuple(out)


def promoted_type(node: fx.Node) -> torch.dtype:
    """Return the common element type of the tensors and numbers among the first two arguments."""
    arguments = [a.meta.get("val") if isinstance(a, fx.Node) else a for a in node.args[:2]]
    known: list[Any] = [a for a in arguments if isinstance(a, (torch.Tensor, int, float))]
    known += [1 for a in arguments if isinstance(a, torch.SymInt)]
    tensors = [a for a in known if isinstance(a, torch.Tensor)]
    if not tensors:
        return torch.float32
    return torch.result_type(*known) if len(known) == 2 else tensors[0].dtype
