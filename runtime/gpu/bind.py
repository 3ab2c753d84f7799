"""From a program and concrete sizes to a flat list of launches: every address and number known.

Invariants: results of a plan that runs several times alternate between the call's own buffers and
spare ones, so that the last run writes the former; every address computed here is a multiple of
`ALIGNMENT`, given ones that are (a run's share of a stacked value aside).
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import cast

from ...errors import DiluError
from ..expression import evaluate
from .device import align
from .program import CallStep, Kernel, KernelStep, Launch, Place, Plan, Program, Variant

#: The most programs of a launch in each direction, on all devices there are.
_GRID_LIMITS = ((1 << 31) - 1, 65535, 65535)
_I32 = range(-(1 << 31), 1 << 31)


@dataclass(frozen=True)
class BoundLaunch:
    """A launch of kernel number `launch.run` with addresses and numbers as arguments."""

    launch: Launch
    grid: tuple[int, int, int]
    arguments: tuple[int, ...]


@dataclass(frozen=True)
class Addresses:
    """Where everything is that a function's plan is handed."""

    parameters: tuple[int, ...]
    states: tuple[int, ...]
    constants: tuple[int, ...]
    results: tuple[int, ...]
    arena: int


def arena_bytes(program: Program, entry: int, sizes: Mapping[str, int]) -> int:
    """Return the bytes of working memory that a function needs at these sizes."""
    plan = program.plans[program.entries[entry].plan]
    return _plan_bytes(program, plan, sizes) + _scratch_bytes(program, plan, sizes)


def bind(
    program: Program,
    entry: int,
    sizes: Mapping[str, int],
    chosen: Sequence[Variant],
    addresses: Addresses,
) -> list[BoundLaunch]:
    """Return the launches of a function at these sizes, in order.

    `chosen` is the variant of every kernel. Launches whose rows are out of range or whose grid is
    empty are left out. Raises DiluError where a number is beyond what a kernel can be told.
    """
    if evaluate(program.entries[entry].work, sizes) == 0:
        return []
    plan = program.plans[program.entries[entry].plan]
    scratch = addresses.arena + _plan_bytes(program, plan, sizes)
    places = {
        "parameter": addresses.parameters,
        "state": addresses.states,
        "constant": addresses.constants,
        "result": addresses.results,
    }
    binder = _Binder(program, sizes, chosen, scratch)
    return list(binder.launches(program.entries[entry].plan, places, addresses.arena))


def grid_of(
    launch: Launch, kernel: Kernel, variant: Variant, sizes: Mapping[str, int]
) -> tuple[int, int, int]:
    """Return the grid of a launch for a variant; raise DiluError where it is beyond the limits."""
    names = {**sizes, **variant.constants}
    x, y, z = (max(evaluate(size, names), 0) for size in launch.grid)
    for number, limit in zip((x, y, z), _GRID_LIMITS, strict=True):
        if number > limit:
            raise DiluError(
                f"the kernel {kernel.name} needs a grid of {x} × {y} × {z} programs, and a device "
                f"takes {' × '.join(map(str, _GRID_LIMITS))}",
                hint="run fewer tokens at a time",
            )
    return x, y, z


def applies(launch: Launch, sizes: Mapping[str, int]) -> bool:
    """Return whether a launch is made at these sizes."""
    if launch.rows is None:
        return True
    size, low, high = launch.rows
    rows = evaluate(size, sizes)
    return low <= rows and (high is None or rows <= high)


_Places = dict[str, tuple[int, ...]]
#: An argument with its size evaluated: a place, or a number.
_Resolved = tuple[Launch, tuple[int, int, int], tuple[Place | int, ...]]


