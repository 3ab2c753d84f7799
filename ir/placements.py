"""What a rank has of every value of a sharded graph, and whether it all fits together.

Along `tp`, a value is the same on all ranks, a part of it is on each, it is a part of a sum, or it
is a rank's own. This follows from how constants are divided; it is found anew here, whatever the
pass that divided them had in mind. All ranks run the same nodes in the same order, since nothing
branches: a collective is met by all of them, but for one in a body that ranks run by themselves.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import replace
from itertools import product
from typing import NoReturn

from ..errors import DiluError
from .dimensions import Link, links
from .dtypes import I64
from .graph import Function, Graph, Node, Value
from .mesh import Mesh
from .ops.collective import AllGather, AllReduce, Collective, Routed
from .ops.control import Call, Kernel
from .ops.elementwise import Add, Cast, Mul, Neg
from .ops.index import BroadcastTo, Reshape, Slice, Take, Transpose
from .ops.quantize import Dequantize
from .ops.reduce import ReduceSum
from .text import print_node
from .types import TensorType
from .weights import Even, Placed

#: The same on all ranks; a part of a sum; a rank's own. A number is the dimension that is divided.
WHOLE, PART, OWN = "whole", "a part of a sum", "a rank's own"
Placement = str | int
#: Where a graph leaves it open what is divided (heads of one number, one head), all that may be.
Placements = frozenset[Placement]

_AXIS = "tp"
_SAME: Placements = frozenset({WHOLE})
#: Ops of one operand that may be applied to the parts of a sum.
_LINEAR = (Reshape, Transpose, BroadcastTo, Slice, ReduceSum, Neg)


def verify_placements(graph: Graph) -> None:
    """Raise DiluError, naming the node, where ranks do not have what an op needs of its operands,
    what a function returns is not whole, or a collective does not fit the mesh."""
    for function in graph.functions:
        found = infer_placements(graph, function)
        for value in function.results:
            if found[value.name] != _SAME:
                raise DiluError(
                    f"invalid graph in @{function.name}: the result {value} is not the same on "
                    f"all ranks, but {_said(found[value.name])}"
                )


def infer_placements(graph: Graph, function: Function) -> dict[str, Placements]:
    """Return what a rank has of every value of a graph's function, by the value's name."""
    given = {v.name: _SAME for v in function.parameters}
    given |= {c.name: _divided(graph, c) for c in function.constants}
    return _Inference(graph, function, {c.name: c.name for c in function.constants}).run(given)


def _divided(graph: Graph, constant: Value) -> Placements:
    weight = graph.weights.get(constant.name)
    even = [s for s in (weight.splits if weight else ()) if isinstance(s, Even)]
    if len(even) > 1:
        raise DiluError(f"the constant {constant} is divided along {len(even)} dimensions")
    if not even:
        return _SAME
    # Integers are no part of a tensor that ranks share: they tell ranks apart.
    return frozenset({OWN if constant.type.dtype == I64 else even[0].dim})


class _Inference:
    """Finds the placements of a function's values.

    `origins`: the constants of the graph's function that the constants here are of. `alone`:
    whether a rank runs the function as often as it likes.
    """

    def __init__(
        self, graph: Graph, function: Function, origins: Mapping[str, str], *, alone: bool = False
    ) -> None:
        self.graph, self.function, self.origins, self.alone = graph, function, origins, alone
        self.mesh = graph.mesh or Mesh()

    def run(self, given: Mapping[str, Placements]) -> dict[str, Placements]:
        """Return all placements, given those of the inputs; states that are not given are found."""
        states = {
            v.name: given.get(v.name) or frozenset({WHOLE, *range(v.type.rank)})
            for v in self.function.states
        }
        while True:
            found = {**given, **states}
            for node in self.function.nodes:
                made = self.made(node, [found[v.name] for v in node.inputs])
                found |= {v.name: p for v, p in zip(node.outputs, made, strict=True)}
            pairs = zip(self.function.states, self.function.updates, strict=True)
            narrowed = {s.name: states[s.name] & found[u.name] for s, u in pairs}
            if narrowed == states:  # what nothing divides is whole
                narrowed = {s: _SAME if WHOLE in p else p for s, p in states.items()}
            if narrowed == states:
                return found
            for name, placements in narrowed.items():
                if not placements:
                    self.fail(f"the state %{name}, {_said(states[name])}, is updated by another")
            states = narrowed

    def fail(self, message: str, node: Node | None = None) -> NoReturn:
        where = f"@{self.function.name}" + (f", {print_node(node)}" if node else "")
        raise DiluError(f"invalid graph in {where}: {message}", loc=node.loc if node else None)

    def made(self, node: Node, inputs: list[Placements]) -> list[Placements]:
        op = node.op
        if isinstance(op, Collective):
            return [self.collective(node, op, inputs[0])]
        if isinstance(op, Routed):
            return [self.routed(node, op, inputs)]
        if isinstance(op, (Call, Kernel)):
            return self.inside(node, op.body, inputs)
        if any(self.placed(v) for v in node.inputs):
            self.fail("the experts that a rank holds are used by no `routed`", node)
        if all(p == _SAME for p in inputs):
            return [_SAME] * len(node.outputs)
        known = {v.name: p for v, p in zip(node.inputs, inputs, strict=True)}
        outcomes: list[set[Placement]] = [set() for _ in node.outputs]
        for choice in product(*(sorted(p, key=str) for p in known.values())):
            chosen = dict(zip(known, choice, strict=True))
            for made in _outcomes(node, [chosen[v.name] for v in node.inputs], self.mesh.tp):
                for outcome, placement in zip(outcomes, made, strict=True):
                    outcome.add(placement)
        if not all(outcomes):
            self.fail(f"operands do not fit each other: {_all_said(node, inputs)}", node)
        return [frozenset(o) for o in outcomes]

    def collective(self, node: Node, op: Collective, x: Placements) -> Placements:
        if self.alone:
            self.fail("the other ranks do not take part in what a rank runs by itself", node)
        if op.axis != _AXIS:
            self.fail(f"nothing is divided along {op.axis}", node)
        if isinstance(op, AllReduce) and not x <= {PART, OWN}:
            self.fail(f"{node.inputs[0]} is no part of a sum, but {_said(x)}", node)
        if isinstance(op, AllGather):
            if op.ranks != self.mesh.tp:
                self.fail(f"the mesh is {self.mesh}", node)
            if op.dim not in x:
                self.fail(f"{node.inputs[0]} is {_said(x)}", node)
        return _SAME

    def routed(self, node: Node, op: Routed, inputs: list[Placements]) -> Placements:
        placement = node.inputs[2]
        if self.alone:
            self.fail("the other ranks do not take part in what a rank runs by itself", node)
        if placement.type.shape[0] != getattr(self.mesh, op.axis):
            self.fail(f"the mesh is {self.mesh}", node)
        if any(p != _SAME for p in inputs[:3]):
            self.fail(f"rows are routed whole: {_all_said(node, inputs[:3])}", node)
        for value in node.inputs[3:]:
            held = self.placed(value)
            if value.name in self.origins and (
                held is None or held.placement != self.origins.get(placement.name)
            ):
                self.fail(f"{placement} does not say which part of {value} a rank holds", node)
        given = {v.name: _SAME for v in op.body.parameters}
        given |= {c.name: p for c, p in zip(op.body.constants, inputs[3:], strict=True)}
        (result,) = op.body.results
        made = _Inference(self.graph, op.body, {}, alone=True).run(given)[result.name]
        return frozenset(p + 1 if isinstance(p, int) and p else p for p in made)

    def placed(self, value: Value) -> Placed | None:
        weight = self.graph.weights.get(self.origins.get(value.name, ""))
        return next((s for s in (weight.splits if weight else ()) if isinstance(s, Placed)), None)

    def inside(self, node: Node, body: Function, inputs: list[Placements]) -> list[Placements]:
        pairs = list(zip(body.inputs, node.inputs, strict=True))
        leads = {inner.name: outer.type.rank - inner.type.rank for inner, outer in pairs}
        given = {
            inner.name: _moved(placements, -leads[inner.name])
            for (inner, _), placements in zip(pairs, inputs, strict=True)
        }
        for inner, placements in given.items():
            if not placements:
                self.fail(f"the repetitions of {inner} cannot be divided", node)
        origins = {
            inner.name: self.origins[outer.name]
            for inner, outer in pairs
            if outer.name in self.origins
        }
        found = _Inference(self.graph, body, origins, alone=self.alone).run(given)
        if getattr(node.op, "times", 1) > 1:
            for result, parameter in zip(body.results, body.parameters, strict=False):
                if found[result.name] != given[parameter.name]:
                    self.fail(
                        f"{parameter}, {_said(given[parameter.name])}, becomes {result}, "
                        f"{_said(found[result.name])}",
                        node,
                    )
        results = [found[v.name] for v in body.results]
        states = zip(body.states, body.updates, strict=True)
        return [*results, *(_moved(found[u.name], leads[s.name]) for s, u in states)]


def _moved(placements: Placements, by: int) -> Placements:
    """Return placements in a tensor with more or fewer leading dimensions."""
    moved = (p + by if isinstance(p, int) else p for p in placements)
    return frozenset(p for p in moved if not isinstance(p, int) or p >= 0)


def _outcomes(node: Node, inputs: list[Placement], ranks: int) -> Iterator[Sequence[Placement]]:
    """Yield what the outputs of an op may be, given what its operands are; nothing for what
    cannot be."""
    op, count = node.op, len(node.outputs)
    kinds = set(inputs)
    if kinds == {WHOLE}:
        yield [WHOLE] * count
    elif OWN in kinds:
        looked_up = isinstance(op, Take) and inputs[0] == 0
        if kinds <= {OWN, WHOLE} or (looked_up and inputs[1] == OWN):
            yield [OWN] * count
    elif PART in kinds:
        one = isinstance(op, Mul) and inputs.count(PART) == 1 and inputs.count(WHOLE) == 1
        all_of_them = kinds == {PART} and (isinstance(op, (Add, *_LINEAR)) or _widens(node))
        if one or all_of_them:
            yield [PART] * count
    else:
        yield from _divided_outcomes(node, inputs, ranks)


def _widens(node: Node) -> bool:
    return isinstance(node.op, Cast) and node.op.dtype.bits > node.inputs[0].type.dtype.bits


def _divided_outcomes(
    node: Node, inputs: list[Placement], ranks: int
) -> Iterator[Sequence[Placement]]:
    """Yield what an op makes of divided operands, seen as an op on what all ranks have together."""
    op = node.op
    whole = tuple(_whole(v.type, p, ranks) for v, p in zip(node.inputs, inputs, strict=True))
    divided = {(i, p) for i, p in enumerate(inputs) if isinstance(p, int)}
    local = [v.type for v in node.outputs]
    candidates = [op]
    if isinstance(op, (Reshape, BroadcastTo)):  # what they make is in their attributes
        shapes = (_whole(local[0], d, ranks).shape for d in range(local[0].rank))
        candidates = [replace(op, shape=shape) for shape in shapes]
    for candidate in candidates:
        try:
            outputs = candidate.infer(*whole)
        except DiluError:
            continue
        known = links(candidate, whole, outputs)
        if isinstance(op, Dequantize):
            known = [_with_scales(link, whole) for link in known]
        made = _linked(known, divided, len(outputs))
        fits = made and all(
            _whole(t, p, ranks) == o for t, p, o in zip(local, made, outputs, strict=True)
        )
        if made and fits:
            yield made


def _with_scales(link: Link, inputs: tuple[TensorType, ...]) -> Link:
    """Join scales with the codes that they are for; one scale may be for the codes of all ranks."""
    ((_, d), *_) = link.inputs
    return replace(link, inputs=((0, d), (1, d)) if inputs[1].shape[d] != 1 else ((0, d),))


def _linked(
    known: Sequence[Link], divided: set[tuple[int, int]], outputs: int
) -> list[Placement] | None:
    """Return what the outputs are where links divide these dimensions; None where they do not."""
    made: list[Placement] = [WHOLE] * outputs
    seen: set[tuple[int, int]] = set()
    for link in known:
        own = [place for place in link.inputs if place in divided]
        if not own:
            continue
        if len(own) != len(link.inputs) or not (link.summed or link.outputs):
            return None
        seen |= set(own)
        if link.summed:
            made = [PART] * outputs
        for o, d in link.outputs:
            if made[o] != WHOLE:
                return None
            made[o] = d
    return made if seen == divided else None


def _whole(t: TensorType, placement: Placement, ranks: int) -> TensorType:
    if not isinstance(placement, int):
        return t
    return t.with_shape(s * ranks if d == placement else s for d, s in enumerate(t.shape))


def _said(placements: Placements) -> str:
    divided = sorted(p for p in placements if isinstance(p, int))
    words = [str(p) for p in sorted(placements, key=str) if not isinstance(p, int)]
    words += [f"divided along dimension {' or '.join(map(str, divided))}"] if divided else []
    return " or ".join(words)


def _all_said(node: Node, inputs: Sequence[Placements]) -> str:
    pairs = zip(node.inputs, inputs, strict=False)
    return ", ".join(f"{value} is {_said(placements)}" for value, placements in pairs)
