"""Multi-head latent attention over the latent: the cache holds what the heads are made of.

A model with latent attention expands the latent of every token into keys and values of all
heads, and a cache of those is 30 times the size of the latent. The expansion is linear, so it
moves to the other side of the products: queries are taken into the latent's space, attention
runs over the latents themselves, and its outcome is expanded per head.

Source: DeepSeek-V2 (arXiv 2405.04434), section 2.1.2 and appendix C.
"""

from __future__ import annotations

from dataclasses import dataclass, replace

import sympy

from ..ir.dtypes import DType
from ..ir.graph import Function, Graph, Node, Value
from ..ir.ops.control import Call
from ..ir.ops.elementwise import Cast
from ..ir.ops.index import BroadcastTo, Concat, Reshape, Slice, Transpose
from ..ir.ops.language import Attention, CacheUpdate
from ..ir.ops.matmul import MatMul
from ..ir.rewrite import Builder
from ..ir.types import Dim, Shape, TensorType

# Shapes: T tokens, H heads, N numbers of a head's key without position, R with rotary position,
# V numbers of a head's value, C numbers of the latent.


def absorb_mla(graph: Graph) -> Graph:
    """Rewrite attention over expanded latents into attention over the latents.

    Before:
        %kv: f32[T,H*(N+V)] = matmul(%c, %w) {transpose_b=true}
        %k: f32[T,H,N+R] = … every head's part of %kv, and one rotary part for all heads
        %keys_1 = cache_update(%keys, %k, %slots); %values_1 = cache_update(%values, %v, %slots)
        %o: f32[T,H,V] = attention(%q, %keys_1, %values_1, …)
    After:
        %latent_1 = cache_update(%latent, concat(%c, rotary part), %slots)
        %q_c: f32[H,T,C] = matmul(q's first N, %w's key rows)
        %o_c: f32[T,H,C] = attention(concat(%q_c, q's last R), %latent_1, %latent_1, …)
        %o: f32[H,T,V] = matmul(%o_c, %w's value rows) {transpose_b=true}

    Numerics: reassociates.
    """
    return replace(graph, functions=tuple(_outer(f) for f in graph.functions))


def _outer(function: Function) -> Function:
    """Absorb in the bodies of a function's calls, and merge the states they were called with."""
    renamed: dict[str, Value] = {}
    nodes: list[Node] = []
    states, updates = list(function.states), list(function.updates)
    for node in function.nodes:
        plan = _plan(node.op.body) if isinstance(node.op, Call) else None
        node = replace(node, inputs=tuple(renamed.get(v.name, v) for v in node.inputs))
        if plan is None or not isinstance(node.op, Call):
            nodes.append(node)
            continue
        body = _absorbed(node.op.body, plan)
        call = replace(node.op, body=body)
        at = {v.name: i for i, v in enumerate(node.op.body.inputs)}
        keys, values = (node.inputs[at[s.name]] for s in (plan.keys, plan.values))
        latent = Value(f"latent_{keys.name}", call.stack(_latent_type(plan)))
        kept = [v for v in node.inputs if v not in (keys, values)]
        kept.insert(len(body.parameters) + _place(body, plan.latent_name), latent)
        old_out = dict(zip((o.name for o in node.op.body.outputs), node.outputs, strict=True))
        first = len(body.results)
        out_latent = Value(f"{latent.name}_out", latent.type)
        outputs = [*node.outputs[:first]]
        for state in body.states:
            index = next((i for i, s in enumerate(node.op.body.states) if s == state), None)
            outputs.append(out_latent if index is None else node.outputs[first + index])
        assert len(old_out) == len(node.outputs)
        nodes.append(replace(node, op=call, inputs=tuple(kept), outputs=tuple(outputs)))
        drop = [states.index(keys), states.index(values)]
        states = [s for i, s in enumerate(states) if i not in drop] + [latent]
        updates = [u for i, u in enumerate(updates) if i not in drop] + [out_latent]
    return replace(function, nodes=tuple(nodes), states=tuple(states), updates=tuple(updates))


def _place(body: Function, state: str) -> int:
    return next(i for i, s in enumerate(body.states) if s.name == state)


@dataclass(frozen=True)
class _Plan:
    """What was found in a body: the nodes to replace and the values to build on."""

    attention: Node
    keys: Value  # states
    values: Value
    key_update: Node
    value_update: Node
    latent: Value  # what the expansion is applied to, [..., T, C]
    weight: Value  # [H*(N+V), C]
    rotary: Value  # T*R elements
    tokens: Dim
    heads: int
    nope: int
    rope: int
    value: int
    rank: int  # C
    latent_name: str = "latent"


def _latent_type(plan: _Plan) -> TensorType:
    pages, _, size, _ = plan.keys.type.shape
    return TensorType(plan.keys.type.dtype, (pages, 1, size, plan.rank + plan.rope))


