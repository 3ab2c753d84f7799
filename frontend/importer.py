"""FX → IR: an exported program becomes a function, operator by operator, from one table.

The table (`operators.TABLE`) is keyed by operator. Invariant: every node carries the user's source
line; an operator that is not in the table is reported with it. Parameters and buffers become
constants in the form in which they are stored, decoded where they are used first.
"""

from __future__ import annotations

import re
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch
from torch import fx
from torch.export.graph_signature import InputKind, OutputKind

from ..errors import DiluError, Loc, UnsupportedError
from ..ir.dtypes import F32
from ..ir.graph import Function, Node, Value
from ..ir.ops.elementwise import Cast
from ..ir.ops.index import Reshape
from ..ir.ops.quantize import Dequantize
from ..ir.rewrite import Builder
from ..ir.types import TensorType, symbol
from .operators import TABLE, Context, Symbols, dtype_of

_OURS = str(Path(__file__).parent)
_TORCH = str(Path(torch.__file__).parent)
_FRAME = re.compile(r'File "([^"]+)", line (\d+)')
_NO_EFFECT = ("_assert", "sym_constrain_range", "_functional_sym_constrain", "_print")
_WRAPPERS = ("wrap_with_set_grad_enabled", "wrap_with_autocast")


@dataclass(frozen=True)
class Storage:
    """How the values of a parameter are stored: plain, or as codes with scales per block.

    `type` is that of the constant; its shape may split the parameter's (a grid of experts and
    projections), never reorder it.
    """

    type: TensorType
    scales: TensorType | None = None
    block: tuple[int, int] | None = None


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


def plain(_: str, t: TensorType) -> Storage:
    """Store every parameter as it is."""
    return Storage(t)


