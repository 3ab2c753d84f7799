"""What is true at every stage: the ops that may stand in a graph, and the types that are gone."""

from __future__ import annotations

from dataclasses import dataclass

STAGES = ("captured", "normalized", "legalized", "sharded", "fused", "planned")


@dataclass(frozen=True)
class Stage:
    """`only`: when not empty, no other op may stand outside kernel bodies. `gone`: ops that may
    stand nowhere. `narrow_floats`: whether f8/f4 types may still occur."""

    only: frozenset[str] = frozenset()
    gone: frozenset[str] = frozenset()
    narrow_floats: bool = True
    planned: bool = False


#: Ops in which ranks of a mesh take part together.
COLLECTIVES = frozenset({"routed", "all_reduce", "all_gather"})
_CODES = frozenset({"decode", "encode"})
#: What a fused function consists of: kernels, calls, and views that cost nothing.
_REGIONS = frozenset({"kernel", "call", "reshape"}) | COLLECTIVES

SPECS: dict[str, Stage] = {
    "captured": Stage(gone=_CODES | COLLECTIVES | {"kernel"}),
    "normalized": Stage(gone=_CODES | COLLECTIVES | {"kernel"}),
    # Kernels may stand here too: fusion makes them one by one.
    "legalized": Stage(gone=COLLECTIVES, narrow_floats=False),
    "sharded": Stage(narrow_floats=False),
    "fused": Stage(only=_REGIONS, narrow_floats=False),
    "planned": Stage(only=_REGIONS, narrow_floats=False, planned=True),
}
