"""Running passes: verify, time, print, dump, and blame.

A pass is a callable from graph to graph. The manager, not the pass, checks what comes out of it,
so that a pass reads as the rewrite alone and an error always names the pass it came from.
"""

from __future__ import annotations

import sys
import time
from collections import Counter
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field, replace
from functools import partial
from pathlib import Path

from .. import knobs
from ..errors import DiluError
from ..ir.graph import Function, Graph
from ..ir.ops.control import Subprogram
from ..ir.text import print_graph
from ..ir.verify import verify

Pass = Callable[[Graph], Graph]


@dataclass(frozen=True)
class PassRecord:
    """What one pass did.

    `ops` is by how many nodes of an op there are more (or fewer) after it. `text` is the text of
    the graph where the pass completed `stage`, and None elsewhere.
    """

    name: str
    seconds: float
    nodes_before: int
    nodes_after: int
    stage: str
    ops: Mapping[str, int] = field(default_factory=dict)
    text: str | None = None


def pass_name(function: Pass) -> str:
    """Return the name of a pass, through `functools.partial`."""
    while isinstance(function, partial):
        function = function.func
    return getattr(function, "__name__", type(function).__name__)


def count_ops(graph: Graph) -> Counter[str]:
    """Return how many nodes of every op a graph has, bodies of calls included."""
    counts: Counter[str] = Counter()

    def add(function: Function) -> None:
        for node in function.nodes:
            counts[node.op.name] += 1
            if isinstance(node.op, Subprogram):
                add(node.op.body)

    for function in graph.functions:
        add(function)
    return counts


def run_passes(
    graph: Graph,
    stages: Mapping[str, Sequence[Pass]],
    *,
    on_pass: Callable[[str], None] | None = None,
) -> tuple[Graph, list[PassRecord]]:
    """Run the passes of every stage in order; raise DiluError naming the pass that went wrong.

    A graph carries the name of a stage once its last pass has run. `on_pass` is told the name of
    every pass before it runs.
    """
    names = [pass_name(p) for passes in stages.values() for p in passes]
    watch = _Watch(names)
    verify(graph)
    watch.dump(graph, graph.stage)
    records: list[PassRecord] = []
    for stage, passes in stages.items():
        for i, function in enumerate(passes):
            name = pass_name(function)
            if on_pass is not None:
                on_pass(name)
            watch.show("before", name, graph)
            last = i == len(passes) - 1
            before, start = count_ops(graph), time.perf_counter()
            graph = _checked(function, graph, name, stage if last else None)
            seconds, after = time.perf_counter() - start, count_ops(graph)
            watch.show("after", name, graph)
            watch.dump(graph, name)
            records.append(
                PassRecord(
                    name,
                    seconds,
                    before.total(),
                    after.total(),
                    stage,
                    {op: n for op in before | after if (n := after[op] - before[op])},
                    print_graph(graph) if last else None,
                )
            )
    return graph, records


def stage_texts(captured: Graph, records: Sequence[PassRecord]) -> dict[str, str]:
    """Return the text of the graph at every stage that `records` completed, by stage."""
    texts = {captured.stage: print_graph(captured)}
    return texts | {r.stage: r.text for r in records if r.text is not None}


def _checked(function: Pass, graph: Graph, name: str, completes: str | None) -> Graph:
    """Apply a pass and verify what it returns."""
    try:
        made = function(graph)
        if not isinstance(made, Graph):  # pyright: ignore[reportUnnecessaryIsInstance]
            raise DiluError(f"the pass returned {type(made).__name__}, not a Graph")
        if completes is not None and made.stage != completes:
            made = replace(made, stage=completes)
        verify(made)
    except DiluError as error:
        raise error.in_pass(name) from error.__cause__
    except Exception as error:
        hint = f"{knobs.DEBUG.name}=1 shows where"
        message = f"{type(error).__name__}: {error}"
        raise DiluError(message, hint=hint).in_pass(name) from error
    return made


class _Watch:
    """What the user asked to see of a run."""

    def __init__(self, names: Sequence[str]) -> None:
        self.moments = knobs.PRINT.get()
        self.folder: Path | None = knobs.DUMP.get()
        self.count = 0
        for moment in self.moments:
            if moment != "all" and moment.partition(":")[2] not in names:
                raise DiluError(
                    f"{knobs.PRINT.name} asks for {moment!r}, and there is no such pass",
                    hint=f"passes: {', '.join(dict.fromkeys(names))}",
                )

    def show(self, when: str, name: str, graph: Graph) -> None:
        if f"{when}:{name}" in self.moments or ("all" in self.moments and when == "after"):
            sys.stderr.write(f"# {when} {name}\n{print_graph(graph, locations=True)}\n")

    def dump(self, graph: Graph, name: str) -> None:
        if self.folder is not None:
            self.folder.mkdir(parents=True, exist_ok=True)
            path = self.folder / f"{self.count:02d}-{name}.txt"
            path.write_text(print_graph(graph, locations=True), "utf-8")
            self.count += 1
