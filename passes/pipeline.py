"""THE list of passes, by the stage they complete, and how a user adds to it."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from functools import partial
from typing import Protocol

from ..errors import DiluError
from ..ir.dtypes import DType
from ..ir.graph import Graph
from ..ir.mesh import Mesh
from .absorb_mla import absorb_mla
from .drop_empty import drop_empty
from .drop_unit_axes import drop_unit_axes
from .eliminate_common import eliminate_common
from .eliminate_dead import eliminate_dead
from .expand_powers import expand_powers
from .fold_constants import fold_constants
from .fuse_experts import fuse_experts
from .fuse_loops import fuse_loops
from .fuse_matmul import fuse_matmul
from .fuse_rest import fuse_rest
from .fuse_updates import fuse_updates
from .hoist_take import hoist_take
from .legalize_float8 import legalize_float8
from .manager import Pass, PassRecord, pass_name, run_passes
from .plan_memory import plan_memory
from .shard_experts import Placing, shard_experts
from .shard_tensors import shard_tensors
from .simplify_identities import simplify_identities
from .sink_views import sink_views

#: A pass to add at the end of `normalized`, or (place, pass) with a place such as
#: `after:fold_constants`, `before:fuse_loops` or `replace:fuse_loops` (None to leave it out).
ExtraPass = Pass | tuple[str, Pass | None]


class PassTarget(Protocol):
    """What passes may ask of a target: the narrow float types it computes with."""

    @property
    def native(self) -> frozenset[DType]: ...


@dataclass(frozen=True)
class Sharding:
    """The ranks that run a graph together, and which experts each of them holds."""

    mesh: Mesh
    place: Placing


def pipeline(target: PassTarget, sharding: Sharding | None = None) -> dict[str, list[Pass]]:
    """Return the passes in order of running, under the stage that they complete."""
    sharded: dict[str, list[Pass]] = {}
    if sharding is not None:
        passes: list[Pass] = [
            partial(shard_tensors, mesh=sharding.mesh),
            partial(shard_experts, mesh=sharding.mesh, place=sharding.place),
        ]
        sharded = {"sharded": passes}
    return {
        "normalized": [
            absorb_mla,
            drop_empty,
            fold_constants,
            expand_powers,
            drop_unit_axes,
            simplify_identities,
            sink_views,
            simplify_identities,
            eliminate_common,
            eliminate_dead,
            hoist_take,
        ],
        "legalized": [
            partial(legalize_float8, native=target.native),
            eliminate_common,
        ],
        **sharded,
        "fused": [
            fuse_experts,
            fuse_matmul,
            fuse_updates,
            fuse_loops,
            fuse_rest,
        ],
        "planned": [
            plan_memory,
        ],
    }


def compile_graph(
    graph: Graph,
    target: PassTarget,
    *,
    passes: Sequence[ExtraPass] | None = None,
    sharding: Sharding | None = None,
    until: str = "planned",
    on_pass: Callable[[str], None] | None = None,
) -> tuple[Graph, list[PassRecord]]:
    """Run the pipeline on a graph, from the stage it is at; return it and what every pass did.

    `passes` are added to the list (see `ExtraPass`), `sharding` divides the graph among
    ranks, `until` is the last stage to complete, `on_pass` hears the name of each pass before it
    runs. Raises DiluError naming the pass that went wrong.
    """
    stages = with_extra(pipeline(target, sharding), passes or ())
    names = list(stages)
    first = names.index(graph.stage) + 1 if graph.stage in names else 0
    wanted = names[first : names.index(until) + 1]
    return run_passes(graph, {name: stages[name] for name in wanted}, on_pass=on_pass)


def with_extra(stages: dict[str, list[Pass]], extra: Sequence[ExtraPass]) -> dict[str, list[Pass]]:
    """Return `stages` with a user's passes put in; raise DiluError for a place there is not."""
    stages = {stage: list(passes) for stage, passes in stages.items()}
    for item in extra:
        if not isinstance(item, tuple):
            stages["normalized"].append(item)
            continue
        place, added = item
        when, _, name = place.rpartition(":")
        found = [
            (passes, i)
            for passes in stages.values()
            for i, p in enumerate(passes)
            if pass_name(p) == name
        ]
        if when not in ("", "before", "after", "replace") or not found:
            raise DiluError(
                f"there is no place {place!r} for a pass",
                hint="use before:, after: or replace: with one of "
                + ", ".join(dict.fromkeys(pass_name(p) for ps in stages.values() for p in ps)),
            )
        passes, at = found[0] if when == "before" else found[-1]
        start = at if when in ("before", "replace") else at + 1
        passes[start : at + 1 if when == "replace" else start] = [] if added is None else [added]
    return stages
