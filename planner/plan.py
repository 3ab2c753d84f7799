"""What planning found."""

from __future__ import annotations

from dataclasses import dataclass

from .cluster import Cluster
from .simulate import Demand, Estimate


@dataclass(frozen=True)
class Plan:
    """What was found: meshes, those that fit first, the fastest before others.

    `scaling` has the best mesh of growing parts of the cluster, None where none fits; `batches`
    the first mesh's estimates at growing batches.
    """

    name: str
    parameters: int
    dtype: str
    cluster: Cluster
    demand: Demand
    estimates: tuple[Estimate, ...]
    scaling: tuple[tuple[int, Estimate | None], ...] = ()
    batches: tuple[Estimate, ...] = ()

    @property
    def best(self) -> Estimate | None:
        """The fastest mesh that fits."""
        first = self.estimates[0] if self.estimates else None
        return first if first is not None and first.fits else None
