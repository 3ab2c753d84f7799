"""How a function is called: the arguments and results as the model's own code has them.

A function of a manifest may carry a `signature`, plain data that the compiler wrote:

    inputs      the parameters of the call in order: `name` (null among `*args`), `how` it is given
                (positional, keyword or either), whether it is `optional`, and its `value`, a tree
    result      a tree
    writes      [parameter, result] pairs: the call puts that result into the caller's own array
    conditions  [left, relation, right]: what the sizes must satisfy

`tree.py` says what a tree is. Without a signature, parameters and results are flat.
"""

from __future__ import annotations

import operator
from collections.abc import Callable, Mapping, Sequence
from typing import Any

from ...errors import DiluError
from ..artifact.expression import evaluate, symbols
from .tree import Tree, build, checked, constant_text, is_constant, keys_text, parameters

_RELATIONS: dict[str, Callable[[int, int], bool]] = {
    "==": operator.eq, "!=": operator.ne, "<": operator.lt,
    "<=": operator.le, ">": operator.gt, ">=": operator.ge,
}  # fmt: skip


class Signature:
    """The signature of one function, checked when it is made.

    `types` describes the parameters of the compiled function to people. `writes` maps parameters
    to the results that go into the caller's arrays.
    """

    def __init__(self, function: str, entry: Mapping[str, Any], types: list[str]) -> None:
        self._function = function
        self._types = types
        names = [parameter["name"] for parameter in entry["parameters"]]
        results = len(entry["results"])
        given = entry.get("signature") or _flat(names, results)
        try:
            self._inputs = [_slot(slot, len(names)) for slot in given["inputs"]]
            self._result = checked(given["result"], len(names), results)
            self.writes = {int(p): int(r) for p, r in given.get("writes", ())}
            self._conditions = [_condition(c) for c in given.get("conditions", ())]
            taken = [i for slot in self._inputs for i in parameters(slot["value"])]
            if sorted(taken) != list(range(len(names))):
                raise ValueError("not every parameter is given once")
            if not all(0 <= p < len(names) and 0 <= r < results for p, r in self.writes.items()):
                raise ValueError("a result is written to nowhere")
        except (KeyError, TypeError, ValueError, AttributeError, RecursionError) as error:
            raise DiluError(
                f"the manifest does not say how {function} is called: {error}",
                hint="compile the model again",
            ) from error

    # ------------------------------------------------------------------ arguments

    def arguments(self, args: Sequence[Any], kwargs: Mapping[str, Any]) -> list[Any]:
        """Return the array for each parameter of the compiled function.

        Raises DiluError where an argument is missing, unknown, given twice, of another structure
        than the example's, or another plain value than the program was compiled for.
        """
        arrays: list[Any] = [None] * len(self._types)
        for slot, path, value in self._bound(args, dict(kwargs)):
            self._take(slot["value"], path, value, arrays)
        return arrays

    def _bound(
        self, args: Sequence[Any], kwargs: dict[str, Any]
    ) -> list[tuple[Mapping[str, Any], str, Any]]:
        positional = [slot for slot in self._inputs if slot["how"] != "keyword"]
        if len(args) > len(positional):
            raise self._wrong_number(len(args) + len(kwargs))
        given: list[tuple[Mapping[str, Any], str, Any]] = []
        by_names = bool(kwargs)
        places = {id(slot): value for slot, value in zip(positional, args, strict=False)}
        for index, slot in enumerate(self._inputs):
            name: Any = slot["name"]
            path = name or str(index)
            by_name = name is not None and slot["how"] != "positional" and name in kwargs
            if by_name and id(slot) in places:
                raise DiluError(f"{self._function}: the argument {name} is given twice")
            if by_name:
                given.append((slot, path, kwargs.pop(path)))
            elif id(slot) in places:
                given.append((slot, path, places[id(slot)]))
            elif not slot["optional"]:
                raise self._missing(path, len(args), by_names=by_names)
        if kwargs:
            known = [s["name"] for s in self._inputs if s["name"] and s["how"] != "positional"]
            hint = f"it takes {', '.join(known)}" if known else "it takes no keywords"
            names = ", ".join(map(repr, kwargs))
            raise DiluError(f"{self._function} has no argument called {names}", hint=hint)
        return given

    def _missing(self, path: str, count: int, *, by_names: bool) -> DiluError:
        if not by_names:
            return self._wrong_number(count)
        return DiluError(f"{self._function}: the argument {path} is missing", hint=self._text())

    def _wrong_number(self, count: int) -> DiluError:
        wanted = sum(not slot["optional"] for slot in self._inputs)
        message = f"{self._function} takes {wanted} arguments, not {count}"
        return DiluError(message, hint=self._text())

    def _text(self) -> str | None:
        shown = [
            f"{s['name'] or '*'}: {self._shown(s['value'])}"
            for s in self._inputs
            if not s["optional"]
        ]
        return f"its parameters are {', '.join(shown)}" if shown else None

    def _shown(self, tree: Tree) -> str:
        """Return a tree as people read it, its arrays by their types."""
        if "parameter" in tree:
            return self._types[tree["parameter"]]
        if "constant" in tree:
            return constant_text(tree)
        if "dict" in tree:
            inner = ", ".join(f"{k!r}: {self._shown(v)}" for k, v in tree["dict"])
            return f"{{{inner}}}"
        if "left_out" in tree:
            return "nothing"
        values = tree.get("values") or tree.get("list") or tree.get("tuple") or []
        inner = ", ".join(map(self._shown, values))
        return f"[{inner}]" if "list" in tree else f"({inner})"

    def _take(self, tree: Tree, path: str, value: Any, arrays: list[Any]) -> None:
        """Put the arrays in a value where the tree says they belong."""
        if "parameter" in tree:
            arrays[tree["parameter"]] = value
        elif "constant" in tree or "left_out" in tree:
            if "left_out" in tree or not is_constant(tree, value):
                raise self._not_compiled_for(tree, path, value)
        elif "dict" in tree:
            self._take_dict(tree, path, value, arrays)
        else:
            parts: list[Tree] = tree[next(k for k in ("values", "tuple", "list") if k in tree)]
            names: list[str] = tree.get("fields", [])
            if names and not isinstance(value, (tuple, list)):
                value = self._fields(names, path, value)
            if not isinstance(value, (tuple, list)) or len(value) != len(parts):
                raise self._unlike(path, value, f"a sequence of {len(parts)}")
            for i, (part, inner) in enumerate(zip(parts, value, strict=True)):
                at = f"{path}.{names[i]}" if names else f"{path}[{i}]"
                self._take(part, at, inner, arrays)

    def _fields(self, names: Sequence[str], path: str, value: Any) -> list[Any]:
        """Return the fields of an object, or of a dictionary in its place."""
        table = value if isinstance(value, Mapping) else None
        if table is not None and table.keys() <= set(names):
            return [table.get(name) for name in names]
        if table is not None or any(not hasattr(value, name) for name in names):
            raise self._unlike(path, value, f"an object with {', '.join(names)}")
        return [getattr(value, name) for name in names]

    def _take_dict(self, tree: Tree, path: str, value: Any, arrays: list[Any]) -> None:
        wanted = dict(tree["dict"])
        if not isinstance(value, Mapping):
            raise self._unlike(path, value, f"a dictionary with {keys_text(wanted)}")
        unknown = [key for key in value if key not in wanted]
        missing = [key for key in wanted if key not in value]
        if unknown or missing:
            what = (
                f"has no {keys_text(missing)}" if missing else f"has {keys_text(unknown)} too many"
            )
            raise DiluError(
                f"{self._function}: the argument {path} {what}",
                hint=f"the program was compiled for {keys_text(wanted)}",
            )
        for key, part in wanted.items():
            self._take(part, f"{path}[{key!r}]", value[key], arrays)

    def _unlike(self, path: str, value: Any, wanted: str) -> DiluError:
        size = f" of {len(value)}" if isinstance(value, (tuple, list)) else ""
        return DiluError(
            f"{self._function}: the argument {path} is a {type(value).__name__}{size}, "
            f"expected {wanted}",
            hint="arguments have the structure of the example inputs",
        )

    def _not_compiled_for(self, tree: Tree, path: str, value: Any) -> DiluError:
        text = repr(value) if isinstance(value, (int, float, str, type(None))) else None
        text = text or f"a {type(value).__name__}"
        only = "without it" if "left_out" in tree else f"for {constant_text(tree)} only"
        return DiluError(
            f"{self._function}: the argument {path} is {text}, but the program was compiled {only}",
            hint="compile again with this value in the example inputs, or make it a tensor",
        )

    # ------------------------------------------------------------------ sizes and results

    def check(self, sizes: Mapping[str, int]) -> None:
        """Raise DiluError where the program does not hold for these sizes."""
        for left, relation, right in self._conditions:
            if (symbols(left) | symbols(right)) - sizes.keys():
                continue
            if not _RELATIONS[relation](evaluate(left, sizes), evaluate(right, sizes)):
                known = ", ".join(f"{n}={sizes[n]}" for n in sorted(symbols(left) | symbols(right)))
                raise DiluError(
                    f"{self._function}: the program holds for {left} {relation} {right} only, "
                    f"and {known}",
                    hint="compile it with example inputs and dynamic_shapes for such sizes",
                )

    def structured(
        self, results: Sequence[Any], arguments: Mapping[int, Any], sizes: Mapping[str, int]
    ) -> Any:
        """Return the results as the model returns them."""

        def leaf(tree: Tree) -> Any:
            if "result" in tree:
                return results[tree["result"]]
            if "parameter" in tree:
                return arguments[tree["parameter"]]
            return evaluate(tree["size"], sizes)

        return build(self._result, leaf)

    @property
    def returned_parameters(self) -> set[int]:
        """The parameters that the call returns as they were given."""
        return set(parameters(self._result))


def _flat(names: Sequence[str], results: int) -> dict[str, Any]:
    """Return the signature of a function whose manifest has none."""
    inputs = [
        {"name": n, "how": "either", "optional": False, "value": {"parameter": i}}
        for i, n in enumerate(names)
    ]
    each = [{"result": i} for i in range(results)]
    return {"inputs": inputs, "result": each[0] if results == 1 else {"tuple": each}}


def _slot(slot: Mapping[str, Any], parameters: int) -> Mapping[str, Any]:
    if slot["how"] not in ("positional", "keyword", "either"):
        raise ValueError(f"an argument is given {slot['how']!r}")
    if not isinstance(slot["name"], (str, type(None))) or not isinstance(slot["optional"], bool):
        raise TypeError(f"not an argument: {slot}")
    return {**slot, "value": checked(slot["value"], parameters, 0)}


def _condition(row: Sequence[Any]) -> tuple[Any, str, Any]:
    left, relation, right = row
    if relation not in _RELATIONS:
        raise ValueError(f"unknown relation {relation!r}")
    for size in (left, right):
        symbols(size)  # raises DiluError for what is none
    return left, relation, right
