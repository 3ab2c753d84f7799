"""Which mesh: every one that fits a cluster is simulated, and the best are kept."""

from __future__ import annotations

from collections.abc import Callable, Iterator

from ..ir.mesh import Mesh
from .cluster import Cluster
from .simulate import Demand, Estimate, ShardedModel, simulate

#: (tp, routed) → the model as ranks of such a mesh run it, None where it cannot be divided so.
Models = Callable[[int, bool], ShardedModel | None]

#: (ranks along ep, replicas) → mean load of the busiest rank over that of all.
Skew = Callable[[int, int], float]

_MOST_TP = 16  # beyond it, heads and columns become too few


def candidates(devices: int, inner: int, experts: int) -> Iterator[Mesh]:
    """Yield the meshes of exactly so many devices, `tp` staying within units of `inner` devices."""
    for tp in _divisors(devices):
        if tp > min(inner, _MOST_TP):
            continue
        for ep in _divisors(devices // tp):
            if ep == 1 or ep <= experts:
                yield Mesh(dp=devices // tp // ep, ep=ep, tp=tp)


def _divisors(n: int) -> list[int]:
    small = [d for d in range(1, int(n**0.5) + 1) if n % d == 0]
    return sorted({*small, *(n // d for d in small)})


def estimates(
    models: Models,
    cluster: Cluster,
    demand: Demand,
    *,
    devices: int | None = None,
    mesh: Mesh | None = None,
    replicas: int = 0,
    skew: Skew | None = None,
) -> list[Estimate]:
    """Return what meshes need and make: those that fit first, then by tokens per second.

    All meshes of `devices` (all of the cluster's), or the one that is given.
    """
    inner = cluster.levels[0].count if cluster.levels else 1
    routed = models(1, True)
    experts = routed.experts if routed is not None else 0
    chosen = [mesh] if mesh else candidates(devices or cluster.size, inner, experts)
    found: list[Estimate] = []
    for each in chosen:
        model = models(each.tp, each.ep > 1)
        if model is None:
            continue
        more = replicas + (-(experts + replicas)) % each.ep if each.ep > 1 else 0
        found.append(
            simulate(
                model, each, cluster, demand,
                replicas=more, skew=skew(each.ep, more) if skew and each.ep > 1 else 1.0,
            )
        )  # fmt: skip
    found.sort(key=lambda e: (not e.fits, -e.decode_rate, e.decode.seconds, str(e.mesh)))
    return found


def scaling(
    models: Models, cluster: Cluster, demand: Demand, *, replicas: int = 0, skew: Skew | None = None
) -> list[tuple[int, Estimate | None]]:
    """Return the best mesh for growing parts of a cluster, None where nothing fits.

    Parts are whole units of a level, doubled until all devices are in.
    """
    found: list[tuple[int, Estimate | None]] = []
    for devices in _parts(cluster):
        best = estimates(models, cluster, demand, devices=devices, replicas=replicas, skew=skew)
        found.append((devices, best[0] if best and best[0].fits else None))
    return found


def _parts(cluster: Cluster) -> list[int]:
    sizes, unit = {1, cluster.size}, 1
    for level in cluster.levels:
        count = 1
        while count < level.count:
            sizes.add(unit * count)
            count *= 2
        unit *= level.count
    return sorted(sizes)
