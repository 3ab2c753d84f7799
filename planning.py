"""`dilu.plan`: will a model fit a cluster, on which mesh, how fast, and what limits it.

    model → frontend → captured graph → passes and lowering for each `tp` → planner

Invariant: nothing is compiled for a device and no weight is read; the work that is simulated is
counted in the kernels and collectives that an artifact of that mesh would run.
"""

from __future__ import annotations

import os
from dataclasses import dataclass, replace
from functools import cache
from typing import TYPE_CHECKING, Any

import numpy as np

from .codegen.kernel_ir import CallPlan, RoutedPlan
from .codegen.kernel_ir import Plan as KernelPlan
from .errors import DiluError, UnsupportedError
from .ir.mesh import Mesh, parse_mesh
from .ir.types import evaluate
from .ir.weights import Placed
from .options import check_dtype, check_replicas
from .planner.cluster import Cluster, read_cluster
from .planner.expert_load import read_load
from .planner.place_experts import place_experts
from .planner.plan import Plan
from .planner.search import Skew, estimates, scaling
from .planner.simulate import Demand, Estimate, ShardedModel
from .runtime.progress import Progress, silent

if TYPE_CHECKING:
    from .ir.graph import Graph


def plan(
    model: str | os.PathLike[str],
    cluster: Cluster | str | os.PathLike[str],
    *,
    mesh: str | None = None,
    dtype: str | None = None,
    demand: Demand | None = None,
    replicas: int = 0,
    expert_load: str | os.PathLike[str] | None = None,
    progress: Progress | None = None,
) -> Plan:
    """Return how a checkpoint (or a config.json) would run on a cluster (or a file of one).

    `mesh` is simulated, or all of the cluster's size; `dtype` is what is computed in (bf16 where
    the device has a rate for it), `replicas` and `expert_load` as in `dilu.compile`. Raises
    DiluError for what is no model or no cluster.
    """
    report = progress or silent
    place = cluster if isinstance(cluster, Cluster) else read_cluster(cluster)
    wanted = parse_mesh(mesh) if mesh is not None else None
    load = read_load(expert_load) if expert_load is not None else None
    demand = demand or Demand()
    check_replicas(replicas)
    check_dtype(dtype)
    dtype = dtype or ("bf16" if "bf16" in place.device.compute else "f32")
    place.device.rate(dtype)
    report("load the compiler")
    prepared = prepare(model, dtype, progress=report)
    longest = prepared.longest
    if demand.context > longest:
        raise DiluError(
            f"the context is {demand.context}, and the model takes {longest} tokens at most",
            hint=f"give --context {longest} or less",
        )

    @cache
    def models(tp: int, routed: bool) -> ShardedModel | None:
        report(f"divide by tp={tp}")
        return prepared.sharded(tp, routed)

    skew: Skew | None = None
    if load is not None:
        loads = tuple(load.layers.values())

        def imbalance(ranks: int, more: int) -> float:
            ratios = [
                place_experts(load_LE, ranks, load_LE.shape[1] + more).imbalance(load_LE)
                for load_LE in loads
            ]
            return float(np.mean(np.concatenate(ratios)))

        skew = cache(imbalance)
    if wanted is not None and models(wanted.tp, wanted.ep > 1) is None:
        raise DiluError(
            f"{prepared.name} cannot be divided by {wanted}", hint="leave --mesh out to see others"
        )
    options: dict[str, Any] = {"replicas": replicas, "skew": skew}
    found = estimates(models, place, demand, mesh=wanted, **options)
    report("simulate parts of the cluster")
    parts = scaling(models, place, demand, **options) if wanted is None else []
    batches: list[Estimate] = []
    if found and found[0].fits:
        batches = _batches(found[0], models, place, options)
    return Plan(
        prepared.name,
        prepared.parameters,
        dtype,
        place,
        demand,
        tuple(found),
        tuple(parts),
        tuple(batches),
    )


