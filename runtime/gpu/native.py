"""Devices behind a driver library: memory, kernels, launches, graphs, one stream each.

Invariants: whatever the thread's current device was, it is again after `active()`; a device's
context lives as long as memory on it can be in use.
"""

from __future__ import annotations

import contextlib
import ctypes
import hashlib
import re
import weakref
from collections.abc import Generator, Sequence
from dataclasses import dataclass, replace
from functools import cache
from pathlib import Path
from typing import Any

import numpy as np

from ... import knobs
from ...errors import DiluError
from .device import CodeRefused, DeviceInfo, KernelCode
from .library import CAPTURE, DriverLibrary

_NON_BLOCKING = 1  # streams that do not wait for the default stream
_PORTABLE = 1  # host memory that all contexts may copy from
_RELAXED = 2  # other calls may be made while a stream is captured
_MAX_SHARED = 8  # the attribute of a function that allows it more dynamic shared memory
_ORDINARY_SHARED = 48 << 10
_CAPABILITY = (75, 76)  # the attributes of a device that hold its compute capability
_SHARED_LIMIT = 97  # and how much dynamic shared memory a kernel may be allowed
_PROPERTIES_BYTES = 16 << 10  # several times what the largest version of the struct takes
_ARCH = re.compile(rb"gfx[0-9a-f]{3,5}(?=[:\0])")
_KDL_CUDA, _KDL_ROCM = 2, 10


@dataclass(frozen=True)
class _Kernel:
    """A loaded kernel."""

    name: str
    handle: int
    module: int
    threads: int
    shared: int
    scratch: int


class _Prepared:
    """A launch with its arguments in place; the driver reads them at every launch."""

    __slots__ = ("_cells", "_pointers", "arguments", "name")

    def __init__(
        self, kernel: _Kernel, grid: Sequence[int], arguments: Sequence[int], stream: int
    ) -> None:
        # An i32 is read from the first bytes of its cell: all devices here are little-endian.
        values = (*arguments, *[0] * kernel.scratch)
        count = len(values)
        self._cells = (ctypes.c_uint64 * count)(*(value & (1 << 64) - 1 for value in values))
        first = ctypes.addressof(self._cells)
        self._pointers = (ctypes.c_void_p * count)(*range(first, first + 8 * count, 8))
        block = (kernel.threads, 1, 1)
        self.arguments = (
            kernel.handle, *grid, *block, kernel.shared, stream, self._pointers, None,
        )  # fmt: skip
        self.name = kernel.name


@cache
def driver_library(backend: str, path: Path | None) -> DriverLibrary:
    """Return the driver library, loaded once. `path` is what DILU_GPU_LIBRARY says."""
    return DriverLibrary(backend)


