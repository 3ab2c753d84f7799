"""Copying the weights that are used into the artifact, packed and aligned.

Invariant: a tensor is copied once however many constants use it, a chunk at a time, byte for byte.
"""

from __future__ import annotations

import os
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from math import prod
from pathlib import Path
from typing import BinaryIO

from ...errors import DiluError, Loc
from ..progress import Progress
from .fingerprint import fingerprint
from .manifest import ConstantEntry, FileEntry, Manifest, changed, located
from .storage import storage
from .tensor_file import Entry, chunks, layout

SHARD_BYTES = 5 << 30
_CHUNK = 8 << 20

WeightFile = Callable[[int], Path | bytes]
Place = tuple[int, int, int]  # index of the file, offset and size in bytes


@dataclass(frozen=True)
class _Piece:
    place: Place
    entry: Entry


def bundled(
    manifest: Manifest, weight_file: WeightFile, folder: Path, progress: Progress
) -> Manifest:
    """Write the weight files into `folder` and return the manifest that refers to them;
    `weight_file` tells where the bytes of a file of the manifest's are now."""
    constants = manifest["constants"]
    pieces = _pieces(constants)
    shards = _shards(pieces)
    total = sum(piece.entry.nbytes for piece in pieces)
    moved: dict[Place, tuple[int, int]] = {}
    files: list[FileEntry] = []
    done = 0
    for number, shard in enumerate(shards):
        name = f"weights-{number + 1:05d}-of-{len(shards):05d}.safetensors"
        plan = layout([piece.entry for piece in shard])
        sources = (_source(weight_file, piece) for piece in shard)
        with open(folder / name, "wb") as out:
            for chunk in chunks(plan, sources):
                out.write(chunk)
                done += len(chunk)
                progress("copy weights", min(done, total), total)
        offsets = zip(shard, plan.offsets, strict=True)
        moved.update({piece.place: (number, offset) for piece, offset in offsets})
        path = folder / name
        files.append({"path": name, "size": plan.size, "fingerprint": fingerprint(path)})
    table = {name: _moved(constant, moved) for name, constant in constants.items()}
    return changed(manifest, files=files, constants=table)


def piece_bytes(constant: ConstantEntry) -> int:
    """Return the size of one piece of a constant."""
    return prod(constant["shape"][constant["grid"] :]) * storage(constant["dtype"]).itemsize


def places(constant: ConstantEntry) -> Iterator[Place]:
    """Yield where each piece of a constant is."""
    size = piece_bytes(constant)
    for file, offset, _ in zip(*located(constant), strict=True):
        yield file, offset, size


def _pieces(constants: dict[str, ConstantEntry]) -> list[_Piece]:
    """Return the pieces of all constants, each once, under names that are unique."""
    found: dict[Place, _Piece] = {}
    names: set[str] = set()
    for constant in constants.values():
        shape = tuple(constant["shape"][constant["grid"] :])
        for place, tensor in zip(places(constant), located(constant)[2], strict=True):
            if place not in found:
                name = tensor if tensor not in names else f"{tensor}@{place[0]}:{place[1]}"
                names.add(name)
                found[place] = _Piece(place, Entry(name, constant["dtype"], shape, place[2]))
    return list(found.values())


def _shards(pieces: list[_Piece]) -> list[list[_Piece]]:
    shards: list[list[_Piece]] = []
    room = 0
    for piece in pieces:
        if not shards or piece.entry.nbytes > room:
            shards.append([])
            room = SHARD_BYTES
        shards[-1].append(piece)
        room -= piece.entry.nbytes
    return shards


def _moved(constant: ConstantEntry, moved: dict[Place, tuple[int, int]]) -> ConstantEntry:
    where = [moved[place] for place in places(constant)]
    return changed(constant, file=[f for f, _ in where], offset=[o for _, o in where])


def _source(weight_file: WeightFile, piece: _Piece) -> Iterator[bytes | memoryview]:
    file, offset, nbytes = piece.place
    source = weight_file(file)
    if isinstance(source, bytes):
        yield memoryview(source)[offset : offset + nbytes]
        return
    with open(source, "rb", buffering=0) as opened:
        yield from _read(opened, source, piece)


def _read(opened: BinaryIO, source: Path, piece: _Piece) -> Iterator[bytes]:
    _, offset, left = piece.place
    while left:
        chunk = os.pread(opened.fileno(), min(left, _CHUNK), offset)
        if not chunk:
            raise DiluError("the file ends too early", Loc(str(source), tensor=piece.entry.name))
        yield chunk
        offset += len(chunk)
        left -= len(chunk)
