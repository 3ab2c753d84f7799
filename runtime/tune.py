"""Measuring the variants of kernels on a device, with the arguments of real calls.

A call is walked through launch by launch, so that each kernel is measured on what it really reads;
variants take turns, and each measured launch finds cold caches, as in a run over many layers.

Invariant: variants that differ in what they compute (NaN codes decoded or not) never compete.
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field, replace
from math import exp, log
from pathlib import Path
from statistics import median
from typing import Any

import numpy as np

from ..errors import DiluError
from .artifact.expression import evaluate, evaluate_shape
from .artifact.storage import storage
from .call.batch import pages_for
from .gpu.array import Memory
from .gpu.bind import Addresses, BoundLaunch, BoundRouted, BoundStep, bind, grid_of
from .gpu.engine import GpuEngine
from .gpu.program import Kernel
from .gpu.tuning import require_file, write_tuning
from .progress import Progress, silent
from .session import Session
from .text.sequences import Sequence as Tokens
from .text.sequences import Step, batch
from .text_table import table

#: Tokens of the batches that a language model's kernels are measured on, the largest first: it
#: fills the cache for the others.
TOKENS = (512, 64, 16, 4, 1)
#: The size of every symbol, for other models.
_ROWS = (64, 1)
_WARM_UP, _ROUNDS = 2, 9
_FLUSHED = 128 << 20  # more than any device's caches


@dataclass
class Timing:
    """The milliseconds of each variant of a kernel, at each size that was measured."""

    kernel: Kernel
    default: int
    times: list[dict[int, float]] = field(default_factory=list)

    @property
    def best(self) -> int:
        """The variant with the best mean speed-up; the default where none is faster."""
        return min(self.times[0], key=lambda v: (-self.speed_up(v), v != self.default, v))

    def speed_up(self, variant: int) -> float:
        """Return how many times faster than the default a variant is (geometric mean)."""
        ratios = [log(at[self.default] / at[variant]) for at in self.times]
        return exp(sum(ratios) / len(ratios))


def tune(session: Session, *, progress: Progress = silent) -> tuple[list[Timing], Path]:
    """Measure the variants of every kernel and keep the fastest beside the artifact.

    Returns what was measured and the file; it counts from the next loading on. The states of the
    session are made anew, so it is good for nothing else afterwards.
    """
    engine = session.engine
    if not isinstance(engine, GpuEngine):
        raise DiluError(
            f"{session.target} has nothing to tune: it runs on the CPU",
            hint="tune an artifact with a GPU target, on the device itself",
        )
    executor, info = engine.executor, engine.device.info
    require_file(session.artifact, info)  # before all the work
    with session.lock, engine.guarded("tuning"):
        found = _Tuner(engine, progress).tuned(_calls(session))
    chosen = {name: timing.best for name, timing in found.items()}
    file = write_tuning(session.artifact, session.target, info, chosen, nan=executor.nan)
    return list(found.values()), file


def describe_tuning(timings: Sequence[Timing]) -> str:
    """Return a table of what was measured."""
    if not timings:
        return "no kernel has several variants to choose from"
    rows: list[Sequence[str]] = [("kernel", "default", "chosen", "speed-up")]
    for timing in timings:
        names = [_variant_name(timing.kernel, index) for index in (timing.default, timing.best)]
        rows.append((timing.kernel.name, *names, f"{timing.speed_up(timing.best):.2f}×"))
    return table("variants of kernels", rows)


def _variant_name(kernel: Kernel, index: int) -> str:
    """Return what tells a variant apart: its constants."""
    constants = kernel.variants[index].constants
    return " ".join(f"{name}={number}" for name, number in constants.items()) or str(index)


#: A call to measure: the function's number, its sizes and its addresses.
_Measured = tuple[int, Mapping[str, int], Addresses]


def _calls(session: Session) -> Iterator[_Measured]:
    """Yield the calls whose kernels are measured, each ready to run."""
    engine = session.engine
    assert isinstance(engine, GpuEngine)
    model = session.artifact.manifest["language_model"]
    for index, function in enumerate(session.functions.values()):
        if function.is_batch and model is not None:
            yield from _batches(engine, index, function, model)
            continue
        for rows in _ROWS:
            sizes = dict.fromkeys(sorted(function.all_symbols), rows)
            arrays = [_zeros(entry, sizes) for entry in function.parameters]
            function.allocate(sizes)
            yield index, *engine.prepared(index, *function.prepare(arrays)[:3])[:2]


def _batches(
    engine: GpuEngine, index: int, function: Any, model: Mapping[str, Any]
) -> Iterator[_Measured]:
    page_size, longest = model["page_size"], min(TOKENS[0], model["max_positions"])
    random = np.random.default_rng(0)
    tokens = random.integers(0, model["vocab_size"], longest).tolist()
    pages = pages_for(longest, page_size)
    function.allocate(dict.fromkeys(function.state_symbols, pages))
    for count in dict.fromkeys(min(count, longest) for count in TOKENS):
        sequence = Tokens(tokens, list(range(pages)), longest - count)
        arrays = batch([Step(sequence, longest, (longest - 1,))], page_size)
        yield index, *engine.prepared(index, *function.prepare(arrays)[:3])[:2]


def _zeros(entry: Mapping[str, Any], sizes: Mapping[str, int]) -> np.ndarray:
    return np.zeros(evaluate_shape(entry["shape"], sizes), storage(entry["dtype"]))


class _Tuner:
    """Times launches on an engine's device."""

    def __init__(self, engine: GpuEngine, progress: Progress) -> None:
        self._executor = engine.executor
        self._device = engine.device
        self._progress = progress
        self._timings: dict[str, Timing] = {}

    def tuned(self, calls: Iterator[_Measured]) -> dict[str, Timing]:
        flushed = Memory(self._device, _FLUSHED)
        events = [self._device.event() for _ in range(2)]
        try:
            for call in calls:
                self._measure(call, flushed, events)
        finally:
            for event in events:
                self._device.free_event(event)
            flushed.free()
        return self._timings

    def _measure(self, call: _Measured, flushed: Memory, events: Sequence[Any]) -> None:
        """Run a call launch by launch; measure each kernel that has several variants once."""
        entry, sizes, addresses = call
        executor = self._executor
        bound = bind(executor.program, entry, sizes, executor.chosen, addresses)
        symbols = executor.program.entries[entry].symbols
        text = ", ".join(f"{name}={sizes[name]}" for name in symbols)
        done: set[int] = set()
        own = executor.program.entries[entry].own(sizes)
        launches = list(self._launches(bound, own))
        for number, (launch, known) in enumerate(launches):
            self._progress(f"measure kernels at {text}", number, len(launches))
            if launch.launch.run not in done:
                done.add(launch.launch.run)
                self._compare(launch, known, flushed, events)
            self._device.launch(executor.prepare(launch))
        self._device.synchronize()

    def _launches(
        self, bound: Iterable[BoundStep], sizes: Mapping[str, int]
    ) -> Iterator[tuple[BoundLaunch, Mapping[str, int]]]:
        """Yield the launches of a call and their sizes; for experts of many ranks, as if rows had
        come to each of those here alike."""
        for step in bound:
            if isinstance(step, BoundLaunch):
                yield step, sizes
            elif isinstance(step, BoundRouted):
                own = step.step
                rows = min(max(evaluate(own.tokens, sizes) * own.choices, 1), own.capacity)
                self._device.upload(step.slots, np.arange(rows) % own.slots)
                self._device.synchronize()
                yield from self._launches(step.body(rows), {**sizes, own.symbol: rows})

    def _compare(
        self, bound: BoundLaunch, sizes: Mapping[str, int], flushed: Memory, events: Sequence[Any]
    ) -> None:
        """Add the times of a kernel's variants at these sizes."""
        executor = self._executor
        kernel = executor.program.kernels[bound.launch.run]
        shared = self._device.info.shared
        candidates = kernel.candidates(nan=executor.nan, shared=shared)
        if len(candidates) < 2:
            return
        launches = {index: self._prepared(kernel, bound, index, sizes) for index in candidates}
        times: dict[int, list[float]] = {index: [] for index in candidates}
        for turn in range(_WARM_UP + _ROUNDS):
            for index, launch in launches.items():
                spent = self._timed(launch, flushed, events)
                if turn >= _WARM_UP:
                    times[index].append(spent)
        default = executor.choice(kernel, {})
        timing = self._timings.setdefault(kernel.name, Timing(kernel, default))
        timing.times.append({index: median(spent) for index, spent in times.items()})

    def _prepared(
        self, kernel: Kernel, bound: BoundLaunch, index: int, sizes: Mapping[str, int]
    ) -> Any:
        variant = kernel.variants[index]
        grid = grid_of(bound.launch, kernel, variant, sizes)
        return self._executor.prepare(replace(bound, grid=grid), variant)

    def _timed(self, launch: Any, flushed: Memory, events: Sequence[Any]) -> float:
        """Return the milliseconds of a launch that finds nothing in the caches."""
        start, end = events
        self._device.zero(flushed.address, flushed.nbytes)
        self._device.record(start)
        self._device.launch(launch)
        self._device.record(end)
        self._device.wait(end)
        return max(self._device.elapsed(start, end), 1e-6)
