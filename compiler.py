"""`dilu.compile`: a model in, an artifact out.

    model → frontend → captured graph → passes → planned graph → codegen → artifact

Invariant: a checkpoint's weights are neither read (beyond headers and fingerprints) nor converted;
nothing is written before the caller saves the artifact.
"""

from __future__ import annotations

import dataclasses
import os
from collections.abc import Iterator, Mapping, Sequence
from math import prod
from pathlib import Path
from typing import TYPE_CHECKING, Any

from . import __version__
from .errors import DiluError
from .runtime.artifact.artifact import CONSTANTS, FORMAT, Artifact, Content
from .runtime.artifact.fingerprint import fingerprint
from .runtime.artifact.tensor_file import Entry, chunks, layout
from .runtime.cpu.features import architecture
from .runtime.progress import Progress, silent

if TYPE_CHECKING:
    import numpy as np

    from .codegen.generate import Module
    from .codegen.target import Target
    from .ir.graph import Function, Graph, Value
    from .ir.weights import Weight
    from .passes.manager import PassRecord
    from .passes.pipeline import ExtraPass, Sharding

DTYPES = ("f32", "bf16")


@dataclasses.dataclass(frozen=True)
class _Captured:
    """What the frontend returned, and where it came from."""

    graph: Graph
    name: str
    source: str
    folder: Path | None = None  # that the pieces of weights are files of
    language_model: dict[str, Any] | None = None
    signature: dict[str, Any] | None = None  # how `main` is called, where it is not flat
    tokenizer: Mapping[str, bytes] = dataclasses.field(default_factory=dict)


def compile(
    model: Any,
    example_inputs: Sequence[Any] | Mapping[str, Any] | None = None,
    target: str | Sequence[str] = "cpu",
    passes: Sequence[ExtraPass] | None = None,
    *,
    example_kwargs: Mapping[str, Any] | None = None,
    dtype: str | None = None,
    config_only: bool = False,
    bundle: bool = False,
    max_seq: int | None = None,
    dynamic_shapes: Any = None,
    mesh: str | None = None,
    replicas: int = 0,
    expert_load: str | os.PathLike[str] | None = None,
    cluster: str | os.PathLike[str] | None = None,
    progress: Progress | None = None,
) -> Artifact:
    """Compile a model and return the artifact, not saved yet.

    `model` is a `torch.nn.Module` or a function of tensors, an `ExportedProgram` or a .pt2 file of
    one, the directory of a checkpoint, or with `config_only` a config.json. A module needs
    `example_inputs`, a tuple (or a dictionary of keyword inputs), may have `example_kwargs`, and
    for symbolic sizes the `dynamic_shapes` of `torch.export`; the session is called as the module
    is, and plain values among the examples are part of the program. `target` is a name or several,
    `cpu` being the best for this machine. `passes` are added to the pipeline. `dtype` is what a
    language model computes in (f32 unless said), `max_seq` the longest sequence it takes, `bundle`
    copies the weights into the artifact when it is saved. `mesh`, such as `ep=8`, is for as many
    processes, which share out experts (with `replicas` more of the hottest, by `expert_load`, a
    file that `dilu run --record-load` wrote) and sequences; with `cluster`, a YAML file, groups of
    experts that are asked for together stay on a machine. Raises DiluError for whatever cannot be
    compiled.
    """
    report = progress or silent
    examples = {
        "example_inputs": example_inputs,
        "example_kwargs": example_kwargs,
        "dynamic_shapes": dynamic_shapes,
    }
    if dtype is not None and dtype not in DTYPES:
        raise DiluError(f"unknown dtype {dtype!r}", hint=f"dtype is one of {', '.join(DTYPES)}")
    report("look up targets")
    targets = _targets([target] if isinstance(target, str) else target)
    path = _path(model)
    topology = _topology(mesh, cluster, path)
    sharding = _sharding(mesh, replicas, expert_load, topology)
    if path is not None and path.suffix != ".pt2":
        _refuse("modules", "this is a checkpoint", **examples)
        captured = _capture_checkpoint(path, dtype or "f32", config_only, max_seq, report)
    else:
        _refuse(
            "checkpoints",
            "this is a module",
            config_only=config_only or None,
            max_seq=max_seq,
            mesh=mesh,
            dtype=dtype,
        )
        captured = _capture_module(path or model, examples, report)

    from .passes.manager import stage_texts
    from .passes.pipeline import compile_graph
    from .passes.shard_experts import expert_blocks

    planned, records = compile_graph(
        captured.graph, targets[0], passes=passes, sharding=sharding, on_pass=report
    )
    modules = [_generated(planned, each, report) for each in targets]
    files: dict[str, Content] = {
        f"graph/{stage}.txt": text.encode()
        for stage, text in stage_texts(captured.graph, records).items()
    }
    files |= captured.tokenizer
    for module in modules:
        files |= _module_files(module)
    report("describe weights")
    constants, weight_files, data = _constants(planned, captured)
    if data:
        files[CONSTANTS] = data
    manifest: dict[str, Any] = {
        **_program(planned, modules, records, captured),
        "name": captured.name,
        "files": weight_files,
        "constants": constants,
        "language_model": captured.language_model,
        "mesh": dataclasses.asdict(planned.mesh) if planned.mesh is not None else None,
        "topology": topology,
        "experts": [dataclasses.asdict(b) for b in expert_blocks(planned.functions[0])],
        "options": {
            "source": captured.source,
            "dtype": (dtype or "f32") if captured.language_model is not None else None,
            "max_seq": max_seq,
            "config_only": config_only,
        },
    }
    return Artifact(manifest, files, bundle=bundle)


