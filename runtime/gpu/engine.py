"""The engine of sessions on a GPU: what `engine.py` above asks for, on a `Device`.

A call's working memory is one block: the arena of its plan, then its parameters that come from
the host, then its results. What the host hands over and gets back passes through pinned buffers.

Invariants: a call is over when it returns; nothing is allocated on the device that was not found
to fit; after the device is lost every call says so, and closing still works.
"""

from __future__ import annotations

import sys
from collections.abc import Generator, Mapping, Sequence
from contextlib import contextmanager, suppress
from math import prod
from typing import Any

import numpy as np

from ...element_types import DTYPES
from ...errors import DiluError
from ..artifact.artifact import Artifact
from ..artifact.expression import evaluate_shape
from ..artifact.manifest import FunctionEntry, ValueEntry
from ..artifact.storage import storage
from ..artifact.weights import Weights
from ..buckets import pad_batch, padded_sizes
from ..call.arrays import from_numpy
from ..call.batch import PARAMETERS
from ..progress import Progress, silent
from . import bind
from .array import DeviceArray, Memory, copy_strided, read_argument
from .bind import Addresses
from .device import Device, DeviceError, DeviceLost, align
from .dlpack import contiguous_strides
from .executor import Executor
from .meet import Meetings
from .pinned import Pinned
from .program import read_program
from .tuning import read_tuning
from .upload import layout, upload


