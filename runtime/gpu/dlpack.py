"""DLPack: reading other libraries' capsules, and making our own, by ctypes alone.

Invariant: a producer's memory is released once, when the last of ours that refers to it is gone;
memory of ours lives as long as any consumer's array of it.
"""

from __future__ import annotations

import contextlib
import ctypes
from collections.abc import Sequence
from math import prod
from typing import Any

from ...element_types import BY_DLPACK, DTYPES
from ...errors import DiluError

_NEW, _USED = b"dltensor", b"used_dltensor"
HOST = 1  # the device type of memory that has no stream


class _Tensor(ctypes.Structure):
    """`DLTensor`: device and element type are spread out."""

    _fields_ = [
        ("data", ctypes.c_void_p),
        ("device_type", ctypes.c_int32),
        ("device_id", ctypes.c_int32),
        ("ndim", ctypes.c_int32),
        ("code", ctypes.c_uint8),
        ("bits", ctypes.c_uint8),
        ("lanes", ctypes.c_uint16),
        ("shape", ctypes.POINTER(ctypes.c_int64)),
        ("strides", ctypes.POINTER(ctypes.c_int64)),
        ("byte_offset", ctypes.c_uint64),
    ]


_Deleter = ctypes.CFUNCTYPE(None, ctypes.c_void_p)


class _Managed(ctypes.Structure):
    """`DLManagedTensor`."""

    _fields_ = [("tensor", _Tensor), ("context", ctypes.c_void_p), ("deleter", ctypes.c_void_p)]


_api = ctypes.pythonapi
_get_pointer = _api.PyCapsule_GetPointer
_get_pointer.argtypes, _get_pointer.restype = (ctypes.c_void_p, ctypes.c_char_p), ctypes.c_void_p
_set_name = _api.PyCapsule_SetName
_set_name.argtypes, _set_name.restype = (ctypes.py_object, ctypes.c_char_p), ctypes.c_int
_is_valid = _api.PyCapsule_IsValid
_is_valid.argtypes, _is_valid.restype = (ctypes.c_void_p, ctypes.c_char_p), ctypes.c_int
_new_capsule = _api.PyCapsule_New
_new_capsule.argtypes = (ctypes.c_void_p, ctypes.c_char_p, ctypes.c_void_p)
_new_capsule.restype = ctypes.py_object


class Imported:
    """An array of another library: its address, shape, strides in elements, and element type."""

    def __init__(self, value: Any, stream: int) -> None:
        name = type(value).__name__
        try:
            on_host = value.__dlpack_device__()[0] == HOST  # has no streams
            capsule = value.__dlpack__(stream=None if on_host else stream)
            pointer = _get_pointer(id(capsule), _NEW)
        except (BufferError, RuntimeError, TypeError, ValueError) as error:
            raise DiluError(f"an array of type {name} cannot be read: {error}") from error
        self._managed = _Managed.from_address(pointer)
        self._pointer = pointer
        _set_name(capsule, _USED)
        tensor = self._managed.tensor
        self.shape = tuple(tensor.shape[i] for i in range(tensor.ndim))
        dense = contiguous_strides(self.shape)
        self.strides = (
            tuple(tensor.strides[i] for i in range(tensor.ndim)) if tensor.strides else dense
        )
        self.address = (tensor.data or 0) + tensor.byte_offset
        element = BY_DLPACK.get((tensor.code, tensor.bits)) if tensor.lanes == 1 else None
        if element is None:
            kind = f"type {tensor.code} of {tensor.bits} bits"
            raise DiluError(f"arrays of DLPack {kind} are not supported")
        self.element = element.name

    @property
    def contiguous(self) -> bool:
        """Whether the elements lie row-major without gaps (dimensions of one step aside)."""
        if 0 in self.shape:
            return True
        dense = contiguous_strides(self.shape)
        pairs = zip(self.shape, self.strides, dense, strict=True)
        return all(length == 1 or stride == want for length, stride, want in pairs)

    def __del__(self) -> None:
        managed = getattr(self, "_managed", None)
        if managed is not None and managed.deleter:
            self._managed = None
            _Deleter(managed.deleter)(self._pointer)


def contiguous_strides(shape: Sequence[int]) -> tuple[int, ...]:
    """Return the strides, in elements, of a row-major array."""
    return tuple(prod(shape[axis + 1 :]) for axis in range(len(shape)))


#: What was given to others and not given back: address of the struct → all that it points to.
_exported: dict[int, tuple[object, ...]] = {}


@_Deleter
def _delete(pointer: int) -> None:
    _exported.pop(pointer, None)


@_Deleter
def _destroy(capsule: int) -> None:
    """Release what a capsule holds that nobody consumed."""
    if _is_valid(capsule, _NEW):
        _exported.pop(_get_pointer(capsule, _NEW), None)


def export(
    owner: object, address: int, shape: Sequence[int], element: str, device: tuple[int, int]
) -> Any:
    """Return a capsule of a dense array; `owner` lives until its consumer is done with it."""
    count = len(shape)
    shape_array = (ctypes.c_int64 * count)(*shape)
    strides_array = (ctypes.c_int64 * count)(*contiguous_strides(shape))
    managed = _Managed()
    managed.deleter = ctypes.cast(_delete, ctypes.c_void_p)
    tensor = managed.tensor
    tensor.data = address
    tensor.device_type, tensor.device_id = device
    tensor.ndim = count
    tensor.code, tensor.bits = DTYPES[element].dlpack, DTYPES[element].bits
    tensor.lanes = 1
    tensor.shape = ctypes.cast(shape_array, ctypes.POINTER(ctypes.c_int64))
    tensor.strides = ctypes.cast(strides_array, ctypes.POINTER(ctypes.c_int64))
    pointer = ctypes.addressof(managed)
    _exported[pointer] = (owner, managed, shape_array, strides_array)
    try:
        return _new_capsule(pointer, _NEW, ctypes.cast(_destroy, ctypes.c_void_p))
    except BaseException:
        with contextlib.suppress(KeyError):
            del _exported[pointer]
        raise