def _topology(mesh: str | None, cluster: Any, path: Path | None) -> dict[str, Any]:
    """Return what experts are placed by beside their load, as keywords of `place_experts`: how
    their ranks lie in the cluster, and the model's groups of experts."""
    if cluster is None:
        return {}
    if mesh is None:
        raise DiluError("cluster is given, but no mesh", hint="give one, such as ep=8")
    from .frontend.checkpoint.checkpoint import read_config
    from .ir.mesh import parse_mesh
    from .planner.cluster import read_cluster

    parsed = parse_mesh(mesh)
    levels = read_cluster(cluster).levels_of(parsed.ep, parsed.tp)
    groups = read_config(path).get("n_group") if path is not None and path.suffix != ".pt2" else 1
    return {"levels": list(levels), "groups": groups or 1}


def _sharding(
    mesh: str | None, replicas: int, load: Any, topology: Mapping[str, Any]
) -> Sharding | None:
    if mesh is None:
        for name, given in (("replicas", replicas), ("expert_load", load)):
            if given:
                raise DiluError(f"{name} is given, but no mesh", hint="give one, such as ep=8")
        return None
    import numpy as np

    from .ir.mesh import parse_mesh
    from .passes.pipeline import Sharding
    from .planner.expert_load import read_load
    from .planner.place_experts import place_experts

    parsed = parse_mesh(mesh)
    loads = None if load is None else read_load(load)

    def place(name: str, layers: int, experts: int) -> np.ndarray:
        load_LE = loads.of(name, layers, experts) if loads is not None else None
        if load_LE is None:
            load_LE = np.ones((layers, experts))
        return place_experts(load_LE, parsed.ep, experts + replicas, **topology).slots

    return Sharding(parsed, place)


def rebalance(
    path: str | os.PathLike[str], expert_load: str | os.PathLike[str]
) -> dict[str, float]:
    """Place the experts of a sharded artifact anew, by a file that `dilu run --record-load` wrote.

    Only the manifest is written, at once or not at all. Returns the load of the busiest rank over
    the mean of all, averaged over the layers, `before` and `after`. Raises DiluError where the
    artifact is not sharded or the load is of another model.
    """
    import numpy as np

    from .planner.expert_load import read_load
    from .planner.place_experts import ExpertPlacement, place_experts
    from .runtime.mesh.shard import placements

    artifact = Artifact.open(path)
    placed = placements(artifact.manifest)
    if not placed:
        raise DiluError(
            f"{artifact.name} has no experts on several ranks", hint="compile it with --mesh ep=8"
        )
    loads = read_load(expert_load)
    constants = dict(artifact.manifest["constants"])
    ratios: dict[str, list[float]] = {"before": [], "after": []}
    for name, old in placed.items():
        layers, ranks, slots = old.shape
        load_LE = loads.of(name, layers, int(old.max()) + 1)
        new = place_experts(load_LE, ranks, ranks * slots, **artifact.manifest.get("topology", {}))
        before = ExpertPlacement(old, new.experts)
        ratios["before"] += before.imbalance(load_LE).tolist()
        ratios["after"] += new.imbalance(load_LE).tolist()
        constants[name] = {**constants[name], "values": new.slots.tolist()}
    artifact.replace_manifest({**artifact.manifest, "constants": constants})
    return {when: float(np.mean(values)) for when, values in ratios.items()}


