"""Kernel IR: what emitters read. Structured kernels of scalar expressions, and plans of kernels.

A kernel is a list of steps; each step sees what the ones before it stored. `LoopNest` covers
everything made of elementwise ops, reductions and data movement; `Matmul`, `Experts`, `Attention`
and `TopK` name an algorithm and leave tiling, packing and scheduling to the emitter. What they
read and how they finish is expressed in the same statements as loop nests.

Values in registers have a *compute type*: f32 for f32, bf16 and f16, else the type itself. Loads
widen, stores round; rounding in between is an explicit `round` of the narrow type.

Names are bound once in a kernel, by `Let`, `Reduce` or a loop; an index may use any of them.
"""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import Literal as OneOf

from ..errors import Loc
from ..ir.dtypes import BF16, DTYPES, F16, F32, I64, DType
from ..ir.types import Dim, Shape
from ..ir.weight_format import WeightFormat

# ------------------------------------------------------------------------------ buffers


@dataclass(frozen=True)
class Buffer:
    """A row-major array.

    `space`: `argument` comes from outside; `scratch` lives for one kernel, shared by all its
    rows; `row` is private to the row of a loop nest that is being computed. The first `pieces`
    axes of an argument are spread over separate pieces of memory. A `constant` has no alignment.
    """

    name: str
    dtype: DType
    shape: Shape
    space: OneOf["argument", "scratch", "row"] = "argument"
    constant: bool = False
    pieces: int = 0


def compute_type(t: DType) -> DType:
    """Return the type in which values of `t` are held in registers."""
    return F32 if t in (BF16, F16) else t


#: Whose codes `decode` and `encode` take and make; the kernel library of each language has a
#: function of its own for each.
DECODED = tuple(t for t in DTYPES.values() if t.is_float and t.bits in (8, 16))
ENCODED = tuple(t for t in DECODED if t.is_code)


# -------------------------------------------------------------------------- expressions


@dataclass(frozen=True)
class Name:
    """A bound name."""

    name: str
    dtype: DType


@dataclass(frozen=True, eq=False)
class Literal:
    """A number known when compiling. Zeros of both signs are two numbers."""

    value: float | int | bool
    dtype: DType

    def __eq__(self, other: object) -> bool:
        return isinstance(other, Literal) and repr(self) == repr(other)

    def __hash__(self) -> int:
        return hash(repr(self))


@dataclass(frozen=True)
class Index:
    """An index expression as a number (i64)."""

    value: Dim

    @property
    def dtype(self) -> DType:
        return I64


@dataclass(frozen=True)
class Apply:
    """A scalar op of `ir.ops`, or `round`, `decode`, `encode` (with `format`), `cast`, `clamp`.

    `dtype` is the compute type of the result; `clamp(x, size)` is x held in 0 … size - 1.
    """

    op: str
    args: tuple[Expr, ...]
    dtype: DType
    format: DType | None = None
    saturate: bool = True


@dataclass(frozen=True)
class Load:
    """An element of a buffer, in its compute type; zero where `mask` does not hold."""

    buffer: Buffer
    index: tuple[Dim, ...]
    mask: Expr | None = None

    @property
    def dtype(self) -> DType:
        return compute_type(self.buffer.dtype)


Expr = Name | Literal | Index | Apply | Load

# --------------------------------------------------------------------------- statements


@dataclass(frozen=True)
class Let:
    """Bind a value to a name."""

    name: str
    value: Expr


@dataclass(frozen=True)
class Store:
    """Put a value, rounded to the buffer's type, where `mask` holds."""

    buffer: Buffer
    index: tuple[Dim, ...]
    value: Expr
    mask: Expr | None = None


@dataclass(frozen=True)
class Loop:
    """`var` from `start` up to `stop`; the iterations are independent of each other."""

    var: str
    start: Dim
    stop: Dim
    body: tuple[Stmt, ...]


@dataclass(frozen=True)
class Reduce:
    """Bind `name` to the sum, product (`prod`), max, min or argmax of `value` over `loops`, each
    a variable and its size.

    `max` and `min` give NaN where any value is NaN. `argmax` is the first position of the largest.
    """

    name: str
    kind: OneOf["sum", "prod", "max", "min", "argmax"]
    dtype: DType
    loops: tuple[tuple[str, Dim], ...]
    body: tuple[Stmt, ...]
    value: Expr


Stmt = Let | Store | Loop | Reduce

# -------------------------------------------------------------------------------- steps


@dataclass(frozen=True)
class LoopNest:
    """Rows (variable, size), independent of each other, and what is done for each.

    `invariant` holds what no row changes.
    """

    rows: tuple[tuple[str, Dim], ...]
    body: tuple[Stmt, ...]
    invariant: tuple[Stmt, ...] = ()
    row_buffers: tuple[Buffer, ...] = ()


@dataclass(frozen=True)
class Weight:
    """A stored matrix of `format`, its scales, and which of its rows are used.

    Blocks of the format are counted from the first row of `codes`. Product b of a batch uses the
    rows from `row + b·batch_rows` on. `columns` is the length of a row.
    """

    codes: Buffer
    format: WeightFormat
    columns: Dim
    scales: Buffer | None = None
    row: Dim = 0
    batch_rows: Dim = 0


