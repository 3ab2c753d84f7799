"""Checkpoint directories: configuration, safetensors headers, and how the weights are quantized.

Invariant: only headers are read, never data; whatever is returned lies inside its file.

Source: safetensors format (8 bytes of header length, JSON header, data); the index file of
sharded checkpoints as transformers writes it.
"""

from __future__ import annotations

import json
import math
import struct
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from ..errors import DiluError, Loc
from ..ir.dtypes import DTYPES, DType

CONFIG = "config.json"
SINGLE = "model.safetensors"
INDEX = "model.safetensors.index.json"
METHODS = ("fp8", "compressed-tensors")

_DTYPES = {
    "F64": "f64", "F32": "f32", "F16": "f16", "BF16": "bf16", "F8_E4M3": "f8e4m3",
    "F8_E5M2": "f8e5m2", "F8_E8M0": "f8e8m0", "I64": "i64", "I32": "i32", "I16": "i16",
    "I8": "i8", "U8": "u8", "U16": "u16", "U32": "u32", "BOOL": "bool",
}  # fmt: skip
_MAX_HEADER = 100_000_000  # bytes, the limit of the safetensors library


@dataclass(frozen=True, slots=True)
class TensorHeader:
    """A tensor in a file: `offset` from the file's beginning and `nbytes`, both in bytes."""

    file: str
    dtype: DType
    shape: tuple[int, ...]
    offset: int
    nbytes: int


@dataclass(frozen=True)
class Quantization:
    """How a checkpoint's quantized weights are stored.

    `block` is the shape of the part of a weight that shares a scale, None where each weight's
    scales decide (a scale per row, or one for the tensor). `suffix` makes a scale's name from its
    weight's. Modules named in `excluded` are not quantized.
    """

    method: str
    block: tuple[int, int] | None
    suffix: str
    excluded: tuple[str, ...] = ()


@dataclass(frozen=True)
class Checkpoint:
    """A checkpoint directory as its files describe it."""

    path: Path
    config: Mapping[str, Any]
    tensors: Mapping[str, TensorHeader]
    quantization: Quantization | None

    def header(self, name: str) -> TensorHeader:
        """Return the header of a tensor; raise DiluError where there is none."""
        if name not in self.tensors:
            raise DiluError(
                f"the checkpoint has no tensor {name!r}",
                Loc(str(self.path), tensor=name),
                "the files do not belong to this config.json, or the download is incomplete",
            )
        return self.tensors[name]


def read_checkpoint(path: str | Path) -> Checkpoint:
    """Read a checkpoint directory's configuration and headers; raise DiluError when it is none."""
    folder = Path(path)
    config = read_config(folder)
    quantization = read_quantization(config, str(folder / CONFIG))
    tensors: dict[str, TensorHeader] = {}
    for file in _weight_files(folder):
        tensors.update(read_headers(folder, file))
    for name, file in _weight_map(folder).items():
        if name not in tensors:
            raise DiluError(
                f"{INDEX} says that {file} holds {name!r}, which it does not",
                Loc(str(folder / file), tensor=name),
                "download the checkpoint again",
            )
    return Checkpoint(folder, config, tensors, quantization)


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


def read_quantization(config: Mapping[str, Any], file: str = CONFIG) -> Quantization | None:
    """Return how the weights are quantized, None when they are not; raise DiluError if unknown."""
    settings = config.get("quantization_config")
    if not settings:
        return None
    method = settings.get("quant_method")
    if method == "fp8":
        block = settings.get("weight_block_size")
        excluded = settings.get("modules_to_not_convert") or settings.get("ignored_layers") or ()
        return Quantization(method, _block(block, file), "_scale_inv", tuple(excluded))
    if method == "compressed-tensors":
        groups = settings.get("config_groups") or {}
        weights = [g.get("weights") or {} for g in groups.values()]
        if all(w.get("type") == "float" and w.get("num_bits") == 8 for w in weights):
            block = next((w["block_structure"] for w in weights if w.get("block_structure")), None)
            excluded = tuple(settings.get("ignore") or ())
            return Quantization(method, _block(block, file), "_scale", excluded)
        method = f"{method} ({settings.get('format')})"
    raise DiluError(
        f"unknown quantization method {method!r}",
        Loc(file),
        f"supported: {', '.join(METHODS)} (8-bit float weights), and no quantization",
    )


def _block(block: Any, file: str) -> tuple[int, int] | None:
    if block is None:
        return None
    if len(block) != 2 or not all(isinstance(b, int) and b > 0 for b in block):
        raise DiluError(f"weight_block_size {block!r} is not a pair of sizes", Loc(file))
    return (block[0], block[1])


def _weight_map(folder: Path) -> dict[str, str]:
    index = folder / INDEX
    if not index.is_file():
        return {}
    try:
        return dict(json.loads(index.read_text("utf-8"))["weight_map"])
    except (json.JSONDecodeError, UnicodeDecodeError, KeyError, TypeError, ValueError):
        raise DiluError("not an index of safetensors files", Loc(str(index))) from None


def _weight_files(folder: Path) -> list[str]:
    files = sorted(set(_weight_map(folder).values()))
    for file in files:
        if not (folder / file).is_file():
            raise DiluError(
                f"missing shard: {file}, which {INDEX} names",
                Loc(str(folder / file)),
                "download the checkpoint again",
            )
    if not files and (folder / SINGLE).is_file():
        files = [SINGLE]
    if not files:
        raise DiluError(
            f"not a checkpoint: {folder} has neither {SINGLE} nor {INDEX}",
            hint="to compile without weights, use --config-only",
        )
    return files


def read_headers(folder: Path, file: str) -> dict[str, TensorHeader]:
    """Return the header of every tensor of one safetensors file in `folder`."""
    path = folder / file
    size = path.stat().st_size
    with path.open("rb") as stream:
        start = stream.read(8)
        length = struct.unpack("<Q", start)[0] if len(start) == 8 else 0
        if length == 0 or length > min(size, _MAX_HEADER):
            raise _truncated(path, size, 8 + length)
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
        if entry["dtype"] not in _DTYPES:
            known = ", ".join(_DTYPES)
            message = f"unknown element type {entry['dtype']!r}"
            raise DiluError(message, Loc(file, tensor=name), f"known: {known}")
        dtype = DTYPES[_DTYPES[entry["dtype"]]]
        shape = tuple(int(d) for d in entry["shape"])
        begin, end = entry["data_offsets"]
        if end - begin != math.prod(shape) * dtype.itemsize or begin < 0:
            raise ValueError(f"{name!r} has {end - begin} bytes for {dtype}{list(shape)}")
        yield name, TensorHeader(file, dtype, shape, base + begin, end - begin)


def _truncated(path: Path, size: int, want: int) -> DiluError:
    return DiluError(
        f"truncated safetensors file: it has {size} bytes and its header says {want}",
        Loc(str(path)),
        "download the file again",
    )
