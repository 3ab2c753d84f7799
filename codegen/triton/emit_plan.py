"""Plans → what the runtime walks: kernels with their launches, calls, places, sizes as text.

Functions that differ in names alone are compiled once, and so are plans. What the compiled code may
rely on is settled here: an argument is aligned unless it is a part of a constant or state whose
parts lie at odd distances.
"""

from __future__ import annotations

import json
import re
from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any

import sympy

from ...ir.dtypes import BF16
from ...ir.types import Dim, dim, print_dim
from ..kernel_ir import CallPlan, CollectivePlan, Kernel, Place, Plan, Program, RoutedPlan
from ..kernel_ir import Launch as KernelLaunch
from ..names import kernel_name
from ..target import Gpu
from .emit_kernel import emit_kernel
from .frame import Launch, buffer_bytes

ALIGNMENT = 16  # bytes


@dataclass(frozen=True)
class Run:
    """A function to compile: a launch's, with the arguments that are aligned."""

    launch: Launch
    kernel: Kernel
    aligned: frozenset[str]

    @property
    def name(self) -> str:
        return self.launch.name


@dataclass(frozen=True)
class _Aligned:
    """Which states and constants of a plan begin at multiples of the alignment."""

    states: tuple[bool, ...]
    constants: tuple[bool, ...]

    def of(self, place: Place) -> bool:
        if place.kind == "state":
            return self.states[place.number]
        return place.kind != "constant" or self.constants[place.number]