@dataclass(frozen=True)
class Epilogue:
    """What becomes of a product: statements over `row`, `column`, `batch` and the accumulators.

    `row_body` depends on row and batch alone, `body` on the column too.
    """

    row: str
    column: str
    batch: str
    accumulators: tuple[str, ...]
    invariant: tuple[Stmt, ...]
    row_body: tuple[Stmt, ...]
    body: tuple[Stmt, ...]


@dataclass(frozen=True)
class Matmul:
    """`a[batch, M, K]` times each of one or two weights: `[N, K]` rows, or `[K, N]` rows.

    `prologue`, when given, stores `a`, a scratch buffer, row by row: an emitter may keep the rows
    in whatever form its kernels like best.
    """

    a: Buffer
    M: Dim
    N: Dim
    K: Dim
    batch: Dim
    weights: tuple[Weight, ...]
    transpose_b: bool
    epilogue: Epilogue
    prologue: LoopNest | None = None


@dataclass(frozen=True)
class Experts:
    """Routed experts: see the op `experts`. `gate_up` has pieces `[E, 2]`, `down` `[E]`."""

    a: Buffer
    T: Dim
    H: Dim
    I: Dim
    E: Dim
    k: Dim
    indices: Buffer
    routing: Buffer
    gate_up: Weight
    down: Weight
    activation: str
    epilogue: Epilogue
    prologue: LoopNest | None = None


@dataclass(frozen=True)
class Attention:
    """Paged attention: see the op `attention`."""

    q: Buffer
    keys: Buffer
    values: Buffer
    positions: Buffer
    sequence: Buffer
    pages: Buffer
    out: Buffer
    scale: float
    value_dim: int
    window: int | None


@dataclass(frozen=True)
class TopK:
    """The `k` largest (or smallest) of every row: see the op `topk`."""

    x: Buffer
    values: Buffer
    indices: Buffer
    k: int
    largest: bool = True


Step = LoopNest | Matmul | Experts | Attention | TopK


@dataclass(frozen=True)
class Kernel:
    """A kernel: its arguments (`inputs`, then `outputs`), the sizes it knows, and its steps."""

    name: str
    kind: str
    inputs: tuple[Buffer, ...]
    outputs: tuple[Buffer, ...]
    symbols: tuple[str, ...]
    steps: tuple[Step, ...]
    scratch: tuple[Buffer, ...] = ()
    loc: Loc | None = field(default=None, compare=False)


# --------------------------------------------------------------------------------- plan


@dataclass(frozen=True)
class Place:
    """Where a value of a plan lies: the `number`-th of its kind, `slot` being the arena's."""

    kind: OneOf["parameter", "state", "constant", "result", "slot"]
    number: int


@dataclass(frozen=True)
class Launch:
    """Run a kernel with the buffers at these places."""

    kernel: Kernel
    arguments: tuple[Place, ...]


@dataclass(frozen=True)
class Stacked:
    """An operand of a call, and how far run i's part lies from the operand's start.

    States and constants of one piece step by `stride` bytes; others by `pieces` pieces.
    """

    place: Place
    stride: Dim = 0
    pieces: int = 0


@dataclass(frozen=True)
class CallPlan:
    """Run `plan` `times` times; its results are the next values of its first parameters."""

    plan: Plan
    times: int
    parameters: tuple[Place, ...]
    states: tuple[Stacked, ...]
    constants: tuple[Stacked, ...]
    results: tuple[Place, ...]
    result_sizes: tuple[Dim, ...]


@dataclass(frozen=True)
class RoutedPlan:
    """Run `plan` on rows that come from all ranks, as often as the host has some.

    `x` are `tokens` rows of `width` numbers of `dtype`, `indices` their `choices` experts each.
    `plan` takes rows and their slots, and makes rows of `made`; `symbol` is their number, at most
    `capacity`. The host puts `[tokens, choices, width]` of `made` into `result`. `ranks` and
    `slots` are the sizes of `placement`.
    """

    plan: Plan
    symbol: str
    capacity: int
    tokens: Dim
    choices: int
    width: int
    dtype: DType
    made: DType
    ranks: int
    slots: int
    x: Place
    indices: Place
    placement: Place
    constants: tuple[Place, ...]
    result: Place


@dataclass(frozen=True)
class CollectivePlan:
    """What the host does with the ranks along `axis`: see the ops `all_reduce` and `all_gather`.

    `x` is `[rows, width]` of `dtype`. Gathered rows are `width` numbers of every rank, one after
    another.
    """

    kind: OneOf["all_reduce", "all_gather"]
    axis: str
    dtype: DType
    rows: Dim
    width: Dim
    x: Place
    result: Place


@dataclass(frozen=True)
class Plan:
    """One function of the graph: its kernels in order, and the sizes of its arena slots in bytes.

    The other numbers count what a caller hands over.
    """

    name: str
    parameters: int
    states: int
    constants: int
    results: int
    slots: tuple[Dim, ...]
    steps: tuple[Launch | CallPlan | RoutedPlan | CollectivePlan, ...]


@dataclass(frozen=True)
class Entry:
    """A function that can be called from outside: a plan and its symbols in order.

    It has nothing to do when the product of `work` is zero.
    """

    plan: Plan
    symbols: tuple[str, ...]
    work: Dim


@dataclass(frozen=True)
class Program:
    """All functions of a module, in the order of their numbers."""

    entries: tuple[Entry, ...]