class _Binder:
    """The walk over the plans. What only depends on the sizes is computed once per plan."""

    def __init__(
        self,
        program: Program,
        sizes: Mapping[str, int],
        chosen: Sequence[Variant],
        scratch: int,
    ) -> None:
        self._program = program
        self._sizes = sizes
        self._chosen = chosen
        self._scratch = scratch
        self._steps: dict[int, list[CallStep | list[_Resolved]]] = {}

    def launches(self, plan: int, places: _Places, arena: int) -> Iterator[BoundLaunch]:
        """Yield the launches of one run of a plan."""
        slots: list[int] = []
        for size in self._program.plans[plan].slots:
            slots.append(arena)
            arena += align(self._number(size))
        places = {**places, "slot": tuple(slots)}
        for step in self._resolved(plan):
            if isinstance(step, CallStep):
                yield from self._called(step, places, arena)
                continue
            for launch, grid, arguments in step:
                values = (a if isinstance(a, int) else places[a[0]][a[1]] for a in arguments)
                yield BoundLaunch(launch, grid, tuple(values))

    def _called(self, step: CallStep, places: _Places, arena: int) -> Iterator[BoundLaunch]:
        def at(place: Place) -> int:
            return places[place[0]][place[1]]

        passed = [at(place) for place in step.parameters]
        own = [at(place) for place in step.results]
        spare: list[int] = []
        for size in step.result_sizes if step.times > 1 else ():
            spare.append(arena)
            arena += align(self._number(size))
        strides = {s: self._number(s.stride) for s in (*step.states, *step.constants)}
        for run in range(step.times):
            made = own if (step.times - 1 - run) % 2 == 0 else spare
            inner: _Places = {
                "parameter": tuple(passed),
                "result": tuple(made),
                "state": tuple(at(s.place) + run * strides[s] for s in step.states),
                "constant": tuple(at(s.place) + run * strides[s] for s in step.constants),
            }
            yield from self.launches(step.plan, inner, arena)
            passed[: len(made)] = made

    def _resolved(self, plan: int) -> list[CallStep | list[_Resolved]]:
        if plan not in self._steps:
            self._steps[plan] = [
                step if isinstance(step, CallStep) else self._resolved_step(step)
                for step in self._program.plans[plan].steps
            ]
        return self._steps[plan]

    def _resolved_step(self, step: KernelStep) -> list[_Resolved]:
        parts: list[int] = []
        at = self._scratch
        for size in step.scratch:
            parts.append(at)
            at += align(self._number(size))
        found: list[_Resolved] = []
        for launch in step.launches:
            if not applies(launch, self._sizes):
                continue
            kernel = self._program.kernels[launch.run]
            grid = grid_of(launch, kernel, self._chosen[launch.run], self._sizes)
            if all(grid):
                found.append((launch, grid, self._arguments(launch, kernel, parts)))
        return found

    def _arguments(
        self, launch: Launch, kernel: Kernel, scratch: Sequence[int]
    ) -> tuple[Place | int, ...]:
        values: list[Place | int] = []
        for argument in launch.arguments:
            if argument.place is not None:
                values.append(argument.place)
            elif argument.scratch is not None:
                values.append(scratch[argument.scratch])
            else:
                values.append(self._i32(cast("int | str", argument.size), kernel))
        return tuple(values)

    def _i32(self, size: int | str, kernel: Kernel) -> int:
        number = self._number(size)
        if number not in _I32:
            raise DiluError(
                f"the kernel {kernel.name} cannot count to {number}, which is {size} here",
                hint="run fewer tokens at a time, or with a smaller cache",
            )
        return number

    def _number(self, size: int | str) -> int:
        return evaluate(size, self._sizes)


def _plan_bytes(program: Program, plan: Plan, sizes: Mapping[str, int]) -> int:
    """Return the bytes of a plan's slots and of the largest of its calls."""
    rest = 0
    for step in plan.steps:
        if isinstance(step, CallStep):
            spares = step.result_sizes if step.times > 1 else ()
            inner = _plan_bytes(program, program.plans[step.plan], sizes)
            rest = max(rest, inner + sum(align(evaluate(s, sizes)) for s in spares))
    return sum(align(evaluate(s, sizes)) for s in plan.slots) + rest


def _scratch_bytes(program: Program, plan: Plan, sizes: Mapping[str, int]) -> int:
    """Return the bytes of the largest scratch of any step, called plans included."""
    most = 0
    for step in plan.steps:
        if isinstance(step, CallStep):
            most = max(most, _scratch_bytes(program, program.plans[step.plan], sizes))
        else:
            most = max(most, sum(align(evaluate(s, sizes)) for s in step.scratch))
    return most
