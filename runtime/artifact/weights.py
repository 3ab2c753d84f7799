"""The weights of a session: files mapped where they are, and a table of addresses per constant.

Invariant: nothing is converted, nor copied but what is scattered over a tensor of which other ranks
have the rest; a file that is not the one that was compiled is refused; and so is a model that does
not fit in memory, before any of it is loaded.
"""

from __future__ import annotations

import contextlib
import mmap
from collections.abc import Iterator
from math import prod
from pathlib import Path

import numpy as np

from ... import knobs
from ...errors import DiluError, Loc
from ..progress import Progress, silent
from .artifact import Artifact
from .fingerprint import fingerprint
from .manifest import ConstantEntry, FileEntry, located
from .storage import storage

_CHANGED = "compile the model again, or put the file back that it was compiled from"


class Weights:
    """Mapped weight files, and what had to be copied of them."""

    def __init__(self, artifact: Artifact, *, progress: Progress = silent) -> None:
        require_bound(artifact)
        self._progress = progress
        self._views: list[np.ndarray] = []
        self._maps: list[mmap.mmap] = []
        self._constants: dict[str, ConstantEntry] = artifact.manifest["constants"]
        files = artifact.manifest["files"]
        for index in range(len(files)):
            progress("map weights", index, len(files))
            self._views.append(self._mapped(artifact, index))
        bases = np.array([view.ctypes.data for view in self._views], np.uint64)
        sizes = np.array([view.nbytes for view in self._views], np.int64)
        self._tables = {
            name: _addresses(name, constant, bases, sizes)
            for name, constant in self._constants.items()
            if not {"values", "part"} & constant.keys()
        }
        self._copies: list[np.ndarray] = []
        for name, constant in self._constants.items():
            if "values" in constant:  # the manifest's own
                self._copies.append(np.array(constant["values"], storage(constant["dtype"])))
                self._tables[name] = np.array([self._copies[-1].ctypes.data], np.uint64)

    def table(self, name: str) -> np.ndarray:
        """Return u64[pieces]: the addresses of a constant's pieces, row-major over its grid."""
        if name not in self._tables:
            self._progress("copy weights")
            parts = list(self._parts(self._constants[name]))
            self._copies += parts
            self._tables[name] = np.array([part.ctypes.data for part in parts], np.uint64)
            self._forget()
        return self._tables[name]

    def pieces(self, name: str) -> Iterator[np.ndarray]:
        """Yield u8[n] for each piece of a constant, in the order of its table."""
        from .bundle import places

        constant = self._constants[name]
        if "values" in constant:
            yield (
                np.array(constant["values"], storage(constant["dtype"])).reshape(-1).view(np.uint8)
            )
        elif "part" in constant:
            yield from (part.reshape(-1).view(np.uint8) for part in self._parts(constant))
        else:
            for file, offset, nbytes in places(constant):
                yield self._views[file][offset : offset + nbytes]

    def _parts(self, constant: ConstantEntry) -> Iterator[np.ndarray]:
        """Yield copies of the parts of a constant's pieces, which are scattered over them."""
        stored, part = constant.get("stored", []), constant.get("part", [])
        dtype = storage(constant["dtype"])
        nbytes = prod(stored) * dtype.itemsize
        index = np.ix_(*(
            (first + np.arange(size)) * step // block
            for first, size, step, block in part
        ))  # fmt: skip
        for file, offset, _ in zip(*located(constant), strict=True):
            piece = self._views[file][offset : offset + nbytes]
            yield np.ascontiguousarray(piece.view(dtype).reshape(stored)[index])

    def _forget(self) -> None:
        """Give back the memory of mapped pages that were read to be copied."""
        for mapped in self._maps:
            if hasattr(mmap, "MADV_DONTNEED"):
                with contextlib.suppress(OSError):
                    mapped.madvise(mmap.MADV_DONTNEED)

    def close(self) -> None:
        """Unmap the files; the tables must not be used afterwards."""
        self._tables = {}
        self._views, self._copies = [], []
        while self._maps:
            with contextlib.suppress(BufferError):
                self._maps.pop().close()

    def _mapped(self, artifact: Artifact, index: int) -> np.ndarray:
        entry = artifact.manifest["files"][index]
        source = artifact.weight_file(index)
        if isinstance(source, bytes):
            return np.frombuffer(source, np.uint8)
        check_file(source, entry)
        with open(source, "rb") as file:
            mapped = mmap.mmap(file.fileno(), 0, access=mmap.ACCESS_READ)
        self._maps.append(mapped)
        if "coordinates" not in artifact.manifest:  # else most of it is for other ranks
            _advise(mapped)
        return np.frombuffer(mapped, np.uint8)


