"""Checkpoint directories: configuration, the tensors of their files, how weights are quantized.

Invariant: only headers are read; the bytes of two tensors only to tell whether they are the same,
or whether they are all zeros, where that decides what they mean.

Which files belong to a checkpoint is decided as transformers decides it: `model.safetensors` alone
where it is there, else what the index names. The index says where to look and no more: tensors are
known from the headers, and a file or a name that is missing is an error for who wants it.

Source: the index file of sharded checkpoints as transformers writes it.
"""

from __future__ import annotations

import json
import re
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from ...errors import DiluError, Loc
from ..formats import Scheme, read_quantization
from .headers import TensorHeader, read_headers

CONFIG = "config.json"
SINGLE = "model.safetensors"
INDEX = "model.safetensors.index.json"

_SHARD = re.compile(r"model-(\d+)-of-(\d+)\.safetensors")
_CHUNK = 1 << 20  # bytes compared at a time


@dataclass(frozen=True)
class Checkpoint:
    """A checkpoint directory as its files describe it.

    `absent` says which missing file the index places a tensor in; `copies` has the headers of
    tensors that are in several files, those in `tensors` among them.
    """

    path: Path
    config: Mapping[str, Any]
    tensors: Mapping[str, TensorHeader]
    quantization: Scheme | None
    absent: Mapping[str, str] = field(default_factory=dict)
    copies: Mapping[str, Sequence[TensorHeader]] = field(default_factory=dict)

    def header(self, name: str) -> TensorHeader:
        """Return a tensor's header; raise DiluError where there is none, or two that differ."""
        if name not in self.tensors:
            raise self.missing(name, f"the checkpoint has no tensor {name!r}")
        first, *others = self.copies.get(name, (self.tensors[name],))
        for other in others:
            if not self.same(first, other):
                raise DiluError(
                    f"{name!r} is in {first.file} and in {other.file} with different values",
                    Loc(str(self.path), tensor=name),
                    "remove the file that is not of this checkpoint",
                )
        return self.tensors[name]

    def missing(self, name: str, message: str) -> DiluError:
        """Return the error for a tensor that is not there, with the cause where it is known."""
        if name in self.absent:
            file = self.absent[name]
            return DiluError(
                f"missing shard: {file}, which {INDEX} says holds {name!r}",
                Loc(str(self.path / file)),
                "download the file",
            )
        return DiluError(
            message,
            Loc(str(self.path), tensor=name),
            f"config.json describes a model that has it; these files hold {len(self.tensors)} "
            "other tensors",
        )

    def same(self, a: TensorHeader, b: TensorHeader) -> bool:
        """Return whether two tensors have the same type, shape and bytes."""
        if (a.element, a.shape, a.nbytes) != (b.element, b.shape, b.nbytes):
            return False
        pairs = zip(self._chunks(a), self._chunks(b), strict=True)
        return all(x == y for x, y in pairs)

    def is_zero(self, header: TensorHeader) -> bool:
        """Return whether all bytes of a tensor are zero."""
        return not any(any(chunk) for chunk in self._chunks(header))

    def _chunks(self, header: TensorHeader) -> Iterator[bytes]:
        with (self.path / header.file).open("rb") as stream:
            stream.seek(header.offset)
            for start in range(0, header.nbytes, _CHUNK):
                yield stream.read(min(_CHUNK, header.nbytes - start))


def read_checkpoint(path: str | Path) -> Checkpoint:
    """Read a checkpoint directory's configuration and headers; raise DiluError when it is none."""
    folder = Path(path)
    config = read_config(folder)
    quantization = read_quantization(config, str(folder / CONFIG))
    files = find_files(folder)
    tensors: dict[str, TensorHeader] = {}
    copies: dict[str, list[TensorHeader]] = {}
    for file in files.named:
        for name, header in read_headers(folder, file).items():
            if name in tensors:
                copies.setdefault(name, [tensors[name]]).append(header)
            tensors[name] = header
    if not tensors.keys() >= files.index.keys():  # it lies, or is not of these files
        for file in files.others:
            tensors = read_headers(folder, file) | tensors
    absent = {n: f for n, f in files.index.items() if not (folder / f).is_file()}
    return Checkpoint(folder, config, tensors, quantization, absent, copies)