@dataclass
class Importer:
    """Imports one exported program. Set up the inputs, then `run`, then `finish`.

    `storage` says how a parameter is stored, given its name and type. `roles` and `layers` are for
    the operators of language models. `trust_indices` promises that no index is negative. `names`
    maps the program's names of parameters to those that `storage` and the constants have.
    """

    program: torch.export.ExportedProgram
    storage: Callable[[str, TensorType], Storage] = plain
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
    _values: dict[fx.Node, Any] = field(default_factory=dict)

    # ------------------------------------------------------------------ inputs

    def name_sizes(self, names: Sequence[Sequence[str | None]] = ()) -> None:
        """Name the symbolic sizes of the user's inputs: per input and axis, s0, s1, … if unsaid.

        Raises DiluError when a symbol is no input's size by itself: nothing would tell its value.
        """
        partial: dict[str, str] = {}
        alone: set[str] = set()
        for i, node in enumerate(self._user_inputs()):
            shape: Sequence[Any] = getattr(node.meta["val"], "shape", ())
            for axis, size in enumerate(shape):
                said = names[i][axis] if i < len(names) and axis < len(names[i]) else None
                if not isinstance(size, torch.SymInt):
                    continue
                for free in sorted(map(str, size.node.expr.free_symbols)):
                    unsaid = f"s{len(self.symbols.names)}"
                    self.symbols.names.setdefault(free, symbol(said or unsaid))
                    if not size.node.expr.is_Symbol:
                        partial.setdefault(free, f"axis {axis} of input {i} has size {size}")
                if size.node.expr.is_Symbol:
                    alone.add(str(size.node.expr))
        for free, size in partial.items():
            if free not in alone:
                raise DiluError(
                    f"{size}, which says nothing of {free} alone",
                    hint="make every dynamic size a torch.export.Dim of its own",
                )

    def take_inputs(self, names: Sequence[str] | None = None) -> None:
        """Make the user's inputs parameters of the function."""
        for i, node in enumerate(self._user_inputs()):
            value = node.meta.get("val")
            if not isinstance(value, torch.Tensor):
                self._values[node] = value
                continue
            base = names[i] if names else str(node.target)
            self._values[node] = self.parameter(base, self._type(value))

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
        """Import all nodes; return the values of the user's outputs."""
        module = self.program.graph_module
        targets = {s.arg.name: s.target for s in self.program.graph_signature.input_specs}
        for node in module.graph.find_nodes(op="placeholder"):
            if node not in self._values:
                name = self.names(str(targets[node.name]))
                self._values[node] = _Stored(name, self._type(node.meta["val"]))
        outputs = self._graph(module)
        results: list[Value] = []
        for spec, value in zip(self.program.graph_signature.output_specs, outputs, strict=True):
            if spec.kind != OutputKind.USER_OUTPUT:
                raise UnsupportedError(
                    f"the model writes to {spec.target or 'its input'!r}",
                    hint="a compiled model changes neither its buffers nor its inputs",
                )
            results += self._flat(value)
        return tuple(results)

    def _graph(self, module: fx.GraphModule) -> Sequence[Any]:
        for node in module.graph.nodes:
            if node.op == "call_function":
                self.builder.loc = location(node)
                self._values[node] = self._call(node)
            elif node.op == "get_attr":
                self._values[node] = getattr(module, str(node.target))
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
            raise UnsupportedError(
                f"the operator {operator} is not supported",
                loc,
                "rewrite this line with other operators, or add a lowering for it",
            )
        types = tuple(self._type(v) for v in _tensors(node.meta["val"]))
        promoted = dtype_of(_promoted(node), loc)
        context = Context(
            self.builder, self.symbols, operator, types, promoted, self.roles,
            self.trust_indices, self.layers, _modules(node),
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
        except TypeError as error:
            message = f"the operator {operator} is not supported with these arguments: {error}"
            raise UnsupportedError(message, loc) from error
        self._check(context, out)
        return out

    def _check(self, context: Context, out: Any) -> None:
        """Assert that a lowering made what torch says the operator makes."""
        made = tuple(v.type for v in _values(out))
        for got, want in zip(made, context.types, strict=False):
            assert got == want, f"{context.operator} made {got}, not {want}"

    def _argument(self, a: Any) -> Any:
        if isinstance(a, fx.Node):
            value = self._values[a]
            if isinstance(value, _Stored):
                value = self._values[a] = self._decoded(value)
            if isinstance(value, (torch.SymBool, torch.SymFloat)):
                message = f"a value depends on a symbolic size ({value})"
                raise UnsupportedError(message, self.builder.loc)
            return value
        if isinstance(a, (list, tuple)):
            return [self._argument(x) for x in a]
        return self.symbols.dim(a) if isinstance(a, torch.SymInt) else a

    def _decoded(self, stored: _Stored) -> Value:
        """Return a parameter's value; codes are decoded to f32, other types to the model's."""
        storage = self.storage(stored.name, stored.type)
        value = self.constant(stored.name, storage.type, Source(stored.name))
        if storage.scales is not None:
            assert storage.block is not None
            name = f"{stored.name}.scales"
            scales = self.constant(name, storage.scales, Source(stored.name, scales=True))
            value = self.builder.emit(Dequantize(storage.block, F32), value, scales)
        elif value.type.dtype != stored.type.dtype:
            value = self.builder.emit(Cast(stored.type.dtype), value)
        if value.type.shape != stored.type.shape:
            value = self.builder.emit(Reshape(stored.type.shape), value)
        return value

    def _flat(self, value: Any) -> list[Value]:
        if value is None:
            return []
        if not isinstance(value, Value):
            raise UnsupportedError(f"the model returns {value!r}, which is no tensor")
        return [value]

    def _type(self, t: torch.Tensor) -> TensorType:
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
    """A parameter that nothing has used yet."""

    name: str
    type: TensorType


#: Keywords of operators that say where and how a tensor lies, not what it is.
_STORAGE_KEYWORDS = frozenset(
    {"device", "dtype", "layout", "memory_format", "pin_memory", "non_blocking", "copy"}
)


def live(nodes: Sequence[Node], wanted: Sequence[Value]) -> tuple[tuple[Node, ...], set[str]]:
    """Return the nodes that `wanted` needs, and the names of all values that are used."""
    used = {v.name for v in wanted}
    kept: list[Node] = []
    for node in reversed(nodes):
        if any(v.name in used for v in node.outputs):
            used.update(v.name for v in node.inputs)
            kept.append(node)
    return tuple(reversed(kept)), used


def location(node: fx.Node) -> Loc | None:
    """Return the innermost line of the user's model that made a node."""
    frames = _FRAME.findall(node.meta.get("stack_trace") or "")
    frames = [f for f in frames if not f[0].startswith((_TORCH, _OURS)) and f[0][0] != "<"]
    return Loc(frames[-1][0], int(frames[-1][1])) if frames else None


def _modules(node: fx.Node) -> tuple[str, ...]:
    """Return the classes of the modules that a node was called in, the outermost first."""
    stack = node.meta.get("nn_module_stack") or {}
    return tuple(
        getattr(kind, "__name__", str(kind)).rpartition(".")[2] for _, kind in stack.values()
    )


def _tensors(value: Any) -> list[torch.Tensor]:
    if isinstance(value, torch.Tensor):
        return [value]
    return [t for v in value or () for t in _tensors(v)] if isinstance(value, (list, tuple)) else []


def _values(out: Any) -> tuple[Value, ...]:
    return (out,) if isinstance(out, Value) else tuple(out)


def _promoted(node: fx.Node) -> torch.dtype:
    """Return the common element type of the tensors and numbers among the first two arguments."""
    arguments = [a.meta.get("val") if isinstance(a, fx.Node) else a for a in node.args[:2]]
    known: list[Any] = [a for a in arguments if isinstance(a, (torch.Tensor, int, float))]
    known += [1 for a in arguments if isinstance(a, torch.SymInt)]
    tensors = [a for a in known if isinstance(a, torch.Tensor)]
    if not tensors:
        return torch.float32
    return torch.result_type(*known) if len(known) == 2 else tensors[0].dtype
