"""The program of a GPU target: program.json as objects.

Sizes are numbers or text in the grammar of `expression.py`.
Invariant: what is read here was checked against its hash when the artifact was opened, so a
program that makes no sense is a bug or of another version, and is refused whole.
"""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

from ...errors import DiluError
from ..artifact.artifact import Artifact
from ..artifact.expression import Size
from .device import KernelCode

#: Where an argument is: its kind (parameter, state, constant, result, slot) and number.
Place = tuple[str, int]


@dataclass(frozen=True)
class Variant:
    """Machine code of a kernel for one choice of its `constants`. `nan`: it decodes NaN codes of
    f8e4m3 exactly, where the others take them for ±480."""

    constants: dict[str, int]
    file: str
    text: str | None
    symbol: str
    threads: int
    shared: int
    scratch_pointers: int
    registers: int | None = None
    spills: int | None = None
    instructions: dict[str, int] = field(default_factory=dict)
    nan: bool = False


@dataclass(frozen=True)
class Kernel:
    """A kernel with its variants; `default` is the one used without tuning."""

    name: str
    kernel: str
    kind: str
    arguments: tuple[str, ...]
    variants: tuple[Variant, ...]
    default: int

    def candidates(self, *, nan: bool, shared: int | None = None) -> list[int]:
        """Return the variants that may be used: those for NaN codes, where `nan` and there are
        any, else the others; none that needs more than `shared` bytes of shared memory."""
        wanted = nan and any(v.nan for v in self.variants)
        return [
            index
            for index, variant in enumerate(self.variants)
            if variant.nan == wanted and (shared is None or variant.shared <= shared)
        ]


@dataclass(frozen=True)
class Argument:
    """An argument of a launch: a place, a part of the step's scratch, or a size (i32)."""

    place: Place | None = None
    scratch: int | None = None
    size: Size | None = None


@dataclass(frozen=True)
class Launch:
    """A launch of a kernel; `rows` (size, low, high) says when it is made, None always."""

    run: int
    rows: tuple[Size, int, int | None] | None
    grid: tuple[Size, Size, Size]
    arguments: tuple[Argument, ...]


@dataclass(frozen=True)
class KernelStep:
    """Run a kernel of the graph, which may take several launches, and working memory between them:
    `scratch` are the bytes of its parts."""

    kernel: str
    kind: str
    scratch: tuple[Size, ...]
    launches: tuple[Launch, ...]


@dataclass(frozen=True)
class Stacked:
    """Where run r of a call reads: `place`, r times `stride` bytes further."""

    place: Place
    stride: Size


@dataclass(frozen=True)
class CallStep:
    """`times` runs of a plan; from the second on, its first parameters are the results before."""

    plan: int
    times: int
    parameters: tuple[Place, ...]
    states: tuple[Stacked, ...]
    constants: tuple[Stacked, ...]
    results: tuple[Place, ...]
    result_sizes: tuple[Size, ...]


@dataclass(frozen=True)
class CollectiveStep:
    """What ranks along `axis` do with `x[rows, width]`: `dilu_collective` of the C interface."""

    gather: bool
    axis: str
    itemsize: int
    bfloat: bool
    rows: Size
    width: Size
    x: Place
    result: Place


@dataclass(frozen=True)
class RoutedStep:
    """Runs of a plan, `routed`, on rows that come from all ranks, `symbol` of them, at most
    `capacity` at a time: `dilu_routed` of the C interface."""

    routed: int
    symbol: str
    capacity: int
    tokens: Size
    choices: int
    width: int
    itemsize: int
    made_itemsize: int
    ranks: int
    slots: int
    x: Place
    indices: Place
    placement: Place
    constants: tuple[Place, ...]
    result: Place


Step = KernelStep | CallStep | CollectiveStep | RoutedStep


@dataclass(frozen=True)
class Plan:
    """What running a function, or a body, means: `slots` of working memory in bytes, and steps."""

    name: str
    slots: tuple[Size, ...]
    steps: tuple[Step, ...]


@dataclass(frozen=True)
class Entry:
    """The plan of one of the artifact's functions; nothing is done where `work` is 0.

    `sizes` are what plans call the `symbols` of the function.
    """

    plan: int
    symbols: tuple[str, ...]
    work: Size
    sizes: tuple[str, ...]

    def own(self, sizes: Mapping[str, int]) -> dict[str, int]:
        """Return the sizes of symbols by the names that they have in plans."""
        names = zip(self.symbols, self.sizes, strict=True)
        return {own: sizes[symbol] for symbol, own in names if symbol in sizes}


