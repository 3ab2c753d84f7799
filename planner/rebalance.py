"""Placing the experts of an artifact anew, by the load that was measured while it ran."""

from __future__ import annotations

import os

import numpy as np

from ..errors import DiluError
from ..runtime.artifact.artifact import Artifact
from ..runtime.mesh.shard import placements
from .expert_load import read_load
from .place_experts import ExpertPlacement, place_experts


def rebalance(
    path: str | os.PathLike[str], expert_load: str | os.PathLike[str]
) -> dict[str, float]:
    """Place the experts of a sharded artifact anew, by a file that `dilu run --record-load` wrote.

    Only the manifest is written, at once or not at all. Returns the load of the busiest rank over
    the mean of all, averaged over the layers, `before` and `after`. Raises DiluError where the
    artifact is not sharded or the load is of another model.
    """
    artifact = Artifact.open(path)
    placed = placements(artifact.manifest)
    if not placed:
        raise DiluError(
            f"{artifact.name} has no experts on several ranks", hint="compile it with --mesh ep=8"
        )
    loads = read_load(expert_load)
    constants = dict(artifact.manifest["constants"])
    ratios: dict[str, list[float]] = {"before": [], "after": []}
    for name, old in placed.items():
        layers, ranks, slots = old.shape
        load_LE = loads.of(name, layers, int(old.max()) + 1)
        new = place_experts(load_LE, ranks, ranks * slots, **artifact.manifest.get("topology", {}))
        before = ExpertPlacement(old, new.experts)
        ratios["before"] += before.imbalance(load_LE).tolist()
        ratios["after"] += new.imbalance(load_LE).tolist()
        constants[name] = {**constants[name], "values": new.slots.tolist()}
    artifact.replace_manifest({**artifact.manifest, "constants": constants})
    return {when: float(np.mean(values)) for when, values in ratios.items()}