class NativeDevice:
    """What devices of both kinds share."""

    backend: str
    dlpack: int
    stuck = False

    def __init__(self, index: int) -> None:
        self._library = driver_library(self.backend, knobs.GPU_LIBRARY.get())
        count = self._library.devices()
        if index >= count:
            plural = "device" if count == 1 else "devices"
            raise DiluError(
                f"there is no device {self.backend}:{index}: the driver finds {count} {plural}",
                hint="dilu targets lists what there is; nvidia-smi or rocm-smi what the system has",
            )
        self._number = self._get("device_get", ctypes.c_int, index)
        self.info = self._described(index)
        self._stream = 0
        self._kernels: dict[tuple[bytes, str], _Kernel] = {}
        self._launch = self._library.function("launch")

    # -- the device itself

    def _described(self, index: int) -> DeviceInfo:
        name = ctypes.create_string_buffer(256)
        self._library.call("device_name", name, len(name), self._number)
        memory = self._get("device_memory", ctypes.c_size_t, self._number)
        driver = self._version(self._get("driver_version", ctypes.c_int))
        text = name.value.decode("utf-8", "replace").strip()
        arch = self._arch()
        return DeviceInfo(
            self.backend, index, text or arch, arch, memory, driver, self.dlpack, self._shared()
        )

    def _get(self, function: str, kind: Any, *arguments: Any) -> Any:
        """Return what a function writes to its first argument."""
        value = kind()
        self._library.call(function, ctypes.byref(value), *arguments)
        return value.value

    def _arch(self) -> str:
        raise NotImplementedError

    def _version(self, number: int) -> str:
        raise NotImplementedError

    def _shared(self) -> int | None:
        return None

    def active(self) -> contextlib.AbstractContextManager[object]:
        raise NotImplementedError

    @property
    def stream(self) -> int:
        if not self._stream:
            self._stream = self._get("stream_create", ctypes.c_void_p, _NON_BLOCKING)
        return self._stream

    # -- memory

    def free_memory(self) -> int | None:
        free, total = ctypes.c_size_t(), ctypes.c_size_t()
        self._library.call("memory_info", ctypes.byref(free), ctypes.byref(total))
        return free.value

    def allocate(self, nbytes: int) -> int:
        address = ctypes.c_void_p()
        what = f"allocating {nbytes} bytes on {self.info.text}"
        self._library.call("allocate", ctypes.byref(address), max(nbytes, 1), what=what)
        return address.value or 0

    def free(self, address: int) -> None:
        self._library.call("free", address)

    def allocate_host(self, nbytes: int) -> np.ndarray:
        address = ctypes.c_void_p()
        size = max(nbytes, 1)
        what = f"allocating {nbytes} bytes of pinned host memory"
        self._library.call("host_allocate", ctypes.byref(address), size, _PORTABLE, what=what)
        return np.ctypeslib.as_array((ctypes.c_uint8 * nbytes).from_address(address.value or 0))

    def free_host(self, array: np.ndarray) -> None:
        self._library.call("host_free", array.ctypes.data)

    def upload(self, address: int, array: np.ndarray) -> None:
        if array.nbytes:
            data = array.ctypes.data
            self._library.call("upload", address, data, array.nbytes, self.stream)

    def download(self, array: np.ndarray, address: int) -> None:
        if array.nbytes:
            data = array.ctypes.data
            self._library.call("download", data, address, array.nbytes, self.stream)

    def copy(self, target: int, source: int, nbytes: int) -> None:
        if nbytes:
            self._library.call("copy", target, source, nbytes, self.stream)

    def zero(self, address: int, nbytes: int) -> None:
        if nbytes:
            self._library.call("fill", address, 0, nbytes, self.stream)

    # -- kernels

    def load(self, code: KernelCode, *, text: bool) -> _Kernel:
        file = code.text if text else code.binary
        if file is None:
            raise CodeRefused(f"the kernel {code.name} has no code that the driver compiles")
        image = code.read(file)
        # By content: other artifacts on this device may have other code under the same name.
        key = hashlib.sha256(image).digest(), code.symbol
        if key not in self._kernels:
            self._kernels[key] = self._loaded(code, image, text=text)
        return replace(self._kernels[key], name=code.name)

    def _loaded(self, code: KernelCode, image: bytes, *, text: bool) -> _Kernel:
        what = f"loading the kernel {code.name}"
        module, handle = ctypes.c_void_p(), ctypes.c_void_p()
        self._library.call("module_load", ctypes.byref(module), image, what=what)
        symbol = code.symbol.encode()
        self._library.call("module_function", ctypes.byref(handle), module, symbol, what=what)
        if code.shared > _ORDINARY_SHARED and self._library.has("function_attribute"):
            self._library.call("function_attribute", handle, _MAX_SHARED, code.shared, what=what)
        return _Kernel(
            code.name, handle.value or 0, module.value or 0, code.threads, code.shared, code.scratch
        )

    def prepare(self, kernel: Any, grid: Sequence[int], arguments: Sequence[int]) -> _Prepared:
        return _Prepared(kernel, grid, arguments, self.stream)

    def launch(self, prepared: Any) -> None:
        code = self._launch(*prepared.arguments)
        if code:
            raise self._library.error(code, f"launching the kernel {prepared.name}")

    def synchronize(self) -> None:
        self._library.call("stream_synchronize", self.stream)

    # -- graphs

    @property
    def can_capture(self) -> bool:
        return self._library.has(*CAPTURE)

    def begin_capture(self) -> None:
        self._library.call("capture_begin", self.stream, _RELAXED)

    def end_capture(self) -> int:
        graph, executable = ctypes.c_void_p(), ctypes.c_void_p()
        self._library.call("capture_end", self.stream, ctypes.byref(graph))
        try:
            self._library.call("graph_instantiate", ctypes.byref(executable), graph, 0)
        finally:
            self._library.call("graph_destroy", graph)
        return executable.value or 0

    def launch_graph(self, graph: Any) -> None:
        self._library.call("graph_launch", graph, self.stream)

    def free_graph(self, graph: Any) -> None:
        self._library.call("graph_exec_destroy", graph)

    # -- events

    def event(self) -> int:
        return self._get("event_create", ctypes.c_void_p, 0)

    def record(self, event: Any) -> None:
        self._library.call("event_record", event, self.stream)

    def wait(self, event: Any) -> None:
        self._library.call("event_synchronize", event)

    def elapsed(self, start: Any, end: Any) -> float:
        return self._get("event_elapsed", ctypes.c_float, start, end)

    def free_event(self, event: Any) -> None:
        self._library.call("event_destroy", event)

    def close(self) -> None:
        with contextlib.suppress(DiluError):  # a lost device gives nothing back
            for kernel in self._kernels.values():
                self._library.call("module_unload", kernel.module)
            if self._stream:
                self._library.call("stream_destroy", self._stream)
        self._kernels, self._stream = {}, 0


