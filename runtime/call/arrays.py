"""Arrays at the boundary of a session: numpy, torch or anything with DLPack, in and out.

Invariant: types without a numpy type of their own (bf16, f8) cross as raw bits of their width, and
torch is only touched where the caller's own arrays are torch tensors.
"""

from __future__ import annotations

import sys
from typing import Any

import numpy as np

from ...element_types import BY_TORCH, DTYPES
from ...errors import DiluError
from ..artifact.storage import STORAGE, storage

#: Types that numpy does not have, by the names torch and ml_dtypes give them.
FOREIGN = {name: t.name for name, t in BY_TORCH.items() if not t.is_numpys}
_BITS_ONLY = {t.name for t in DTYPES.values() if not t.is_numpys}
_NAMES = {bits: name for name, bits in STORAGE.items() if name not in _BITS_ONLY}


def is_torch(value: object) -> bool:
    """Return whether `value` is a torch tensor, without importing torch."""
    torch = sys.modules.get("torch")
    return torch is not None and isinstance(value, torch.Tensor)


def to_numpy(value: Any, dtype: str, *, reader: str = "the CPU") -> tuple[np.ndarray, str]:
    """Return a C-contiguous array of raw bits and the name of its element type.

    Plain Python numbers and lists of them take the element type `dtype` where it holds them;
    arrays keep theirs, but raw bits (u8, u16) pass for a `dtype` of their width that numpy lacks.
    `reader` is where the session runs, for errors.
    """
    if is_torch(value):
        array, name = _from_torch(value, reader)
    elif isinstance(value, (int, float, bool, list, tuple)):
        return _from_python(value, dtype), dtype
    else:
        array, name = _from_array(value)
    return array, dtype if dtype in _BITS_ONLY and name == _NAMES[storage(dtype)] else name


def _from_python(value: Any, dtype: str) -> np.ndarray:
    """Return numbers and nested lists of them as an array of `dtype`, which must hold them."""
    if dtype in _BITS_ONLY:
        raise DiluError(f"{dtype} values cannot be made from Python numbers; pass an array")
    try:
        array = np.asarray(value)
    except (TypeError, ValueError, RuntimeError) as error:  # ragged, or with tensors in it
        raise DiluError(f"these Python numbers form no array: {error}") from error
    wanted = storage(dtype)
    kinds = {"b": "b", "i": "bi", "u": "bi", "f": "bif"}[wanted.kind]
    if array.size and (array.dtype.kind not in kinds or not _is_plain(value)):
        what = "numbers" if array.dtype.kind in "bif" else "objects"
        raise DiluError(f"{dtype} values cannot be made from these Python {what}; pass an array")
    made = array.astype(wanted)
    if wanted.kind in "iu" and not np.array_equal(made, array):
        raise DiluError(f"a number is too large for {dtype}")
    return np.asarray(made, order="C")


def _is_plain(value: Any) -> bool:
    """Whether a nested list holds Python's own numbers only, and not arrays."""
    if isinstance(value, (list, tuple)):
        return all(_is_plain(v) for v in value)
    return isinstance(value, (int, float, np.generic))


def _from_array(value: Any) -> tuple[np.ndarray, str]:
    if isinstance(value, np.ma.MaskedArray):
        raise DiluError("masked arrays are not supported", hint="pass array.filled(…)")
    if not isinstance(value, (np.ndarray, np.generic)) and hasattr(value, "__dlpack__"):
        value = _from_dlpack(value)
    array = np.asarray(value)
    name = FOREIGN.get(array.dtype.name)
    if name is not None:
        return np.asarray(array, order="C").view(STORAGE[name]), name
    little = array.dtype.newbyteorder("<")
    if little not in _NAMES:
        if array.dtype == object and not array.shape:
            raise DiluError(
                f"{'None' if value is None else f'a {type(value).__name__}'} is no array"
            )
        raise DiluError(f"arrays of {array.dtype} are not supported")
    return np.asarray(array, little, order="C"), _NAMES[little]


def from_numpy(array: np.ndarray, dtype: str, *, torch: bool) -> Any:
    """Return a result as the caller expects it: raw bits in numpy, the real type in torch."""
    if not torch:
        return array
    library = sys.modules["torch"]
    tensor = library.from_numpy(array)
    known = DTYPES[dtype]
    if known.is_numpys or known.torch is None:
        return tensor
    return tensor.view(getattr(library, known.torch))


def _from_torch(tensor: Any, reader: str) -> tuple[np.ndarray, str]:
    if tensor.device.type != "cpu":
        raise DiluError(
            f"a tensor on {tensor.device} was passed, but this session runs on {reader}",
            hint="pass tensor.cpu()",
        )
    torch = sys.modules["torch"]
    if tensor.is_nested or tensor.layout != torch.strided or tensor.is_quantized:
        kind = "nested" if tensor.is_nested else str(tensor.layout).removeprefix("torch.")
        kind = "quantized" if tensor.is_quantized else kind
        raise DiluError(f"{kind} tensors are not supported", hint="pass a dense tensor")
    name = str(tensor.dtype).removeprefix("torch.")
    try:
        tensor = tensor.detach().contiguous()
        if name in FOREIGN:
            bits = torch.uint16 if tensor.element_size() == 2 else torch.uint8
            return tensor.view(bits).numpy(), FOREIGN[name]
        array = tensor.resolve_neg().resolve_conj().numpy()
    except (RuntimeError, TypeError, ValueError, NotImplementedError) as error:
        kind = type(tensor).__name__
        raise DiluError(f"a {kind} of {tensor.dtype} cannot be read: {error}") from error
    if array.dtype not in _NAMES:
        raise DiluError(f"tensors of {tensor.dtype} are not supported")
    return array, _NAMES[array.dtype]


def _from_dlpack(value: Any) -> np.ndarray:
    try:
        return np.from_dlpack(value)
    except (BufferError, RuntimeError, TypeError, ValueError) as error:
        raise DiluError(
            f"an array of type {type(value).__name__} cannot be read: {error}"
        ) from error
