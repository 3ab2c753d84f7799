"""Ops with a body: calls of repeated layers, and fused kernels."""

from __future__ import annotations

from ..graph import Function
from ..op import Op, expect, register
from ..types import TensorType


class Subprogram(Op):
    """An op whose body is a list of kernels of its own. The body's states and constants are the
    last operands, in order."""

    body: Function

    @property
    def own(self) -> int:
        """How many operands come before those that stand for the body's states and constants."""
        return len(self.body.parameters)


@register("call")
class Call(Subprogram):
    """Run `body` `times` times, feeding its results back to its first parameters.

    Operands are the body's parameters, states and constants. Parameters beyond the number of
    results stay the same. A state or constant with one more leading dimension of size `times`
    is stacked: run i takes its i-th part. So a model of any depth is one node per kind of layer.
    """

    body: Function
    times: int = 1

    def infer(self, *inputs: TensorType) -> tuple[TensorType, ...]:
        body = self.body
        expect(len(inputs) == len(body.inputs), f"call of @{body.name}: wrong number of operands")
        first_state = len(body.parameters)
        for i, (got, want) in enumerate(zip(inputs, body.inputs, strict=True)):
            stacked = i >= first_state and got == self.stack(want.type)
            ok = stacked or got == want.type
            expect(ok, f"call of @{body.name}: operand {want} is {got}, not {want.type}")
        for result, parameter in zip(body.results, body.parameters, strict=False):
            ok = self.times == 1 or result.type == parameter.type
            expect(ok, f"call of @{body.name}: {result} cannot be fed back to {parameter}")
        states = inputs[first_state : first_state + len(body.states)]
        return (*(r.type for r in body.results), *states)

    def stack(self, t: TensorType) -> TensorType:
        """Return the stacked type of a state or constant of the body."""
        return t.with_shape((self.times, *t.shape))


@register("kernel")
class Kernel(Op):
    """A fused region that becomes one kernel. Operands are the body's inputs, in order.

    `kind` names the region's schedule: `loops`, `matmul`, `experts`, `attention`, `topk`,
    `cache_update`.
    """

    kind: str
    body: Function

    def infer(self, *inputs: TensorType) -> tuple[TensorType, ...]:
        expect(len(inputs) == len(self.body.inputs), f"kernel @{self.body.name}: operand count")
        for got, want in zip(inputs, self.body.inputs, strict=True):
            expect(got == want.type, f"kernel @{self.body.name}: {want} is {got}")
        return tuple(v.type for v in self.body.outputs)
