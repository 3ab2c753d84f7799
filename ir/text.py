"""The text form of graphs: one printer, one parser, `parse_graph(print_graph(g)) == g`.

    graph    = "graph" stage ["mesh" "string"] function*
    function = "func" "@"name "(" values ")" ["state" "(" values ")"] ["const" "(" values ")"] "{"
               node* "return" names ["update" names] ("arena" size ":" names)* "}"
    node     = values "=" op "(" names ")" ["{" attributes "}"]
    value    = "%"name ":" dtype "[" sizes "]", a name of other than letters being "quoted"
    attribute value = int | float | true | false | none | "string" | dtype | "<" size ">"
                    | "[" values "]" | function

Attributes are sorted by name; attributes at their default are printed too, so that a text keeps
its meaning when a default changes. `#` starts a comment.
"""

from __future__ import annotations

import json
import re
from collections.abc import Callable, Iterable
from typing import Any, TypeVar

import sympy

from ..errors import DiluError
from .dtypes import DTYPES, DType, dtype
from .graph import Function, Graph, Node, Slot, Value
from .mesh import parse_mesh
from .op import OPS
from .types import TensorType, parse_dim, print_dim

# ------------------------------------------------------------------------------ printing


def print_graph(graph: Graph, *, locations: bool = False) -> str:
    """Return the text of a graph; with `locations`, source lines as comments."""
    mesh = f" mesh {json.dumps(str(graph.mesh))}" if graph.mesh else ""
    parts = [f"graph {graph.stage}{mesh}", *(print_function(f, locations) for f in graph.functions)]
    return "\n\n".join(parts) + "\n"


def print_function(function: Function, locations: bool = False, indent: str = "") -> str:
    """Return the text of one function."""
    head = f"func @{function.name}({_typed(function.parameters)})"
    if function.states:
        head += f" state({_typed(function.states)})"
    if function.constants:
        head += f" const({_typed(function.constants)})"
    lines = [head + " {"]
    inner = indent + "  "
    lines += [inner + print_node(n, locations, inner) for n in function.nodes]
    tail = f"return {_names(function.results)}".rstrip()
    if function.states:
        tail += f" update {_names(function.updates)}"
    lines.append(inner + tail)
    for slot in function.arena:
        values = ", ".join(map(_name, slot.values))
        lines.append(f"{inner}arena {print_dim(slot.size)} : {values}")
    return "\n".join([*lines, indent + "}"])


def print_node(node: Node, locations: bool = False, indent: str = "") -> str:
    """Return the text of one node."""
    text = f"{_typed(node.outputs)} = {node.op.name}({_names(node.inputs)})"
    attributes = node.op.written()
    if attributes:
        pairs = (f"{k}={_attribute(attributes[k], locations, indent)}" for k in sorted(attributes))
        text += f" {{{', '.join(pairs)}}}"
    return f"{text}  # {node.loc}" if locations and node.loc else text


def _typed(values: Iterable[Value]) -> str:
    return ", ".join(f"{_name(v.name)}: {v.type}" for v in values)


def _names(values: Iterable[Value]) -> str:
    return ", ".join(_name(v.name) for v in values)


def _name(name: str) -> str:
    return f"%{name}" if re.fullmatch(r"[\w.]+", name) else f"%{json.dumps(name)}"


def _attribute(value: Any, locations: bool, indent: str) -> str:
    if value is None:
        return "none"
    if isinstance(value, bool):
        return "true" if value else "false"
    if isinstance(value, (int, DType)):
        return str(value)
    if isinstance(value, float):
        return repr(value)
    if isinstance(value, str):
        return json.dumps(value)
    if isinstance(value, sympy.Expr):
        return f"<{print_dim(value)}>"
    if isinstance(value, tuple):
        return f"[{', '.join(_attribute(v, locations, indent) for v in value)}]"
    if isinstance(value, Function):
        return print_function(value, locations, indent)
    raise AssertionError(f"attribute of type {type(value).__name__}")


# ------------------------------------------------------------------------------- parsing

_TOKEN = re.compile(
    r"""\s+|\#[^\n]*
    |(?P<string>"(?:[^"\\]|\\.)*")
    |(?P<angle><[^>]*>)
    |(?P<value>%(?:[\w.]+|"(?:[^"\\]|\\.)*"))
    |(?P<symbol>@[\w.]+)
    |(?P<number>-?(?:inf\b|nan\b|\d[\d.]*(?:e[+-]?\d+)?))
    |(?P<word>[A-Za-z_\u0080-\U0010ffff][\w\u0080-\U0010ffff]*)
    |(?P<mark>[()\[\]{},:=+*/%-])""",
    re.VERBOSE,
)
_T = TypeVar("_T")


def parse_graph(text: str) -> Graph:
    """Return the graph that `text` denotes; raise DiluError with the line where it goes wrong."""
    parser = _Parser(text)
    parser.word("graph")
    stage = parser.next("word")
    mesh = parse_mesh(json.loads(parser.next("string"))) if parser.accept("mesh") else None
    functions: list[Function] = []
    while not parser.done:
        functions.append(parser.function())
    return Graph(stage, tuple(functions), mesh=mesh)


