"""FX → IR: an exported program becomes a function, operator by operator, from one table.

The table (`operators.TABLE`) is keyed by operator. Invariant: every node carries the user's source
line; an operator that is not in the table is reported with it. Parameters and buffers become
constants in the form in which they are stored, decoded where they are used first.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, field
from itertools import count
from operator import attrgetter
from typing import Any

import torch
from torch import fx
from torch.export.graph_signature import InputKind, OutputKind, OutputSpec

from ...errors import DiluError, UnsupportedError
from ...ir.dtypes import F32
from ...ir.graph import Function, Value
from ...ir.ops.elementwise import Cast
from ...ir.ops.index import BroadcastTo, Reshape
from ...ir.ops.quantize import Dequantize
from ...ir.rewrite import Builder
from ...ir.types import Dim, TensorType, symbol
from ...ir.weight_format import Storage, plain
from ..operators import TABLE, Context, Symbols, dtype_of
from .nodes import (
    live,
    location,
    modules_of,
    object_text,
    promoted_type,
    tensors_of,
    unknown_operator,
    values_of,
)

#: What computes nothing. Assertions on sizes are guards of the program too, to which a call is
#: held; those on values are not run: where they hold, and only there, the results are the model's.
_NO_EFFECT = ("_assert", "sym_constrain_range", "_functional_sym_constrain", "_print")
_WRAPPERS = ("wrap_with_set_grad_enabled", "wrap_with_autocast")


@dataclass(frozen=True)
class Source:
    """What a constant of an imported function is: a parameter's values or codes, or its scales."""

    parameter: str
    scales: bool = False


@dataclass
class Imported:
    """An imported function and what its constants are, by name."""

    function: Function
    sources: dict[str, Source]


