"""From a program and concrete sizes to a flat list of what is to be done, every address and number
known: launches, and where ranks meet.

Invariants: results of a plan that runs several times alternate between the call's own buffers and
spare ones, so that the last run writes the former; every address computed here is a multiple of
`ALIGNMENT`, given ones that are (a run's share of a stacked value aside).
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import cast

from ...errors import DiluError
from ..artifact.expression import evaluate
from .device import align
from .program import (
    CallStep,
    CollectiveStep,
    Kernel,
    KernelStep,
    Launch,
    Place,
    Plan,
    Program,
    RoutedStep,
    Variant,
)

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
class BoundCollective:
    """What ranks do with numbers at `x`; what comes of it goes to `result`."""

    step: CollectiveStep
    x: int
    result: int


@dataclass(frozen=True)
class BoundRouted:
    """Where rows for experts come from and go to.

    `rows`, `slots` and `made` have room for `step.capacity` rows that came from all ranks, and for
    what `body(n)` makes of the first n of them.
    """

    step: RoutedStep
    x: int
    indices: int
    placement: int
    result: int
    rows: int
    slots: int
    made: int
    body: Callable[[int], list[BoundStep]]


BoundStep = BoundLaunch | BoundCollective | BoundRouted


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
    sizes = program.entries[entry].own(sizes)
    return _plan_bytes(program, plan, sizes) + _scratch_bytes(program, plan, sizes)


def bind(
    program: Program,
    entry: int,
    sizes: Mapping[str, int],
    chosen: Sequence[Variant],
    addresses: Addresses,
) -> list[BoundStep]:
    """Return what a function does at these sizes, in order.

    `chosen` is the variant of every kernel. Launches whose rows are out of range or whose grid is
    empty are left out. Raises DiluError where a number is beyond what a kernel can be told.
    """
    sizes = program.entries[entry].own(sizes)
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
    return list(binder.bound(program.entries[entry].plan, places, addresses.arena))


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
_Step = CallStep | CollectiveStep | RoutedStep | list[_Resolved]


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
        self._steps: dict[int, list[_Step]] = {}

    def bound(self, plan: int, places: _Places, arena: int) -> Iterator[BoundStep]:
        """Yield what one run of a plan does."""
        slots: list[int] = []
        for size in self._program.plans[plan].slots:
            slots.append(arena)
            arena += align(self._number(size))
        places = {**places, "slot": tuple(slots)}
        for step in self._resolved(plan):
            if isinstance(step, CallStep):
                yield from self._called(step, places, arena)
            elif isinstance(step, CollectiveStep):
                x, result = (places[kind][number] for kind, number in (step.x, step.result))
                yield BoundCollective(step, x, result)
            elif isinstance(step, RoutedStep):
                yield self._routed(step, places, arena)
            else:
                for launch, grid, arguments in step:
                    values = (a if isinstance(a, int) else places[a[0]][a[1]] for a in arguments)
                    yield BoundLaunch(launch, grid, tuple(values))

    def _routed(self, step: RoutedStep, places: _Places, arena: int) -> BoundRouted:
        def at(place: Place) -> int:
            return places[place[0]][place[1]]

        own: list[int] = []
        for nbytes in _row_bytes(step):
            own.append(arena)
            arena += nbytes
        rows, slots, made = own
        inner: _Places = {
            "parameter": (rows, slots),
            "result": (made,),
            "constant": tuple(at(c) for c in step.constants),
        }

        def body(count: int) -> list[BoundStep]:
            sizes = {**self._sizes, step.symbol: count}
            binder = _Binder(self._program, sizes, self._chosen, self._scratch)
            return list(binder.bound(step.routed, inner, arena))

        return BoundRouted(
            step, at(step.x), at(step.indices), at(step.placement), at(step.result),
            rows, slots, made, body,
        )  # fmt: skip

    def _called(self, step: CallStep, places: _Places, arena: int) -> Iterator[BoundStep]:
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
            yield from self.bound(step.plan, inner, arena)
            passed[: len(made)] = made

    def _resolved(self, plan: int) -> list[_Step]:
        if plan not in self._steps:
            self._steps[plan] = [
                self._resolved_step(step) if isinstance(step, KernelStep) else step
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
        elif isinstance(step, RoutedStep):
            inner = _plan_bytes(program, program.plans[step.routed], _most(step, sizes))
            rest = max(rest, inner + sum(_row_bytes(step)))
    return sum(align(evaluate(s, sizes)) for s in plan.slots) + rest


def _scratch_bytes(program: Program, plan: Plan, sizes: Mapping[str, int]) -> int:
    """Return the bytes of the largest scratch of any step, called plans included."""
    most = 0
    for step in plan.steps:
        if isinstance(step, CallStep):
            most = max(most, _scratch_bytes(program, program.plans[step.plan], sizes))
        elif isinstance(step, RoutedStep):
            inner = program.plans[step.routed]
            most = max(most, _scratch_bytes(program, inner, _most(step, sizes)))
        elif isinstance(step, KernelStep):
            most = max(most, sum(align(evaluate(s, sizes)) for s in step.scratch))
    return most


def _row_bytes(step: RoutedStep) -> tuple[int, int, int]:
    """Return the bytes for rows that come, for their slots, and for what becomes of them."""
    count = step.capacity * step.width
    made = align(count * step.made_itemsize)
    return align(count * step.itemsize), align(8 * step.capacity), made


def _most(step: RoutedStep, sizes: Mapping[str, int]) -> dict[str, int]:
    """Return the sizes of a routed plan's largest run."""
    return {**sizes, step.symbol: step.capacity}
