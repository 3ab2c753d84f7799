"""The mesh of ranks that one program runs on: named axes, coordinates, groups.

`ep` divides experts (and sequences), `tp` heads and columns, `dp` sequences alone. Ranks count
through the axes row-major in the order `dp, ep, tp`: those of a `tp` group are neighbours.
"""

from __future__ import annotations

from dataclasses import dataclass
from math import prod

from ..errors import DiluError

AXES = ("dp", "ep", "tp")
_HINT = "give sizes such as ep=8,tp=2; the axes are " + ", ".join(AXES)


@dataclass(frozen=True)
class Mesh:
    """The sizes of the axes, in the order of `AXES`."""

    dp: int = 1
    ep: int = 1
    tp: int = 1

    @property
    def size(self) -> int:
        """How many ranks there are."""
        return self.dp * self.ep * self.tp

    def coordinates(self, rank: int) -> dict[str, int]:
        """Return where a rank is along each axis."""
        found: dict[str, int] = {}
        for axis in reversed(AXES):
            rank, found[axis] = divmod(rank, getattr(self, axis))
        return found

    def rank(self, coordinates: dict[str, int]) -> int:
        """Return the rank at some coordinates."""
        rank = 0
        for axis in AXES:
            rank = rank * getattr(self, axis) + coordinates[axis]
        return rank

    def groups(self, axis: str) -> list[tuple[int, ...]]:
        """Return the groups of ranks that differ along `axis` alone, each in its order."""
        size = getattr(self, axis)
        first = [r for r in range(self.size) if self.coordinates(r)[axis] == 0]
        stride = prod(getattr(self, a) for a in AXES[AXES.index(axis) + 1 :])
        return [tuple(r + i * stride for i in range(size)) for r in first]

    def __str__(self) -> str:
        return ",".join(f"{a}={getattr(self, a)}" for a in AXES if getattr(self, a) > 1) or "ep=1"


def parse_mesh(text: str) -> Mesh:
    """Return the mesh that a text such as `ep=8,tp=2` names; raise DiluError where it is none."""
    sizes: dict[str, int] = {}
    for part in text.split(","):
        name, _, size = (piece.strip() for piece in part.partition("="))
        if name not in AXES or not size.isdecimal() or int(size) < 1:
            raise DiluError(f"not a mesh: {text!r}", hint=_HINT)
        if name in sizes:
            raise DiluError(f"the mesh {text!r} has the axis {name} twice", hint=_HINT)
        sizes[name] = int(size)
    return Mesh(**sizes)