@dataclass
class Importer:
    """Imports one exported program. Set up the inputs, then `run`, then `finish`.

    `storage` says how a parameter is stored, given its name and type. `roles` and `layers` are for
    the operators of language models. `trust_indices` promises that no index is negative. `names`
    maps the program's names of parameters to those that `storage` and the constants have.
    """

    program: torch.export.ExportedProgram
    storage: Callable[[str, TensorType], Storage] = lambda _, t: plain(t)
    layers: Callable[[int, tuple[Value, ...]], Value] | None = None
    trust_indices: bool = False
    names: Callable[[str], str] = str
    builder: Builder = field(default_factory=Builder)
    symbols: Symbols = field(default_factory=Symbols)
    roles: dict[str, Value] = field(default_factory=dict)
    parameters: list[Value] = field(default_factory=list)
    states: list[Value] = field(default_factory=list)
    constants: list[Value] = field(default_factory=list)
    sources: dict[str, Source] = field(default_factory=dict)
    not_one: list[Dim] = field(default_factory=list)
    _values: dict[fx.Node, Any] = field(default_factory=dict)

    # ------------------------------------------------------------------ inputs

    def name_sizes(self, names: Sequence[Sequence[str | None]] = ()) -> None:
        """Name the symbolic sizes of the user's inputs: per input and axis, s0, s1, … if unsaid.

        Raises DiluError when a symbol is no input's size by itself: nothing would tell its value.
        """
        partial: dict[str, str] = {}
        alone: set[str] = set()
        sizes = list(self._symbolic_sizes())
        for i, axis, size in sizes:
            said = names[i][axis] if i < len(names) and axis < len(names[i]) else None
            if size.node.expr.is_Symbol:
                alone.add(str(size.node.expr))
                if said is not None:  # of several that torch tells apart and that are one, too
                    self.symbols.names.setdefault(str(size.node.expr), symbol(said))
        taken = {name for row in names for name in row}
        for i, axis, size in sizes:
            for free in sorted(map(str, size.node.expr.free_symbols)):
                if free not in self.symbols.names:
                    given = {*taken, *map(str, self.symbols.names.values())}
                    numbered = (f"s{n}" for n in count(len(self.symbols.names)))
                    self.symbols.names[free] = symbol(next(n for n in numbered if n not in given))
                if not size.node.expr.is_Symbol:
                    partial.setdefault(free, f"axis {axis} of input {i} has size {size}")
        for free, size in partial.items():
            if free not in alone:
                raise DiluError(
                    f"{size}, which says nothing of {free} alone",
                    hint="make every dynamic size a torch.export.Dim of its own",
                )

    def _symbolic_sizes(self) -> Iterator[tuple[int, int, torch.SymInt]]:
        """Yield the symbolic sizes of the user's inputs: input, axis and size."""
        for i, node in enumerate(self._user_inputs()):
            shape: Sequence[Any] = getattr(node.meta["val"], "shape", ())
            for axis, size in enumerate(shape):
                if isinstance(size, torch.SymInt):
                    yield i, axis, size

    def take_inputs(self, names: Sequence[str] | None = None) -> None:
        """Make the user's inputs parameters of the function."""
        for i, node in enumerate(self._user_inputs()):
            value = node.meta.get("val")
            if value is None or isinstance(value, (bool, int, float, str)):
                self._values[node] = value
                continue
            if not isinstance(value, torch.Tensor):
                symbolic = isinstance(value, (torch.SymInt, torch.SymFloat, torch.SymBool))
                what = "a number that is made dynamic" if symbolic else object_text(value)
                raise UnsupportedError(
                    f"the input {node.target} is {what}, which is not supported",
                    hint="an input whose values vary has to be a tensor",
                )
            base = names[i] if names else str(node.target)
            try:
                self._values[node] = self.parameter(base, self._type(value))
            except UnsupportedError as error:
                error.message = f"the input {node.target}: {error.message}"
                raise

    def parameter(self, name: str, t: TensorType) -> Value:
        """Add a parameter to the function."""
        self.parameters.append(Value(self.builder.fresh(name), t))
        return self.parameters[-1]

    def state(self, name: str, t: TensorType) -> Value:
        """Add a state to the function."""
        self.states.append(Value(self.builder.fresh(name), t))
        return self.states[-1]

    def constant(self, name: str, t: TensorType, source: Source) -> Value:
        """Return a constant of the function, added when it is new (shared parameters are not)."""
        known = next((c for c in self.constants if self.sources[c.name] == source), None)
        if known is not None:
            return known
        value = Value(self.builder.fresh(name), t)
        self.constants.append(value)
        self.sources[value.name] = source
        return value

    def _user_inputs(self) -> list[fx.Node]:
        names = {
            s.arg.name
            for s in self.program.graph_signature.input_specs
            if s.kind == InputKind.USER_INPUT
        }
        nodes = self.program.graph_module.graph.find_nodes(op="placeholder")
        return [n for n in nodes if n.name in names]

    # ------------------------------------------------------------------ running

    def run(self) -> tuple[Value, ...]:
        """Import all nodes; return the values of the user's outputs, all of them tensors."""
        results: list[Value] = []
        for spec, _, value in self.outputs():
            if spec.kind != OutputKind.USER_OUTPUT:
                raise UnsupportedError(
                    f"the model writes to {spec.target or 'its input'!r}",
                    hint="a compiled model changes neither its buffers nor its inputs",
                )
            results += self._flat(value)
        return tuple(results)

    def outputs(self) -> list[tuple[OutputSpec, Any, Any]]:
        """Import all nodes; return the program's outputs: what each is, what gives it in the
        program (a node or a plain value), and its value here."""
        module = self.program.graph_module
        targets = {s.arg.name: s.target for s in self.program.graph_signature.input_specs}
        for node in module.graph.find_nodes(op="placeholder"):
            if node not in self._values:
                name, value = self.names(str(targets[node.name])), node.meta["val"]
                tensor = isinstance(value, torch.Tensor)
                self._values[node] = _Stored(name, value) if tensor else _Object(object_text(value))
        values = self._graph(module)
        (output,) = module.graph.find_nodes(op="output")
        specs = self.program.graph_signature.output_specs
        return list(zip(specs, output.args[0], values, strict=True))

    def _graph(self, module: fx.GraphModule) -> Sequence[Any]:
        for node in module.graph.nodes:
            if node.op == "call_function":
                self.builder.loc = location(node)
                self._values[node] = self._call(node)
            elif node.op == "get_attr":
                self._values[node] = attrgetter(str(node.target))(module)
        (output,) = module.graph.find_nodes(op="output")
        return [self._argument(a) for a in output.args[0]]

    def _call(self, node: fx.Node) -> Any:
        value, operator = node.meta.get("val"), str(node.target)
        if operator == "<built-in function getitem>":
            source = self._argument(node.args[0])
            return source[int(node.args[1])]  # type: ignore[arg-type]
        if isinstance(value, int) and not isinstance(value, bool):
            return value
        if isinstance(value, torch.SymInt):
            return self.symbols.dim(value)
        if value is None and any(part in operator for part in _NO_EFFECT):
            return None
        if isinstance(value, (bool, torch.SymBool, torch.SymFloat, float)):
            return value  # a size's condition; whoever computes with it will say so
        if any(operator.endswith(w) for w in _WRAPPERS):
            return self._inline(node)
        return self._lower(node, operator)

    def _inline(self, node: fx.Node) -> tuple[Any, ...]:
        """Import the body of a region that only sets a mode."""
        at = next(
            i
            for i, a in enumerate(node.args)
            if isinstance(a, fx.Node) and isinstance(self._values.get(a), fx.GraphModule)
        )
        body = self._values[node.args[at]]  # type: ignore[index]
        arguments = [self._argument(a) for a in node.args[at + 1 :]]
        for place, value in zip(body.graph.find_nodes(op="placeholder"), arguments, strict=True):
            self._values[place] = value
        return tuple(self._graph(body))

    def _lower(self, node: fx.Node, operator: str) -> Any:
        loc = self.builder.loc
        if operator not in TABLE:
            raise unknown_operator(node, operator, loc)
        self._assume(node, operator)
        types = tuple(self._type(v) for v in tensors_of(node.meta["val"]))
        if types and all(0 in t.shape for t in types):  # no element is anyone's to compute
            empty = tuple(_emptied(self.builder, t) for t in types)
            return empty[0] if isinstance(node.meta["val"], torch.Tensor) else empty
        promoted = dtype_of(promoted_type(node), loc)
        context = Context(
            self.builder, self.symbols, operator, types, promoted, self.roles,
            self.trust_indices, self.layers, modules_of(node),
        )  # fmt: skip
        try:
            arguments = [self._argument(a) for a in node.args]
            keywords = {
                k: self._argument(a) for k, a in node.kwargs.items() if k not in _STORAGE_KEYWORDS
            }
            out = TABLE[operator](context, *arguments, **keywords)
        except DiluError as error:
            error.loc = error.loc or loc
            raise
        except Exception as error:
            what = (
                str(error) if isinstance(error, TypeError) else f"{type(error).__name__}: {error}"
            )
            message = f"the operator {operator} is not supported with these arguments: {what}"
            raise UnsupportedError(message, loc) from error
        self._check(context, out)
        return out

    def _check(self, context: Context, out: Any) -> None:
        """Raise UnsupportedError unless a lowering made what torch says the operator makes."""
        made = tuple(v.type for v in values_of(out))
        for got, want in zip(made, context.types, strict=False):
            if got != want:
                raise context.unsupported(f"what becomes {want} in torch and {got} in dilu")

    def _assume(self, node: fx.Node, operator: str) -> None:
        """Note the symbolic sizes that torch took not to be 1 since it removed no such axis."""
        if operator not in ("aten.squeeze.default", "aten.squeeze.dim", "aten.squeeze.dims"):
            return
        x: Any = node.args[0].meta["val"]  # type: ignore[union-attr]
        given: Any = node.args[1] if len(node.args) > 1 else range(x.dim())
        for axis in [given] if isinstance(given, int) else given:
            if x.dim() and isinstance(x.shape[axis], torch.SymInt):
                self.not_one.append(self.symbols.dim(x.shape[axis]))

    def _argument(self, a: Any) -> Any:
        if isinstance(a, fx.Node):
            value = self._values[a]
            if isinstance(value, _Stored):
                value = self._values[a] = self._decoded(value)
            if isinstance(value, _Object):
                raise UnsupportedError(
                    f"the model uses {value.text}, which is not supported",
                    self.builder.loc,
                    "a compiled model consists of tensors and plain values",
                )
            if isinstance(value, torch.Tensor):
                message = "a tensor that is made inside of a region of its own is not supported"
                raise UnsupportedError(message, self.builder.loc, "make it in __init__")
            if isinstance(value, (torch.SymBool, torch.SymFloat)):
                message = f"a value depends on a symbolic size ({value})"
                raise UnsupportedError(message, self.builder.loc)
            return value
        if isinstance(a, (list, tuple)):
            return [self._argument(x) for x in a]
        return self.symbols.dim(a) if isinstance(a, torch.SymInt) else a

    def _decoded(self, stored: _Stored) -> Value:
        """Return a parameter's value; codes are decoded to f32, other types to the model's."""
        try:
            t = self._type(stored.fake)
        except UnsupportedError as error:
            error.message = f"the parameter {stored.name!r}: {error.message}"
            raise
        storage = self.storage(stored.name, t)
        value = self.constant(stored.name, storage.type, Source(stored.name))
        if storage.scales is not None:
            name = f"{stored.name}.scales"
            scales = self.constant(name, storage.scales, Source(stored.name, scales=True))
            value = self.builder.emit(Dequantize(storage.format.block, F32), value, scales)
        elif value.type.dtype != t.dtype:
            value = self.builder.emit(Cast(t.dtype), value)
        if value.type.shape != t.shape:
            value = self.builder.emit(Reshape(t.shape), value)
        return value

    def _flat(self, value: Any) -> list[Value]:
        if value is None:
            return []
        if not isinstance(value, Value):
            raise UnsupportedError(f"the model returns {value!r}, which is no tensor")
        return [value]

    def _type(self, t: torch.Tensor) -> TensorType:
        if t.layout != torch.strided:
            message = f"a tensor of the layout {t.layout} is not supported"
            raise UnsupportedError(message, self.builder.loc, "use dense tensors")
        shape = tuple(self.symbols.dim(d) for d in t.shape)
        return TensorType(dtype_of(t.dtype, self.builder.loc), shape)

    # ---------------------------------------------------------------- finishing

    def finish(
        self, name: str, results: Sequence[Value], updates: Sequence[Value] = ()
    ) -> Imported:
        """Return the function, without nodes and constants that nothing needs."""
        nodes, used = live(self.builder.nodes, [*results, *updates])
        function = Function(
            name,
            tuple(self.parameters),
            tuple(self.states),
            tuple(c for c in self.constants if c.name in used),
            nodes,
            tuple(results),
            tuple(updates),
        )
        return Imported(function, {n: s for n, s in self.sources.items() if n in used})


@dataclass(frozen=True)
class _Stored:
    """A parameter that nothing has used yet, and torch's fake of it."""

    name: str
    fake: torch.Tensor


@dataclass(frozen=True)
class _Object:
    """An input of the program that is no tensor, such as a random generator."""

    text: str


#: Keywords of operators that say where and how a tensor lies, not what it is. `dtype` is the
#: result's element type, which a lowering knows from torch (`Context.dtype`), as it knows that no
#: layout but the dense one is left.
_STORAGE_KEYWORDS = frozenset(
    {"device", "dtype", "layout", "memory_format", "pin_memory", "non_blocking", "copy"}
)


def _emptied(builder: Builder, t: TensorType) -> Value:
    """Return a value without elements."""
    return builder.emit(BroadcastTo(t.shape), builder.literal(0, t.dtype))
