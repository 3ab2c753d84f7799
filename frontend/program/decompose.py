"""Decomposition, the safety net of operators: what has no lowering becomes operators that have one.

torch knows how to write most operators in terms of others; a lowering of our own exists where that
is less accurate or slower. Invariant: an operator with a lowering is never decomposed.
"""

from __future__ import annotations

import inspect
from collections.abc import Callable, Iterator, Mapping
from functools import cache
from typing import Any

import torch
from torch._decomp import decomposition_table
from torch._ops import OpOverload
from torch.export import ExportedProgram
from torch.fx import GraphModule

from ..operators import TABLE

#: What decompositions decompose into may itself have none of ours; more turns than this would be a
#: circle of torch's.
_TURNS = 6


def decomposed(program: ExportedProgram) -> ExportedProgram:
    """Return the program with every operator that has no lowering replaced by what it consists of,
    as far as torch knows that."""
    tried: set[OpOverload] = set()
    for _ in range(_TURNS):
        missing = {op for op in _operators(program.graph_module) if str(op) not in TABLE} - tried
        table = {op: how for op in missing if (how := _decomposition(op)) is not None}
        if not table:
            break
        tried |= missing
        program = _taken_apart(program, table)
    return program


def _taken_apart(program: ExportedProgram, table: Mapping[Any, Any]) -> ExportedProgram:
    """Return the program with operators decomposed; those that torch fails on stay, to be refused
    by their names."""
    try:
        return program.run_decompositions(dict(table))
    except Exception:
        if len(table) > 1:
            for op, how in table.items():
                program = _taken_apart(program, {op: how})
        return program


def _operators(module: GraphModule) -> Iterator[OpOverload]:
    for part in module.modules():
        if isinstance(part, GraphModule):
            for node in part.graph.nodes:
                if isinstance(node.target, OpOverload):
                    yield node.target


def _decomposition(op: OpOverload) -> Callable[..., Any] | None:
    """Return what computes an operator by others that may have lowerings; None where torch has
    nothing of the kind."""
    known = _exports_own().get(op) or decomposition_table.get(op)
    return None if known is None or _is_primitive(op, known) else known


def _is_primitive(op: OpOverload, decomposition: Callable[..., Any]) -> bool:
    """Return whether torch takes an operator apart into its own namesake among the primitives."""
    module = inspect.unwrap(decomposition).__module__
    name = op.name().rpartition("::")[2].partition(".")[0]
    return module.startswith("torch._refs") and hasattr(torch.ops.prims, name)


@cache
def _exports_own() -> Mapping[Any, Callable[..., Any]]:
    """Return torch.export's decompositions, those of composite operators among them."""
    return dict(torch.export.default_decompositions().items())
