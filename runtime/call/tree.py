"""Trees of arguments and results, as a manifest describes them: checked, read and made.

A tree is one of `{"tuple": […]}`, `{"list": […]}`, `{"dict": [[key, tree], …]}`, `{"fields": [name,
…], "values": [tree, …], "class": "module:name"}`, or a leaf: `{"parameter": i}` (of the compiled
function; among results, the caller's own array), `{"result": i}`, `{"size": "2*N"}`,
`{"constant": value, "type": name}` (floats as text) or `{"left_out": true}`.

Invariant: nothing is imported or evaluated for a tree. `class` is only looked up among what the
process has loaded already, and used where it is a named tuple or dataclass of just these fields.
"""

from __future__ import annotations

import sys
from collections import namedtuple
from collections.abc import Callable, Iterable, Sequence
from typing import Any

from ..artifact.expression import symbols

Tree = dict[str, Any]

_PLAIN: dict[str, type] = {
    "bool": bool, "int": int, "float": str, "str": str, "none": type(None),
}  # fmt: skip
_DEEPEST = 64


def checked(tree: Tree, parameters: int, results: int, depth: int = 0) -> Tree:
    """Return a tree after checking that it is one."""

    def each(trees: Sequence[Tree]) -> None:
        for part in trees:
            checked(part, parameters, results, depth + 1)

    if depth > _DEEPEST:
        raise ValueError("a tree is too deep")
    kind = next(iter(tree), None)
    if kind in ("parameter", "result"):
        limit = parameters if kind == "parameter" else results
        if type(tree[kind]) is not int or not 0 <= tree[kind] < limit:
            raise ValueError(f"there is no {kind} {tree[kind]}")
    elif kind == "constant":
        if type(tree["constant"]) is not _PLAIN[tree["type"]]:
            raise TypeError(f"not a constant: {tree}")
        if tree["type"] == "float":
            float(tree["constant"])
    elif kind == "size":
        symbols(tree["size"])
    elif kind == "dict":
        if not all(isinstance(key, (str, int)) for key, _ in tree["dict"]):
            raise TypeError("a key is neither text nor a number")
        each([part for _, part in tree["dict"]])
    elif kind == "fields":
        if len(tree["fields"]) != len(tree["values"]) or not isinstance(tree["class"], str):
            raise ValueError("fields and values differ in number")
        if not all(isinstance(name, str) and name.isidentifier() for name in tree["fields"]):
            raise ValueError("a field's name is none")
        each(tree["values"])
    elif kind in ("list", "tuple"):
        each(tree[kind])
    elif kind != "left_out":
        raise ValueError(f"unknown kind {kind!r}")
    return tree


def parameters(tree: Tree) -> list[int]:
    """Return the numbers of the parameters in a tree, in its order."""
    if "parameter" in tree:
        return [tree["parameter"]]
    parts = tree.get("values") or tree.get("list") or tree.get("tuple") or ()
    parts = [part for _, part in tree["dict"]] if "dict" in tree else parts
    return [i for part in parts for i in parameters(part)]


def is_constant(tree: Tree, value: Any) -> bool:
    """Return whether a value is the one that a program was compiled for, of the same type."""
    if type(value).__module__ == "numpy" and not getattr(value, "shape", (1,)):
        value = value.item()
    if tree["type"] == "none":
        return value is None
    kind = {"bool": bool, "int": int, "float": float, "str": str}[tree["type"]]
    if not isinstance(value, kind) or isinstance(value, bool) != (kind is bool):
        return False
    return repr(float(value)) == tree["constant"] if kind is float else value == tree["constant"]


def constant_text(tree: Tree) -> str:
    """Return a constant of a tree as text for people."""
    return tree["constant"] if tree["type"] == "float" else repr(tree["constant"])


def keys_text(keys: Iterable[Any]) -> str:
    """Return the keys of a dictionary as text for people."""
    return ", ".join(map(repr, keys)) or "no keys"


def build(tree: Tree, leaf: Callable[[Tree], Any]) -> Any:
    """Return the value that a tree describes, its leaves but the constants made by `leaf`."""
    if "constant" in tree:
        return float(tree["constant"]) if tree["type"] == "float" else tree["constant"]
    if "dict" in tree:
        return {key: build(part, leaf) for key, part in tree["dict"]}
    if "list" in tree:
        return [build(part, leaf) for part in tree["list"]]
    if "tuple" in tree:
        return tuple(build(part, leaf) for part in tree["tuple"])
    if "fields" in tree:
        return _instance(tree["class"], tree["fields"], [build(v, leaf) for v in tree["values"]])
    return leaf(tree)


def _instance(name: str, fields: Sequence[str], values: Sequence[Any]) -> Any:
    """Return an instance of a class that is loaded, or else a named tuple of the same fields."""
    module, _, qualified = name.partition(":")
    found: Any = sys.modules.get(module)
    for part in qualified.split("."):
        found = getattr(found, part, None)
    if isinstance(found, type):
        if issubclass(found, tuple) and getattr(found, "_fields", None) == tuple(fields):
            return found(*values)
        declared: dict[str, Any] = getattr(found, "__dataclass_fields__", {})
        if list(declared) == list(fields) and all(field.init for field in declared.values()):
            return found(**dict(zip(fields, values, strict=True)))
    short = qualified.rpartition(".")[2]
    plain = short if short.isidentifier() else "Result"
    made: Any = namedtuple(plain, fields, rename=True)  # pyright: ignore[reportUntypedNamedTuple]
    return made(*values)
