"""Running a program on a device: launches one by one, or replayed as captured graphs.

The first call of a kind (function, sizes, addresses) launches kernel by kernel, which also lets a
driver load what it loads late; from the second on, what lies between two meetings of ranks is one
graph, and without such all of it. The kinds used least recently are forgotten.

Invariants: a graph is only ever replayed for the very addresses it was captured with; once a
device is lost, nothing more is asked of it.
"""

from __future__ import annotations

from collections import OrderedDict
from collections.abc import Iterator, Mapping, Sequence
from contextlib import suppress
from itertools import groupby
from typing import Any

from ... import knobs
from ...errors import DiluError
from ..artifact.artifact import Artifact
from ..artifact.expression import evaluate
from ..progress import Progress, silent
from .bind import Addresses, BoundCollective, BoundLaunch, BoundRouted, BoundStep, bind
from .device import CodeRefused, Device, DeviceError, DeviceLost
from .meet import Meetings
from .program import Kernel, Program, Variant, kernel_code

_KEPT_CALLS = 32
_KEPT_BODIES = 4  # numbers of rows for which work on them is kept, of every block of experts

_Key = tuple[int, tuple[tuple[str, int], ...], Addresses]


class Executor:
    """The kernels of a program on a device, and the calls made of them.

    `meetings` does what ranks do together; None where there is one.
    """

    def __init__(
        self,
        device: Device,
        artifact: Artifact,
        target: str,
        program: Program,
        *,
        text: bool,
        meetings: Meetings | None = None,
    ) -> None:
        self.device = device
        self.meetings = meetings
        self.program = program
        self.nan = False
        self.chosen: list[Variant] = []
        self.refused: str | None = None  # the driver's name for why the binaries are not used
        self._artifact = artifact
        self._target = target
        self._text = text
        self._kernels: list[Any] = []
        self._calls: OrderedDict[_Key, list[_Part]] = OrderedDict()
        self._one_by_one = knobs.GPU_SYNC.get()
        self.graphs = knobs.GPU_GRAPHS.get() and not self._one_by_one and device.can_capture

    def probe(self) -> None:
        """Load a kernel, so that code which this driver cannot run is noticed first."""
        if self.program.kernels:
            kernel = self.program.kernels[0]
            self.load_kernel(kernel, kernel.variants[self.choice(kernel, {})])

    def load(self, tuned: Mapping[str, int], *, nan: bool, progress: Progress = silent) -> None:
        """Choose a variant of every kernel and load it. `nan`: some weights hold NaN codes."""
        self.nan = nan
        kernels = self.program.kernels
        self.chosen = [k.variants[self.choice(k, tuned)] for k in kernels]
        self._kernels = []
        for index, (kernel, variant) in enumerate(zip(kernels, self.chosen, strict=True)):
            progress("load kernels", index, len(kernels))
            self._kernels.append(self.load_kernel(kernel, variant))

    def choice(self, kernel: Kernel, tuned: Mapping[str, int]) -> int:
        """Return the variant to use: the tuned one where there is one, else the default."""
        shared = self.device.info.shared
        fitting = kernel.candidates(nan=self.nan, shared=shared)
        if not fitting:
            raise DiluError(
                f"no variant of the kernel {kernel.name} fits {self.device.info.text}: they need "
                f"more than the {shared} bytes of shared memory that it has",
                hint="compile for this device's own target",
            )
        wanted = (tuned.get(kernel.name), kernel.default)
        return next((index for index in wanted if index in fitting), fitting[0])

    def load_kernel(self, kernel: Kernel, variant: Variant) -> Any:
        """Load a variant from its binary, or from its text where binaries are refused."""
        code = kernel_code(self._artifact, self._target, kernel, variant)
        if not self._text:
            try:
                return self.device.load(code, text=False)
            except CodeRefused as refused:
                if code.text is None:
                    raise
                self._text, self.refused = True, refused.name
        return self.device.load(code, text=True)

    def run(
        self,
        entry: int,
        sizes: Mapping[str, int],
        addresses: Addresses,
        exact: Mapping[str, int] | None = None,
    ) -> None:
        """Launch a function; it may be under way when this returns.

        `exact` are the sizes without padding, where `sizes` has some.
        """
        key = (entry, tuple(sizes.items()), addresses)
        call = self._calls.get(key)
        if call is None:
            bound = bind(self.program, entry, sizes, self.chosen, addresses)
            call = self._calls[key] = list(self._parts(bound))
            self._forget(_KEPT_CALLS)
        self._calls.move_to_end(key)
        own = self.program.entries[entry].own(exact or sizes)
        for part in call:
            part.run(own)

    def recorded(self, bound: Sequence[BoundLaunch]) -> Recorded:
        """Return launches that are made together."""
        return Recorded(self, [self.prepare(b) for b in bound])

    def _parts(self, bound: Sequence[BoundStep]) -> Iterator[_Part]:
        for is_launch, steps in groupby(bound, lambda step: isinstance(step, BoundLaunch)):
            if is_launch:
                yield self.recorded([step for step in steps if isinstance(step, BoundLaunch)])
                continue
            for step in steps:
                assert self.meetings is not None and not isinstance(step, BoundLaunch)
                if isinstance(step, BoundRouted):
                    yield _Route(self, self.meetings, step)
                else:
                    yield _Collect(self.meetings, step)

    def prepare(self, bound: BoundLaunch, variant: Variant | None = None) -> Any:
        """Return a bound launch ready for the device, of the chosen variant or of another one.

        The grid of `bound` has to be that of the variant.
        """
        kernel = self._kernels[bound.launch.run]
        if variant is not None:
            kernel = self.load_kernel(self.program.kernels[bound.launch.run], variant)
        return self.device.prepare(kernel, bound.grid, bound.arguments)

    def forget(self) -> None:
        """Drop all graphs: the addresses they were made with are going away."""
        self._forget(0)

    def close(self) -> None:
        """Give graphs and kernels back."""
        self.forget()
        self._kernels = []

    def launch_all(self, launches: Sequence[Any]) -> None:
        """Launch in order; where asked to, wait after each, so that an error names its kernel."""
        if not self._one_by_one:
            for launch in launches:
                self.device.launch(launch)
            return
        for launch in launches:
            self.device.launch(launch)
            try:
                self.device.synchronize()
            except DeviceError as error:
                name = getattr(launch, "name", "a kernel")
                message = f"running the kernel {name}: {error.message}"
                raise type(error)(message, error.hint, name=error.name) from error

    def captured(self, launches: Sequence[Any]) -> Any:
        """Return launches as a graph."""
        self.device.begin_capture()
        try:
            self.launch_all(launches)
        except BaseException:
            self._abandon_capture()
            raise
        return self.device.end_capture()

    def _abandon_capture(self) -> None:
        try:
            self.device.free_graph(self.device.end_capture())
        except DeviceError:
            pass  # the error that led here says more

    def _forget(self, kept: int) -> None:
        while len(self._calls) > kept:
            _, call = self._calls.popitem(last=False)
            for part in call:
                part.free()