def _plan(body: Function) -> _Plan | None:
    """Return what to absorb in a body, or None when its attention is not over a latent."""
    producers = body.producers()
    attention = next((n for n in body.nodes if isinstance(n.op, Attention)), None)
    if attention is None:
        return None
    updates = [producers.get(v.name) for v in attention.inputs[1:3]]
    if any(u is None or not isinstance(u.op, CacheUpdate) for u in updates):
        return None
    key_update, value_update = updates
    assert key_update is not None and value_update is not None
    k, v = key_update.inputs[1], value_update.inputs[1]
    trace = _Trace(producers)
    found = trace.split(k, v)
    if found is None:
        return None
    expansion, rotary, nope = found
    a, b = expansion.inputs
    assert isinstance(expansion.op, MatMul)
    if not expansion.op.transpose_b or b.type.rank != 2:
        return None
    heads, width = (int(d) for d in k.type.shape[1:])
    return _Plan(
        attention=attention,
        keys=key_update.inputs[0],
        values=value_update.inputs[0],
        key_update=key_update,
        value_update=value_update,
        latent=a,
        weight=b,
        rotary=rotary,
        tokens=k.type.shape[0],
        heads=heads,
        nope=nope,
        rope=width - nope,
        value=int(v.type.shape[2]),
        rank=int(b.type.shape[1]),
        latent_name=Builder.over(body).fresh("latent"),
    )


def _absorbed(body: Function, plan: _Plan) -> Function:
    """Return the body with attention over the latent; what is dead is left to `eliminate_dead`."""
    builder = Builder.over(body)
    state = Value(builder.fresh(plan.latent_name), _latent_type(plan))
    t, h, n, r, c = plan.tokens, plan.heads, plan.nope, plan.rope, plan.rank
    updated = state
    subst: dict[str, Value] = {}
    for node in body.nodes:
        builder.loc = node.loc
        node = replace(node, inputs=tuple(subst.get(v.name, v) for v in node.inputs))
        if node.outputs == plan.key_update.outputs or node.outputs == plan.value_update.outputs:
            continue
        if node.outputs != plan.attention.outputs:
            builder.nodes.append(node)
            continue
        op = plan.attention.op
        assert isinstance(op, Attention)
        q = node.inputs[0]
        parts = (
            _to(builder, builder.emit(Reshape((t, c)), plan.latent), state.type.dtype),
            _to(builder, builder.emit(Reshape((t, r)), plan.rotary), state.type.dtype),
        )
        row = builder.emit(Reshape((t, 1, c + r)), builder.emit(Concat(1), *parts))
        slots = plan.key_update.inputs[2]
        updated = builder.emit(CacheUpdate(), state, row, slots, name=f"{state.name}_new")
        weight = builder.emit(Reshape((h, n + plan.value, c)), plan.weight)
        key_rows = builder.emit(Slice(1, 0, n), weight)
        value_rows = builder.emit(Slice(1, n, n + plan.value), weight)
        swap = Transpose((1, 0, 2))
        wide, narrow = weight.type.dtype, q.type.dtype
        q_nope = _to(builder, builder.emit(swap, builder.emit(Slice(2, 0, n), q)), wide)
        q_latent = builder.emit(swap, builder.emit(MatMul(), q_nope, key_rows))
        q_latent = _to(builder, q_latent, narrow)
        q_rope = builder.emit(Slice(2, n, n + r), q)
        query = builder.emit(Concat(2), q_latent, q_rope)
        new_op = replace(op, value_dim=c)
        o_latent = builder.emit(new_op, query, updated, updated, *node.inputs[3:])
        o_latent = _to(builder, builder.emit(swap, o_latent), wide)
        expanded = builder.emit(MatMul(transpose_b=True), o_latent, value_rows)
        subst[node.output.name] = _to(builder, builder.emit(swap, expanded), narrow)
    gone = (plan.keys, plan.values)
    states = tuple(s for s in body.states if s not in gone)
    new = tuple(u for s, u in zip(body.states, body.updates, strict=True) if s not in gone)
    return replace(
        body,
        states=(*states, state),
        nodes=tuple(builder.nodes),
        results=tuple(subst.get(v.name, v) for v in body.results),
        updates=(*new, updated),
    )


def _to(builder: Builder, value: Value, dtype: DType) -> Value:
    return value if value.type.dtype == dtype else builder.emit(Cast(dtype), value)


#: What the symbols of an index stay below.
Bounds = dict[sympy.Symbol, Dim]