def _targets(names: Sequence[str]) -> list[Target]:
    """Return the targets, each once; raise DiluError early for one that cannot be compiled for."""
    from .codegen.targets import find_target

    targets = list(dict.fromkeys(find_target(name) for name in names))
    if not targets:
        raise DiluError("no target is given", hint="`cpu` is the best for this machine")
    if len({t.native for t in targets}) > 1:
        raise DiluError(
            "these targets compute with different element types and cannot share an artifact: "
            + ", ".join(t.name for t in targets),
            hint="compile an artifact for each",
        )
    if any(t.executable and t.language == "c" for t in targets):
        from .codegen.c.driver import find_compiler

        find_compiler()
    return targets


def _path(model: Any) -> Path | None:
    """Return the path that `model` is, None where it is a model itself."""
    if not isinstance(model, (str, os.PathLike)):
        return None
    path = Path(model)
    if not path.exists():
        raise DiluError(f"no such path: {path}", hint="give the directory of a checkpoint")
    return path


def _capture_checkpoint(
    path: Path, dtype: str, config_only: bool, max_seq: int | None, report: Progress
) -> _Captured:
    if path.is_file() and not config_only:
        raise DiluError(
            f"not a checkpoint: {path} is a file",
            hint="give the checkpoint's directory, or --config-only to compile without weights",
        )
    report("load the compiler")
    from .frontend.checkpoint.checkpoint import read_config
    from .frontend.language.language_model import capture_language_model
    from .frontend.language.tokenizer import read_tokenizer

    read_config(path)  # its errors come before those of anything that takes long
    report("capture")
    graph, info = capture_language_model(path, dtype=dtype, config_only=config_only)
    described = info.to_dict()
    longest: int = described["max_positions"]
    if max_seq is not None:
        if not 1 <= max_seq <= longest:
            raise DiluError(
                f"max_seq is {max_seq}, and the model takes 1 to {longest} tokens",
                hint="leave --max-seq out for the longest",
            )
        described["max_positions"] = max_seq
    folder = path.parent if path.is_file() else path
    absolute = folder.resolve()
    tokenizer = read_tokenizer(absolute, described["vocab_size"])
    described["notes"] += tokenizer.notes
    name = absolute.name if path.is_dir() or path.stem == "config" else path.stem
    return _Captured(
        graph, name, str(path.resolve()), absolute, described, tokenizer=tokenizer.files
    )


def _refuse(what_for: str, what: str, **given: Any) -> None:
    """Raise DiluError for an argument that is given and means nothing for this model."""
    for name, value in given.items():
        if value is not None:
            raise DiluError(f"{name} is for {what_for}, and {what}")


def _capture_module(model: Any, examples: dict[str, Any], report: Progress) -> _Captured:
    report("load the compiler")
    import torch

    from .frontend.program.capture import capture_call

    name, source = type(model).__name__, type(model).__name__
    if isinstance(model, Path):
        name, source = model.stem, str(model.resolve())
        try:
            model = torch.export.load(model)
        except Exception as error:  # whatever torch raises for a file that is none of its own
            raise DiluError(f"not an exported program: {source} ({error})") from error
    if isinstance(model, torch.export.ExportedProgram):
        _refuse("modules", "an exported program has its own", **examples)
    elif isinstance(model, type) or not callable(model):
        raise DiluError(
            f"cannot compile a {name}",
            hint="give a torch.nn.Module, an ExportedProgram or the path of a checkpoint",
        )
    elif not isinstance(model, torch.nn.Module):
        name = source = getattr(model, "__name__", name).strip("<>")
    report("capture")
    call = capture_call(model, **examples)
    return _Captured(call.graph, name, source, signature=call.signature)


def _generated(graph: Graph, target: Target, report: Progress) -> Module:
    from .codegen.generate import generate

    return generate(graph, target, progress=report)


def _folder(module: Module) -> str:
    return f"kernels/{module.target.name.replace(':', '-')}"


def _module_files(module: Module) -> dict[str, Content]:
    files: dict[str, Content] = {_source_file(module): module.source.encode()}
    if module.library:
        files[f"{_folder(module)}/module.so"] = module.library
    return files | {f"{_folder(module)}/{name}": data for name, data in module.files.items()}


def _source_file(module: Module) -> str:
    return f"{_folder(module)}/module.{'c' if module.target.language == 'c' else 'py'}"


def _target(module: Module) -> dict[str, Any]:
    gpu = module.target.gpu
    machine: dict[str, Any] = {
        "library": f"{_folder(module)}/module.so" if module.library else None,
        "architecture": architecture(),
    }
    if gpu is not None:
        program = f"{_folder(module)}/program.json"
        machine = {"program": program, "backend": gpu.backend, "arch": gpu.arch}
    return {
        **machine,
        "source": _source_file(module),
        "requires": list(module.target.requires),
        "kernels": [_kernel(kernel, module.source) for kernel in module.kernels],
    }