def _batches(
    best: Estimate, models: Any, cluster: Cluster, options: dict[str, Any]
) -> list[Estimate]:
    """Return the estimates of a mesh at batches of 1, 4, 16, … as long as they fit."""
    found: list[Estimate] = []
    for exponent in range(0, 26, 2):
        demand = replace(best.demand, batch=1 << exponent)
        (estimate,) = estimates(models, cluster, demand, mesh=best.mesh, **options)
        if not estimate.fits:
            break
        found.append(estimate)
    return found


@dataclass(frozen=True)
class Prepared:
    """A captured language model, not divided yet; `longest` is the most tokens of a sequence."""

    name: str
    parameters: int
    longest: int
    dtype: str
    graph: Graph

    def sharded(self, tp: int, routed: bool) -> ShardedModel | None:
        """Return the model as divided among `tp` ranks, and its experts among any number where
        `routed`; None where that cannot be."""
        from .codegen.lower import lower
        from .codegen.targets import find_target
        from .passes.pipeline import Sharding, compile_graph

        counts: list[int] = []

        def place(_: str, layers: int, experts: int) -> np.ndarray:
            counts.append(experts)
            slots = np.resize(np.arange(experts), (2, -(-experts // 2)))
            return np.broadcast_to(slots, (layers, *slots.shape))

        target = find_target("null")
        mesh = Mesh(ep=2 if routed else 1, tp=tp)
        sharding = Sharding(mesh, place) if mesh.size > 1 else None
        try:
            planned, _ = compile_graph(self.graph, target, sharding=sharding)
        except UnsupportedError:
            return None
        if routed and not counts:
            return None
        program = lower(planned, target)
        weight_bytes, slot_bytes = _bytes(planned)
        states = planned.functions[0].states
        return ShardedModel(
            program=program,
            dtype=self.dtype,
            weight_bytes=weight_bytes,
            slot_bytes=slot_bytes,
            experts=counts[0] if counts else 0,
            choices=next(_choices(program.entries[0].plan), 0),
            page=next((int(v.type.shape[2]) for v in states), 1),
            page_bytes=sum(evaluate(v.type.nbytes, {"B": 1}) for v in states),
        )


def prepare(
    model: str | os.PathLike[str], dtype: str, *, progress: Progress | None = None
) -> Prepared:
    """Capture a checkpoint or a config.json, to be divided; raise DiluError where it is none."""
    from .codegen.targets import find_target
    from .frontend.checkpoint.checkpoint import read_config
    from .frontend.doors import find_model
    from .frontend.language.language_model import capture_language_model
    from .passes.pipeline import compile_graph

    report, path = progress or silent, find_model(model)
    read_config(path)  # its errors come before those of anything that takes long
    report("capture")
    weights = path.is_dir() and any(path.glob("*.safetensors"))
    captured, info = capture_language_model(path, dtype=dtype, config_only=not weights)
    report("simplify")
    graph, _ = compile_graph(captured, find_target("null"), until="legalized")
    described = info.to_dict()
    name = path.resolve().parent.name if path.name == "config.json" else path.resolve().stem
    return Prepared(name, described["parameters"], described["max_positions"], dtype, graph)


def _bytes(graph: Graph) -> tuple[float, float]:
    """Return the bytes of a rank's weights beside experts, and of a slot for an expert."""
    weights, slot = 0.0, 0.0
    for weight in graph.weights.values():
        nbytes = float(evaluate(weight.type.nbytes, {}))
        placed = next((s for s in weight.splits if isinstance(s, Placed)), None)
        if placed is None:
            weights += nbytes
        else:
            slot += nbytes / int(weight.type.shape[placed.dim])
    return weights, slot


def _choices(plan: KernelPlan) -> Any:
    """Yield how many experts every token chooses, from the blocks that route."""
    for step in plan.steps:
        if isinstance(step, CallPlan):
            yield from _choices(step.plan)
        elif isinstance(step, RoutedPlan):
            yield step.choices
