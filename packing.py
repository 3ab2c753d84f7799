"""Packing what was compiled into an artifact: its files and its manifest.

Invariant: weights are described, never read; what is written into the artifact is only what no file
of the checkpoint holds.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import asdict, dataclass
from math import prod
from pathlib import Path
from typing import Any

import numpy as np

from .codegen.generate import KernelInfo, Module
from .frontend.door import Captured
from .ir.graph import Function, Graph, Value
from .ir.ops.control import Call
from .ir.types import print_dim
from .ir.weights import Placed, Weight
from .options import Options
from .passes.manager import PassRecord, stage_texts
from .passes.shard_experts import expert_blocks
from .runtime.artifact.artifact import CONSTANTS, Artifact, Content
from .runtime.artifact.fingerprint import fingerprint
from .runtime.artifact.manifest import (
    FORMAT,
    ConstantEntry,
    CpuTargetEntry,
    FileEntry,
    FunctionEntry,
    GpuTargetEntry,
    KernelEntry,
    Manifest,
    MemoryEntry,
    PassEntry,
    ValueEntry,
)
from .runtime.artifact.tensor_file import Entry, chunks, layout
from .runtime.cpu.features import architecture
from .version import __version__


@dataclass(frozen=True)
class Compiled:
    """A model as every stage left it: captured, planned, and as a module for each target;
    `topology` is what its experts were placed by."""

    captured: Captured
    planned: Graph
    records: Sequence[PassRecord]
    modules: Sequence[Module]
    topology: Mapping[str, Any]


def pack(compiled: Compiled, options: Options) -> Artifact:
    """Return the artifact of a compiled model, not saved yet."""
    captured, planned = compiled.captured, compiled.planned
    texts = stage_texts(captured.graph, compiled.records)
    files: dict[str, Content] = {f"graph/{s}.txt": text.encode() for s, text in texts.items()}
    files |= captured.files
    for module in compiled.modules:
        files |= _module_files(module)
    constants, weight_files, data = _constants(planned, captured)
    if data:
        files[CONSTANTS] = data
    described = captured.language_model
    manifest: Manifest = {
        "format": FORMAT,
        "dilu": __version__,
        "functions": _functions(compiled),
        "targets": {m.target.name: _target(m) for m in compiled.modules},
        "passes": [_pass(record) for record in compiled.records],
        "name": captured.name,
        "files": weight_files,
        "constants": constants,
        "language_model": described,
        "mesh": asdict(planned.mesh) if planned.mesh is not None else None,
        "topology": dict(compiled.topology),
        "experts": [asdict(block) for block in expert_blocks(planned.functions[0])],
        "options": {
            "source": captured.source,
            "dtype": (options.dtype or "f32") if described is not None else None,
            "max_seq": options.max_seq,
            "config_only": options.config_only,
        },
    }
    return Artifact(manifest, files, bundle=options.bundle)


# ------------------------------------------------------------------------------- targets


def _module_files(module: Module) -> dict[str, Content]:
    files: dict[str, Content] = {_source_file(module): module.source.encode()}
    if module.library:
        files[f"{_folder(module)}/module.so"] = module.library
    return files | {f"{_folder(module)}/{name}": data for name, data in module.files.items()}


def _target(module: Module) -> CpuTargetEntry | GpuTargetEntry:
    source, requires = _source_file(module), list(module.target.requires)
    kernels = [_kernel(kernel, module.source) for kernel in module.kernels]
    gpu = module.target.gpu
    if gpu is None:
        return {
            "library": f"{_folder(module)}/module.so" if module.library else None,
            "architecture": architecture(),
            "source": source,
            "requires": requires,
            "kernels": kernels,
        }
    return {
        "program": f"{_folder(module)}/program.json",
        "backend": gpu.backend,
        "arch": gpu.arch,
        "source": source,
        "requires": requires,
        "kernels": kernels,
    }


def _kernel(kernel: KernelInfo, source: str) -> KernelEntry:
    """Describe a kernel; `lines` are the first and last of its text in the module's source."""
    start = source.find(kernel.source)
    lines = None
    if start >= 0:
        first = source.count("\n", 0, start) + 1
        lines = [first, first + kernel.source.rstrip("\n").count("\n")]
    return {"name": kernel.name, "kind": kernel.kind, "function": kernel.function, "lines": lines}


def _folder(module: Module) -> str:
    return f"kernels/{module.target.name.replace(':', '-')}"


def _source_file(module: Module) -> str:
    return f"{_folder(module)}/module.{'c' if module.target.language == 'c' else 'py'}"


# ------------------------------------------------------------------------------- functions


