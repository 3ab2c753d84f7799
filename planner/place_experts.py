"""Which rank holds which experts: hot ones several times, so that all ranks have equal work.

    placement = place_experts(load, ranks=32, slots=288)

A rank holds equally many experts as any other, none of them twice; the load of an expert is shared
equally by its replicas. Legend: L layers, E experts, R ranks, S slots of a rank.

Invariant: equal inputs give equal placements, on any machine.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from math import prod

import networkx as nx
import numpy as np

from ..errors import DiluError

_CLOSE = 1e-12  # of a rank's load: differences below are rounding


@dataclass(frozen=True)
class ExpertPlacement:
    """`slots` i64[L, R, S]: the expert that every slot of every rank holds, ascending."""

    slots: np.ndarray
    experts: int

    def replicas(self) -> np.ndarray:
        """Return how often every expert is held, i64[L, E]."""
        layers = self.slots.reshape(len(self.slots), -1)
        return np.stack([np.bincount(slots, minlength=self.experts) for slots in layers])

    def rank_load(self, load_LE: np.ndarray) -> np.ndarray:
        """Return the load of every rank, f64[L, R]."""
        each = _shares(load_LE) / self.replicas()
        slots = self.slots.reshape(len(each), -1)
        return np.take_along_axis(each, slots, 1).reshape(self.slots.shape).sum(-1)

    def imbalance(self, load_LE: np.ndarray) -> np.ndarray:
        """Return the load of the busiest rank over the mean of all, f64[L]; 1 is best."""
        load_LR = self.rank_load(load_LE)
        return load_LR.max(1) / load_LR.mean(1)


def place_experts(
    load_LE: np.ndarray,
    ranks: int,
    slots: int | None = None,
    *,
    levels: Sequence[int] = (),
    groups: int = 1,
) -> ExpertPlacement:
    """Return a placement that balances `load_LE`, tokens (or any measure) per layer and expert.

    `slots`: how many experts all ranks hold together, replicas included (default: no replicas).
    `levels`: the topology from the outside in, children per node, such as 4 machines of 8 devices;
    its product is `ranks`. `groups`: experts of a group, which lie next to each other, are asked
    for together (group-limited routing), so that a group stays inside of a part of the topology
    where groups divide evenly among the parts.

    Replicas go one by one to the expert whose replicas have most load, which makes the largest
    share as small as it can be. They are packed by decreasing load onto the rank with least load,
    as by DeepSeek's EPLB (https://github.com/deepseek-ai/EPLB); then experts are swapped between
    the busiest rank and another one while that helps.

    Raises DiluError where numbers do not fit or loads are negative or not finite.
    """
    load_LE = np.asarray(load_LE, np.float64)
    slots = int(load_LE.shape[-1]) if slots is None else slots
    levels = tuple(levels) or (ranks,)
    _check(load_LE, ranks, slots, levels, groups)
    tree, root = _topology(levels)
    share_LE = _shares(load_LE)
    placed = [_place_layer(share, tree, root, slots // ranks, groups) for share in share_LE]
    return ExpertPlacement(np.array(placed, np.int64), load_LE.shape[1])


def least_imbalance(load_LE: np.ndarray, ranks: int, slots: int) -> np.ndarray:
    """Return a bound f64[L] that no placement's imbalance is below.

    The busiest rank has the mean at least, and at least the largest share, with replicas where
    they help most, together with what fills its other slots: experts with all the replicas.
    """
    bounds: list[float] = []
    for share in _shares(np.asarray(load_LE, np.float64)):
        experts = len(share)
        largest = float((share / _replicate(share, slots, ranks)).max())
        others = np.sort(share)[: slots // ranks - 1] / min(ranks, slots - experts + 1)
        bounds.append(max(1.0, ranks * (largest + float(others.sum()))))
    return np.array(bounds)


def _check(
    load_LE: np.ndarray, ranks: int, slots: int, levels: tuple[int, ...], groups: int
) -> None:
    if load_LE.ndim != 2 or 0 in load_LE.shape:
        raise DiluError(f"the load of experts is {load_LE.shape}, not [layers, experts]")
    if not np.isfinite(load_LE).all() or (load_LE < 0).any():
        layer = int(np.flatnonzero(~(np.isfinite(load_LE) & (load_LE >= 0)).all(1))[0])
        raise DiluError(f"the load of experts in layer {layer} is negative or not a number")
    experts = load_LE.shape[1]
    if ranks < 1 or slots < experts or slots % ranks:
        low = -(-experts // max(ranks, 1)) * max(ranks, 1)
        raise DiluError(
            f"{experts} experts do not fill {slots} slots on {ranks} ranks evenly",
            hint=f"the fewest slots are {low}: {low - experts} replicas; or more by {ranks}s",
        )
    if slots > experts * ranks:
        raise DiluError(
            f"{slots} slots are more than every rank of {ranks} can fill with {experts} experts",
            hint=f"at most {experts * (ranks - 1)} replicas",
        )
    if prod(levels) != ranks:
        raise DiluError(f"a topology of {' × '.join(map(str, levels))} has not {ranks} ranks")
    if groups < 1 or experts % groups:
        raise DiluError(f"{experts} experts are not {groups} groups of equal size")


def _shares(load_LE: np.ndarray) -> np.ndarray:
    """Return the load as shares of a layer's; equal ones where a layer has none."""
    total = load_LE.sum(1, keepdims=True)
    equal = np.full_like(load_LE, 1 / load_LE.shape[1], dtype=np.float64)
    return np.divide(load_LE, total, out=equal, where=total > 0)


