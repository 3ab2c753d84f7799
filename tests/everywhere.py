"""One module on every target: torch's outcome beside those of the reference interpreter, of C for
any machine and for this one, and of Triton's kernels under the interpreter."""

from __future__ import annotations

import contextlib
from collections.abc import Callable, Iterator, Mapping, Sequence
from typing import Any

import numpy as np
import torch
from interpreted import INTERPRETED, InterpretedDevice

import dilu
from dilu.codegen import targets
from dilu.frontend.operators.context import TORCH_DTYPES
from dilu.frontend.program.capture import capture_module, raw
from dilu.ir.dtypes import DType, decode, to_storage
from dilu.ir.interpret import constant_values, interpret

Tensors = Sequence[torch.Tensor]
Functions = Mapping[str, Callable[..., Any]]


class Table(torch.nn.Module):
    """Many functions of the same inputs as one module, so that they are compiled together."""

    def __init__(self, functions: Functions) -> None:
        super().__init__()
        self.functions = dict(functions)
        for number, f in enumerate(functions.values()):
            if isinstance(f, torch.nn.Module):
                self.add_module(str(number), f)

    def forward(self, *inputs: torch.Tensor) -> tuple[torch.Tensor, ...]:
        return tuple(t for f in self.functions.values() for t in tensors(f(*inputs)))


def tensors(out: Any) -> list[torch.Tensor]:
    return [out] if isinstance(out, torch.Tensor) else list(out)


def storage(t: torch.Tensor) -> np.ndarray:
    return raw(t, TORCH_DTYPES[t.dtype])


class Compiled:
    """Functions compiled together for every target; to be closed."""

    def __init__(
        self,
        functions: Functions,
        inputs: Tensors,
        *,
        interpreted: bool = True,
        compiled: bool = True,
    ) -> None:
        self.functions = functions
        module = Table(functions).eval()
        self.graph = capture_module(module, tuple(inputs), None)
        cpu = dict.fromkeys(("cpu:baseline", targets.host_target().name))
        names = [*(cpu if compiled else ()), *([INTERPRETED.name] if interpreted else ())]
        known = targets.TARGETS
        targets.TARGETS = (*known, INTERPRETED)
        try:
            artifact = dilu.compile(module, tuple(inputs), target=names)
        finally:
            targets.TARGETS = known
        self.sessions = contextlib.ExitStack()
        self.places = {name: self.sessions.enter_context(self._load(artifact, name))
                       for name in names}  # fmt: skip

    def _load(self, artifact: Any, name: str) -> Any:
        device = InterpretedDevice() if name == INTERPRETED.name else "cpu"
        return dilu.load(artifact, target=name, device=device, threads=1)

    def __enter__(self) -> Compiled:
        return self

    def __exit__(self, *_: object) -> None:
        self.sessions.close()

    def outcomes(self, inputs: Tensors) -> Iterator[tuple[str, list[np.ndarray]]]:
        """Yield where the functions ran, and the storage of their results."""
        main = self.graph.function("main")
        arrays = [storage(t) for t in inputs]
        values = [decode(p.type.dtype, a) for p, a in zip(main.parameters, arrays, strict=True)]
        got = interpret(main, (*values, *constant_values(self.graph, main)))
        pairs = zip(main.results, got, strict=True)
        yield "the reference", [to_storage(r.type.dtype, a) for r, a in pairs]
        for name, session in self.places.items():
            made = session(*arrays)
            yield name, [np.asarray(a) for a in (made if isinstance(made, tuple) else (made,))]

    def check(
        self, inputs: Tensors, tolerance: float = 0.0, oracles: Functions | None = None
    ) -> None:
        """Assert that all functions give what torch gives (or `oracles` say), everywhere.

        NaN is where torch's is, infinities are equal, other floats within `tolerance` (relative,
        or absolute below 1), or equal where it is 0; zeros of both signs are equal.
        """
        with torch.no_grad():
            want = {
                n: tensors(f(*inputs)) for n, f in {**self.functions, **(oracles or {})}.items()
            }
        faults: list[str] = []
        for place, results in self.outcomes(inputs):
            left = iter(results)
            for name, each in want.items():
                for number, t in enumerate(each):
                    dtype = TORCH_DTYPES[t.dtype]
                    fault = difference(dtype, next(left), storage(t), tolerance)
                    if fault:
                        faults.append(f"{name}[{number}] on {place}: {fault}")
        assert not faults, "\n".join(faults)


def compare(
    functions: Functions,
    inputs: Tensors,
    tolerance: float = 0.0,
    *,
    oracles: Functions | None = None,
    **options: bool,
) -> None:
    """Compile and check: see `Compiled`."""
    with Compiled(functions, inputs, **options) as compiled:
        compiled.check(inputs, tolerance, oracles)


def difference(t: DType, got: np.ndarray, want: np.ndarray, tolerance: float) -> str:
    """Return how two arrays of storage differ, or nothing."""
    if got.shape != want.shape or got.dtype != want.dtype:
        return f"{got.dtype}{got.shape} is not {want.dtype}{want.shape}"
    g, w = decode(t, got), decode(t, want)
    if not t.is_float:
        bad = g != w
    else:
        with np.errstate(all="ignore"):
            near = np.abs(g - w) <= tolerance * np.maximum(np.abs(w), 1)
            bad = ~((g == w) | (near & np.isfinite(w)) | (np.isnan(g) & np.isnan(w)))
    at = np.argwhere(bad)[:6]
    if not len(at):
        return ""
    pairs = ", ".join(f"{tuple(map(int, i))}: {g[tuple(i)]} not {w[tuple(i)]}" for i in at)
    return f"{int(bad.sum())} of {bad.size}: {pairs}"
