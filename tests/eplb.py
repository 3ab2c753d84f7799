"""The greedy algorithm that DeepSeek published as EPLB, after its description: the peer that
placements are compared with (https://github.com/deepseek-ai/EPLB; the global form).

Replicas go one by one to the expert with the largest load per replica; then, by decreasing load,
each goes to the rank of least load that has a free slot.
"""

from __future__ import annotations

import numpy as np


def eplb(load_LE: np.ndarray, ranks: int, slots: int) -> np.ndarray:
    """Return the experts of every rank, i64[L, R, S]; a rank may have one twice."""
    return np.array([_layer(load, ranks, slots // ranks, slots) for load in load_LE])


def _layer(load: np.ndarray, ranks: int, size: int, slots: int) -> list[list[int]]:
    counts = np.ones(len(load), np.int64)
    for _ in range(slots - len(load)):
        counts[np.argmax(load / counts)] += 1
    items = np.repeat(np.arange(len(load)), counts)
    weights = (load / counts)[items]
    rows: list[list[int]] = [[] for _ in range(ranks)]
    total = np.zeros(ranks)
    for i in np.argsort(-weights, kind="stable"):
        full = np.array([len(row) == size for row in rows])
        best = int(np.where(full, np.inf, total).argmin())
        rows[best].append(int(items[i]))
        total[best] += weights[i]
    return rows
