"""What a device is to the rest of the runtime.

Everything above this file speaks the protocol `Device` and nothing else; the drivers of NVIDIA and
AMD are one implementation (`native.py`), and how one is opened is for `open_device.py` to know.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from contextlib import AbstractContextManager
from dataclasses import dataclass
from typing import Any, Protocol

import numpy as np

from ...errors import DiluError

#: Every address that the runtime computes on a device is a multiple of this.
ALIGNMENT = 256


def align(size: int) -> int:
    """Return the next multiple of the alignment of memory on a device."""
    return -(-size // ALIGNMENT) * ALIGNMENT


class DeviceError(DiluError):
    """A call of the driver failed. `name` is the driver's own name of the error."""

    def __init__(self, message: str, hint: str | None = None, *, name: str = "") -> None:
        super().__init__(message, hint=hint)
        self.name = name


class CodeRefused(DeviceError):
    """The driver does not take this machine code; another form of it may still do."""


class DeviceLost(DeviceError):
    """The device, or our context on it, can run nothing any more."""


@dataclass(frozen=True)
class DeviceInfo:
    """What is known of a device without running anything on it.

    `arch`: compute capability (`8.6`) or architecture (`gfx942`). `memory`: bytes of all of it.
    `driver`: its driver's version. `dlpack`: the device type of its arrays in DLPack. `shared`: the
    most shared memory that a kernel may have, None where it is not known.
    """

    backend: str
    index: int
    name: str
    arch: str
    memory: int
    driver: str
    dlpack: int
    shared: int | None = None

    @property
    def place(self) -> str:
        """The device as a user names it."""
        return f"{self.backend}:{self.index}"

    @property
    def text(self) -> str:
        return f"{self.place} ({self.name})"


@dataclass(frozen=True)
class KernelCode:
    """One variant of a kernel, as it is given to a device to load.

    `arguments`: the kinds of the run-time arguments in order, `pointer` or `i32`. `scratch`: how
    many hidden null pointers follow them. `shared`: bytes of shared memory. `constants`: the
    numbers it was compiled with. `source`: the file of all kernels' source in the artifact.
    `binary` and `text` (assembly that drivers compile themselves, or None) are files as well;
    `read` returns the content of any.
    """

    name: str
    kind: str
    symbol: str
    arguments: tuple[str, ...]
    threads: int
    shared: int
    scratch: int
    constants: dict[str, Any]
    source: str
    binary: str
    text: str | None
    read: Callable[[str], bytes]


class Device(Protocol):
    """A device with one stream: what is asked of it is done in order.

    Addresses are numbers. Copies between the host and the device may be under way when a call
    returns, and the host's array has to stay as it is until `synchronize`, or until an event
    after it. Methods are called inside of `active()` and raise DeviceError; DeviceLost where
    nothing can be done any more.
    """

    info: DeviceInfo
    #: It waits for other processes, and for ever: nothing may be asked of it, nor freed.
    stuck: bool

    def active(self) -> AbstractContextManager[object]:
        """Return a block in which this device is the thread's current one."""
        ...

    @property
    def stream(self) -> int:
        """The stream's handle, for producers of DLPack arrays."""
        ...

    def free_memory(self) -> int | None: ...
    def allocate(self, nbytes: int) -> int:
        """Return the address of new memory, aligned to `ALIGNMENT`."""
        ...

    def free(self, address: int) -> None: ...
    def allocate_host(self, nbytes: int) -> np.ndarray:
        """Return u8[nbytes] on the host that copies can be made of while the program goes on."""
        ...

    def free_host(self, array: np.ndarray) -> None: ...
    def upload(self, address: int, array: np.ndarray) -> None:
        """Copy a contiguous array to the device."""
        ...

    def download(self, array: np.ndarray, address: int) -> None:
        """Fill a contiguous array from the device."""
        ...

    def copy(self, target: int, source: int, nbytes: int) -> None:
        """Copy on the device."""
        ...

    def zero(self, address: int, nbytes: int) -> None: ...
    def load(self, code: KernelCode, *, text: bool) -> Any:
        """Load a kernel from its binary, or from its text; raise CodeRefused for the wrong one."""
        ...

    def prepare(self, kernel: Any, grid: Sequence[int], arguments: Sequence[int]) -> Any:
        """Return a launch of a loaded kernel that can be repeated. Pointers and i32 are numbers."""
        ...

    def launch(self, prepared: Any) -> None: ...
    def synchronize(self) -> None: ...
    @property
    def can_capture(self) -> bool: ...
    def begin_capture(self) -> None:
        """Collect launches from here on instead of running them."""
        ...

    def end_capture(self) -> Any:
        """Return the launches since `begin_capture` as a graph."""
        ...

    def launch_graph(self, graph: Any) -> None: ...
    def free_graph(self, graph: Any) -> None: ...
    def event(self) -> Any: ...
    def record(self, event: Any) -> None: ...
    def wait(self, event: Any) -> None:
        """Return when everything before the event was recorded is done."""
        ...

    def elapsed(self, start: Any, end: Any) -> float:
        """Return the milliseconds between two events that are over."""
        ...

    def free_event(self, event: Any) -> None: ...
    def close(self) -> None:
        """Give the stream and the kernels back. Memory that is still in use stays usable."""
        ...