@dataclass(frozen=True)
class Program:
    """The kernels of a target, and the plans that launch them; entries are the functions."""

    kernels: tuple[Kernel, ...]
    plans: tuple[Plan, ...]
    entries: tuple[Entry, ...]


def read_program(artifact: Artifact, target: str) -> Program:
    """Return the program of one of the artifact's GPU targets."""
    name = artifact.gpu_target(target)["program"]
    try:
        return parse_program(json.loads(artifact.read(name)))
    except (KeyError, TypeError, ValueError, IndexError) as error:
        raise DiluError(
            f"the program {name} of {artifact.name} cannot be read: {error!r}",
            hint="compile the model again",
        ) from error


def parse_program(data: dict[str, Any]) -> Program:
    """Return the program that plain data describes; raise KeyError or the like where it is none."""
    return Program(
        tuple(_kernel(k) for k in data["kernels"]),
        tuple(_plan(p) for p in data["plans"]),
        tuple(map(_entry, data["entries"])),
    )


def kernel_code(artifact: Artifact, target: str, kernel: Kernel, variant: Variant) -> KernelCode:
    """Return a variant as it is given to a device."""
    return KernelCode(
        name=kernel.name,
        kind=kernel.kind,
        symbol=variant.symbol,
        arguments=kernel.arguments,
        threads=variant.threads,
        shared=variant.shared,
        scratch=variant.scratch_pointers,
        constants=variant.constants,
        source=artifact.targets[target].get("source", ""),
        binary=_beside(artifact, target, variant.file),
        text=_beside(artifact, target, variant.text) if variant.text else None,
        read=artifact.read,
    )


def _beside(artifact: Artifact, target: str, file: str) -> str:
    """Return a file's path in the artifact: the program names those in its own folder."""
    return f"{artifact.gpu_target(target)['program'].rpartition('/')[0]}/{file}"


def _kernel(data: dict[str, Any]) -> Kernel:
    known = Variant.__dataclass_fields__
    variants = tuple(Variant(**{k: v[k] for k in v if k in known}) for v in data["variants"])
    variants[data["default"]]  # raises where there is none
    return Kernel(
        data["name"], data["kernel"], data["kind"], tuple(data["arguments"]), variants,
        data["default"],
    )  # fmt: skip


def _entry(data: dict[str, Any]) -> Entry:
    symbols = tuple(data["symbols"])
    return Entry(data["plan"], symbols, data["work"], tuple(data.get("sizes", symbols)))


def _plan(data: dict[str, Any]) -> Plan:
    return Plan(data["name"], tuple(data["slots"]), tuple(map(_step, data["steps"])))


def _step(data: dict[str, Any]) -> Step:
    if "plan" in data:
        return _call(data)
    if "routed" in data:
        return _routed(data)
    return _collective(data) if "gather" in data else _kernel_step(data)


def _kernel_step(data: dict[str, Any]) -> KernelStep:
    launches = tuple(_launch(launch) for launch in data["launches"])
    return KernelStep(data["kernel"], data["kind"], tuple(data["scratch"]), launches)


def _launch(data: dict[str, Any]) -> Launch:
    x, y, z = data["grid"]
    rows = data["rows"]
    arguments = tuple(
        Argument(_place(a["place"]) if "place" in a else None, a.get("scratch"), a.get("size"))
        for a in data["arguments"]
    )
    return Launch(data["run"], tuple(rows) if rows else None, (x, y, z), arguments)


def _call(data: dict[str, Any]) -> CallStep:
    return CallStep(
        data["plan"],
        data["times"],
        tuple(_place(p) for p in data["parameters"]),
        _stacked(data["states"]),
        _stacked(data["constants"]),
        tuple(_place(p) for p in data["results"]),
        tuple(data["result_sizes"]),
    )


def _routed(data: dict[str, Any]) -> RoutedStep:
    known: dict[str, Any] = {n: data[n] for n in RoutedStep.__dataclass_fields__}
    known |= {name: _place(data[name]) for name in ("x", "indices", "placement", "result")}
    known["constants"] = tuple(_place(p) for p in data["constants"])
    return RoutedStep(**known)


def _collective(data: dict[str, Any]) -> CollectiveStep:
    known: dict[str, Any] = {n: data[n] for n in CollectiveStep.__dataclass_fields__}
    known |= {name: _place(data[name]) for name in ("x", "result")}
    return CollectiveStep(**known)


def _stacked(data: Sequence[dict[str, Any]]) -> tuple[Stacked, ...]:
    return tuple(Stacked(_place(s["place"]), s["stride"]) for s in data)


def _place(data: Sequence[Any]) -> Place:
    kind, number = data
    return kind, number
