"""A rank's part of a sharded artifact: the same program over the weights that this rank holds."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import replace
from math import prod
from typing import Any

import numpy as np

from ..errors import DiluError
from .artifact import Artifact


def local_part(artifact: Artifact, coordinates: Mapping[str, int]) -> Artifact:
    """Return the artifact as the rank at `coordinates` of the mesh sees it.

    Its constants are the rank's own, and its weight files those that they lie in.
    """
    placed = placements(artifact.manifest)
    constants = {
        name: _local(name, constant, placed, coordinates)
        for name, constant in artifact.manifest["constants"].items()
    }
    used = sorted({f for c in constants.values() for f in c["file"] or ()})
    number = {old: new for new, old in enumerate(used)}
    for name, constant in constants.items():
        if constant["file"] is not None:
            constants[name] = {**constant, "file": [number[f] for f in constant["file"]]}
    files = [artifact.manifest["files"][f] for f in used]
    manifest = {**artifact.manifest, "constants": constants, "files": files}
    return replace(artifact, manifest={**manifest, "coordinates": dict(coordinates)})


def placements(manifest: Mapping[str, Any]) -> dict[str, np.ndarray]:
    """Return which experts the slots of every rank hold, `i64[layers, ranks, slots]`, by name."""
    constants = manifest["constants"]
    splits = (c.get("split") for c in constants.values())
    names = dict.fromkeys(split["placement"] for split in splits if split is not None)
    return {name: np.array(constants[name]["values"], np.int64) for name in names}


def _local(
    name: str,
    constant: dict[str, Any],
    placed: Mapping[str, np.ndarray],
    coordinates: Mapping[str, int],
) -> dict[str, Any]:
    """Return a constant as a rank has it: the pieces of the experts in its slots."""
    split = constant.get("split")
    if split is None:
        return constant
    dim, grid = split["dim"], constant["grid"]
    own = placed[split["placement"]][..., coordinates[split["axis"]], :]
    own = own[0] if own.ndim > dim + 1 else own  # one layer that is not stacked
    shape = constant["shape"]
    fits = own.ndim == dim + 1 and dim < grid
    if not fits or not 0 <= own.min(initial=0) <= own.max(initial=0) < shape[dim]:
        raise DiluError(f"the manifest divides the constant {name} in a way that cannot be")
    local = {**constant, "shape": [*shape[:dim], own.shape[-1], *shape[dim + 1 :]]}
    if constant["file"] is None:
        return local
    pieces = np.arange(prod(shape[:grid])).reshape(shape[:grid])
    index = own.reshape(*own.shape, *[1] * (grid - dim - 1))
    index = np.broadcast_to(index, (*own.shape, *shape[dim + 1 : grid]))
    chosen = np.take_along_axis(pieces, index, dim)
    for key in ("file", "offset", "tensor"):
        local[key] = [constant[key][i] for i in chosen.reshape(-1)]
    return local
