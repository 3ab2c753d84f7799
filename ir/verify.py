"""The verifier: SSA form, types inferred again, and what the graph's stage promises."""

from __future__ import annotations

from ..errors import DiluError
from .graph import Function, Graph, Node, Value
from .placements import verify_placements
from .stages import SPECS, Stage
from .text import print_node


def verify(graph: Graph) -> None:
    """Raise DiluError, naming function and node, when `graph` breaks a rule of its stage."""
    if graph.stage not in SPECS:
        raise DiluError(f"unknown stage {graph.stage!r}", hint=f"stages: {', '.join(SPECS)}")
    for function in graph.functions:
        verify_function(function, SPECS[graph.stage])
        for constant in function.constants:
            weight = graph.weights.get(constant.name)
            if weight is not None and weight.type != constant.type:
                raise DiluError(f"@{function.name}: {constant} is bound to {weight.type}")
    if graph.stage == "sharded" and graph.mesh is not None:
        verify_placements(graph)


def verify_function(function: Function, stage: Stage, *, in_kernel: bool = False) -> None:
    """Verify one function and the bodies inside it."""
    scope: dict[str, Value] = {}

    def fail(message: str, node: Node | None = None) -> None:
        where = f"@{function.name}" + (f", {print_node(node)}" if node else "")
        raise DiluError(f"invalid graph in {where}: {message}", loc=node.loc if node else None)

    def define(value: Value, node: Node | None = None) -> None:
        if value.name in scope:
            fail(f"{value} is defined twice", node)
        if value.type.dtype.is_code and not stage.narrow_floats:
            fail(f"{value} has type {value.type}, which must be gone by now", node)
        scope[value.name] = value

    def use(value: Value, node: Node | None = None) -> None:
        if scope.get(value.name) != value:
            fail(f"{value}: {value.type} is used but not defined before", node)

    for value in function.inputs:
        define(value)
    for node in function.nodes:
        for value in node.inputs:
            use(value, node)
        if node.op.name in stage.gone:
            fail(f"op {node.op.name} must be gone by now", node)
        if stage.only and not in_kernel and node.op.name not in stage.only:
            fail(f"op {node.op.name} must be inside a kernel by now", node)
        try:
            types = node.op.infer(*(v.type for v in node.inputs))
        except DiluError as error:
            fail(error.message, node)
            raise
        except TypeError:
            fail(f"{node.op.name} takes another number of operands", node)
            raise
        if types != tuple(v.type for v in node.outputs):
            fail(f"the types should be {', '.join(map(str, types))}", node)
        for value in node.outputs:
            define(value, node)
    for value in function.results + function.updates:
        use(value)
    if len(function.updates) != len(function.states):
        fail("every state needs exactly one update")
    for state, update in zip(function.states, function.updates, strict=True):
        if state.type != update.type:
            fail(f"{state} is updated by {update}, which has another type")
    for node in function.nodes:
        body = getattr(node.op, "body", None)
        if body is not None:
            verify_function(body, stage, in_kernel=in_kernel or node.op.name == "kernel")
