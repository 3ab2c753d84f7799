"""Planned graph → kernel IR: kernels from regions, and the plans that run them.

Every value of a planned function has a place: it is an input, it is made in a result, it lies in
a slot of the arena, or it is a view of another value.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from typing import Any

import sympy

from ..errors import DiluError
from ..ir.graph import Function, Graph, Node, Value
from ..ir.ops.collective import AllGather, Collective, Routed
from ..ir.ops.control import Call
from ..ir.text import print_node
from ..ir.types import Dim, dim, numel, symbols
from .kernel_ir import (
    Buffer,
    CallPlan,
    CollectivePlan,
    Entry,
    Kernel,
    Launch,
    Place,
    Plan,
    Program,
    RoutedPlan,
    Stacked,
)
from .lower_language import lower_attention, lower_cache_update, lower_experts, lower_topk
from .lower_loops import Output
from .lower_matmul import lower_matmul
from .lower_products import Region
from .names import buffer_name
from .target import Target


def lower(graph: Graph, target: Target) -> Program:
    """Return the program of a planned graph; raise DiluError for a region no kernel computes.

    `target` says which types products read and what is worth keeping of a row.
    """
    if graph.stage != "planned":
        raise DiluError(f"code is made from planned graphs, not from a {graph.stage} one")
    return Program(tuple(_entry(graph, f, target) for f in graph.functions))


def _entry(graph: Graph, function: Function, target: Target) -> Entry:
    pieces = {c.name: _pieces(graph, c, target) for c in function.constants}
    plan = lower_function(function, pieces, target)
    names = function_symbols(function)
    return Entry(plan, names, _work(function))


def function_symbols(function: Function) -> tuple[str, ...]:
    """Return the symbols of a function's sizes in the order of their first appearance."""
    found: dict[str, None] = {}
    for value in (*function.inputs, *function.results):
        for size in value.type.shape:
            found.update(dict.fromkeys(symbols([size])))
    return tuple(found)


def _work(function: Function) -> Dim:
    """Return a number that is zero only when the function has nothing to do."""
    results = sum((numel(r.type.shape) for r in function.results), 0)
    if has_collectives(function):  # a rank without tokens works for the others
        return 1
    if function.states and function.parameters:
        return dim(numel(function.parameters[0].type.shape))
    return dim(results)


def has_collectives(function: Function) -> bool:
    """Whether a function takes part in what other ranks do."""
    return any(isinstance(n.op, (Routed, Collective)) for n in function.nodes) or any(
        has_collectives(n.op.body) for n in function.nodes if isinstance(n.op, Call)
    )


def _pieces(graph: Graph, constant: Value, target: Target) -> int:
    weight = graph.weights.get(constant.name)
    if weight is None or weight.data is not None or target.copies_weights:
        return 0
    return weight.grid


# ------------------------------------------------------------------------------- plans


def lower_function(function: Function, pieces: Mapping[str, int], target: Target) -> Plan:
    """Return the plan of a function whose constants are spread over `pieces` leading axes."""
    places = _Places(function)
    steps: list[Launch | CallPlan | RoutedPlan | CollectivePlan] = []
    for node in function.nodes:
        try:
            if node.op.name == "kernel":
                steps.append(_launch(node, places, pieces, target))
            elif node.op.name == "call":
                steps.append(_call(node, places, pieces, target))
            elif node.op.name == "routed":
                steps.append(_routed(node, places, pieces, target))
            elif isinstance(node.op, Collective):
                steps.append(_collective(node, node.op, places))
        except DiluError as error:
            raise error.in_pass("lower", _short(node), node.loc) from None
    return Plan(
        function.name,
        len(function.parameters),
        len(function.states),
        len(function.constants),
        len(function.results),
        tuple(slot.size for slot in function.arena),
        tuple(steps),
    )


def _short(node: Node) -> str:
    body: Function | None = getattr(node.op, "body", None)
    return node.op.name if body is None else f"{node.op.name} @{body.name}"