def _functions(compiled: Compiled) -> list[FunctionEntry]:
    pairs = zip(
        compiled.planned.functions,
        compiled.captured.graph.functions,
        compiled.modules[0].symbols,
        strict=True,
    )
    functions = [_function(function, before, symbols) for function, before, symbols in pairs]
    if compiled.captured.signature is not None:
        functions[0]["signature"] = compiled.captured.signature
    return functions


def _function(function: Function, before: Function, symbols: Sequence[str]) -> FunctionEntry:
    """Describe a function, of which `before` is what was captured."""
    return {
        "name": function.name,
        "symbols": list(symbols),
        "parameters": _boundary(function.parameters, before.parameters),
        "states": [_value(v) for v in function.states],
        "results": _boundary(function.results, before.results),
        "constants": [v.name for v in function.constants],
        "memory": list(_memory(function)),
    }


def _boundary(values: Sequence[Value], before: Sequence[Value]) -> list[ValueEntry]:
    """Describe parameters or results, of which `before` is what was captured."""
    entries = [_value(value) for value in values]
    for entry, value, captured in zip(entries, values, before, strict=True):
        if value.type.dtype != captured.type.dtype:
            entry["element"] = captured.type.dtype.name
    return entries


def _value(value: Value) -> ValueEntry:
    shape = [d if isinstance(d, int) else print_dim(d) for d in value.type.shape]
    return {"name": value.name, "dtype": value.type.dtype.name, "shape": shape}


def _memory(function: Function, times: int = 1) -> Iterator[MemoryEntry]:
    """Yield the memory plan of a function and of the bodies that it calls."""
    yield {
        "function": function.name,
        "times": times,
        "slots": [{"size": print_dim(s.size), "values": len(s.values)} for s in function.arena],
    }
    for node in function.nodes:
        if isinstance(node.op, Call):
            yield from _memory(node.op.body, node.op.times)


def _pass(record: PassRecord) -> PassEntry:
    return {
        "name": record.name,
        "stage": record.stage,
        "seconds": round(record.seconds, 4),
        "nodes_before": record.nodes_before,
        "nodes_after": record.nodes_after,
    }


# ------------------------------------------------------------------------------- weights


def _constants(
    graph: Graph, captured: Captured
) -> tuple[dict[str, ConstantEntry], list[FileEntry], tuple[bytes | memoryview, ...]]:
    """Return the table of constants, the weight files, and the file of data held in memory."""
    names = dict.fromkeys(v.name for f in graph.functions for v in f.constants)
    weights = {name: graph.weights[name] for name in names}
    splits = [split for w in weights.values() for split in w.splits]
    placements = {split.placement for split in splits if isinstance(split, Placed)}
    held = {
        name: w.data for name, w in weights.items() if w.data is not None and name not in placements
    }
    plan = layout([_entry(name, weights[name]) for name in held])
    where = dict(zip(held, plan.offsets, strict=True))
    used = list(dict.fromkeys(p.file for w in weights.values() for p in w.pieces))
    index = {file: number for number, file in enumerate(used)}
    files = [_file((captured.folder or Path()) / file) for file in used]
    if held:
        files.append({"path": CONSTANTS, "size": plan.size, "fingerprint": None})
    table: dict[str, ConstantEntry] = {}
    for name, weight in weights.items():
        entry: ConstantEntry = {
            "dtype": weight.dtype.name,
            "format": captured.graph.weights.get(name, weight).dtype.name,
            "shape": [int(d) for d in weight.whole.shape],
            "grid": weight.grid,
            "file": None,
            "offset": None,
            "tensor": None,
        }
        if weight.splits:
            entry["splits"] = [asdict(split) for split in weight.splits]
        if name in placements and weight.data is not None:
            place: tuple[list[int], list[int], list[str]] = ([], [], [])
            entry["values"] = weight.data.tolist()
        elif name in held:
            count, size = prod(weight.grid_shape), weight.nbytes
            offsets = [where[name] + i * size // max(count, 1) for i in range(count)]
            place = ([len(used)] * count, offsets, [name] * count)
        else:
            place = (
                [index[p.file] for p in weight.pieces],
                [p.offset for p in weight.pieces],
                [p.tensor for p in weight.pieces],
            )
        if weight.data is not None or weight.pieces:
            entry["file"], entry["offset"], entry["tensor"] = place
        table[name] = entry
    data = tuple(chunks(plan, ([_bytes(a)] for a in held.values()))) if held else ()
    return table, files, data


def _entry(name: str, weight: Weight) -> Entry:
    return Entry(name, weight.dtype.name, tuple(int(d) for d in weight.whole.shape), weight.nbytes)


def _bytes(array: np.ndarray) -> bytes | memoryview:
    array = np.asarray(array, order="C")
    return array.reshape(-1).view(np.uint8).data if array.size else b""


def _file(path: Path) -> FileEntry:
    return {"path": str(path), "size": path.stat().st_size, "fingerprint": fingerprint(path)}
