"""Calling captured modules as a session calls them, with the reference interpreter as its engine:
what is tested is how arguments and results travel, for which no compiler is needed."""

from __future__ import annotations

import copy
import threading
from collections.abc import Sequence
from types import SimpleNamespace
from typing import Any

import numpy as np
import torch

from dilu.frontend.program.capture import capture_call
from dilu.ir.dtypes import decode, to_storage
from dilu.ir.interpret import constant_values, interpret
from dilu.ir.types import symbols
from dilu.packing import _function
from dilu.runtime.call.arrays import from_numpy, to_numpy
from dilu.runtime.call.function import Function


class Call(torch.nn.Module):
    """A function as a module, with parameters of its own."""

    def __init__(self, function, **members) -> None:
        super().__init__()
        self.function = function
        for name, member in members.items():
            setattr(self, name, member)

    def forward(self, *args, **kwargs):
        return (
            self.function(self, *args, **kwargs)
            if self._parameters
            else self.function(*args, **kwargs)
        )


class Interpreter:
    """An engine that interprets a captured graph."""

    def __init__(self, graph) -> None:
        self.main = graph.function("main")
        self.constants = constant_values(graph, self.main)

    def argument(self, value: Any, dtype: str) -> tuple[np.ndarray, str]:
        return to_numpy(value, dtype)

    def on_device(self, _: Any) -> bool:
        return False

    def result(self, array: Any, dtype: str, *, torch: bool) -> Any:
        return from_numpy(array, dtype, torch=torch)

    def run(self, _: int, __: Any, arrays: Sequence[Any], *___: Any, on_device: bool) -> list[Any]:
        values = [
            decode(p.type.dtype, array)
            for p, array in zip(self.main.parameters, arrays, strict=True)
        ]
        made = interpret(self.main, [*values, *self.constants])
        return [
            np.array(to_storage(r.type.dtype, np.asarray(value)))
            for r, value in zip(self.main.results, made, strict=True)
        ]


def interpreted(model, args=None, kwargs=None, dynamic_shapes=None) -> Function:
    """Return what a session calls for a module that was captured with these examples."""
    captured = capture_call(model, args, dynamic_shapes, kwargs)
    main = captured.graph.function("main")
    names = dict.fromkeys(name for p in main.parameters for name in symbols(p.type.shape))
    entry = {**_function(main, main, list(names)), "signature": captured.signature}
    session = SimpleNamespace(
        lock=threading.RLock(),
        engine=Interpreter(captured.graph),
        artifact=SimpleNamespace(manifest={"language_model": None}),
    )
    return Function(session, 0, entry)  # type: ignore[arg-type]


def same(got: Any, wanted: Any, where: str = "result") -> None:
    """Assert that two results are equal: structure, types and, to 1e-5, numbers."""
    if isinstance(wanted, torch.Tensor):
        got = got if isinstance(got, torch.Tensor) else torch.from_numpy(np.asarray(got))
        assert (got.dtype, got.shape) == (wanted.dtype, wanted.shape), where
        torch.testing.assert_close(got.double(), wanted.detach().double(), rtol=1e-5, atol=1e-5)
    elif isinstance(wanted, dict):
        assert type(got) is dict and list(got) == list(wanted), where
        for key in wanted:
            same(got[key], wanted[key], f"{where}[{key!r}]")
    elif isinstance(wanted, (tuple, list)):
        assert type(got) is type(wanted) and len(got) == len(wanted), where
        for i, (one, other) in enumerate(zip(got, wanted, strict=True)):
            same(one, other, f"{where}[{i}]")
    elif hasattr(wanted, "__dataclass_fields__"):
        assert type(got) is type(wanted), where
        for name in wanted.__dataclass_fields__:
            same(getattr(got, name), getattr(wanted, name), f"{where}.{name}")
    else:
        assert type(got) is type(wanted) and got == wanted, where


def as_the_module(model, args=(), kwargs=None, call=None, called=None, dynamic_shapes=None):
    """Assert that a captured module does with other arguments what the module does; return it."""
    kwargs, call = kwargs or {}, args if call is None else call
    called = kwargs if called is None else called
    function = interpreted(model, args, kwargs, dynamic_shapes)
    mine = copy.deepcopy((call, called))
    with torch.no_grad():
        wanted = (model.eval() if isinstance(model, torch.nn.Module) else model)(*call, **called)
    same(function(*mine[0], **mine[1]), wanted)
    return function
