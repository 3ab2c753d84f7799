"""Values of a kernel's body as functions of an index.

Each op says how an element of its output is made from elements of its inputs; nothing is computed
before somebody asks for an element. So chains of views vanish into index arithmetic, and what a
loop computes is exactly what its stores need.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

from ..errors import DiluError, UnsupportedError
from ..ir.dtypes import BF16, BOOL, F16, F64, I64, DType
from ..ir.graph import Function, Node, Value
from ..ir.text import print_node
from ..ir.types import Dim, Shape
from .block import BlockBuilder
from .index import FloorDiv, Remainder, divmod_index, index, reshape_index
from .kernel_ir import Buffer, Expr, Index, Literal, compute_type

Indices = tuple[Dim, ...]
_Lowering = Callable[["BodyValues", Node, Indices], Expr]

#: Elementwise ops whose result is exactly representable when their inputs are.
_EXACT = frozenset({"neg", "abs", "floor", "maximum", "minimum", "where", "round_even",
                    "copysign"})  # fmt: skip
_ELEMENTWISE = frozenset(
    "neg abs exp log sqrt rsqrt sin cos tanh erf sigmoid floor logical_not add sub mul div mod pow"
    " maximum minimum eq ne lt le gt ge logical_and logical_or where atan round_even copysign"
    " bit_not bit_and bit_or bit_xor shift_left shift_right".split()
)


class BodyValues:
    """The values of `body`, built on demand into `builder`.

    `special` gives elements that others make: accumulators of a product, rows kept in a buffer.
    It is asked first, with the index it has to fit.
    """

    def __init__(self, body: Function, builder: BlockBuilder, inputs: dict[str, Buffer]) -> None:
        self.body = body
        self.builder = builder
        self.inputs = inputs
        self.producers = body.producers()
        self.special: dict[str, Callable[[Indices], Expr | None]] = {}
        self.computing: set[str] = set()  # values whose row buffer is being filled

    def element(self, value: Value, indices: Indices) -> Expr:
        """Return element `indices` of `value`; along an axis of size 1, any index is 0.

        So whoever asks for an element, in whatever way an index was come by, asks for the same.
        """
        indices = canonical(indices, value.type.shape)
        key = (value.name, indices, self.builder.mask)
        found = self.builder.recall(key)
        if found is None:
            found = self._element(value, indices)
            self.builder.remember(key, found)
        return found

    def _element(self, value: Value, indices: Indices) -> Expr:
        if value.name in self.special:
            known = self.special[value.name](indices)
            if known is not None:
                return known
        if value.name in self.inputs:
            return self.builder.load(self.inputs[value.name], indices)
        node = self.producers[value.name]
        lowering = LOWERINGS.get(node.op.name)
        if lowering is None:
            raise UnsupportedError(f"no loop computes the op {node.op.name}").in_pass(
                "lower", print_node(node), node.loc
            )
        try:
            return lowering(self, node, indices)
        except DiluError as error:
            raise error.in_pass("lower", print_node(node), node.loc) from None

    # -- for lowerings

    def operand(self, node: Node, number: int, indices: Indices) -> Expr:
        """Return an input's element under numpy's broadcasting rule."""
        value = node.inputs[number]
        return self.element(value, broadcast_index(indices, value))

    def rounded(self, x: Expr, dtype: DType) -> Expr:
        """Round a value to a narrow type, as it would be if it had been stored."""
        if dtype not in (BF16, F16):
            return x
        return self.builder.apply("round", x, dtype=compute_type(dtype), format=dtype)


def broadcast_index(indices: Indices, value: Value) -> Indices:
    """Return the index of the element of `value` that broadcasting puts at `indices`."""
    shape = value.type.shape
    return canonical(indices[len(indices) - len(shape) :], shape)


def canonical(indices: Indices, shape: Shape) -> Indices:
    """Return indices in `shape` with 0 along every axis of size 1."""
    return tuple(0 if size == 1 else i for i, size in zip(indices, shape, strict=True))


# ------------------------------------------------------------------------- elementwise


def _elementwise(values: BodyValues, node: Node, indices: Indices) -> Expr:
    args = tuple(values.operand(node, i, indices) for i in range(len(node.inputs)))
    dtype = node.output.type.dtype
    name = node.op.name
    if name == "pow":
        name, args = _power(args)
    out = values.builder.apply(name, *args, dtype=compute_type(dtype))
    return out if name in _EXACT else values.rounded(out, dtype)


def _power(args: tuple[Expr, ...]) -> tuple[str, tuple[Expr, ...]]:
    """Squares are common. (Roots are no powers: those of -0 and -inf differ.)"""
    base, exponent = args
    if isinstance(exponent, Literal) and exponent.dtype.is_float and exponent.value == 2:
        return "mul", (base, base)
    return "pow", args


def _literal(values: BodyValues, node: Node, indices: Indices) -> Expr:
    dtype: DType = node.op.dtype  # type: ignore[attr-defined]
    literal = Literal(node.op.value, compute_type(dtype))  # type: ignore[attr-defined]
    return values.rounded(literal, dtype)


def _cast(values: BodyValues, node: Node, indices: Indices) -> Expr:
    (x,) = node.inputs
    return cast_element(values, values.element(x, indices), x.type.dtype, node.output.type.dtype)


def cast_element(values: BodyValues, x: Expr, old: DType, new: DType) -> Expr:
    """Return an element of type `old` as one of type `new`."""
    source, target = compute_type(old), compute_type(new)
    if source != target:
        if isinstance(x, Literal) and target == F64:
            return Literal(float(x.value), target)
        x = values.builder.apply("cast", x, dtype=target)
    return x if old == new else values.rounded(x, new)


# ------------------------------------------------------------------------------- index


def _reshape(values: BodyValues, node: Node, indices: Indices) -> Expr:
    (x,) = node.inputs
    shape = node.output.type.shape
    place = reshape_index(indices, shape, x.type.shape, values.builder.ranges)
    _offer_splits(values, indices, place)
    return values.element(x, place)


def _offer_splits(values: BodyValues, indices: Indices, place: Indices) -> None:
    """A loop variable that an index divides is better two loops."""
    for part in place:
        if isinstance(part, int):
            continue
        terms: set[Any] = part.atoms(FloorDiv, Remainder)
        for term in terms:
            inner, divisor = term.args
            if divisor.is_Integer:
                values.builder.want_split(inner, int(divisor))


def _transpose(values: BodyValues, node: Node, indices: Indices) -> Expr:
    order: tuple[int, ...] = node.op.permutation  # type: ignore[attr-defined]
    place: list[Dim] = [0] * len(order)
    for i, axis in enumerate(order):
        place[axis] = indices[i]
    return values.element(node.inputs[0], tuple(place))


def _broadcast_to(values: BodyValues, node: Node, indices: Indices) -> Expr:
    return values.operand(node, 0, indices)


def _slice(values: BodyValues, node: Node, indices: Indices) -> Expr:
    op: Any = node.op
    place = list(indices)
    place[op.axis] = index(indices[op.axis] * op.step + op.start)
    return values.element(node.inputs[0], tuple(place))


def _windows(values: BodyValues, node: Node, indices: Indices) -> Expr:
    op: Any = node.op
    before, (o, k, *after) = indices[: op.axis], indices[op.axis :]
    at = index(o * op.stride + k * op.dilation)
    return values.element(node.inputs[0], (*before, at, *after))


def _concat(values: BodyValues, node: Node, indices: Indices) -> Expr:
    axis: int = node.op.axis  # type: ignore[attr-defined]
    at = indices[axis]
    builder = values.builder
    parts: list[tuple[Expr | bool, Expr]] = []
    start: Dim = 0
    not_before: Expr | bool = True
    for number, x in enumerate(node.inputs, 1):
        stop = index(start + x.type.shape[axis])
        below = number == len(node.inputs) or builder.below(at, stop)
        if below is False:
            start = stop
            continue
        inside = _both(values, not_before, below)
        with builder.masked(inside):
            place = (*indices[:axis], index(at - start), *indices[axis + 1 :])
            parts.append((below, values.element(x, place)))
        if below is True:
            break
        not_before = _both(values, not_before, builder.apply("logical_not", below, dtype=BOOL))
        start = stop
    out = parts[-1][1]
    for below, value in reversed(parts[:-1]):
        assert not isinstance(below, bool)
        out = builder.apply("where", below, value, out, dtype=value.dtype)
    return out


def _both(values: BodyValues, a: Expr | bool, b: Expr | bool) -> Expr | bool:
    if isinstance(a, bool):
        return b if a else False
    if isinstance(b, bool):
        return a if b else False
    return values.builder.apply("logical_and", a, b, dtype=BOOL)


def _take(values: BodyValues, node: Node, indices: Indices) -> Expr:
    table, chosen = node.inputs
    rank = chosen.type.rank
    row = values.element(chosen, indices[:rank])
    row = values.builder.clamped_index(row, table.type.shape[0])
    return values.element(table, (row, *indices[rank:]))


def _take_along(values: BodyValues, node: Node, indices: Indices) -> Expr:
    x, chosen = node.inputs
    at = values.builder.clamped_index(values.element(chosen, indices), x.type.shape[-1])
    return values.element(x, (*indices[:-1], at))


def _iota(values: BodyValues, node: Node, indices: Indices) -> Expr:
    return cast_element(values, Index(indices[0]), I64, node.output.type.dtype)


# ---------------------------------------------------------------------------- quantize


def _decode(values: BodyValues, node: Node, indices: Indices) -> Expr:
    op: Any = node.op
    codes = values.element(node.inputs[0], indices)
    out = values.builder.apply("decode", codes, dtype=compute_type(op.dtype), format=op.format)
    return values.rounded(out, op.dtype)


def _encode(values: BodyValues, node: Node, indices: Indices) -> Expr:
    op: Any = node.op
    x = values.element(node.inputs[0], indices)
    dtype = node.output.type.dtype
    return values.builder.apply("encode", x, dtype=dtype, format=op.format, saturate=op.saturate)


def _dequantize(values: BodyValues, node: Node, indices: Indices) -> Expr:
    op: Any = node.op
    codes, scales = node.inputs
    *lead, n, k = indices
    block = tuple(
        divmod_index(i, b, values.builder.ranges)[0] for i, b in zip((n, k), op.block, strict=True)
    )
    dtype = compute_type(op.dtype)
    parts = [values.element(codes, indices), values.element(scales, (*lead, *block))]
    parts = [p if p.dtype == dtype else values.builder.apply("cast", p, dtype=dtype) for p in parts]
    return values.rounded(values.builder.apply("mul", *parts, dtype=dtype), op.dtype)


# ------------------------------------------------------------------------------ reduce


def _reduce(values: BodyValues, node: Node, indices: Indices) -> Expr:
    (x,) = node.inputs
    op: Any = node.op
    argmax = op.name == "argmax"
    axes: tuple[int, ...] = (x.type.rank - 1,) if argmax else op.axes
    keepdims = False if argmax else op.keepdims
    kept = [a for a in range(x.type.rank) if a not in axes]
    place: list[Dim] = [0] * x.type.rank
    for a, i in zip(kept, (indices[a] for a in kept) if keepdims else indices, strict=True):
        place[a] = i

    def body(variables: tuple[Dim, ...]) -> Expr:
        for a, variable in zip(axes, variables, strict=True):
            place[a] = variable
        return values.element(x, tuple(place))

    builder = values.builder
    depths = [builder.depth_of(place[a]) for a in kept]
    depths.append(builder.depth_of(builder.mask) if builder.mask is not None else 0)
    dtype = I64 if argmax else compute_type(x.type.dtype)
    sizes = tuple(x.type.shape[a] for a in axes)
    kind = op.name.removeprefix("reduce_")
    # Never outside the rows: the kernel's own block is run by every thread.
    out = builder.reduce(kind, dtype, sizes, max(1, *depths), body)
    return values.rounded(out, x.type.dtype) if kind in ("sum", "prod") else out


LOWERINGS: dict[str, _Lowering] = {
    **dict.fromkeys(_ELEMENTWISE, _elementwise),
    "literal": _literal,
    "cast": _cast,
    "reshape": _reshape,
    "transpose": _transpose,
    "broadcast_to": _broadcast_to,
    "slice": _slice,
    "windows": _windows,
    "concat": _concat,
    "take": _take,
    "take_along": _take_along,
    "iota": _iota,
    "decode": _decode,
    "encode": _encode,
    "dequantize": _dequantize,
    "reduce_sum": _reduce,
    "reduce_prod": _reduce,
    "reduce_max": _reduce,
    "reduce_min": _reduce,
    "argmax": _reduce,
}