class _Parser:
    def __init__(self, text: str) -> None:
        self.text = text
        self.tokens: list[tuple[str, str, int]] = []
        self.at = 0
        place = 0
        while place < len(text):
            match = _TOKEN.match(text, place)
            if match is None:
                raise self.error(f"unexpected {text[place]!r}", place)
            if match.lastgroup:
                self.tokens.append((match.lastgroup, match[match.lastgroup], place))
            place = match.end()
        self.tokens.append(("end", "end of text", len(text)))

    @property
    def done(self) -> bool:
        return self.tokens[self.at][0] == "end"

    def error(self, message: str, place: int | None = None) -> DiluError:
        place = self.tokens[self.at][2] if place is None else place
        line = self.text.count("\n", 0, place) + 1
        return DiluError(f"graph text, line {line}: {message}")

    def next(self, kind: str, text: str | None = None) -> str:
        got_kind, got, _ = self.tokens[self.at]
        if got_kind != kind or (text is not None and got != text):
            raise self.error(f"expected {text or kind}, got {got!r}")
        self.at += 1
        return got

    def word(self, text: str) -> None:
        self.next("word", text)

    def mark(self, text: str) -> None:
        self.next("mark", text)

    def peek(self, text: str) -> bool:
        return self.tokens[self.at][1] == text and self.tokens[self.at][0] != "string"

    def accept(self, text: str) -> bool:
        found = self.peek(text)
        self.at += found
        return found

    def separated(self, item: Callable[[], _T], close: str) -> tuple[_T, ...]:
        """Parse items up to and with the closing mark."""
        out: list[_T] = []
        while not self.accept(close):
            if out:
                self.mark(",")
            out.append(item())
        return tuple(out)

    def function(self) -> Function:
        self.word("func")
        name = self.next("symbol")[1:]
        self.mark("(")
        parameters = self.separated(self.typed, ")")
        states = self.separated(self.typed, ")") if self.section("state") else ()
        constants = self.separated(self.typed, ")") if self.section("const") else ()
        scope = {v.name: v for v in parameters + states + constants}
        self.mark("{")
        nodes: list[Node] = []
        while not self.peek("return"):
            nodes.append(self.node(scope))
        self.word("return")
        results = self.names(scope)
        updates = self.names(scope) if self.accept("update") else ()
        arena: list[Slot] = []
        while self.accept("arena"):
            size = self.size(":")
            self.mark(":")
            arena.append(Slot(size, tuple(v.name for v in self.names(scope))))
        self.mark("}")
        return Function(
            name, parameters, states, constants, tuple(nodes), results, updates, tuple(arena)
        )

    def section(self, word: str) -> bool:
        if not self.accept(word):
            return False
        self.mark("(")
        return True

    def typed(self) -> Value:
        name = self.value_name()
        self.mark(":")
        element = self.by(dtype, self.next("word"))
        self.mark("[")
        shape: list[Any] = []
        while not self.accept("]"):
            if shape:
                self.mark(",")
            shape.append(self.size(",", "]"))
        return Value(name, TensorType(element, tuple(shape)))

    def size(self, *stops: str) -> Any:
        """Parse a size up to (not with) one of `stops` outside parentheses."""
        start, depth = self.at, 0
        while depth or not any(self.peek(s) for s in stops):
            depth += self.peek("(") - self.peek(")")
            if self.done:
                raise self.error("unfinished size", self.tokens[start][2])
            self.at += 1
        begin, end = self.tokens[start][2], self.tokens[self.at][2]
        return self.by(parse_dim, self.text[begin:end].strip())

    def by(self, parse: Callable[[str], _T], text: str) -> _T:
        """Parse a piece of text by another parser, whose errors know no line."""
        try:
            return parse(text)
        except DiluError as error:
            raise self.error(error.message, self.tokens[self.at - 1][2]) from None

    def names(self, scope: dict[str, Value]) -> tuple[Value, ...]:
        """Parse a possibly empty list of value names that no closing mark follows."""
        out: list[Value] = []
        while self.tokens[self.at][0] == "value":
            out.append(self.known(scope))
            if not self.accept(","):
                break
        return tuple(out)

    def value_name(self) -> str:
        text = self.next("value")[1:]
        return str(json.loads(text)) if text.startswith('"') else text

    def known(self, scope: dict[str, Value]) -> Value:
        name = self.value_name()
        if name not in scope:
            self.at -= 1
            raise self.error(f"%{name} is not defined")
        return scope[name]

    def node(self, scope: dict[str, Value]) -> Node:
        outputs = [self.typed()]
        while self.accept(","):
            outputs.append(self.typed())
        self.mark("=")
        name, place = self.next("word"), self.tokens[self.at - 1][2]
        if name not in OPS:
            self.at -= 1
            raise self.error(f"unknown op {name!r}")
        self.mark("(")
        inputs = self.separated(lambda: self.known(scope), ")")
        pairs = self.separated(self.pair, "}") if self.accept("{") else ()
        try:
            op = OPS[name](**dict(pairs))
        except TypeError as error:
            raise self.error(f"{name}: {error}", place) from None
        scope.update({v.name: v for v in outputs})
        return Node(op, inputs, tuple(outputs))

    def pair(self) -> tuple[str, Any]:
        key = self.next("word")
        self.mark("=")
        return key, self.attribute()

    def attribute(self) -> Any:
        kind, text, _ = self.tokens[self.at]
        if kind == "word" and text == "func":
            return self.function()
        self.at += 1
        if kind == "number":
            return int(text) if re.fullmatch(r"-?\d+", text) else float(text)
        if kind == "string":
            return json.loads(text)
        if kind == "angle":
            return self.by(parse_dim, text[1:-1])
        if text == "[":
            return self.separated(self.attribute, "]")
        if kind == "word":
            words = {"true": True, "false": False, "none": None, "inf": float("inf"),
                     "nan": float("nan"), **DTYPES}  # fmt: skip
            if text in words:
                return words[text]
        self.at -= 1
        raise self.error(f"not an attribute value: {text!r}")
