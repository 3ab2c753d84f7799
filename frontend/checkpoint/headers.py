"""Safetensors headers: where a file's tensors are, and of what type.

Invariant: only headers are read, never data; whatever is returned lies inside its file. A tensor of
an element type that nobody here knows is kept as it is: it is an error for who wants its values.

Source: safetensors format (8 bytes of header length, JSON header, data).
"""

from __future__ import annotations

import json
import math
import struct
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from ...element_types import BY_SAFETENSORS, DType
from ...errors import DiluError, Loc, UnsupportedError

_MAX_HEADER = 100_000_000  # bytes, the limit of the safetensors library


@dataclass(frozen=True, slots=True)
class TensorHeader:
    """A tensor in a file: `offset` from the file's beginning and `nbytes`, both in bytes.

    `element` is the type as the file names it.
    """

    file: str
    name: str
    element: str
    shape: tuple[int, ...]
    offset: int
    nbytes: int

    @property
    def dtype(self) -> DType:
        """The element type; raises UnsupportedError when it is none that is known."""
        if self.element not in BY_SAFETENSORS:
            raise UnsupportedError(
                f"unknown element type {self.element!r}",
                Loc(self.file, tensor=self.name),
                f"known: {', '.join(BY_SAFETENSORS)}",
            )
        return BY_SAFETENSORS[self.element]


def read_headers(folder: Path, file: str) -> dict[str, TensorHeader]:
    """Return the header of every tensor of one safetensors file in `folder`."""
    path = folder / file
    size = path.stat().st_size
    with path.open("rb") as stream:
        start = stream.read(8)
        length = struct.unpack("<Q", start)[0] if len(start) == 8 else 0
        if length == 0 or length > min(size, _MAX_HEADER):
            raise _no_header(path, size, start, length)
        text = stream.read(length)
    if len(text) < length:
        raise _truncated(path, size, 8 + length)
    try:
        header = json.loads(text)
        tensors = dict(_tensors(header, file, 8 + length))
    except (AttributeError, KeyError, TypeError, ValueError) as error:
        raise DiluError(
            f"broken safetensors header: {error}", Loc(str(path)), "download the file again"
        ) from None
    end = max((t.offset + t.nbytes for t in tensors.values()), default=0)
    if end > size:
        raise _truncated(path, size, end)
    return tensors


def _tensors(header: Mapping[str, Any], file: str, base: int) -> Iterator[tuple[str, TensorHeader]]:
    for name, entry in header.items():
        if name == "__metadata__":
            continue
        element = str(entry["dtype"])
        shape = tuple(int(d) for d in entry["shape"])
        begin, end = (int(offset) for offset in entry["data_offsets"])
        if begin < 0 or end < begin:
            raise ValueError(f"{name!r} lies at {begin} to {end}")
        if element in BY_SAFETENSORS:
            dtype = BY_SAFETENSORS[element]
            if end - begin != math.prod(shape) * dtype.itemsize:
                raise ValueError(f"{name!r} has {end - begin} bytes for {dtype}{list(shape)}")
        yield name, TensorHeader(file, name, element, shape, base + begin, end - begin)


def _no_header(path: Path, size: int, start: bytes, length: int) -> DiluError:
    """Return what is wrong with a file that has no room for a header, or none at all."""
    loc = Loc(str(path))
    if len(start) < 8:
        return _truncated(path, size, 8)
    if start == b"version ":
        return DiluError(
            "this is a pointer of Git LFS, not the file", loc, "fetch the file: git lfs pull"
        )
    if 8 + length > size and length <= _MAX_HEADER:
        return _truncated(path, size, 8 + length)
    return DiluError("not a safetensors file: it begins with no header", loc)


def _truncated(path: Path, size: int, want: int) -> DiluError:
    return DiluError(
        f"truncated safetensors file: it has {size} bytes and its header says {want}",
        Loc(str(path)),
        "the download is incomplete: get the file again",
    )