class _Places:
    """Where the values of a function lie."""

    def __init__(self, function: Function) -> None:
        self.function = function
        self.known: dict[str, Place] = {}
        self.constants = {c.name for c in function.constants}
        self.views: dict[str, Value] = {}
        for i, v in enumerate(function.parameters):
            self.known[v.name] = Place("parameter", i)
        for i, v in enumerate(function.states):
            self.known[v.name] = Place("state", i)
        for i, v in enumerate(function.constants):
            self.known[v.name] = Place("constant", i)
        self._views()
        for i, v in enumerate(function.results):
            root = self.root(v)
            if root.name in self.known:
                raise DiluError(f"@{function.name}: result {v} is not made by a kernel of its own")
            self.known[root.name] = Place("result", i)
        for i, slot in enumerate(function.arena):
            for name in slot.values:
                self.known.setdefault(name, Place("slot", i))

    def _views(self) -> None:
        """Note reshapes and updated states as views of what they come from."""
        for node in self.function.nodes:
            op: Any = node.op
            if op.name == "reshape":
                self.views[node.output.name] = node.inputs[0]
            elif op.name in ("kernel", "call"):
                body: Function = op.body
                first = len(body.parameters)
                states = node.inputs[first : first + len(body.states)]
                made = node.outputs[len(body.results) :]
                self.views.update({m.name: s for m, s in zip(made, states, strict=True)})

    def root(self, value: Value) -> Value:
        while value.name in self.views:
            value = self.views[value.name]
        return value

    def of(self, value: Value) -> Place:
        root = self.root(value)
        if root.name not in self.known:
            raise DiluError(f"@{self.function.name}: {value} has no place in the arena")
        return self.known[root.name]


# ----------------------------------------------------------------------------- kernels

_KINDS: dict[str, Callable[[Region], None]] = {
    "matmul": lower_matmul,
    "experts": lower_experts,
    "attention": lower_attention,
    "topk": lower_topk,
    "cache_update": lower_cache_update,
}


def _launch(node: Node, places: _Places, pieces: Mapping[str, int], target: Target) -> Launch:
    op: Any = node.op
    body: Function = op.body
    count = {
        inside.name: _operand_pieces(outside, places, pieces)
        for inside, outside in zip(body.inputs, node.inputs, strict=True)
    }
    constant = {
        inside.name
        for inside, outside in zip(body.inputs, node.inputs, strict=True)
        if places.root(outside).name in places.constants
    }
    results = node.outputs[: len(body.results)]
    kernel = lower_kernel(op.kind, body, constant, count, node, target)
    arguments = tuple(places.of(v) for v in (*node.inputs, *results))
    return Launch(kernel, arguments)


def _operand_pieces(value: Value, places: _Places, pieces: Mapping[str, int]) -> int:
    root = places.root(value)
    count = pieces.get(root.name, 0)
    if count and root is not value and root.type.shape[:count] != value.type.shape[:count]:
        raise DiluError(f"{root} lies in pieces and cannot be reshaped to {value.type}")
    return count


def lower_kernel(
    kind: str,
    body: Function,
    constant: set[str],
    pieces: Mapping[str, int],
    node: Node,
    target: Target,
) -> Kernel:
    """Return the kernel of one region."""
    inputs: dict[str, Buffer] = {}
    taken: set[str] = set()
    for v in body.inputs:
        name = buffer_name(v.name, taken)
        taken.add(name)
        count, lasting = pieces.get(v.name, 0), v.name in constant
        inputs[v.name] = Buffer(
            name, v.type.dtype, v.type.shape, "argument", constant=lasting, pieces=count
        )
    outputs: list[Buffer] = []
    for v in body.results:
        name = buffer_name(v.name, taken)
        taken.add(name)
        outputs.append(Buffer(name, v.type.dtype, v.type.shape))
    region = Region(body, dict(inputs), tuple(outputs), taken | symbols_of(body), target)
    if kind == "loops":
        pairs = zip(body.results, outputs, strict=True)
        region.steps += region.loops([Output(v, b) for v, b in pairs])
    elif kind in _KINDS:
        _KINDS[kind](region)
    else:
        raise DiluError(f"unknown kind of kernel {kind!r}").in_pass("lower", print_node(node))
    loc = next((n.loc for n in body.nodes if n.loc is not None), node.loc)
    return Kernel(
        body.name, kind, tuple(inputs.values()), region.outputs,
        tuple(sorted(symbols_of(body))), tuple(region.steps), tuple(region.scratch), loc,
    )  # fmt: skip


