"""How experts are placed on the ranks of a mesh: by which load, and in which cluster."""

from __future__ import annotations

from dataclasses import dataclass, replace
from typing import Any

import numpy as np

from ..ir.mesh import Mesh, parse_mesh
from ..options import Options
from .cluster import read_cluster
from .expert_load import ExpertLoad, read_load
from .place_experts import place_experts


@dataclass(frozen=True)
class Placing:
    """Places the experts of any run of layers.

    `load` is None where all experts are taken to be asked for equally often. `levels` are those of
    `place_experts`, empty where the cluster is not known; `groups` the model's groups of experts.
    """

    mesh: Mesh
    replicas: int = 0
    load: ExpertLoad | None = None
    levels: tuple[int, ...] = ()
    groups: int = 1

    def __call__(self, name: str, layers: int, experts: int) -> np.ndarray:
        """Return i64[layers, ranks, slots]: which experts the slots of a rank hold."""
        equal = np.ones((layers, experts))
        load_LE = equal if self.load is None else self.load.of(name, layers, experts)
        slots = experts + self.replicas
        return place_experts(load_LE, self.mesh.ep, slots, **self.topology).slots

    def for_groups(self, groups: int) -> Placing:
        """Return how experts are placed that are asked for in so many groups."""
        return replace(self, groups=groups)

    @property
    def topology(self) -> dict[str, Any]:
        """What experts are placed by beside their load, as keywords of `place_experts`."""
        return {"levels": list(self.levels), "groups": self.groups} if self.levels else {}


def read_placing(options: Options) -> Placing | None:
    """Return how experts are placed, by the files that options name; None without a mesh. Raises
    DiluError where a file is none of its kind or does not fit the mesh."""
    if options.mesh is None:
        return None
    mesh, levels, load = parse_mesh(options.mesh), (), None
    if options.cluster is not None:
        levels = read_cluster(options.cluster).levels_of(mesh.ep, mesh.tp)
    if options.expert_load is not None:
        load = read_load(options.expert_load)
    return Placing(mesh, options.replicas, load, levels)
