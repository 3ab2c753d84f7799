"""The driver libraries of NVIDIA and AMD, called through ctypes: names, types and errors.

One layer serves both, since HIP's driver API is CUDA's function by function: a table holds each
function's two names. The `cuda-bindings` package would serve one of them only, and be one more
thing to install; what is used here is two dozen functions.

Invariant: a call either did what it says or raises a DeviceError with the driver's own words.
"""

from __future__ import annotations

import ctypes
from collections.abc import Callable
from typing import Any

from ... import knobs
from ...errors import DiluError
from .device import CodeRefused, DeviceError, DeviceLost

_INT, _UINT, _SIZE = ctypes.c_int, ctypes.c_uint, ctypes.c_size_t
_POINTER, _TEXT = ctypes.c_void_p, ctypes.c_char_p
_FILES = {
    "cuda": ("libcuda.so.1",),
    "hip": (
        "libamdhip64.so", "libamdhip64.so.7", "libamdhip64.so.6", "/opt/rocm/lib/libamdhip64.so",
    ),
}  # fmt: skip
_PREFIX = {"cuda": "cu", "hip": "hip"}
_SYSTEM = {"cuda": "the NVIDIA driver", "hip": "ROCm"}

#: What we call it → (CUDA's name, HIP's name, types of its arguments). A name that is empty: it has
#: none; several: the first that is there.
_FUNCTIONS: dict[str, tuple[str, str, tuple[Any, ...]]] = {
    "init": ("cuInit", "hipInit", (_UINT,)),
    "driver_version": ("cuDriverGetVersion", "hipDriverGetVersion", (_POINTER,)),
    "device_count": ("cuDeviceGetCount", "hipGetDeviceCount", (_POINTER,)),
    "device_get": ("cuDeviceGet", "hipDeviceGet", (_POINTER, _INT)),
    "device_name": ("cuDeviceGetName", "hipDeviceGetName", (_POINTER, _INT, _INT)),
    "device_memory": ("cuDeviceTotalMem_v2", "hipDeviceTotalMem", (_POINTER, _INT)),
    "device_attribute": (
        "cuDeviceGetAttribute", "hipDeviceGetAttribute", (_POINTER, _INT, _INT),
    ),
    "device_properties": (
        "", "hipGetDevicePropertiesR0600 hipGetDeviceProperties", (_POINTER, _INT),
    ),
    "context_retain": ("cuDevicePrimaryCtxRetain", "", (_POINTER, _INT)),
    "context_release": ("cuDevicePrimaryCtxRelease_v2", "", (_INT,)),
    "context_push": ("cuCtxPushCurrent_v2", "", (_POINTER,)),
    "context_pop": ("cuCtxPopCurrent_v2", "", (_POINTER,)),
    "current_get": ("", "hipGetDevice", (_POINTER,)),
    "current_set": ("", "hipSetDevice", (_INT,)),
    "memory_info": ("cuMemGetInfo_v2", "hipMemGetInfo", (_POINTER, _POINTER)),
    "allocate": ("cuMemAlloc_v2", "hipMalloc", (_POINTER, _SIZE)),
    "free": ("cuMemFree_v2", "hipFree", (_POINTER,)),
    "host_allocate": ("cuMemHostAlloc", "hipHostMalloc", (_POINTER, _SIZE, _UINT)),
    "host_free": ("cuMemFreeHost", "hipHostFree", (_POINTER,)),
    "upload": (
        "cuMemcpyHtoDAsync_v2", "hipMemcpyHtoDAsync", (_POINTER, _POINTER, _SIZE, _POINTER),
    ),
    "download": (
        "cuMemcpyDtoHAsync_v2", "hipMemcpyDtoHAsync", (_POINTER, _POINTER, _SIZE, _POINTER),
    ),
    "copy": (
        "cuMemcpyDtoDAsync_v2", "hipMemcpyDtoDAsync", (_POINTER, _POINTER, _SIZE, _POINTER),
    ),
    "fill": (
        "cuMemsetD8Async", "hipMemsetD8Async", (_POINTER, ctypes.c_ubyte, _SIZE, _POINTER),
    ),
    "stream_create": ("cuStreamCreate", "hipStreamCreateWithFlags", (_POINTER, _UINT)),
    "stream_destroy": ("cuStreamDestroy_v2", "hipStreamDestroy", (_POINTER,)),
    "stream_synchronize": ("cuStreamSynchronize", "hipStreamSynchronize", (_POINTER,)),
    "event_create": ("cuEventCreate", "hipEventCreateWithFlags", (_POINTER, _UINT)),
    "event_record": ("cuEventRecord", "hipEventRecord", (_POINTER, _POINTER)),
    "event_synchronize": ("cuEventSynchronize", "hipEventSynchronize", (_POINTER,)),
    "event_elapsed": (
        "cuEventElapsedTime", "hipEventElapsedTime", (_POINTER, _POINTER, _POINTER),
    ),
    "event_destroy": ("cuEventDestroy_v2", "hipEventDestroy", (_POINTER,)),
    "module_load": ("cuModuleLoadData", "hipModuleLoadData", (_POINTER, _TEXT)),
    "module_unload": ("cuModuleUnload", "hipModuleUnload", (_POINTER,)),
    "module_function": (
        "cuModuleGetFunction", "hipModuleGetFunction", (_POINTER, _POINTER, _TEXT),
    ),
    "function_attribute": ("cuFuncSetAttribute", "", (_POINTER, _INT, _INT)),
    "launch": (
        "cuLaunchKernel", "hipModuleLaunchKernel",
        (_POINTER, *[_UINT] * 7, _POINTER, _POINTER, _POINTER),
    ),
    "capture_begin": ("cuStreamBeginCapture_v2", "hipStreamBeginCapture", (_POINTER, _INT)),
    "capture_end": ("cuStreamEndCapture", "hipStreamEndCapture", (_POINTER, _POINTER)),
    "graph_instantiate": (
        "cuGraphInstantiateWithFlags", "hipGraphInstantiateWithFlags",
        (_POINTER, _POINTER, ctypes.c_ulonglong),
    ),
    "graph_launch": ("cuGraphLaunch", "hipGraphLaunch", (_POINTER, _POINTER)),
    "graph_destroy": ("cuGraphDestroy", "hipGraphDestroy", (_POINTER,)),
    "graph_exec_destroy": ("cuGraphExecDestroy", "hipGraphExecDestroy", (_POINTER,)),
}  # fmt: skip

