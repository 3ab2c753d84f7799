"""The reference executor of a sharded graph: all ranks of its mesh in one process, in lock-step.

A node is run on every rank before the next one is. What ranks have of their own, inputs and sizes,
is given for each; nothing passes between them but by collectives.
"""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np

from ..errors import DiluError
from .graph import Function, Graph
from .interpret import Arrays, Interpreter, Runs, bind_sizes
from .mesh import Mesh
from .ops.collective import Collective, Routed
from .ops.control import Call


def interpret_ranks(
    graph: Graph, function: Function, inputs: Sequence[Sequence[np.ndarray]], *, wide: bool = False
) -> list[Arrays]:
    """Run `function` of a graph with a mesh on `inputs[rank]`; return what every rank returns.

    Inputs and outputs are those of `interpret`, for each rank; sizes such as T may differ.
    """
    mesh = graph.mesh or Mesh()
    if len(inputs) != mesh.size:
        raise DiluError(f"{len(inputs)} ranks have inputs, and the mesh {mesh} has {mesh.size}")
    ranks = [Interpreter(bind_sizes(function, own), wide) for own in inputs]
    with np.errstate(all="ignore"):
        return _Ranks(mesh, ranks).function(function, [tuple(own) for own in inputs])


class _Ranks:
    def __init__(self, mesh: Mesh, ranks: list[Interpreter]) -> None:
        self.mesh = mesh
        self.ranks = ranks

    def function(self, function: Function, inputs: list[Arrays]) -> list[Arrays]:
        scopes = [r.scope(function, own) for r, own in zip(self.ranks, inputs, strict=True)]
        for node in function.nodes:
            arguments = [tuple(scope[v.name] for v in node.inputs) for scope in scopes]
            outputs = self.apply(node.op, arguments)
            for rank, scope, own in zip(self.ranks, scopes, outputs, strict=True):
                rank.define(scope, node, own)
        return [tuple(scope[v.name] for v in function.outputs) for scope in scopes]

    def apply(self, op: object, arguments: list[Arrays]) -> list[Arrays]:
        if isinstance(op, Routed):
            outputs: list[Arrays] = [()] * self.mesh.size
            for group in self.mesh.groups(op.axis):
                made = self.together(op, group, [arguments[r] for r in group])
                for rank, array in zip(group, made, strict=True):
                    outputs[rank] = (array,)
            return outputs
        if isinstance(op, Collective):
            outputs = [()] * self.mesh.size
            for group in self.mesh.groups(op.axis):
                made = op.reference_ranks([arguments[r][0] for r in group])
                for rank in group:
                    outputs[rank] = (made,)
            return outputs
        if isinstance(op, Call):
            runs = [Runs(op, own) for own in arguments]
            for i in range(op.times):
                made = self.function(op.body, [run.inputs(i) for run in runs])
                for run, out in zip(runs, made, strict=True):
                    run.take(i, out)
            return [run.outputs for run in runs]
        return [r.apply(op, own) for r, own in zip(self.ranks, arguments, strict=True)]

    def together(
        self, op: Routed, group: tuple[int, ...], inputs: list[Arrays]
    ) -> list[np.ndarray]:
        def run(number: int, own: Arrays) -> np.ndarray:
            rank = self.ranks[group[number]]
            inner = Interpreter(rank.sizes | bind_sizes(op.body, own), rank.wide)
            (out,) = inner.function(op.body, own)
            return out

        return op.reference_ranks(inputs, run)