def read_config(path: str | Path) -> dict[str, Any]:
    """Return the configuration of a checkpoint directory, or of a config.json itself."""
    path = Path(path)
    if not path.exists():
        raise DiluError(f"no such path: {path}", hint="give the directory of a checkpoint")
    file = path / CONFIG if path.is_dir() else path
    if not file.is_file():
        raise DiluError(
            f"not a checkpoint: {path} has no {CONFIG}",
            hint=f"a checkpoint is a directory with {CONFIG} and *.safetensors files",
        )
    try:
        config = json.loads(file.read_text("utf-8"))
    except (json.JSONDecodeError, UnicodeDecodeError) as error:
        raise DiluError(f"not a configuration: {error}", Loc(str(file))) from None
    if not isinstance(config, dict):
        raise DiluError("not a configuration: it is no JSON object", Loc(str(file)))
    return config


# ------------------------------------------------------------------------------ files


@dataclass(frozen=True)
class Files:
    """A checkpoint's files: those to read, other shards of the same set, and the index."""

    named: Sequence[str]
    others: Sequence[str]
    index: Mapping[str, str]


def find_files(folder: Path) -> Files:
    """Return a checkpoint's files; raise DiluError where there is none, or only some shards."""
    if (folder / SINGLE).is_file():
        return Files([SINGLE], [], {})
    index = _weight_map(folder)
    named = sorted({f for f in index.values() if (folder / f).is_file()})
    shards = _shards(folder)
    if named:
        totals = {shards[f] for f in named if f in shards}
        others = [f for f, total in shards.items() if total in totals and f not in named]
        return Files(named, others, index)
    if not shards:
        raise _no_weights(folder, sorted(set(index.values())))
    _check_whole(folder, shards)
    return Files(list(shards), [], index)


def _shards(folder: Path) -> dict[str, int]:
    """Return the files that are named as shards, and of how many."""
    names = (p.name for p in sorted(folder.iterdir()) if p.is_file())
    return {n: int(m[2]) for n in names if (m := _SHARD.fullmatch(n))}


def _check_whole(folder: Path, shards: Mapping[str, int]) -> None:
    """Raise DiluError unless shards that no index names are all those of one set."""
    totals = sorted(set(shards.values()))
    if len(totals) > 1:
        sets = ", ".join(f"-of-{t:05d}" for t in totals)
        raise DiluError(
            f"shards of several checkpoints are in one directory: {sets}",
            Loc(str(folder)),
            "remove those that are not of this checkpoint",
        )
    numbers = {int(file.split("-")[1]) for file in shards}
    missing = ", ".join(str(n) for n in range(1, totals[0] + 1) if n not in numbers)
    if missing:
        raise DiluError(
            f"missing shards: of the {totals[0]} files model-…-of-{totals[0]:05d}.safetensors "
            f"these are not there: {missing}",
            Loc(str(folder)),
            "download them",
        )


def _weight_map(folder: Path) -> dict[str, str]:
    index = folder / INDEX
    if not index.is_file():
        return {}
    try:
        weight_map = json.loads(index.read_text("utf-8"))["weight_map"]
        return {str(name): str(file) for name, file in weight_map.items()}
    except (AttributeError, json.JSONDecodeError, UnicodeDecodeError, KeyError, TypeError):
        raise DiluError("not an index of safetensors files", Loc(str(index))) from None


def _no_weights(folder: Path, named: Sequence[str]) -> DiluError:
    """Return what is wrong with a directory that has none of the files that hold weights."""
    if named:
        return DiluError(
            f"missing shard: {named[0]}, which {INDEX} names"
            + (f", and {len(named) - 1} more" if len(named) > 1 else ""),
            Loc(str(folder / named[0])),
            "download the files that the index names",
        )
    names = [p.name for p in sorted(folder.iterdir())]
    others = [n for n in names if n.endswith((".safetensors", ".bin", ".pt", ".pth", ".gguf"))]
    seen = f"; it has {', '.join(others[:4])}, which are not read" if others else ""
    return DiluError(
        f"not a checkpoint: {folder} has neither {SINGLE} nor {INDEX}{seen}",
        hint="to compile without weights, use --config-only",
    )