class _Trace:
    """Follows single elements of a value upwards through ops that only move elements."""

    def __init__(self, producers: dict[str, Node]) -> None:
        self.producers = producers
        self.t, self.h, self.d = (
            sympy.Symbol(n, integer=True, nonnegative=True) for n in ("_t", "_h", "_d")
        )

    def split(self, k: Value, v: Value) -> tuple[Node, Value, int] | None:
        """Return (expansion, rotary part, N) when `k[T,H,N+R]` and `v[T,H,V]` come of a latent."""
        heads, width = k.type.shape[1:]
        if not isinstance(heads, int) or not isinstance(width, int):
            return None
        nope = self.seam(k, width)
        if nope is None:
            return None
        t, h, d = self.t, self.h, self.d
        tokens, value_dim = k.type.shape[0], v.type.shape[2]
        assert isinstance(value_dim, int)
        per_head = nope + value_dim
        limits: Bounds = {t: tokens, h: heads}
        key = self.source(k, (t, h, d), limits | {d: nope})
        value = self.source(v, (t, h, d), limits | {d: value_dim})
        rotary = self.source(k, (t, h, d + nope), limits | {d: width - nope})
        if key[0] != value[0]:
            return None
        expansion = self.producers.get(key[0].name)
        if expansion is None or not isinstance(expansion.op, MatMul):
            return None
        in_order = key[1][-1] == sympy.expand(h * per_head + d)
        in_order = in_order and value[1][-1] == sympy.expand(h * per_head + nope + d)
        same_for_all = not any(sympy.sympify(i).has(h) for i in rotary[1])
        return (expansion, rotary[0], nope) if in_order and same_for_all else None

    def seam(self, k: Value, width: int) -> int | None:
        """Return where the last axis of `k` is joined of two parts."""
        while (node := self.producers.get(k.name)) is not None:
            if isinstance(node.op, Concat) and len(node.inputs) == 2:
                first = node.inputs[0].type.shape[-1]
                last = node.op.axis == node.output.type.rank - 1
                return first if last and isinstance(first, int) and first < width else None
            if not isinstance(node.op, (Reshape, Transpose, Cast)):
                return None
            k = node.inputs[0]
        return None

    def source(
        self, value: Value, index: tuple[sympy.Expr, ...], bounds: Bounds
    ) -> tuple[Value, tuple[sympy.Expr, ...]]:
        """Return the value and index that element `index` of `value` is moved from.

        `bounds` limits the symbols in `index` (exclusive). The trace ends at what computes, and
        at a join whose part depends on the symbols.
        """
        while (node := self.producers.get(value.name)) is not None:
            op = node.op
            if isinstance(op, Transpose):
                index = tuple(index[op.permutation.index(a)] for a in range(len(index)))
            elif isinstance(op, Reshape):
                moved = _reindex(index, value.type.shape, node.inputs[0].type.shape, bounds)
                if moved is None:
                    return value, index
                index = moved
            elif isinstance(op, BroadcastTo):
                shape = node.inputs[0].type.shape
                index = index[len(index) - len(shape) :]
                index = tuple(
                    sympy.Integer(0) if s == 1 else i for s, i in zip(shape, index, strict=True)
                )
            elif isinstance(op, Cast):
                pass  # a rounding that the rewrite leaves out
            elif isinstance(op, Slice):
                start = sympy.sympify(op.start) + op.step * index[op.axis]
                index = (*index[: op.axis], sympy.expand(start), *index[op.axis + 1 :])
            elif isinstance(op, Concat):
                low = index[op.axis].subs(dict.fromkeys(bounds, 0))
                high = index[op.axis].subs({s: b - 1 for s, b in bounds.items()})
                begin: Dim = 0
                for part in node.inputs:
                    end = begin + part.type.shape[op.axis]
                    if (low >= begin) == sympy.true and (high < end) == sympy.true:
                        break
                    begin = end
                else:
                    return value, index
                moved_axis = sympy.expand(index[op.axis] - begin)
                index = (*index[: op.axis], moved_axis, *index[op.axis + 1 :])
                value = part
                continue
            else:
                break
            value = node.inputs[0]
        return value, index


def _reindex(
    index: tuple[sympy.Expr, ...], old: Shape, new: Shape, bounds: Bounds
) -> tuple[sympy.Expr, ...] | None:
    """Return the index into `new` of the element at `index` of shape `old`, if it is plain."""
    flat: sympy.Expr = sympy.Integer(0)
    for i, size in zip(index, old, strict=True):
        flat = sympy.expand(flat * size + i)
    out: list[sympy.Expr] = []
    for axis in reversed(range(len(new))):
        size = sympy.sympify(new[axis])
        if all(s == 1 for s in new[:axis]):
            out.append(flat)
            out += [sympy.Integer(0)] * axis
            break
        quotient, rest = sympy.Integer(0), sympy.Integer(0)
        for term in sympy.Add.make_args(flat):
            divided = sympy.cancel(term / size)
            if divided.is_polynomial() and sympy.denom(divided) == 1:
                quotient += divided
            else:
                rest += term
        highest = rest.subs({s: b - 1 for s, b in bounds.items()})
        if (highest < size) != sympy.true:
            return None
        out.append(rest)
        flat = sympy.expand(quotient)
    return tuple(reversed(out))