# ---------------------------------------------------------------------------- topology


def _topology(levels: Sequence[int]) -> tuple[nx.DiGraph[int], int]:
    """Return the tree of the topology, and its root; the leaves are the ranks, in order."""
    tree: nx.DiGraph[int] = nx.DiGraph()
    tree.add_node(0)
    front = [0]
    for children in levels:
        below: list[int] = []
        for node in front:
            for _ in range(children):
                below.append(len(tree))
                tree.add_edge(node, below[-1])
        front = below
    return tree, 0


def _leaves(tree: nx.DiGraph[int], node: int) -> int:
    below = nx.descendants(tree, node) | {node}
    return sum(1 for n in below if tree.out_degree(n) == 0)


def _place_layer(
    share_E: np.ndarray, tree: nx.DiGraph[int], root: int, size: int, groups: int
) -> list[list[int]]:
    """Return the experts of every rank, for one layer."""
    experts = np.arange(len(share_E)).reshape(groups, -1)

    def place(node: int, own: list[int]) -> list[list[int]]:
        """Return the experts of the ranks below a node that has these groups."""
        children = list(tree.successors(node))
        chosen = experts[own].reshape(-1)
        below = _leaves(tree, node)
        whole = len(own) > 1 and len(own) % max(len(children), 1) == 0
        # A child must have enough experts of its own for its ranks to hold none twice.
        enough = whole and size <= len(chosen) // len(children)
        if not children or not enough or len(chosen) > below * size:
            return _place_flat(share_E, chosen, below, size)
        weights = np.array([share_E[experts[g]].sum() for g in own])
        parts = _pack(weights, np.array(own), len(children), len(own) // len(children))
        return [
            rank for child, part in zip(children, parts, strict=True) for rank in place(child, part)
        ]

    return place(root, list(range(groups)))


def _place_flat(share_E: np.ndarray, chosen: np.ndarray, ranks: int, size: int) -> list[list[int]]:
    """Return the experts of `ranks` ranks that hold `chosen`, replicas as needed."""
    counts = _replicate(share_E[chosen], ranks * size, ranks)
    items = np.repeat(chosen, counts)
    return _pack(np.repeat(share_E[chosen] / counts, counts), items, ranks, size)


def _replicate(share_E: np.ndarray, slots: int, ranks: int) -> np.ndarray:
    """Return how many replicas every expert gets: each goes where a replica has most load."""
    counts = np.ones(len(share_E), np.int64)
    for _ in range(slots - len(share_E)):
        each = np.where(counts < ranks, share_E / counts, -1.0)
        counts[int(each.argmax())] += 1
    return counts


# ----------------------------------------------------------------------------- packing


def _pack(weights: np.ndarray, items: np.ndarray, bins: int, size: int) -> list[list[int]]:
    """Return `bins` bins of `size` items each, no item twice in a bin, of weights near to equal."""
    order = np.lexsort((items, -weights))
    packed = _by_decreasing_weight(weights, items, order, bins, size)
    if packed is None:  # equal items side by side go to different bins, whatever they weigh
        packed = np.lexsort((items,)).reshape(size, bins).T
    _swap(packed, weights, items)
    return [sorted(int(items[i]) for i in row) for row in packed]


def _by_decreasing_weight(
    weights: np.ndarray, items: np.ndarray, order: np.ndarray, bins: int, size: int
) -> np.ndarray | None:
    """Return i64[bins, size], or None where the last items fit no bin."""
    rows: list[list[int]] = [[] for _ in range(bins)]
    held: list[set[int]] = [set() for _ in range(bins)]
    total = [0.0] * bins
    for i in order.tolist():
        item = int(items[i])
        free = [b for b in range(bins) if len(rows[b]) < size and item not in held[b]]
        if not free:
            return None
        best = min(free, key=total.__getitem__)
        rows[best].append(i)
        held[best].add(item)
        total[best] += float(weights[i])
    return np.array(rows)


def _swap(packed: np.ndarray, weights: np.ndarray, items: np.ndarray) -> None:
    """Swap items between the heaviest bin and another one, always the pair that leaves the
    heavier of the two lightest, until no pair helps."""
    bins = len(packed)
    while bins > 1:
        total = weights[packed].sum(1)
        top = int(total.argmax())
        own, others = packed[top], np.delete(np.arange(bins), top)
        gain = weights[own][:, None, None] - weights[packed[others]][None]  # [size, bins-1, size]
        heavier = np.maximum(total[top] - gain, total[others][None, :, None] + gain)
        mine, theirs = items[own], items[packed[others]]
        doubled = (mine[:, None, None] == theirs[None]).any(2)[:, :, None]  # mine is there already
        doubled = doubled | (theirs[..., None] == mine).any(2)[None]  # theirs is here already
        heavier[np.broadcast_to(doubled, heavier.shape)] = np.inf
        i, b, j = np.unravel_index(int(heavier.argmin()), heavier.shape)
        if heavier[i, b, j] >= total[top] * (1 - _CLOSE):
            return
        other = int(others[b])
        packed[top, i], packed[other, j] = packed[other, j], packed[top, i]