class CudaDevice(NativeDevice):
    """An NVIDIA device, in its primary context: the one that torch and others use as well."""

    backend = "cuda"
    dlpack = _KDL_CUDA

    def __init__(self, index: int) -> None:
        super().__init__(index)
        self._context: int | None = None

    def _arch(self) -> str:
        major, minor = (
            self._get("device_attribute", ctypes.c_int, attribute, self._number)
            for attribute in _CAPABILITY
        )
        return f"{major}.{minor}"

    def _shared(self) -> int | None:
        return self._get("device_attribute", ctypes.c_int, _SHARED_LIMIT, self._number) or None

    def _version(self, number: int) -> str:
        return f"{number // 1000}.{number % 1000 // 10}"

    @contextlib.contextmanager
    def active(self) -> Generator[None]:
        if self._context is None:
            self._context = self._get("context_retain", ctypes.c_void_p, self._number)
            weakref.finalize(self, _release, self._library, self._number)
        self._library.call("context_push", self._context)
        try:
            yield
        finally:
            self._library.function("context_pop")(ctypes.byref(ctypes.c_void_p()))

    def _loaded(self, code: KernelCode, image: bytes, *, text: bool) -> _Kernel:
        return super()._loaded(code, image + b"\0" if text else image, text=text)


class HipDevice(NativeDevice):
    """An AMD device."""

    backend = "hip"
    dlpack = _KDL_ROCM

    def _arch(self) -> str:
        # The struct grew between versions and the name moved in it, so it is searched for.
        properties = ctypes.create_string_buffer(_PROPERTIES_BYTES)
        self._library.call("device_properties", properties, self._number)
        found = _ARCH.search(properties.raw)
        if found is None:
            raise DiluError(f"the driver does not tell the architecture of hip:{self._number}")
        return found[0].decode()

    def _version(self, number: int) -> str:
        return f"{number // 10_000_000}.{number // 100_000 % 100}"

    @contextlib.contextmanager
    def active(self) -> Generator[None]:
        before = self._get("current_get", ctypes.c_int)
        self._library.call("current_set", self._number)
        try:
            yield
        finally:
            self._library.function("current_set")(before)


def _release(library: DriverLibrary, number: int) -> None:
    """Let the primary context go, once nothing of ours can be in it."""
    library.function("context_release")(number)
