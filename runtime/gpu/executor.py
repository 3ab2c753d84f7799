"""Running a program on a device: launches one by one, or replayed as a captured graph.

The first call of a kind (function, sizes, addresses) launches kernel by kernel, which also lets a
driver load what it loads late; from the second on it is one graph. The kinds used least recently
are forgotten.

Invariants: a graph is only ever replayed for the very addresses it was captured with; once a
device is lost, nothing more is asked of it.
"""

from __future__ import annotations

from collections import OrderedDict
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

from ... import knobs
from ...errors import DiluError
from ..artifact import Artifact
from ..progress import Progress, silent
from .bind import Addresses, BoundLaunch, bind
from .device import CodeRefused, Device, DeviceError, DeviceLost
from .program import Kernel, Program, Variant, kernel_code

_KEPT_CALLS = 32

_Key = tuple[int, tuple[tuple[str, int], ...], Addresses]


@dataclass
class _Call:
    """The launches of a call; `graph` once it has been captured."""

    launches: list[Any] = field(default_factory=list)
    graph: Any = None


class Executor:
    """The kernels of a program on a device, and the calls made of them."""

    def __init__(
        self, device: Device, artifact: Artifact, target: str, program: Program, *, text: bool
    ) -> None:
        self.device = device
        self.program = program
        self.nan = False
        self.chosen: list[Variant] = []
        self.refused: str | None = None  # the driver's name for why the binaries are not used
        self._artifact = artifact
        self._target = target
        self._text = text
        self._kernels: list[Any] = []
        self._calls: OrderedDict[_Key, _Call] = OrderedDict()
        self._one_by_one = knobs.GPU_SYNC.get()
        self._graphs = knobs.GPU_GRAPHS.get() and not self._one_by_one and device.can_capture

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

    def run(self, entry: int, sizes: Mapping[str, int], addresses: Addresses) -> None:
        """Launch a function; it may be under way when this returns."""
        key = (entry, tuple(sizes.items()), addresses)
        call = self._calls.get(key)
        if call is None:
            bound = bind(self.program, entry, sizes, self.chosen, addresses)
            call = self._calls[key] = _Call([self.prepare(b) for b in bound])
            self._forget(_KEPT_CALLS)
        elif call.graph is None and call.launches and self._graphs:
            call.graph = self._captured(call.launches)
            call.launches = []
        self._calls.move_to_end(key)
        if call.graph is not None:
            self.device.launch_graph(call.graph)
        else:
            self._launch_all(call.launches)

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

    def _launch_all(self, launches: Sequence[Any]) -> None:
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

    def _captured(self, launches: Sequence[Any]) -> Any:
        self.device.begin_capture()
        try:
            self._launch_all(launches)
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
            if call.graph is not None:
                try:
                    self.device.free_graph(call.graph)
                except DeviceLost:
                    pass