def symbols_of(body: Function) -> set[str]:
    """Return the symbols in the types and attributes of a body."""
    values = [*body.inputs, *(v for n in body.nodes for v in n.outputs)]
    found = {s for v in values for s in symbols(v.type.shape)}
    for node in body.nodes:
        sizes = (a for a in node.op.attributes().values() if isinstance(a, sympy.Expr))
        found.update(symbols(sizes))
    return found


# ------------------------------------------------------------------------------- calls


def _call(node: Node, places: _Places, pieces: Mapping[str, int], target: Target) -> CallPlan:
    op: Any = node.op
    body: Function = op.body
    first, second = len(body.parameters), len(body.parameters) + len(body.states)
    states = tuple(
        _stacked(outside, inside, places, pieces)
        for outside, inside in zip(node.inputs[first:second], body.states, strict=True)
    )
    inner: dict[str, int] = {}
    constants: list[Stacked] = []
    for outside, inside in zip(node.inputs[second:], body.constants, strict=True):
        constants.append(_stacked(outside, inside, places, pieces))
        stacked = outside.type.rank > inside.type.rank
        inner[inside.name] = max(0, pieces.get(outside.name, 0) - stacked)
    plan = lower_function(body, inner, target)
    results = node.outputs[: len(body.results)]
    return CallPlan(
        plan,
        op.times,
        tuple(places.of(v) for v in node.inputs[:first]),
        states,
        tuple(constants),
        tuple(places.of(v) for v in results),
        tuple(v.type.nbytes for v in results),
    )


def _routed(node: Node, places: _Places, pieces: Mapping[str, int], target: Target) -> RoutedPlan:
    op: Any = node.op
    x, indices, placement, *constants = node.inputs
    inner = {
        inside.name: _operand_pieces(outside, places, pieces)
        for inside, outside in zip(op.body.constants, constants, strict=True)
    }
    tokens, width = x.type.shape
    sizes = (indices.type.shape[1], width, *placement.type.shape)
    if not all(isinstance(size, int) for size in sizes):
        raise DiluError("routed experts need sizes that are known when compiling")
    choices, numbers, ranks, slots = (int(size) for size in sizes)
    return RoutedPlan(
        lower_function(op.body, inner, target),
        str(op.body.parameters[0].type.shape[0]),
        op.capacity,
        tokens,
        choices,
        numbers,
        x.type.dtype,
        node.output.type.dtype,
        ranks,
        slots,
        places.of(x),
        places.of(indices),
        places.of(placement),
        tuple(places.of(c) for c in constants),
        places.of(node.output),
    )


def _collective(node: Node, op: Collective, places: _Places) -> CollectivePlan:
    (x,) = node.inputs
    split = op.dim if isinstance(op, AllGather) else 0
    return CollectivePlan(
        "all_gather" if isinstance(op, AllGather) else "all_reduce",
        op.axis,
        x.type.dtype,
        numel(x.type.shape[:split]),
        numel(x.type.shape[split:]),
        places.of(x),
        places.of(node.output),
    )


def _stacked(outside: Value, inside: Value, places: _Places, pieces: Mapping[str, int]) -> Stacked:
    """Return how an operand of a call steps from run to run."""
    place = places.of(outside)
    if outside.type.rank == inside.type.rank:
        return Stacked(place)
    count = pieces.get(outside.name, 0)
    if count == 0:
        return Stacked(place, stride=inside.type.nbytes)
    number = numel(inside.type.shape[: count - 1])
    assert isinstance(number, int)
    return Stacked(place, pieces=number)