@dataclass
class Plans:
    """The plans of a program as data, and the functions that they launch."""

    gpu: Gpu
    runs: list[Run] = field(default_factory=list)
    plans: list[dict[str, Any]] = field(default_factory=list)
    kernels: list[tuple[Kernel, str]] = field(default_factory=list)
    _runs: dict[str, int] = field(default_factory=dict)
    _plans: dict[str, int] = field(default_factory=dict)
    _names: set[str] = field(default_factory=set)

    def entries(
        self, program: Program, names: Mapping[str, str] | None = None
    ) -> list[dict[str, Any]]:
        """Add every entry's plan and return the entries; `names` are those that callers know the
        sizes of the plans by, where they differ."""
        known = names or {}
        return [
            {
                "plan": self.plan(
                    e.plan, _Aligned((True,) * e.plan.states, (True,) * e.plan.constants)
                ),
                "symbols": [known.get(s, s) for s in e.symbols],
                "sizes": list(e.symbols),
                "work": size_text(e.work),
            }
            for e in program.entries
        ]

    def plan(self, plan: Plan, aligned: _Aligned) -> int:
        """Add a plan and return its number."""
        steps = [self._step(step, aligned) for step in plan.steps]
        made = {
            "name": plan.name, "parameters": plan.parameters, "states": plan.states,
            "constants": plan.constants, "results": plan.results,
            "slots": [size_text(s) for s in plan.slots], "steps": steps,
        }  # fmt: skip
        form = json.dumps(made | {"name": ""}, sort_keys=True)
        if form not in self._plans:
            self._plans[form] = len(self.plans)
            self.plans.append(made)
        return self._plans[form]

    def _step(
        self, step: KernelLaunch | CallPlan | RoutedPlan | CollectivePlan, aligned: _Aligned
    ) -> dict[str, Any]:
        if isinstance(step, KernelLaunch):
            return self._launches(step, aligned)
        if isinstance(step, CallPlan):
            return self._call(step, aligned)
        return self._routed(step, aligned) if isinstance(step, RoutedPlan) else _collective(step)

    def _routed(self, step: RoutedPlan, aligned: _Aligned) -> dict[str, Any]:
        inner = _Aligned((), tuple(aligned.of(c) for c in step.constants))
        return {
            "routed": self.plan(step.plan, inner), "symbol": step.symbol,
            "capacity": step.capacity, "tokens": size_text(step.tokens),
            "choices": step.choices, "width": step.width, "itemsize": step.dtype.itemsize,
            "made_itemsize": step.made.itemsize, "ranks": step.ranks, "slots": step.slots,
            "x": _place(step.x), "indices": _place(step.indices),
            "placement": _place(step.placement),
            "constants": [_place(c) for c in step.constants], "result": _place(step.result),
        }  # fmt: skip

    def _call(self, step: CallPlan, aligned: _Aligned) -> dict[str, Any]:
        stacked = [step.states, step.constants]
        inner = [
            tuple(aligned.of(s.place) and _is_multiple(s.stride) for s in each) for each in stacked
        ]
        return {
            "plan": self.plan(step.plan, _Aligned(*inner)),
            "times": step.times,
            "parameters": [_place(p) for p in step.parameters],
            "states": [_stacked(s.place, s.stride) for s in step.states],
            "constants": [_stacked(s.place, s.stride) for s in step.constants],
            "results": [_place(p) for p in step.results],
            "result_sizes": [size_text(s) for s in step.result_sizes],
        }

    # -- kernels

    def _launches(self, step: KernelLaunch, aligned: _Aligned) -> dict[str, Any]:
        kernel = step.kernel
        frame = emit_kernel(kernel, self._fresh(kernel_name(kernel.name)), self.gpu)
        buffers = (*kernel.inputs, *kernel.outputs)
        places = {b.name: p for b, p in zip(buffers, step.arguments, strict=True)}
        scratch = {b.name: i for i, b in enumerate(frame.scratch)}
        launches: list[dict[str, Any]] = []
        for launch in frame.launches:
            arguments: list[dict[str, Any]] = []
            loose: set[str] = set()
            for a in launch.arguments:
                if a.buffer is None:
                    assert a.size is not None
                    arguments.append({"size": size_text(a.size)})
                elif a.buffer.name in scratch:
                    arguments.append({"scratch": scratch[a.buffer.name]})
                else:
                    place = places[a.buffer.name]
                    arguments.append({"place": _place(place)})
                    if not aligned.of(place):
                        loose.add(a.name)
            pointers = {a.name for a in launch.arguments if a.buffer is not None}
            rows = launch.rows
            launches.append({
                "run": self._run(launch, kernel, frozenset(pointers - loose)),
                "rows": [size_text(rows.size), rows.low, rows.high] if rows else None,
                "grid": list(launch.grid),
                "arguments": arguments,
            })  # fmt: skip
        self.kernels.append((kernel, self.runs[launches[-1]["run"]].name if launches else ""))
        return {
            "kernel": kernel.name, "kind": kernel.kind,
            "scratch": [size_text(buffer_bytes(b)) for b in frame.scratch], "launches": launches,
        }  # fmt: skip

    def _fresh(self, name: str) -> str:
        unique, count = name, 1
        while unique in self._names:
            unique, count = f"{name}_{count}", count + 1
        self._names.add(unique)
        return unique

    def _run(self, launch: Launch, kernel: Kernel, aligned: frozenset[str]) -> int:
        """Add a function, unless one that differs in names alone is there; return its number."""
        form = re.sub(rf"\b{launch.name}\b", "@", launch.text)
        for i, a in enumerate(launch.arguments):
            form = re.sub(rf"(?<!\.)\b{a.name}\b", f"#{i}", form)  # and no `tl.exp` for `exp`
        loose = [i for i, a in enumerate(launch.arguments) if a.name not in aligned]
        types = [a.type for a in launch.arguments]
        key = json.dumps([form, types, loose, [v.label for v in launch.variants]])
        if key not in self._runs:
            self._runs[key] = len(self.runs)
            self.runs.append(Run(launch, kernel, aligned))
        return self._runs[key]


def _collective(step: CollectivePlan) -> dict[str, Any]:
    return {
        "gather": step.kind == "all_gather", "axis": step.axis, "itemsize": step.dtype.itemsize,
        "bfloat": step.dtype == BF16, "rows": size_text(step.rows),
        "width": size_text(step.width), "x": _place(step.x), "result": _place(step.result),
    }  # fmt: skip


def size_text(size: Dim) -> int | str:
    """Return a size as a program has it: a number or an expression of symbols."""
    return size if isinstance(size, int) else print_dim(size)


def _place(place: Place) -> list[Any]:
    return [place.kind, place.number]


def _stacked(place: Place, stride: Dim) -> dict[str, Any]:
    return {"place": _place(place), "stride": size_text(stride)}


def _is_multiple(stride: Dim) -> bool:
    terms: tuple[Any, ...] = sympy.Add.make_args(sympy.sympify(dim(stride)))
    return all(term.as_coeff_Mul()[0] % ALIGNMENT == 0 for term in terms)
