"""Single kernels of dilu on torch's tensors: compiled from IR text, run and timed on a device.

A kernel is timed with cold caches: it runs over as many copies of its weights as exceed them, all
launches captured into one graph, so that neither the host nor the caches take part.
"""

from __future__ import annotations

import math
import statistics
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any, Protocol

import torch

from dilu.codegen.generate import generate
from dilu.codegen.target import Target
from dilu.errors import DiluError
from dilu.ir.text import parse_graph
from dilu.runtime.artifact.artifact import Artifact
from dilu.runtime.gpu.bind import Addresses, arena_bytes, bind
from dilu.runtime.gpu.choose import fit
from dilu.runtime.gpu.device import Device
from dilu.runtime.gpu.executor import Executor
from dilu.runtime.gpu.program import read_program
from dilu.runtime.progress import Progress, silent

BLOCK = 128


def blocks(size: int) -> int:
    return -(-size // BLOCK)


def product_text(name: str, N: int, K: int, dtype: str = "bf16") -> str:
    """Return a product with e4m3 weights [N, K]: `dtype`[T, K] → `dtype`[T, N]."""
    body = f"""
      %a: f32[T,{K}] = cast(%x) {{dtype=f32}}
      %d: f32[{N},{K}] = decode(%w) {{format=f8e4m3, dtype=f32}}
      %f: f32[{N},{K}] = dequantize(%d, %s) {{block=[{BLOCK},{BLOCK}], dtype=f32}}
      %p: f32[T,{N}] = matmul(%a, %f) {{transpose_b=true}}
      %y: {dtype}[T,{N}] = cast(%p) {{dtype={dtype}}}
    """
    weights = f"%w: u8[{N},{K}], %s: f32[{blocks(N)},{blocks(K)}]"
    return _function(name, f"%x: {dtype}[T,{K}]", weights, body, f"{dtype}[T,{N}]", "matmul")


def experts_text(name: str, E: int, H: int, I: int, top: int, dtype: str = "bf16") -> str:
    """Return a block of experts: gate and up u8[E, 2, I, H], down u8[E, H, I], SiLU between."""
    body = f"""
      %gd: f32[{E},2,{I},{H}] = decode(%gu) {{format=f8e4m3, dtype=f32}}
      %gw: f32[{E},2,{I},{H}] = dequantize(%gd, %gs) {{block=[{BLOCK},{BLOCK}], dtype=f32}}
      %dd: f32[{E},{H},{I}] = decode(%dn) {{format=f8e4m3, dtype=f32}}
      %dw: f32[{E},{H},{I}] = dequantize(%dd, %ds) {{block=[{BLOCK},{BLOCK}], dtype=f32}}
      %a: f32[T,{H}] = cast(%x) {{dtype=f32}}
      %e: f32[T,{H}] = experts(%a, %indices, %weights, %gw, %dw) {{activation="silu"}}
      %y: {dtype}[T,{H}] = cast(%e) {{dtype={dtype}}}
    """
    parameters = f"%x: {dtype}[T,{H}], %indices: i64[T,{top}], %weights: f32[T,{top}]"
    weights = (
        f"%gu: u8[{E},2,{I},{H}], %gs: f32[{E},2,{blocks(I)},{blocks(H)}],"
        f" %dn: u8[{E},{H},{I}], %ds: f32[{E},{blocks(H)},{blocks(I)}]"
    )
    return _function(name, parameters, weights, body, f"{dtype}[T,{H}]", "experts")


def _function(name: str, parameters: str, weights: str, body: str, result: str, kind: str) -> str:
    inputs = f"{parameters}, {weights}"
    names = ", ".join(part.split(":")[0] for part in inputs.split(", "))
    return (
        f"func @{name}({parameters}) const({weights}) {{\n"
        f'  %out: {result} = kernel({names}) {{kind="{kind}", body=func @{name}_kernel({inputs}) {{'
        f"\n{body}  return %y\n}}}}\n  return %out\n}}\n"
    )


class Kernels:
    """The functions of IR texts, compiled for a target and loaded on a device."""

    def __init__(
        self, texts: Sequence[str], target: Target, device: Device, progress: Progress = silent
    ) -> None:
        graph = parse_graph("graph planned\n" + "\n".join(texts))
        module = generate(graph, target, progress=progress)
        assert target.gpu is not None
        folder = module.functions[0]
        described = {
            "program": f"{folder}/program.json",
            "source": f"{folder}/module.py",
            "backend": target.gpu.backend,
            "arch": target.gpu.arch,
        }
        files = {"module.py": module.source.encode(), **module.files}
        manifest = {"name": "kernels", "targets": {target.name: described}}
        self.artifact = Artifact(manifest, {f"{folder}/{n}": data for n, data in files.items()})
        self.functions = list(module.functions)
        self.symbols = module.symbols
        self.device = device
        fits = fit(described, device.info)
        if fits is None:
            raise DiluError(f"{target.name} does not run on {device.info.text}")
        program = read_program(self.artifact, target.name)
        self.executor = Executor(device, self.artifact, target.name, program, text=fits.text)
        with device.active():
            self.executor.load({}, nan=False)

    def variants(self, name: str, rows: int) -> list[dict[str, int]]:
        """Return choices of variants to try of a function's kernels: the default first, then each
        other one of the kernels that run at so many rows."""
        found: list[dict[str, int]] = [{}]
        launches = self._bound(name, rows, Addresses((0,) * 9, (), (0,) * 9, (0,) * 9, 0))
        for index in dict.fromkeys(launch.launch.run for launch in launches):
            kernel = self.executor.program.kernels[index]
            default = self.executor.choice(kernel, {})
            fitting = kernel.candidates(nan=False, shared=self.device.info.shared)
            found += [{kernel.name: number} for number in fitting if number != default]
        return found

    def choose(self, variants: dict[str, int]) -> None:
        with self.device.active():
            self.executor.load(variants, nan=False)

    def prepared(
        self, name: str, parameters: Sequence[Any], constants: Sequence[Any], results: Sequence[Any]
    ) -> tuple[list[Any], torch.Tensor]:
        """Return the launches of a call on tensors, and its working memory, which must be kept."""
        rows = int(parameters[0].shape[0])
        sizes = dict.fromkeys(self.symbols[self.functions.index(name)], rows)
        entry = self.functions.index(name)
        arena = torch.empty(
            arena_bytes(self.executor.program, entry, sizes) + 512,
            dtype=torch.uint8, device=parameters[0].device,
        )  # fmt: skip
        at = [tuple(t.data_ptr() for t in part) for part in (parameters, constants, results)]
        base = -(-arena.data_ptr() // 256) * 256
        bound = self._bound(name, rows, Addresses(at[0], (), at[1], at[2], base))
        with self.device.active():
            return [self.executor.prepare(launch) for launch in bound], arena

    def run(self, launches: Sequence[Any]) -> None:
        with self.device.active():
            for launch in launches:
                self.device.launch(launch)
            self.device.synchronize()

    def _bound(self, name: str, rows: int, addresses: Addresses) -> list[Any]:
        entry = self.functions.index(name)
        sizes = dict.fromkeys(self.symbols[entry], rows)
        executor = self.executor
        return bind(executor.program, entry, sizes, executor.chosen, addresses)


# --------------------------------------------------------------------------------- time


class Timed(Protocol):
    """Something that is timed: `seconds()` runs it once over all copies."""

    def seconds(self) -> float: ...


class OurCalls:
    """Launches of ours, captured into one graph where the device can: `count` calls of a kernel."""

    def __init__(self, device: Device, launches: Sequence[Any], count: int, keep: Any) -> None:
        self.device, self.launches, self.keep, self.count = device, launches, keep, count
        self.graph: Any = None
        with device.active():
            for launch in launches:  # lets the driver load what it loads late
                device.launch(launch)
            device.synchronize()
            if device.can_capture:
                device.begin_capture()
                for launch in launches:
                    device.launch(launch)
                self.graph = device.end_capture()
                self.start, self.end = device.event(), device.event()

    def seconds(self) -> float:
        device = self.device
        with device.active():
            if self.graph is None:
                start = time.perf_counter()
                for launch in self.launches:
                    device.launch(launch)
                device.synchronize()
                return (time.perf_counter() - start) / self.count
            device.record(self.start)
            device.launch_graph(self.graph)
            device.record(self.end)
            device.wait(self.end)
            return device.elapsed(self.start, self.end) * 1e-3 / self.count

    def close(self) -> None:
        with self.device.active():
            if self.graph is not None:
                self.device.free_graph(self.graph)
                self.device.free_event(self.start)
                self.device.free_event(self.end)


class TorchCalls:
    """Calls of torch, captured into one graph on a GPU: `call(copy)` for each copy."""

    def __init__(self, call: Callable[[int], Any], count: int) -> None:
        self.count, self.call = count, call
        self.graph = None
        if not torch.cuda.is_available():
            return
        side = torch.cuda.Stream()
        side.wait_stream(torch.cuda.current_stream())
        with torch.cuda.stream(side):  # loads kernels and libraries, which no graph can
            call(0)
        torch.cuda.current_stream().wait_stream(side)
        self.graph = torch.cuda.CUDAGraph()
        with torch.cuda.graph(self.graph):
            self.kept = [call(copy) for copy in range(count)]
        self.start, self.end = (torch.cuda.Event(enable_timing=True) for _ in range(2))

    def seconds(self) -> float:
        if self.graph is None:
            start = time.perf_counter()
            for copy in range(self.count):
                self.call(copy)
            return (time.perf_counter() - start) / self.count
        self.start.record()
        self.graph.replay()
        self.end.record()
        self.end.synchronize()
        return self.start.elapsed_time(self.end) * 1e-3 / self.count

    def close(self) -> None:
        if self.graph is not None:
            self.graph.reset()


@dataclass(frozen=True)
class Times:
    median: float
    spread: float  # between the quartiles, as a share of the median


def in_turn(candidates: dict[str, Timed], rounds: int = 15, warm_up: int = 3) -> dict[str, Times]:
    """Return the seconds of every candidate; they take turns, so that a device that slows down
    slows down all of them."""
    found: dict[str, list[float]] = {name: [] for name in candidates}
    for turn in range(warm_up + rounds):
        for name, candidate in candidates.items():
            seconds = candidate.seconds()
            if turn >= warm_up:
                found[name].append(seconds)
    times = {}
    for name, values in found.items():
        low, middle, high = statistics.quantiles(values, n=4)
        times[name] = Times(middle, (high - low) / middle)
    return times


def copies(nbytes: int, flushed: int, most: int = 64) -> int:
    """Return how many copies of weights exceed any cache."""
    return max(1, min(most, math.ceil(flushed / nbytes)))