class GpuEngine:
    """The functions, weights and working memory of an artifact on a device."""

    expert_counts: np.ndarray | None = None

    def __init__(
        self,
        artifact: Artifact,
        target: str,
        device: Device,
        *,
        text: bool,
        meetings: Meetings | None = None,
    ) -> None:
        self.device = device
        self.text = device.info.text
        self.where = f" on {device.info.text}"
        self.notes: list[str] = []
        self._artifact = artifact
        self._target = target
        self._functions: list[FunctionEntry] = artifact.manifest["functions"]
        self._image = layout(artifact)
        self._weights: Memory | None = None
        self._work: Memory | None = None
        self._outgoing, self._incoming = (Pinned(device, device.synchronize) for _ in range(2))
        self._constant_addresses: dict[int, tuple[int, ...]] = {}
        self._lost: str | None = None
        self._meetings = meetings
        program = read_program(artifact, target)
        self.executor = Executor(device, artifact, target, program, text=text, meetings=meetings)
        with self.guarded():
            self.executor.probe()

    @property
    def weight_bytes(self) -> int:
        return self._image.nbytes

    def load(self, progress: Progress = silent) -> None:
        """Copy the weights to the device, choose the variants of the kernels and load them."""
        weights = Weights(self._artifact, progress=progress)
        try:
            with self.guarded():
                self._weights, nan = upload(
                    self.device, self._artifact, weights, self._image, progress=progress
                )
        finally:
            weights.close()
        tuned = read_tuning(self._artifact, self._target, self.device.info, nan=nan)
        with self.guarded():
            self.executor.load(tuned, nan=nan, progress=progress)
        if self.executor.refused:
            why = self.executor.refused
            self.notes.append(f"the driver refused the binaries ({why}) and compiles their PTX")
        if nan:
            self.notes.append("some weights are NaN, so kernels decode NaN codes")
        if tuned:
            self.notes.append(f"tuned for this device ({len(tuned)} kernels)")

    def available_memory(self) -> int | None:
        """Return what weights, working memory and new states may take together."""
        with self.guarded():
            free = self.device.free_memory()
        held = sum(m.nbytes for m in (self._weights, self._work) if m is not None)
        return None if free is None else free + held

    def arena_bytes(self, function: int, sizes: Mapping[str, int]) -> int:
        """Return the bytes of working memory of a call, parameters and results included."""
        if self._is_batch(function):
            sizes = padded_sizes(sizes)
        return self._plan_work(function, sizes, [])[-1]

    def argument(self, value: Any, dtype: str) -> tuple[np.ndarray | DeviceArray, str]:
        with self.guarded():
            return read_argument(self.device, value, dtype)

    def on_device(self, array: object) -> bool:
        return isinstance(array, DeviceArray)

    def result(self, array: Any, dtype: str, *, torch: bool) -> Any:
        """Return a result as the caller expects it."""
        if not isinstance(array, DeviceArray):
            return from_numpy(array, dtype, torch=torch)
        if not torch:
            return array
        library = sys.modules["torch"]  # the caller's own arrays are its tensors
        known = DTYPES[dtype]
        if known.torch is None or not known.is_code:
            return library.from_dlpack(array)
        bits = DeviceArray(self.device, array, array.address, array.shape, "u8")
        return library.from_dlpack(bits).view(getattr(library, known.torch))

    def zeros(self, shape: Sequence[int], dtype: str) -> DeviceArray:
        """Return a new state."""
        with self.guarded():
            array = DeviceArray.empty(self.device, shape, dtype)
            self.device.zero(array.address, array.nbytes)
            self.device.synchronize()
            self.executor.forget()
        return array

    def keep(self, old: DeviceArray, new: DeviceArray) -> None:
        """Copy what two states have in common from one to the other."""
        common = [min(a, b) for a, b in zip(old.shape, new.shape, strict=True)]
        layouts = [(a.address, contiguous_strides(a.shape)) for a in (new, old)]
        with self.guarded():
            copy_strided(self.device, layouts[0], layouts[1], common, new.dtype.itemsize)
            self.device.synchronize()

    def content(self, array: Any) -> np.ndarray:
        """Return an array's content on the host."""
        if not isinstance(array, DeviceArray):
            return array
        with self.guarded():
            return array.numpy()

    def run(
        self,
        function: int,
        sizes: Mapping[str, int],
        parameters: Sequence[np.ndarray | DeviceArray],
        states: Sequence[DeviceArray],
        shapes: Sequence[Sequence[int]],
        *,
        on_device: bool = False,
    ) -> list[Any]:
        """Run a function; return its results, cut to `shapes`, on the host or on the device."""
        with self.guarded(self._functions[function]["name"]):
            if self._meetings is not None:
                self._meetings.begin()
            padded, addresses, results = self.prepared(function, sizes, parameters, states)
            self.executor.run(function, padded, addresses, sizes)
            if self._meetings is not None:
                self._meetings.settle()
            return self._results(function, results, shapes, on_device=on_device)

    def prepared(
        self,
        function: int,
        sizes: Mapping[str, int],
        parameters: Sequence[np.ndarray | DeviceArray],
        states: Sequence[DeviceArray],
    ) -> tuple[Mapping[str, int], Addresses, list[int]]:
        """Upload the parameters, padded where they are a batch; return the sizes they then have,
        all addresses of a call and those of its results."""
        if self._is_batch(function):
            sizes = padded_sizes(sizes)
            parameters = pad_batch([self.content(a) for a in parameters], sizes)
        hosted = [a for a in parameters if isinstance(a, np.ndarray)]
        places = self._plan_work(function, sizes, parameters)
        base = self._room(places[-1])
        places = [base + place for place in places]
        self._send(hosted, places[0])
        staged = iter(places[: len(hosted)])
        at = tuple(a.address if isinstance(a, DeviceArray) else next(staged) for a in parameters)
        results = places[len(hosted) : -1]
        addresses = Addresses(
            at,
            tuple(state.address for state in states),
            self._constants(function),
            tuple(results),
            base,
        )
        return sizes, addresses, results

    @contextmanager
    def guarded(self, what: str = "") -> Generator[None]:
        """Make the device current; note where it is lost, and say so from then on."""
        if self._lost is not None:
            raise DiluError(
                f"the session is lost since an earlier call failed{self.where}: {self._lost}",
                hint="load the artifact again",
            )
        try:
            with self.device.active():
                yield
        except DeviceLost as error:
            self._lost = error.message
            prefix = f"{what}: " if what else ""
            message = f"{prefix}the device {self.text} failed: {error.message}"
            raise DeviceLost(message, error.hint, name=error.name) from error

    def close(self) -> None:
        """Free everything; what a lost device does not give back is gone with it."""
        if self.device.stuck:
            return  # the end of the process frees it
        weights, self._weights = self._weights, None
        work, self._work = self._work, None
        frees = [m.free for m in (weights, work) if m is not None]
        if self._meetings is not None:
            frees.append(self._meetings.close)
        for step in (
            self.executor.close, self._outgoing.free, self._incoming.free, *frees, self.device.close
        ):  # fmt: skip
            with suppress(DeviceError), self.device.active():
                step()

    # -- one call

    def _is_batch(self, function: int) -> bool:
        """Whether a function takes a language model's batches, so that they can be padded."""
        names = tuple(entry["name"] for entry in self._functions[function]["parameters"])
        return self._artifact.manifest["language_model"] is not None and names == PARAMETERS

    def _constants(self, function: int) -> tuple[int, ...]:
        """Return where the constants of a function are."""
        if self._weights is None:
            raise DiluError("the session is closed")
        if function not in self._constant_addresses:
            base, names = self._weights.address, self._functions[function]["constants"]
            found = tuple(base + self._image.offsets[name] for name in names)
            self._constant_addresses[function] = found
        return self._constant_addresses[function]

    def _plan_work(
        self,
        function: int,
        sizes: Mapping[str, int],
        parameters: Sequence[np.ndarray | DeviceArray],
    ) -> list[int]:
        """Return the offsets of hosted parameters and results in the block, and its size.

        Without `parameters`, all of them count, at these sizes.
        """
        entry = self._functions[function]
        if parameters:
            inputs = [a.nbytes for a in parameters if isinstance(a, np.ndarray)]
        else:
            inputs = [_nbytes(p, sizes) for p in entry["parameters"]]
        at = align(bind.arena_bytes(self.executor.program, function, sizes))
        places: list[int] = []
        for nbytes in [*inputs, *(_nbytes(r, sizes) for r in entry["results"])]:
            places.append(at)
            at += align(nbytes)
        return [*places, at]

    def _room(self, nbytes: int) -> int:
        """Return the address of a block of working memory of at least this size."""
        if self._work is None or self._work.nbytes < nbytes:
            self.executor.forget()
            if self._work is not None:  # the old one first, so that both never stand side by side
                old, self._work = self._work, None
                old.free()
            self._work = Memory(self.device, nbytes)
        return self._work.address

    def _send(self, arrays: Sequence[np.ndarray], address: int) -> None:
        """Upload arrays one after the other, each aligned, in one copy."""
        total = sum(align(array.nbytes) for array in arrays)
        if not total:
            return
        buffer, at = self._outgoing.take(total), 0
        for array in arrays:
            buffer[at : at + array.nbytes] = array.reshape(-1).view(np.uint8)
            at += align(array.nbytes)
        self.device.upload(address, buffer[:at])

    def _results(
        self,
        function: int,
        addresses: Sequence[int],
        shapes: Sequence[Sequence[int]],
        *,
        on_device: bool,
    ) -> list[Any]:
        entries = self._functions[function]["results"]
        made: list[Any] = []
        if on_device:
            for address, shape, entry in zip(addresses, shapes, entries, strict=True):
                array = DeviceArray.empty(self.device, shape, entry["dtype"])
                self.device.copy(array.address, address, array.nbytes)
                made.append(array)
            self.device.synchronize()
            return made
        types = [storage(entry["dtype"]) for entry in entries]
        sizes = [prod(s) * t.itemsize for s, t in zip(shapes, types, strict=True)]
        buffer, at = self._incoming.take(sum(map(align, sizes))), 0
        for address, size in zip(addresses, sizes, strict=True):
            self.device.download(buffer[at : at + size], address)
            at += align(size)
        self.device.synchronize()
        at = 0
        for size, shape, dtype in zip(sizes, shapes, types, strict=True):
            made.append(buffer[at : at + size].copy().view(dtype).reshape(shape))
            at += align(size)
        return made


def _nbytes(entry: ValueEntry, sizes: Mapping[str, int]) -> int:
    return prod(evaluate_shape(entry["shape"], sizes)) * storage(entry["dtype"]).itemsize
