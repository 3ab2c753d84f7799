"""Planned graph → module: kernel IR, source, machine code."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass

from ..errors import DiluError
from ..ir.graph import Graph
from ..runtime.progress import Progress, silent
from .c.driver import compile_source
from .c.emit import emit_module
from .kernel_ir import Program
from .lower import lower
from .names import with_own_sizes, with_users_names
from .target import Target


@dataclass(frozen=True)
class KernelInfo:
    """A kernel as the graph names it, the function that serves it, and that function's source."""

    name: str
    kind: str
    function: str
    source: str


@dataclass(frozen=True)
class Module:
    """Compiled functions.

    `functions` are in the order of `dilu_run`'s numbers, `symbols` of each in the order of
    `dilu_call.sizes`. `library` is empty for a target that executes nothing, and for GPUs, whose
    code and plans are in `files`, by their names in the target's folder.
    """

    target: Target
    source: str
    kernels: tuple[KernelInfo, ...]
    library: bytes
    functions: tuple[str, ...]
    symbols: tuple[tuple[str, ...], ...]
    program: Program
    files: Mapping[str, bytes]


def generate(
    graph: Graph, target: Target, *, progress: Progress = silent, optimize: str = "-O3"
) -> Module:
    """Return the module of a planned graph for `target`.

    Raises DiluError for a region that no kernel computes, and when the target's compiler is
    missing or fails. `progress` is told what is done.
    """
    own, names = with_own_sizes(graph)
    try:
        return _generate(own, names, target, progress, optimize)
    except DiluError as error:
        raise with_users_names(error, names) from None


def _generate(
    graph: Graph, names: Mapping[str, str], target: Target, progress: Progress, optimize: str
) -> Module:
    """Return the module of a graph whose sizes have names of ours; `names` are the users'."""
    progress(f"lowering for {target.name}")
    program = lower(graph, target)
    progress(f"writing source for {target.name}")
    files: Mapping[str, bytes] = {}
    library = b""
    if target.language == "c":
        source, emitted = emit_module(program, target)
        kernels = tuple(KernelInfo(k.name, k.kind, k.function, k.source) for k in emitted)
        if target.executable:
            progress(f"compiling for {target.name}")
            library = compile_source(source, target, optimize=optimize)
    else:
        from .triton.build import build  # only here: a CPU needs none of it

        built = build(program, target, names, progress=progress)
        source, files = built.source, built.files
        kernels = tuple(KernelInfo(k.name, k.kind, name, text) for k, name, text in built.kernels)
    return Module(
        target,
        source,
        kernels,
        library,
        tuple(f.name for f in graph.functions),
        tuple(tuple(names[s] for s in entry.symbols) for entry in program.entries),
        program,
        files,
    )