def _kernel(kernel: Any, source: str) -> dict[str, Any]:
    """Describe a kernel; `lines` are the first and last of its text in the module's source."""
    start = source.find(kernel.source)
    lines = None
    if start >= 0:
        first = source.count("\n", 0, start) + 1
        lines = [first, first + kernel.source.rstrip("\n").count("\n")]
    return {"name": kernel.name, "kind": kernel.kind, "function": kernel.function, "lines": lines}


def _program(
    graph: Graph, modules: Sequence[Module], records: Sequence[PassRecord], captured: _Captured
) -> dict[str, Any]:
    """Return what the manifest says of the compiled program itself."""
    each = zip(graph.functions, captured.graph.functions, modules[0].symbols, strict=True)
    functions = [_function(f, before, symbols) for f, before, symbols in each]
    if captured.signature is not None:
        functions[0]["signature"] = captured.signature
    return {
        "format": FORMAT,
        "dilu": __version__,
        "functions": functions,
        "targets": {m.target.name: _target(m) for m in modules},
        "passes": [_pass(record) for record in records],
    }


def _function(function: Function, before: Function, symbols: Sequence[str]) -> dict[str, Any]:
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


def _boundary(values: Sequence[Value], before: Sequence[Value]) -> list[dict[str, Any]]:
    """Describe parameters or results; `element` is what the model calls the type of those that the
    compiled code has as codes."""
    return [
        _value(v) | ({} if v.type.dtype == b.type.dtype else {"element": b.type.dtype.name})
        for v, b in zip(values, before, strict=True)
    ]


def _value(value: Value) -> dict[str, Any]:
    from .ir.types import print_dim

    shape = [d if isinstance(d, int) else print_dim(d) for d in value.type.shape]
    return {"name": value.name, "dtype": value.type.dtype.name, "shape": shape}


def _memory(function: Function, times: int = 1) -> Iterator[dict[str, Any]]:
    """Yield the memory plan of a function and of the bodies that it calls."""
    from .ir.ops.control import Call
    from .ir.types import print_dim

    yield {
        "function": function.name,
        "times": times,
        "slots": [{"size": print_dim(s.size), "values": len(s.values)} for s in function.arena],
    }
    for node in function.nodes:
        if isinstance(node.op, Call):
            yield from _memory(node.op.body, node.op.times)


def _pass(record: PassRecord) -> dict[str, Any]:
    return {
        "name": record.name,
        "stage": record.stage,
        "seconds": round(record.seconds, 4),
        "nodes_before": record.nodes_before,
        "nodes_after": record.nodes_after,
    }


def _constants(
    graph: Graph, captured: _Captured
) -> tuple[dict[str, Any], list[dict[str, Any]], tuple[bytes | memoryview, ...]]:
    """Return the table of constants, the weight files, and the file of data held in memory.

    `dtype` is the element type in memory, `format` what the checkpoint calls it.
    """
    from .ir.weights import Placed

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
    table: dict[str, Any] = {}
    for name, weight in weights.items():
        entry: dict[str, Any] = {
            "dtype": weight.dtype.name,
            "format": captured.graph.weights.get(name, weight).dtype.name,
            "shape": [int(d) for d in weight.whole.shape],
            "grid": weight.grid,
        }
        if weight.splits:
            entry["splits"] = [dataclasses.asdict(split) for split in weight.splits]
        if name in placements and weight.data is not None:
            place = {"file": [], "offset": [], "tensor": [], "values": weight.data.tolist()}
        elif name in held:
            count, size = prod(weight.grid_shape), weight.nbytes
            offsets = [where[name] + i * size // max(count, 1) for i in range(count)]
            place = {"file": [len(used)] * count, "offset": offsets, "tensor": [name] * count}
        elif weight.pieces:
            place = {
                "file": [index[p.file] for p in weight.pieces],
                "offset": [p.offset for p in weight.pieces],
                "tensor": [p.tensor for p in weight.pieces],
            }
        else:
            place = {"file": None, "offset": None, "tensor": None}
        table[name] = entry | place
    data = tuple(chunks(plan, ([_bytes(a)] for a in held.values()))) if held else ()
    return table, files, data


def _entry(name: str, weight: Weight) -> Entry:
    return Entry(name, weight.dtype.name, tuple(int(d) for d in weight.whole.shape), weight.nbytes)


def _bytes(array: np.ndarray) -> bytes | memoryview:
    import numpy as np

    array = np.asarray(array, order="C")
    return array.reshape(-1).view(np.uint8).data if array.size else b""


def _file(path: Path) -> dict[str, Any]:
    return {"path": str(path), "size": path.stat().st_size, "fingerprint": fingerprint(path)}
