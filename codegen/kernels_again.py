"""The kernel IR of an artifact, made again from the planned graph that it keeps.

An artifact holds no kernel IR: it follows from what is in it, so that nothing has to be stored, or
can disagree, and what is shown is how this version of dilu lowers the graph.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from dataclasses import replace

from ..errors import DiluError
from ..ir.text import parse_graph
from ..ir.weights import Weight
from .kernel_ir import CallPlan, Kernel, Launch, Plan, RoutedPlan
from .kernel_text import print_kernel
from .lower import lower
from .targets import find_target


def kernel_ir(planned: str, grids: Mapping[str, int], target: str, name: str) -> str:
    """Return the IR of a kernel of the graph with the text `planned`, as it is lowered for a
    target; several texts where kernels of one name differ.

    `grids` says how many leading axes of a constant count pieces. Raises DiluError for a text that
    this version does not read, and where it has no such kernel.
    """
    graph = parse_graph(planned)
    constants = {c.name: c for f in graph.functions for c in f.constants}
    weights = {n: Weight(c.type, grid=grids.get(n, 0)) for n, c in constants.items()}
    program = lower(replace(graph, weights=weights), find_target(target))
    kernels = [k for entry in program.entries for k in _kernels(entry.plan) if k.name == name]
    if not kernels:
        raise DiluError(
            f"the artifact's planned graph has no kernel {name!r}",
            hint="it was made by another version of dilu; compile the model again",
        )
    return "\n".join(dict.fromkeys(map(print_kernel, kernels)))


def _kernels(plan: Plan) -> Iterator[Kernel]:
    for step in plan.steps:
        if isinstance(step, Launch):
            yield step.kernel
        elif isinstance(step, CallPlan | RoutedPlan):
            yield from _kernels(step.plan)
