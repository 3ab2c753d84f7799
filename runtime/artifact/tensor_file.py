"""Writing tensors to a safetensors file, in chunks, each tensor on a 64-byte boundary.

Invariant: the file is valid for every reader of the format. That allows no holes, so what fills
the way to a boundary is a tensor too, called `__pad_N`. The values themselves are never converted.
Source: the format's description in the safetensors repository.
"""

from __future__ import annotations

import json
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass

from ...element_types import DTYPES

ALIGNMENT = 64
Chunk = bytes | memoryview
_LENGTH_BYTES = 8  # the header's length stands before the header


@dataclass(frozen=True, slots=True)
class Entry:
    """A tensor to be written: its name in the file, element type, shape and size in bytes."""

    name: str
    dtype: str
    shape: tuple[int, ...]
    nbytes: int


@dataclass(frozen=True)
class Layout:
    """Where each tensor of a file will lie. `offsets` count from the start of the file."""

    header: bytes
    offsets: tuple[int, ...]
    size: int


def layout(entries: Sequence[Entry]) -> Layout:
    """Return the header and offsets of a file with these tensors in this order."""
    table: dict[str, object] = {}
    starts: list[int] = []
    at = 0
    for number, entry in enumerate(entries):
        gap = -at % ALIGNMENT
        if gap:
            table[f"__pad_{number}"] = _described("U8", (gap,), at, gap)
            at += gap
        starts.append(at)
        table[entry.name] = _described(_named(entry.dtype), entry.shape, at, entry.nbytes)
        at += entry.nbytes
    text = json.dumps(table, separators=(",", ":")).encode()
    text += b" " * (-(len(text) + _LENGTH_BYTES) % ALIGNMENT)
    header = len(text).to_bytes(_LENGTH_BYTES, "little") + text
    return Layout(header, tuple(len(header) + s for s in starts), len(header) + at)


def chunks(
    plan: Layout, contents: Iterable[Iterable[bytes | memoryview]]
) -> Iterator[bytes | memoryview]:
    """Yield the file's bytes: its header, then each tensor's chunks with the gaps between."""
    yield plan.header
    at = len(plan.header)
    for offset, content in zip(plan.offsets, contents, strict=True):
        yield bytes(offset - at)
        at = offset
        for chunk in content:
            yield chunk
            at += len(chunk)


def _described(dtype: str, shape: tuple[int, ...], at: int, nbytes: int) -> dict[str, object]:
    return {"dtype": dtype, "shape": list(shape), "data_offsets": [at, at + nbytes]}


def _named(dtype: str) -> str:
    """Return the format's name of an element type; what it has none for is bytes."""
    return DTYPES[dtype].safetensors or "U8"
