"""How long a step of a sharded model takes on a cluster, and what it holds in memory.

A kernel takes what its device needs to read its weights or to multiply with them, whichever is
longer; a collective takes what the levels it crosses need. Nothing overlaps, as nothing does when
an artifact runs. Ranks wait for the busiest one at every block of experts.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field, replace
from functools import lru_cache
from math import ceil, erf, exp, lgamma, log, sqrt

from ..codegen.kernel_ir import CallPlan, Plan, Program, RoutedPlan
from ..errors import DiluError
from ..ir.mesh import Mesh
from ..runtime.mesh.wire import check_format
from .cluster import Cluster
from .work import Sizes, Work, count_work, number

PARTS: tuple[str, ...] = ("products", "experts", "attention", "other", "network", "imbalance")


@dataclass(frozen=True)
class ShardedModel:
    """A model as the ranks of a mesh with some `tp` run it, for any number of ranks along `ep`.

    `weight_bytes` are those of a rank beside experts, `slot_bytes` those of a slot for an expert,
    in all layers; `page_bytes` those of a page of cache of `page` tokens. `experts` is 0 for a
    dense model.
    """

    program: Program
    dtype: str
    weight_bytes: float
    slot_bytes: float
    experts: int
    choices: int
    page: int
    page_bytes: float


@dataclass(frozen=True)
class Demand:
    """What is asked: `batch` sequences at once, each of `context` tokens, `prompt` of them given.

    Rows travel to experts in a format of `runtime.wire.FORMATS`.
    Raises DiluError for what nobody can ask.
    """

    batch: int = 32
    context: int = 4096
    prompt: int = 1024
    wire: str = "exact"

    def __post_init__(self) -> None:
        check_format(self.wire)
        for name in ("batch", "context", "prompt"):
            if getattr(self, name) < 1:
                raise DiluError(f"{name} is {getattr(self, name)}", hint=f"{name} is 1 or more")
        if self.prompt > self.context:
            raise DiluError(
                f"a prompt of {self.prompt} tokens is longer than its sequence of {self.context}",
                hint="give a larger --context or a smaller --prompt",
            )


@dataclass(frozen=True)
class Timing:
    """Seconds of a step by what takes them; `layers` by layer (name, times, seconds by part)."""

    parts: Mapping[str, float]
    layers: tuple[tuple[str, int, Mapping[str, float]], ...] = ()

    @property
    def seconds(self) -> float:
        return sum(self.parts.values())

    @property
    def limit(self) -> str:
        return max(self.parts, key=lambda part: self.parts[part])


@dataclass(frozen=True)
class Estimate:
    """What a mesh needs and makes. `memory` is of one rank, in bytes, by what it is for."""

    mesh: Mesh
    replicas: int
    cluster: Cluster
    demand: Demand
    memory: Mapping[str, float]
    decode: Timing
    prefill: Timing = field(repr=False)

    @property
    def fits(self) -> bool:
        return sum(self.memory.values()) <= self.cluster.device.memory

    @property
    def decode_rate(self) -> float:
        """Tokens per second of all sequences together."""
        return self.demand.batch / self.decode.seconds

    @property
    def prefill_rate(self) -> float:
        return self.demand.batch * self.demand.prompt / self.prefill.seconds


def simulate(
    model: ShardedModel,
    mesh: Mesh,
    cluster: Cluster,
    demand: Demand,
    *,
    replicas: int = 0,
    skew: float = 1.0,
) -> Estimate:
    """Return what the ranks of a mesh, one to a device of a cluster, need and make.

    `skew` is the mean load of the busiest rank's experts over the mean of all ranks (1: placing
    evened it out). Raises DiluError where the cluster has fewer devices.
    """
    if mesh.size > cluster.size:
        raise DiluError(
            f"the mesh {mesh} is for {mesh.size} devices, and {cluster.name} has {cluster.size}",
            hint="give a smaller --mesh, or none, to find one",
        )
    owners = mesh.dp * mesh.ep
    sequences = ceil(demand.batch / owners)
    decode = Sizes(sequences, sequences, sequences, demand.context, wire=demand.wire)
    tokens = sequences * demand.prompt
    prefill = Sizes(tokens, sequences, sequences, (demand.prompt + 1) / 2, wire=demand.wire)
    each = {"decode": demand.batch, "prefill": demand.batch * demand.prompt}
    timings = {
        name: _timing(model, mesh, cluster, sizes, each[name] / mesh.dp, replicas, skew)
        for name, sizes in (("decode", decode), ("prefill", prefill))
    }
    # Prompts are worked on in parts; a rank needs working memory for one.
    working = {"T": float(min(tokens, 2048)), "R": sequences, "S": sequences, "P": 1, "B": 1}
    arena = _arena(model.program.entries[0].plan, working)
    slots = (model.experts + replicas) / mesh.ep
    memory = {
        "weights": model.weight_bytes + slots * model.slot_bytes,
        "cache": sequences * ceil(demand.context / model.page) * model.page_bytes,
        "working": arena,
    }
    return Estimate(mesh, replicas, cluster, demand, memory, timings["decode"], timings["prefill"])


def _arena(plan: Plan, sizes: Mapping[str, float]) -> float:
    """Return the bytes of working memory of a plan and of the largest one that it runs."""
    inner = [0.0]
    for step in plan.steps:
        if isinstance(step, CallPlan):
            inner.append(_arena(step.plan, sizes))
        elif isinstance(step, RoutedPlan):
            inner.append(_arena(step.plan, {**sizes, step.symbol: step.capacity}))
    return sum(number(d, sizes) for d in plan.slots) + max(inner)


def _timing(
    model: ShardedModel,
    mesh: Mesh,
    cluster: Cluster,
    sizes: Sizes,
    tokens: float,
    replicas: int,
    skew: float,
) -> Timing:
    """Return the time of a step in which a group of `ep` works on `tokens` tokens."""
    total = tokens * model.choices
    mean = total / mesh.ep
    most = mean
    if mesh.ep > 1 and total:
        most = min(total, expected_most(total, mesh.ep) + (skew - 1) * mean)
    slots = (model.experts + replicas) // mesh.ep
    sizes = replace(sizes, slots=slots, ranks=mesh.ep)
    busy = count_work(model.program, replace(sizes, assignments=most))
    even = count_work(model.program, replace(sizes, assignments=mean))
    layers: list[tuple[str, int, Mapping[str, float]]] = []
    sums = dict.fromkeys(PARTS, 0.0)
    for layer, other in zip(busy, even, strict=True):
        found = dict.fromkeys(PARTS, 0.0)
        for work, usual in zip(layer.works, other.works, strict=True):
            seconds = _seconds(work, model, mesh, cluster)
            base = min(seconds, _seconds(usual, model, mesh, cluster))
            found[work.part] += base
            found["imbalance"] += seconds - base
        layers.append((layer.name, layer.times, found))
        for part, seconds in found.items():
            sums[part] += layer.times * seconds
    sums["other"] += cluster.device.step
    return Timing(sums, tuple(layers))


def _seconds(work: Work, model: ShardedModel, mesh: Mesh, cluster: Cluster) -> float:
    device = cluster.device
    if work.collective:
        ranks: int = getattr(mesh, work.axis)
        if ranks == 1:
            return 0.0
        stride = mesh.tp if work.axis == "ep" else 1
        if work.collective == "all_to_all":
            return cluster.all_to_all(ranks, stride, work.nbytes * (ranks - 1) / ranks)
        if work.collective == "all_reduce":
            return cluster.all_reduce(ranks, stride, work.nbytes)
        return cluster.all_gather(ranks, stride, work.nbytes)
    products = device.product_seconds(work.weights, work.weight_bytes, work.rows, model.dtype)
    return device.kernel + products + device.seconds(work.flops, work.nbytes, model.dtype)


@lru_cache(maxsize=10_000)
def expected_most(total: float, bins: int) -> float:
    """Return the mean of the largest count where `total` balls fall into `bins` bins alike.

    Counts are taken as independent and Poisson: Σ over m of 1 - P(count ≤ m)^bins; a ball there is
    falls somewhere.
    """
    mean = total / bins
    if mean > 500:  # near enough to a normal distribution
        return min(total, mean + sqrt(mean) * _largest_normal(bins))
    below, most = 0.0, 0.0
    for m in range(ceil(mean + 12 * sqrt(mean) + 20)):
        below = min(1.0, below + exp(m * log(mean) - mean - lgamma(m + 1)))
        most += 1 - below**bins
    return min(total, max(most, 1.0))


@lru_cache(maxsize=1_000)
def _largest_normal(count: int) -> float:
    """Return the mean of the largest of `count` numbers of the standard normal distribution."""
    step = 0.01
    points = [(i + 0.5) * step for i in range(-1000, 1000)]
    powers = [(0.5 * (1 + erf(x / sqrt(2)))) ** count for x in points]
    pairs = zip(points, powers, strict=True)
    return step * sum((1 - p) if x > 0 else -p for x, p in pairs)
