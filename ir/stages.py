"""What is true at every stage: the ops that may stand in a graph, and the types that are gone."""

from __future__ import annotations

from dataclasses import dataclass

STAGES = ("captured", "normalized", "legalized", "fused", "planned")


@dataclass(frozen=True)
class Stage:
    """`only`: when not empty, no other op may stand outside kernel bodies. `gone`: ops that may
    stand nowhere. `narrow_floats`: whether f8/f4 types may still occur."""

    only: frozenset[str] = frozenset()
    gone: frozenset[str] = frozenset()
    narrow_floats: bool = True
    planned: bool = False


_CODES = frozenset({"decode", "encode"})
#: What a fused function consists of: kernels, calls, and views that cost nothing.
_REGIONS = frozenset({"kernel", "call", "reshape"})

SPECS: dict[str, Stage] = {
    "captured": Stage(gone=_CODES | {"kernel"}),
    "normalized": Stage(gone=_CODES | {"kernel"}),
    "legalized": Stage(narrow_floats=False),  # kernels too: fusion makes them one by one
    "fused": Stage(only=_REGIONS, narrow_floats=False),
    "planned": Stage(only=_REGIONS, narrow_floats=False, planned=True),
}
