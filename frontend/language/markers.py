"""Things that a model may hand on but not look into: attention masks, and state shared by layers.

While a model is captured they stand where tensors or containers would be. Whoever computes with one
is told what the model does with it and where, instead of getting a value that is not the real one.
"""

from __future__ import annotations

import inspect
from collections.abc import Callable
from pathlib import Path
from types import FrameType
from typing import Any, NoReturn

import torch

from ...errors import Loc

_OURS = str(Path(__file__).parent.parent)
_TORCH = str(Path(torch.__file__).parent)


class Marker:
    """A thing that is handed on only; `refuse` says what is not supported when it is used."""

    def refuse(self, what: str) -> NoReturn:
        """Raise UnsupportedError for a model that does `what` with the thing."""
        raise NotImplementedError

    def __getattr__(self, name: str) -> Any:
        if name.startswith("__"):  # asked by copy, pytree and the like, not by a model
            raise AttributeError(name)
        self.refuse(f"reads .{name} of")

    @classmethod
    def __torch_function__(cls, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        given = [*args, *(kwargs or {}).values()]
        flat = [x for a in given for x in (a if isinstance(a, (list, tuple)) else [a])]
        marker = next(x for x in flat if isinstance(x, Marker))
        marker.refuse(f"computes {getattr(func, '__name__', func)} of")


def _refusing(what: str) -> Callable[..., Any]:
    def operation(self: Marker, *_: Any, **__: Any) -> Any:
        self.refuse(what)

    return operation


_ARITHMETIC = (
    "add",
    "sub",
    "mul",
    "matmul",
    "truediv",
    "floordiv",
    "mod",
    "pow",
    "and",
    "or",
    "xor",
)
_OTHERS = {
    "__getitem__": "indexes",
    "__setitem__": "writes to",
    "__delitem__": "writes to",
    "__contains__": "looks into",
    "__iter__": "goes through",
    "__len__": "takes the length of",
    "__bool__": "decides by",
    "__call__": "calls",
    "__invert__": "inverts",
    "__neg__": "negates",
    "__lt__": "compares",
    "__le__": "compares",
    "__gt__": "compares",
    "__ge__": "compares",
    "__index__": "indexes by",
    "__float__": "makes a number of",
    "__int__": "makes a number of",
}
for _name, _what in _OTHERS.items():
    setattr(Marker, _name, _refusing(_what))
for _operator in _ARITHMETIC:
    for _prefix in ("", "r", "i"):
        setattr(Marker, f"__{_prefix}{_operator}__", _refusing("computes with"))


def place() -> Loc | None:
    """Return the line of the model's code that is running."""
    frame = _frame()
    return None if frame is None else Loc(frame.f_code.co_filename, frame.f_lineno)


def whose(otherwise: str) -> str:
    """Return the class of the module whose code is running."""
    frame = _frame()
    module = None if frame is None else frame.f_locals.get("self")
    return type(module).__name__ if isinstance(module, torch.nn.Module) else otherwise


def _frame() -> FrameType | None:
    frame = inspect.currentframe()
    while frame is not None and not is_models(frame.f_code.co_filename, frame.f_lineno):
        frame = frame.f_back
    return frame


def is_models(file: str, line: int) -> Loc | None:
    """Return a line as a place, if it is of a model's code: not ours, not a library's."""
    library = "/transformers/" in file and "/transformers/models/" not in file
    return None if library or file.startswith((_OURS, _TORCH, "<")) else Loc(file, line)