def require_bound(artifact: Artifact) -> None:
    """Raise DiluError for an artifact that was compiled without weights."""
    if not artifact.has_weights:
        raise DiluError(
            f"{artifact.name} was compiled from a configuration only: there are no weights to run",
            hint="compile the checkpoint's directory instead",
        )


def check_file(path: Path, entry: FileEntry) -> None:
    """Raise DiluError unless the file at `path` is the one that was compiled."""
    size = path.stat().st_size
    if size != entry["size"]:
        raise DiluError(
            f"the weights changed since compiling: the file has {size} bytes, not {entry['size']}",
            Loc(str(path)),
            hint=_CHANGED,
        )
    if fingerprint(path) != entry["fingerprint"]:
        raise DiluError("the weights changed since compiling", Loc(str(path)), hint=_CHANGED)


def weight_bytes(artifact: Artifact) -> int:
    """Return the bytes of all weights that the functions read, each piece counted once."""
    from .bundle import places

    constants = artifact.manifest["constants"].values()
    return sum(size for _, _, size in {place for c in constants for place in places(c)})


def require_memory(needed: dict[str, int], free: int | None, where: str = "") -> None:
    """Raise DiluError where the sum of `needed` (what for → bytes) is more than is free.

    `where` ends the message, such as " on cuda:0". None for `free` says that it is not known.
    """
    total = sum(needed.values())
    if free is None or total <= free or knobs.ALLOW_OVERCOMMIT.get():
        return
    parts = ", ".join(f"{what} {megabytes(size)}" for what, size in needed.items() if size)
    raise DiluError(
        f"not enough memory: {megabytes(total)} needed ({parts}), "
        f"{megabytes(free)} available{where}",
        hint="free some memory, ask for fewer tokens, or set DILU_ALLOW_OVERCOMMIT=1 to try anyway",
    )


def megabytes(size: int) -> str:
    """Return a size for people."""
    if size < 1 << 20:
        return f"{size / 1e3:.1f} kB"
    return f"{size / 1e6:.1f} MB" if size < 10**9 else f"{size / 1e9:.2f} GB"


def _addresses(
    name: str, constant: ConstantEntry, bases: np.ndarray, sizes: np.ndarray
) -> np.ndarray:
    file = np.asarray(constant["file"], np.int64)
    offset = np.asarray(constant["offset"], np.int64)
    grid, shape = constant["grid"], constant["shape"]
    stored = constant.get("stored", shape[grid:])
    nbytes = prod(stored) * storage(constant["dtype"]).itemsize
    fits = len(file) == len(offset) == prod(shape[:grid])
    fits = fits and bool(((file >= 0) & (file < len(bases))).all())
    if not fits or bool(((offset < 0) | (offset + nbytes > sizes[file])).any()):
        raise DiluError(f"the manifest places the constant {name} outside its files")
    return np.ascontiguousarray(bases[file] + offset.astype(np.uint64))


def _advise(mapped: mmap.mmap) -> None:
    """Ask for read-ahead, and for huge pages where files can have them; either may be refused."""
    for advice in ("MADV_WILLNEED", "MADV_HUGEPAGE"):
        if hasattr(mmap, advice):
            with contextlib.suppress(OSError):
                mapped.madvise(getattr(mmap, advice))
