"""Running captured language models in the reference interpreter, weights read from the files."""

from __future__ import annotations

import math
from collections.abc import Sequence
from pathlib import Path

import numpy as np

from dilu.ir.dtypes import decode
from dilu.ir.graph import Graph
from dilu.ir.interpret import interpret, weight_values
from dilu.ir.types import evaluate
from dilu.ir.weights import Weight


def load_weight(weight: Weight, folder: Path) -> np.ndarray:
    """Return a constant's values, its pieces read from the checkpoint's files."""
    if weight.data is not None:
        return weight_values(weight)
    assert math.prod(weight.grid_shape) == len(weight.pieces)
    parts = []
    for piece in weight.pieces:
        raw = np.fromfile(folder / piece.file, np.uint8, piece.nbytes, offset=piece.offset)
        parts.append(raw.view(weight.dtype.storage).reshape(weight.piece_shape))
    shape = tuple(int(d) for d in weight.type.shape)
    return decode(weight.dtype, np.stack(parts).reshape(shape))


class CapturedModel:
    """A captured language model with its weights and a cache, for batches of sequences."""

    def __init__(self, graph: Graph, folder: Path, *, pages: int = 12, wide: bool = False) -> None:
        self.function = graph.function("main")
        self.constants = [
            load_weight(graph.weights[c.name], folder) for c in self.function.constants
        ]
        self.wide = wide
        self.pages = pages
        sizes = {"B": pages}
        self.states = [
            np.zeros([evaluate(d, sizes) for d in s.type.shape], s.type.dtype.value)
            for s in self.function.states
        ]
        self.page_size = int(self.function.states[0].type.shape[3])
        self.lengths: list[int] = []
        self.tables: list[list[int]] = []
        self._free = list(reversed(range(pages)))

    def feed(self, sequences: Sequence[Sequence[int]]) -> list[np.ndarray]:
        """Append tokens to the sequences (new ones the first time); return their logits [n, V]."""
        if not self.lengths:
            self.lengths, self.tables = [0] * len(sequences), [[] for _ in sequences]
        rows: list[tuple[int, int, int, int]] = []
        for s, tokens in enumerate(sequences):
            for token in tokens:
                position = self.lengths[s]
                if position % self.page_size == 0:
                    self.tables[s].append(self._free.pop())
                slot = self.tables[s][-1] * self.page_size + position % self.page_size
                rows.append((token, position, s, slot))
                self.lengths[s] += 1
        width = max(map(len, self.tables))
        table = np.array([t + [0] * (width - len(t)) for t in self.tables], np.int64)
        tokens, positions, sequence, slots = (
            np.array(c, np.int64) for c in zip(*rows, strict=True)
        )
        count = len(rows)
        inputs = [tokens, positions, sequence, slots, table, np.arange(count)]
        out = interpret(self.function, [*inputs, *self.states, *self.constants], wide=self.wide)
        self.states = list(out[1:])
        return np.split(out[0], np.cumsum([len(s) for s in sequences])[:-1])