#: Older drivers lack these; without them, kernels are launched one by one.
CAPTURE = (
    "capture_begin", "capture_end", "graph_instantiate", "graph_launch", "graph_destroy",
    "graph_exec_destroy",
)  # fmt: skip

# The numbers of errors are the same in both APIs.
_OUT_OF_MEMORY, _OLD_DRIVER, _NO_DEVICE, _BAD_DEVICE = 2, 35, 100, 101
#: Invalid image, no binary for this GPU, invalid PTX, PTX of a newer version, no compiler for it.
_REFUSED = frozenset({200, 209, 218, 221, 222, 223})
#: Errors after which a context is of no use: uncorrectable memory or link errors, illegal
#: addresses and instructions, failed and timed-out launches, and those of an unknown cause.
_LOST = frozenset({46, 214, 220, 700, 702, 709, 710, 714, 715, 716, 717, 718, 719, 999})

_HINTS = {
    _OUT_OF_MEMORY: "close what else uses the device, or ask for fewer tokens",
    _OLD_DRIVER: "update the driver",
    _NO_DEVICE: "see whether the device is there and visible to this process "
    "(nvidia-smi or rocm-smi; CUDA_VISIBLE_DEVICES or HIP_VISIBLE_DEVICES)",
}
_HINT_REFUSED = "update the driver, or compile for this device"
_HINT_LOST = "load the artifact again; DILU_GPU_SYNC=1 waits after each kernel, and so names it"


class DriverLibrary:
    """A loaded driver library; `call(name, …)` calls a function of the table."""

    def __init__(self, backend: str) -> None:
        self.backend = backend
        self._native = _opened(backend)
        self._functions: dict[str, Callable[..., int]] = {}
        for name, (cuda, hip, types) in _FUNCTIONS.items():
            for symbol in (cuda if backend == "cuda" else hip).split():
                function = getattr(self._native, symbol, None)
                if function is not None and name not in self._functions:
                    function.argtypes, function.restype = types, _INT
                    self._functions[name] = function
        if "init" not in self._functions:
            what = knobs.GPU_LIBRARY.get() or _SYSTEM[backend]
            raise DiluError(f"no driver for {backend} devices: {what} is not one")
        self.call("init", 0)

    def has(self, *names: str) -> bool:
        return all(name in self._functions for name in names)

    def function(self, name: str) -> Callable[..., int]:
        """Return a function that returns its error code; raise DiluError where it is missing."""
        if name not in self._functions:
            what = f"the driver has no function {self._symbol(name)}"
            raise DiluError(what, hint="update the driver")
        return self._functions[name]

    def call(self, name: str, *arguments: Any, what: str = "") -> None:
        """Call a function; raise DeviceError, saying `what` it was for, where it fails."""
        code = self.function(name)(*arguments)
        if code:
            raise self.error(code, what or self._symbol(name))

    def error(self, code: int, what: str) -> DeviceError:
        """Return what to raise for an error code."""
        name, text = self._words(code)
        message = f"{what}: {name} ({text})"
        if code in _LOST:
            return DeviceLost(message, _HINT_LOST, name=name)
        if code in _REFUSED:
            return CodeRefused(message, _HINT_REFUSED, name=name)
        return DeviceError(message, _HINTS.get(code), name=name)

    def devices(self) -> int:
        """Return how many devices there are."""
        count = ctypes.c_int()
        code = self.function("device_count")(ctypes.byref(count))
        if code not in (0, _NO_DEVICE, _BAD_DEVICE):
            raise self.error(code, "counting the devices")
        return 0 if code else count.value

    def _symbol(self, name: str) -> str:
        cuda, hip, _ = _FUNCTIONS[name]
        return cuda if self.backend == "cuda" else hip

    def _words(self, code: int) -> tuple[str, str]:
        """Return the driver's name of an error and what it says about it."""
        words: list[str] = []
        for symbol in ("GetErrorName", "GetErrorString"):
            function = getattr(self._native, f"{_PREFIX[self.backend]}{symbol}", None)
            words.append(_error_word(function, self.backend, code))
        return words[0] or f"error {code}", words[1] or "no description"


def _error_word(function: Any, backend: str, code: int) -> str:
    if function is None:
        return ""
    if backend == "hip":
        function.restype = _TEXT
        return (function(code) or b"").decode("utf-8", "replace")
    text = ctypes.c_char_p()
    function(code, ctypes.byref(text))
    return (text.value or b"").decode("utf-8", "replace")


def _opened(backend: str) -> ctypes.CDLL:
    chosen = knobs.GPU_LIBRARY.get()
    problem = ""
    for file in [str(chosen)] if chosen else _FILES[backend]:
        try:
            return ctypes.CDLL(file)
        except OSError as error:
            problem = problem or str(error)
    what = f"DILU_GPU_LIBRARY={chosen}" if chosen else _SYSTEM[backend]
    raise DiluError(
        f"no driver for {backend} devices: {what} cannot be loaded: {problem}",
        hint="install the driver, or run on the CPU: --device cpu",
    )
