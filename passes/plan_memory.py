"""Where every value lies: in the arena, in a result, or where another value lay."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass, replace

import sympy

from ..errors import DiluError, UnsupportedError
from ..ir.graph import Function, Graph, Node, Slot, Value
from ..ir.ops.control import Call, Kernel, Subprogram
from ..ir.ops.index import BroadcastTo, Reshape
from ..ir.rewrite import Builder, map_functions
from ..ir.types import Dim, dim
from .eliminate_dead import live_part
from .nominal import NOMINAL, nominal

ALIGNMENT = 64  # bytes; a cache line, and the widest vector


def plan_memory(graph: Graph, *, at: int = NOMINAL) -> Graph:
    """Give every value that is made inside a function a slot of the function's arena.

    Values that are never needed at the same time share slots; the largest are placed first, each
    in the slot that fits best when every symbolic size is `at`. A reshape lies where its
    operand lies, an updated state where the state lies, and a result in the caller's memory. A
    result that would be a parameter, a constant, a state or another result becomes a copy.

    Before:
        func @main(%x: f32[T,8]) {
          %a: f32[T,8] = kernel(%x) …
          %b: f32[T,8] = kernel(%a) …
          %c: f32[T,8] = kernel(%b) …
          %y: f32[T,8] = kernel(%c) …
          return %y
        }
    After:
        … the same nodes …
          return %y
          arena 64*((32*T + 63) // 64) : %a, %c
          arena 64*((32*T + 63) // 64) : %b

    Numerics: exact.
    """
    planned = map_functions(graph, lambda f: _planned(live_part(_with_copies(f)), at))
    return replace(planned, stage="planned")


# ------------------------------------------------------------------------------------ storage


def in_place(node: Node) -> Iterator[tuple[Value, Value]]:
    """Yield (state, its update) for every state that a node works on in place."""
    if isinstance(node.op, (Call, Kernel)):
        body = node.op.body
        first = len(body.parameters)
        states = node.inputs[first : first + len(body.states)]
        yield from zip(states, node.outputs[len(body.results) :], strict=True)


def storage(function: Function) -> dict[str, Value]:
    """Return, for every value by name, the value whose memory it lies in (often itself)."""
    home = {v.name: v for v in function.inputs}
    for node in function.nodes:
        home.update((v.name, v) for v in node.outputs)
        if isinstance(node.op, Reshape):
            home[node.output.name] = home[node.inputs[0].name]
        for state, update in in_place(node):
            home[update.name] = home[state.name]
    return home


@dataclass(frozen=True)
class Life:
    """From the node that first writes a piece of memory to the last one that reads it."""

    value: Value
    first: int
    last: int

    def meets(self, other: Life) -> bool:
        return self.first <= other.last and other.first <= self.last


def lives(function: Function) -> list[Life]:
    """Return the lives of the values that need a place in the arena."""
    home = storage(function)
    elsewhere = {v.name for v in function.inputs} | {home[v.name].name for v in function.outputs}
    first: dict[str, int] = {}
    last: dict[str, int] = {}
    for i, node in enumerate(function.nodes):
        for value in node.outputs:
            first.setdefault(home[value.name].name, i)
        for value in (*node.inputs, *node.outputs):
            last[home[value.name].name] = i
    made = {v.name: v for n in function.nodes for v in n.outputs}
    return [Life(made[n], i, last[n]) for n, i in first.items() if n not in elsewhere]


# ----------------------------------------------------------------------------------- planning


def _planned(function: Function, at: int) -> Function:
    _check_states(function)
    sized = [(nominal(life.value.type.nbytes, at), life) for life in lives(function)]
    sized.sort(key=lambda pair: (-pair[0], pair[1].first))
    slots: list[tuple[int, list[Life]]] = []
    for size, life in sized:
        free = [s for s in slots if not any(life.meets(other) for other in s[1])]
        if free:
            min(free, key=lambda s: s[0] - size)[1].append(life)
        else:
            slots.append((size, [life]))
    return replace(function, arena=tuple(_slot([life.value for life in s]) for _, s in slots))


def _slot(values: list[Value]) -> Slot:
    largest = sympy.Max(*(v.type.nbytes for v in values))
    return Slot(aligned(dim(largest)), tuple(v.name for v in values))


def aligned(size: Dim) -> Dim:
    """Return a size in bytes rounded up to the alignment of the arena."""
    if isinstance(size, int):
        return -(-size // ALIGNMENT) * ALIGNMENT
    if _is_aligned(size):
        return size
    return dim(ALIGNMENT * sympy.floor((size + ALIGNMENT - 1) / ALIGNMENT))


def _is_aligned(size: sympy.Expr) -> bool:
    """Whether a size is a multiple of the alignment, whatever its symbols stand for."""
    if isinstance(size, sympy.Max):
        return all(isinstance(a, sympy.Expr) and _is_aligned(a) for a in size.args)
    if size.has(sympy.floor, sympy.Mod):
        return False
    return all(term.as_coeff_Mul()[0] % ALIGNMENT == 0 for term in sympy.Add.make_args(size))


def _check_states(function: Function) -> None:
    """Raise DiluError where a state is read after it was overwritten, or not updated in place."""
    home = storage(function)
    current = {home[s.name].name: s.name for s in function.states}
    version = {v.name: v.name for v in function.inputs}
    for node in function.nodes:
        version.update((v.name, v.name) for v in node.outputs)
        if isinstance(node.op, Reshape):
            version[node.output.name] = version[node.inputs[0].name]
        for value in node.inputs:
            place = home[value.name].name
            if place in current and current[place] != version[value.name]:
                raise DiluError(
                    f"@{function.name}: {value} is read after it was updated to %{current[place]}",
                    loc=node.loc,
                    hint="read the state before it is updated, or read the update",
                )
        for state, update in in_place(node):
            current[home[state.name].name] = update.name
    for state, update in zip(function.states, function.updates, strict=True):
        if home[update.name] != state:
            raise UnsupportedError(
                f"@{function.name}: state {state} is replaced by {update}, not updated in place"
            )
        if current[state.name] != version[update.name]:
            raise DiluError(f"@{function.name}: state {state} ends as {update}, an old version")


def _with_copies(function: Function) -> Function:
    """Copy results that would lie in memory which is not theirs alone."""
    home = storage(function)
    taken = {v.name for v in function.inputs}
    builder = Builder.over(function)
    builder.nodes.extend(function.nodes)
    results: list[Value] = []
    for i, value in enumerate(function.results):
        place = home[value.name].name
        name = f"{function.name}_copy_{i}"
        results.append(_copy(value, name, builder) if place in taken else value)
        taken.add(place)
    return replace(function, nodes=tuple(builder.nodes), results=tuple(results))


def _copy(value: Value, name: str, builder: Builder) -> Value:
    inside = Value(builder.fresh(f"{value.name}_copy"), value.type)
    body = Function(
        name,
        parameters=(value,),
        nodes=(Node(BroadcastTo(value.type.shape), (value,), (inside,)),),
        results=(inside,),
    )
    builder.nodes.append(Node(Kernel("loops", body), (value,), (inside,)))
    return inside


# ------------------------------------------------------------------------------------ summary


@dataclass(frozen=True)
class FunctionMemory:
    """What a function's arena takes, in bytes, and what it would take without reuse."""

    name: str
    arena: Dim
    without_reuse: Dim
    slots: tuple[Slot, ...]


def memory_summary(graph: Graph) -> list[FunctionMemory]:
    """Return the arenas of a planned graph's functions and of the bodies they call."""
    out: list[FunctionMemory] = []

    def add(function: Function) -> None:
        total = dim(sum((s.size for s in function.arena), 0))
        alone = dim(sum((aligned(life.value.type.nbytes) for life in lives(function)), 0))
        out.append(FunctionMemory(function.name, total, alone, function.arena))
        for node in function.nodes:
            if isinstance(node.op, Subprogram):
                add(node.op.body)

    for function in graph.functions:
        add(function)
    return out
