"""Memory on a device and the arrays that lie in it.

Invariant: memory is given back when nothing refers to it any more, whatever becomes of the session
that made it; arrays of ours are dense and row-major.
"""

from __future__ import annotations

import sys
from collections.abc import Sequence
from math import prod
from typing import Any

import numpy as np

from ...errors import DiluError
from ..artifact.storage import storage
from ..call.arrays import FOREIGN, is_torch, to_numpy
from .device import Device
from .dlpack import Imported, contiguous_strides, export

#: Compiled kernels rely on addresses being multiples of this.
_POINTER_ALIGNMENT = 16


class Memory:
    """A piece of memory on a device."""

    def __init__(self, device: Device, nbytes: int) -> None:
        self._device = device
        self.nbytes = nbytes
        self.address = 0
        with device.active():
            self.address = device.allocate(nbytes)

    def free(self) -> None:
        """Give it back now; nothing may use it afterwards."""
        address, self.address = self.address, 0
        if address and not self._device.stuck:
            with self._device.active():
                self._device.free(address)

    def __del__(self) -> None:
        try:
            self.free()
        except Exception:  # a lost device, or the interpreter's end
            pass


class DeviceArray:
    """A dense array on a device, for anything that reads DLPack or `__cuda_array_interface__`.

    `element` is the type's name in a manifest, `dtype` the numpy type of its raw bits. `numpy()`
    copies it to the host.
    """

    def __init__(
        self,
        device: Device,
        owner: object,
        address: int,
        shape: Sequence[int],
        element: str,
    ) -> None:
        self.device = device
        self.address = address
        self.shape = tuple(shape)
        self.element = element
        self.dtype = storage(element)
        self._owner = owner

    @classmethod
    def empty(cls, device: Device, shape: Sequence[int], element: str) -> DeviceArray:
        memory = Memory(device, prod(shape) * storage(element).itemsize)
        return cls(device, memory, memory.address, shape, element)

    @property
    def ndim(self) -> int:
        return len(self.shape)

    @property
    def nbytes(self) -> int:
        return prod(self.shape) * self.dtype.itemsize

    def numpy(self) -> np.ndarray:
        """Return a copy on the host: raw bits where numpy lacks the type."""
        array = np.empty(self.shape, self.dtype)
        with self.device.active():
            self.device.download(array, self.address)
            self.device.synchronize()
        return array

    def __array__(self, dtype: Any = None, copy: bool | None = None) -> np.ndarray:
        if copy is False:
            raise ValueError("the array lies on a device and cannot be read without a copy")
        return np.asarray(self.numpy(), dtype)

    def __dlpack_device__(self) -> tuple[int, int]:
        return self.device.info.dlpack, self.device.info.index

    def __dlpack__(
        self,
        *,
        stream: Any = None,
        max_version: tuple[int, int] | None = None,
        dl_device: tuple[int, int] | None = None,
        copy: bool | None = None,
    ) -> Any:
        """Return a capsule. No stream has to wait: what made the array is over."""
        if copy or dl_device not in (None, self.__dlpack_device__()):
            raise BufferError("the array can only be handed over as it is, where it is")
        return export(self, self.address, self.shape, self.element, self.__dlpack_device__())

    @property
    def __cuda_array_interface__(self) -> dict[str, Any]:
        return {
            "shape": self.shape,
            "typestr": self.dtype.str,
            "data": (self.address, False),
            "strides": None,
            "version": 3,
        }

    def __repr__(self) -> str:
        dims = ",".join(map(str, self.shape))
        return f"DeviceArray({self.element}[{dims}] on {self.device.info.place})"


def read_argument(device: Device, value: Any, dtype: str) -> tuple[np.ndarray | DeviceArray, str]:
    """Return an argument as an array where it is, host or device, and its element type.

    Plain numbers take the element type `dtype`, and so do raw bits of its width.
    """
    place = _place_of(value)
    if place is None or place[0] != device.info.dlpack:
        return to_numpy(value, dtype, reader=device.info.text)
    if place[1] != device.info.index:
        raise DiluError(
            f"an array on {device.info.backend}:{place[1]} was passed, but this session runs on "
            f"{device.info.text}",
            hint="move it there, or pass an array on the host",
        )
    if isinstance(value, DeviceArray):
        array = value
    else:
        array = _imported(device, value)
    if storage(dtype) == storage(array.element) and array.element in ("u8", "u16"):
        array = DeviceArray(device, array, array.address, array.shape, dtype)
    return array, array.element


def _place_of(value: Any) -> tuple[int, int] | None:
    if isinstance(value, np.ndarray) or not hasattr(value, "__dlpack_device__"):
        return None
    try:
        kind, index = value.__dlpack_device__()
    except (BufferError, RuntimeError, TypeError, ValueError):
        return None  # such as torch's meta tensors
    return int(kind), int(index)


def _imported(device: Device, value: Any) -> DeviceArray:
    element = None
    if is_torch(value):
        value = value.detach()
        if value.element_size() == 1:  # 8-bit floats, which not every version exports
            torch = sys.modules["torch"]
            element = FOREIGN.get(str(value.dtype).removeprefix("torch."))
            value = value.view(torch.uint8) if element else value
    with device.active():
        found = Imported(value, device.stream)
        element = element or found.element
        if found.contiguous and found.address % _POINTER_ALIGNMENT == 0:
            return DeviceArray(device, found, found.address, found.shape, element)
        made = DeviceArray.empty(device, found.shape, element)
        size = storage(element).itemsize
        dense = contiguous_strides(found.shape)
        copy_strided(
            device, (made.address, dense), (found.address, found.strides), found.shape, size
        )
        device.synchronize()  # the producer's memory may go now
    return made


def copy_strided(
    device: Device,
    target: tuple[int, Sequence[int]],
    source: tuple[int, Sequence[int]],
    shape: Sequence[int],
    itemsize: int,
) -> None:
    """Copy an array of `shape` between two layouts, each an address and strides in elements.

    What lies in one piece in both is one copy.
    """
    if 0 in shape:
        return
    block, axis = 1, len(shape)
    while axis and all(shape[axis - 1] == 1 or s[axis - 1] == block for _, s in (target, source)):
        axis -= 1
        block *= shape[axis]
    outer = np.indices(shape[:axis]).reshape(axis, -1) if axis else np.zeros((0, 1), np.int64)
    offsets = [np.asarray(strides[:axis], np.int64) @ outer for _, strides in (target, source)]
    for to, of in zip(*(offset.tolist() for offset in offsets), strict=True):
        device.copy(target[0] + to * itemsize, source[0] + of * itemsize, block * itemsize)
