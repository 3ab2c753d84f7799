"""A rank's part of a sharded artifact: the same program over the weights that this rank holds."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import replace
from math import prod
from typing import Any

import numpy as np

from ...errors import DiluError
from ..artifact.artifact import Artifact
from ..artifact.manifest import ConstantEntry, Manifest, changed, located
from ..artifact.storage import storage


def local_part(artifact: Artifact, coordinates: Mapping[str, int]) -> Artifact:
    """Return the artifact as the rank at `coordinates` of the mesh sees it.

    Its constants are the rank's own, and its weight files those that they lie in.
    """
    placed = placements(artifact.manifest)
    constants: dict[str, ConstantEntry] = {}
    mesh = artifact.manifest.get("mesh") or {}
    for name, constant in artifact.manifest["constants"].items():
        local = constant
        for split in constant.get("splits", ()):
            choose = _chosen if "placement" in split else _even
            local = choose(name, local, split, placed, mesh, coordinates)
        constants[name] = local
    used = sorted({f for c in constants.values() for f in c["file"] or ()})
    number = {old: new for new, old in enumerate(used)}
    for name, constant in constants.items():
        if constant["file"] is not None:
            constants[name] = changed(constant, file=[number[f] for f in constant["file"]])
    files = [artifact.manifest["files"][f] for f in used]
    return replace(
        artifact,
        manifest=changed(
            artifact.manifest, constants=constants, files=files, coordinates=dict(coordinates)
        ),
    )


def placements(manifest: Manifest) -> dict[str, np.ndarray]:
    """Return which experts the slots of every rank hold, `i64[layers, ranks, slots]`, by name."""
    constants = manifest["constants"]
    splits = (split for c in constants.values() for split in c.get("splits", ()))
    names = dict.fromkeys(split["placement"] for split in splits if "placement" in split)
    return {name: np.array(constants[name].get("values"), np.int64) for name in names}


def _chosen(
    name: str,
    constant: ConstantEntry,
    split: Mapping[str, Any],
    placed: Mapping[str, np.ndarray],
    _: Mapping[str, int],
    coordinates: Mapping[str, int],
) -> ConstantEntry:
    """Return a constant as a rank has it: the pieces of the experts in its slots."""
    dim, grid = split["dim"], constant["grid"]
    own = placed[split["placement"]][..., coordinates[split["axis"]], :]
    own = own[0] if own.ndim > dim + 1 else own  # one layer that is not stacked
    shape = constant["shape"]
    fits = own.ndim == dim + 1 and dim < grid
    if not fits or not 0 <= own.min(initial=0) <= own.max(initial=0) < shape[dim]:
        raise _impossible(name)
    return _taken(constant, own, dim)


def _taken(constant: ConstantEntry, own: np.ndarray, dim: int) -> ConstantEntry:
    """Return a constant with the pieces whose index along `dim` is one of `own`'s last axis."""
    grid, shape = constant["grid"], constant["shape"]
    local = changed(constant, shape=[*shape[:dim], own.shape[-1], *shape[dim + 1 :]])
    if constant["file"] is None:
        return local
    pieces = np.arange(prod(shape[:grid])).reshape(shape[:grid])
    index = own.reshape(*own.shape, *[1] * (grid - dim - 1))
    index = np.broadcast_to(index, (*shape[:dim], own.shape[-1], *shape[dim + 1 : grid]))
    chosen = np.take_along_axis(pieces, index, dim).reshape(-1)
    file, offset, tensor = ([column[i] for i in chosen] for column in located(constant))
    return changed(local, file=file, offset=offset, tensor=tensor)


def _even(
    name: str,
    constant: ConstantEntry,
    split: Mapping[str, Any],
    _: Mapping[str, np.ndarray],
    mesh: Mapping[str, int],
    coordinates: Mapping[str, int],
) -> ConstantEntry:
    """Return a constant as a rank has it: an equal part of a dimension.

    Where the part of every piece is contiguous, it is used where it lies. Where it is not,
    `part` says which indices of the dimensions of the stored piece, `stored`, make it up.
    """
    dim, size, grid, shape = split["dim"], split["size"], constant["grid"], constant["shape"]
    first, step, block = coordinates[split["axis"]] * size, split["step"], split["block"]
    last = (mesh[split["axis"]] * size - 1) * step // block
    if not 0 <= dim < len(shape) or size < 1 or last >= shape[dim]:
        raise _impossible(name)
    own = (first + np.arange(size)) * step // block
    if dim < grid:
        return _taken(constant, own.reshape(*[1] * dim, -1), dim)
    local = changed(constant, shape=[*shape[:dim], size, *shape[dim + 1 :]])
    if constant["file"] is None:
        return local
    apart = len(own) > 1 and bool((np.diff(own) != 1).any())
    if apart or "part" in constant or prod(shape[grid:dim]) > 1:
        part = constant.get("part", [[0, n, 1, 1] for n in shape[grid:]])
        local["part"] = [*part[: dim - grid], [first, size, step, block], *part[dim - grid + 1 :]]
        local["stored"] = constant.get("stored", shape[grid:])
        return local
    skipped = int(own[0]) * prod(shape[dim + 1 :]) * storage(constant["dtype"]).itemsize
    return changed(local, offset=[offset + skipped for offset in located(constant)[1]])


def _impossible(name: str) -> DiluError:
    return DiluError(f"the manifest divides the constant {name} in a way that cannot be")
