"""torch's own samples of its operators as modules: scalars, empty tensors, sizes of 1, strides.

What becomes of all of them is `tests/operator_sweep.py`'s work.
"""

from __future__ import annotations

import sys
import unittest
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from functools import cached_property
from types import SimpleNamespace
from typing import Any

import numpy as np
import torch
from torch.utils import _pytree as pytree

from dilu.errors import DiluError
from dilu.frontend.program.capture import CapturedCall, capture_call
from dilu.ir.graph import Graph
from dilu.ir.interpret import constant_values, interpret
from dilu.ir.verify import verify
from dilu.runtime.call.tree import build

TOLERANCE = 1e-4  # of f32, where torch and we add in another order


class Call(torch.nn.Module):
    """An operator with the arguments of a sample; the tensors among them are inputs."""

    def __init__(self, function: Callable[..., Any], spec: Any, fixed: Sequence[Any]) -> None:
        super().__init__()
        self.function, self.spec, self.fixed = function, spec, fixed

    def forward(self, *tensors: torch.Tensor) -> Any:
        left = iter(tensors)
        leaves = [next(left) if leaf is TENSOR else leaf for leaf in self.fixed]
        args, keywords = pytree.tree_unflatten(leaves, self.spec)
        out = self.function(*args, **keywords)
        return tuple(t for t in pytree.tree_leaves(out) if isinstance(t, torch.Tensor))


TENSOR = object()


#: Operators whose results hold whatever lay in memory: nothing but their shape is compared.
UNDEFINED = frozenset({"empty", "empty_like", "empty_permuted", "empty_strided", "new_empty",
                       "new_empty_strided", "resize_", "resize_as_"})  # fmt: skip


#: Operators whose second result is a place, any of those that hold equal numbers.
TIES = frozenset({"kthvalue", "median", "nanmedian", "mode", "topk", "sort", "msort", "argsort"})


@dataclass(frozen=True)
class Sample:
    """One sample of an operator; `name` tells it from the others."""

    name: str
    module: Call
    tensors: tuple[torch.Tensor, ...]
    defined: bool = True
    ties: bool = False

    @cached_property
    def wanted(self) -> tuple[torch.Tensor, ...]:
        """What torch makes of it: the results, then its tensors, which it may have written to."""
        tensors = [t.detach().clone() for t in self.tensors]
        with torch.no_grad():
            return (*self.module(*tensors), *tensors)

    @cached_property
    def is_valid(self) -> bool:
        """Whether torch itself computes it."""
        try:
            self.wanted
            return True
        except (RuntimeError, IndexError, ValueError, TypeError):
            return False

    def difference(self, got: Sequence[np.ndarray]) -> str | None:
        """Return what differs from torch, of results and then tensors; None where nothing does."""
        if len(got) != len(self.wanted):
            return f"{len(got)} results, not {len(self.wanted)}"
        for i, (mine, theirs) in enumerate(zip(got, self.wanted, strict=True)):
            want = values(theirs)
            if mine.shape != want.shape:
                return f"result {i} is {mine.shape}, not {want.shape}"
            if not self.defined or (self.ties and i == 1 and len(self.tensors) == 1):
                continue
            bound = 2e-2 if theirs.dtype in (torch.bfloat16, torch.float16) else TOLERANCE
            if not np.allclose(mine, want, rtol=bound, atol=bound, equal_nan=True):
                at = np.argwhere(~np.isclose(mine, want, rtol=bound, atol=bound, equal_nan=True))[0]
                return f"result {i} at {at.tolist()} is {mine[tuple(at)]}, not {want[tuple(at)]}"
        return None


def values(t: torch.Tensor) -> np.ndarray:
    """Return a tensor's numbers as numpy holds them; narrow floats as f32."""
    t = t.detach()
    narrow = t.is_floating_point() and t.dtype not in (torch.float32, torch.float64)
    return (t.float() if narrow else t).numpy()


def operators() -> dict[str, Any]:
    """Return torch's descriptions of its operators by name and variant."""
    # What torch's own tests import for a base class, and none of its samples needs.
    stand_in: Any = SimpleNamespace(TestCase=unittest.TestCase)
    sys.modules.setdefault("expecttest", stand_in)
    from torch.testing._internal.common_methods_invocations import op_db

    return {f"{o.name}.{o.variant_test_name}".rstrip("."): o for o in op_db}


