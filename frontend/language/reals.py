"""Computing with real tensors while a model is being captured.

What a capture turns on (fake tensors, tracing, patched functions) belongs to a thread, so real
computation is a matter of another thread, whatever the version of torch.
"""

from __future__ import annotations

import threading
from collections.abc import Callable
from typing import Any, TypeVar

import torch
from torch._subclasses.fake_tensor import FakeTensor

T = TypeVar("T")


class NotReal(Exception):
    """The computation took part in the capture: its result depends on values that are not there."""


def compute(function: Callable[[], T]) -> T:
    """Return `function()`, computed outside of any capture; raise what it raises."""
    results: list[T] = []
    errors: list[BaseException] = []

    def run() -> None:
        try:
            with torch.no_grad():
                results.append(function())
        except BaseException as error:  # handed to the thread that asked
            errors.append(error)

    thread = threading.Thread(target=run, name="dilu-reals")
    thread.start()
    thread.join()
    if errors:
        raise errors[0]
    return results[0]


def real(x: Any) -> torch.Tensor:
    """Return a tensor that has values; raise NotReal when it has none."""
    if not isinstance(x, torch.Tensor) or isinstance(x, FakeTensor) or x.is_meta:
        raise NotReal(f"a {type(x).__name__} without values")
    return x