class Recorded:
    """Launches in a row: made one by one the first time, from the second on as one graph."""

    def __init__(self, executor: Executor, launches: list[Any]) -> None:
        self._executor, self._launches = executor, launches
        self._graph: Any = None
        self._ran = False

    def run(self, _: Mapping[str, int] | None = None) -> None:
        executor = self._executor
        if self._graph is None and self._ran and self._launches and executor.graphs:
            self._graph = executor.captured(self._launches)
            self._launches = []
        self._ran = True
        if self._graph is not None:
            executor.device.launch_graph(self._graph)
        else:
            executor.launch_all(self._launches)

    def free(self) -> None:
        """Give the graph back."""
        graph, self._graph = self._graph, None
        if graph is not None:
            with suppress(DeviceLost):
                self._executor.device.free_graph(graph)


class _Collect:
    """A collective of a call."""

    def __init__(self, meetings: Meetings, bound: BoundCollective) -> None:
        self._meetings, self._bound = meetings, bound

    def run(self, sizes: Mapping[str, int]) -> None:
        step = self._bound.step
        rows, width = evaluate(step.rows, sizes), evaluate(step.width, sizes)
        self._meetings.collect(self._bound, rows, width)

    def free(self) -> None: ...


class _Route:
    """Rows for experts, and what is done for those that come; recorded for few numbers of rows."""

    def __init__(self, executor: Executor, meetings: Meetings, bound: BoundRouted) -> None:
        self._executor, self._meetings, self._bound = executor, meetings, bound
        self._bodies: dict[int, Recorded] = {}

    def run(self, sizes: Mapping[str, int]) -> None:
        self._meetings.route(self._bound, evaluate(self._bound.step.tokens, sizes), self._work)

    def _work(self, rows: int) -> None:
        if rows not in self._bodies:
            if len(self._bodies) >= _KEPT_BODIES:
                self._bodies.pop(next(iter(self._bodies))).free()
            bound = self._bound.body(rows)
            launches = [step for step in bound if isinstance(step, BoundLaunch)]
            assert len(launches) == len(bound)  # ranks work on rows as often as they have some
            self._bodies[rows] = self._executor.recorded(launches)
        self._bodies[rows] = body = self._bodies.pop(rows)  # the last one used
        body.run()

    def free(self) -> None:
        for body in self._bodies.values():
            body.free()


_Part = Recorded | _Collect | _Route
