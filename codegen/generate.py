"""Planned graph → module: kernel IR, source, machine code."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

from ..ir.graph import Graph
from .c.driver import compile_source
from .c.emit import emit_module
from .kernel_ir import Program
from .lower import function_symbols, lower
from .target import Target

Progress = Callable[[str], None]


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
    `dilu_call.sizes`. `library` is empty for a target that executes nothing.
    """

    target: Target
    source: str
    kernels: tuple[KernelInfo, ...]
    library: bytes
    functions: tuple[str, ...]
    symbols: tuple[tuple[str, ...], ...]
    program: Program


def generate(
    graph: Graph, target: Target, *, progress: Progress | None = None, optimize: str = "-O3"
) -> Module:
    """Return the module of a planned graph for `target`.

    Raises DiluError for a region that no kernel computes, and when the C compiler is missing or
    fails. `progress` is told what begins.
    """
    say = progress or (lambda _: None)
    say("lowering")
    program = lower(graph, target)
    say("writing source")
    source, kernels = emit_module(program, target)
    library = compile_library(source, target, progress, optimize=optimize)
    return Module(
        target,
        source,
        tuple(KernelInfo(k.name, k.kind, k.function, k.source) for k in kernels),
        library,
        tuple(f.name for f in graph.functions),
        tuple(function_symbols(f) for f in graph.functions),
        program,
    )


def compile_library(
    source: str, target: Target, progress: Progress | None = None, *, optimize: str = "-O3"
) -> bytes:
    """Return the shared library of a module's source; nothing for a target that cannot run."""
    if not target.executable:
        return b""
    if progress is not None:
        progress("compiling")
    return compile_source(source, target, optimize=optimize)
