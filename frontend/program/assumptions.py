"""What a captured program takes for granted of its sizes, so that a call can be held to it.

torch.export records the guards that it needed, but not what it decided because it takes a dynamic
size to be at least 2: whether a model's own `if n == 1:` is taken, or whether `squeeze` removes
an axis. Here both become conditions; what cannot be checked at a call is refused.
"""

from __future__ import annotations

import contextlib
import sys
from collections.abc import Generator, Iterable, Mapping
from dataclasses import dataclass, field
from typing import Any

import sympy
import torch
from torch.export.graph_signature import InputKind
from torch.utils._sympy.numbers import int_oo

from ...errors import DiluError, UnsupportedError
from ...ir.types import Dim, dim, print_dim
from ..operators import Symbols

_RELATIONS: dict[Any, str] = {
    sympy.Eq: "==", sympy.Ne: "!=", sympy.Lt: "<", sympy.Le: "<=", sympy.Gt: ">", sympy.Ge: ">=",
}  # fmt: skip
_TORCH = str(torch.__path__[0])
_TRANSPARENT = f"{_TORCH}/__init__.py"  # `bool(size)` asks whether it is 0 in there


@dataclass
class Branches:
    """Conditions on sizes that a model's own code asked for, and how they came out.

    `on_nothing` says that one was decided by no size being 0.
    """

    taken: list[tuple[sympy.Basic, bool]] = field(default_factory=list)
    on_nothing: bool = False


@contextlib.contextmanager
def recorded_branches() -> Generator[Branches]:
    """Record the conditions on symbolic sizes that are asked for outside of torch."""
    branches = Branches()
    original = torch.SymBool.__bool__

    def recording(self: torch.SymBool) -> bool:
        outcome = original(self)
        # A frame that held itself would keep the fake tensors of its callers alive.
        frame = sys._getframe(1)  # pyright: ignore[reportPrivateUsage]
        if frame.f_code.co_filename == _TRANSPARENT:
            frame = frame.f_back or frame
        if not frame.f_code.co_filename.startswith(_TORCH):
            expression = sympy.sympify(self.node.expr)
            if expression in (sympy.true, sympy.false):
                branches.on_nothing = True
            else:
                branches.taken.append((expression, outcome))
        return outcome

    torch.SymBool.__bool__ = recording  # type: ignore[method-assign]
    try:
        yield branches
    finally:
        torch.SymBool.__bool__ = original  # type: ignore[method-assign]


def guards_of(program: torch.export.ExportedProgram) -> list[sympy.Basic]:
    """Return the conditions on sizes that torch found to be needed while it captured."""
    for node in program.graph_module.graph.find_nodes(op="placeholder"):
        environment = getattr(getattr(node.meta.get("val"), "fake_mode", None), "shape_env", None)
        if environment is not None:
            return [sympy.sympify(environment.replace(g.expr)) for g in environment.guards]
    return []


def ranges_of(
    program: torch.export.ExportedProgram, sizes: Mapping[tuple[int, int], Any]
) -> list[sympy.Basic]:
    """Return the ranges of sizes, of which `sizes` says what was asked for, by input and axis.

    torch's range begins at 2 for every size about which nothing was said: that alone is no
    condition, unless it was asked for.
    """
    found: list[sympy.Basic] = []
    for symbol, bounds in program.range_constraints.items():
        if bounds.lower > 2:
            found.append(sympy.Ge(symbol, bounds.lower, evaluate=False))
        if bounds.upper < int_oo:
            found.append(sympy.Le(symbol, bounds.upper, evaluate=False))
    inputs = _user_tensors(program)
    for (index, axis), size in sizes.items():
        least = None if hasattr(size, "root") else getattr(size, "min", None)
        dim_here = inputs[index].shape[axis] if index in inputs else None
        if isinstance(least, int) and isinstance(dim_here, torch.SymInt):
            found.append(sympy.Ge(dim_here.node.expr, least, evaluate=False))
    return found


def _user_tensors(program: torch.export.ExportedProgram) -> dict[int, torch.Tensor]:
    """Return the fakes of the tensors among the user's inputs, by the place of each."""
    fakes = {
        node.name: node.meta.get("val")
        for node in program.graph_module.graph.find_nodes(op="placeholder")
    }
    specs = program.graph_signature.input_specs
    users = [s.arg for s in specs if s.kind is InputKind.USER_INPUT]
    values = [fakes.get(getattr(arg, "name", "")) for arg in users]
    return {i: v for i, v in enumerate(values) if isinstance(v, torch.Tensor)}


def conditions(
    holding: Iterable[sympy.Basic],
    branches: Branches,
    not_one: Iterable[Dim],
    symbols: Symbols,
) -> list[list[str | int]]:
    """Return conditions as `[left, relation, right]` in the grammar of a manifest's sizes.

    `not_one` are sizes, in dilu's symbols, that must not be 1. Raises UnsupportedError for a
    condition that is no comparison of sizes.
    """
    found: dict[tuple[Any, ...], None] = {}
    wanted = [*((c, True) for c in holding), *branches.taken]
    if branches.on_nothing:
        wanted += [(sympy.Ge(s, 1, evaluate=False), True) for s in _torch_symbols(symbols)]
    for condition, outcome in wanted:
        for part in _parts(condition, outcome):
            names = {str(s) for s in part.free_symbols}
            if not names <= symbols.names.keys():
                continue  # of sizes that depend on data, which nothing that was imported has
            found[tuple(_comparison(part, symbols))] = None
    found.update({(_text(size), "!=", 1): None for size in not_one})
    return [list(row) for row in found]


def _torch_symbols(symbols: Symbols) -> list[sympy.Symbol]:
    return [sympy.Symbol(name, integer=True) for name in symbols.names]


def _parts(condition: Any, outcome: bool) -> list[Any]:
    """Return comparisons that hold all together where `condition` has this outcome."""
    if isinstance(condition, sympy.Not):
        return _parts(condition.args[0], not outcome)
    both = sympy.And if outcome else sympy.Or
    if isinstance(condition, both):
        return [part for each in condition.args for part in _parts(each, outcome)]
    if condition in (sympy.true, sympy.false):
        return []
    return [condition if outcome else sympy.Not(condition)]


def _comparison(condition: Any, symbols: Symbols) -> list[str | int]:
    relation = next((text for kind, text in _RELATIONS.items() if isinstance(condition, kind)), "")
    if not relation:
        raise _uncheckable(condition)
    try:
        left, right = (_text(symbols.dim_of(side)) for side in condition.args)
    except DiluError as error:
        raise _uncheckable(condition) from error
    return [left, relation, right]


def _uncheckable(condition: Any) -> UnsupportedError:
    return UnsupportedError(
        f"the model is captured for sizes with {condition}, which cannot be checked at a call",
        hint="make fewer sizes dynamic",
    )


def _text(size: Dim) -> str | int:
    return size if isinstance(size, int) else print_dim(dim(size))