def samples(operator: Any, dtype: torch.dtype = torch.float32) -> Iterator[Sample]:
    """Yield an operator's samples of an element type; nothing where it has none of that type."""
    if dtype not in operator.dtypes:
        return
    torch.manual_seed(0)
    for i, each in enumerate(operator.sample_inputs("cpu", dtype, requires_grad=False)):
        leaves, spec = pytree.tree_flatten(((each.input, *each.args), dict(each.kwargs)))
        tensors = tuple(leaf for leaf in leaves if isinstance(leaf, torch.Tensor))
        fixed = [TENSOR if isinstance(leaf, torch.Tensor) else leaf for leaf in leaves]
        defined = operator.name not in UNDEFINED
        # Samples of floats have no equal numbers.
        ties = operator.name in TIES and not dtype.is_floating_point
        call = Call(operator.op, spec, fixed)
        yield Sample(f"{operator.name} {i}", call, tensors, defined, ties)


@dataclass(frozen=True)
class Outcome:
    """How a sample fared: `right`, `wrong`, `refused`, `missing` (its operator is not in the
    importer's table), `uncaptured` (torch cannot export it) or `internal`, an error that no user
    should see; and what there is to say."""

    sample: Sample
    kind: str
    text: str = ""


class Together(torch.nn.Module):
    """Samples one after another, captured at once: what takes longest is capturing."""

    def __init__(self, parts: Sequence[Sample]) -> None:
        super().__init__()
        self.parts = parts

    def forward(self, *tensors: torch.Tensor) -> tuple[torch.Tensor, ...]:
        left = iter(tensors)
        each = [[next(left) for _ in p.tensors] for p in self.parts]
        return tuple(t for p, own in zip(self.parts, each, strict=True) for t in p.module(*own))


def outcomes(parts: Sequence[Sample], run: Run | None = None) -> list[Outcome]:
    """Return how samples fare: together where that can be, else each alone.

    `run` takes a graph and its inputs to results; unless given, the reference interpreter does.
    """
    if not parts:
        return []
    try:
        return _together(parts, run or interpreted)
    except Exception as error:
        if len(parts) == 1:
            return [_failed(parts[0], error)]
    first = outcomes(parts[: (len(parts) + 3) // 4], run)
    if len(first) > 1 and all(o.kind == "missing" for o in first):
        return first
    return first + outcomes(parts[(len(parts) + 3) // 4 :], run)


Run = Callable[[Graph, list[np.ndarray]], Sequence[np.ndarray]]


def interpreted(graph: Graph, inputs: list[np.ndarray]) -> Sequence[np.ndarray]:
    main = graph.functions[0]
    return interpret(main, [*inputs, *constant_values(graph, main)])


def _together(parts: Sequence[Sample], run: Run) -> list[Outcome]:
    tensors = tuple(t.detach().clone() for p in parts for t in p.tensors)
    call = capture_call(Together(parts), tensors)
    verify(call.graph)
    inputs = [values(t) for t in tensors]
    results, after = map(iter, returned(call, inputs, run(call.graph, list(inputs))))
    found: list[Outcome] = []
    for part in parts:
        count = len(part.wanted) - len(part.tensors)
        got = [next(results) for _ in range(count)] + [next(after) for _ in part.tensors]
        text = part.difference(got)
        found.append(Outcome(part, "wrong" if text else "right", text or ""))
    return found


def returned(
    call: CapturedCall, inputs: Sequence[np.ndarray], made: Sequence[np.ndarray]
) -> tuple[list[Any], list[np.ndarray]]:
    """Return what a call returns, and its inputs after it, of what the graph's function made."""
    after = list(inputs)
    for parameter, result in call.signature["writes"]:
        after[parameter] = made[result]

    def leaf(tree: dict[str, Any]) -> Any:
        return made[tree["result"]] if "result" in tree else after[tree["parameter"]]

    return list(build(call.signature["result"], leaf)), after


def _failed(part: Sample, error: Exception) -> Outcome:
    text = str(error).partition("\n")[0]
    if not isinstance(error, DiluError):
        return Outcome(part, "internal", f"{type(error).__name__}: {text}")
    if text.startswith("torch.export cannot capture the model"):
        return Outcome(part, "uncaptured", text)
    missing = text.startswith("the operator ") and text.endswith(" is not supported")
    return Outcome(part, "missing" if missing else "refused", text)
