"""How often tokens chose each expert: what `dilu run --record-load` counts, and placing reads.

The file is JSON: `{"expert_load": 1, "layers": {NAME: [[tokens of each expert] of each layer]}}`,
NAME being a run of equal layers.
"""

from __future__ import annotations

import json
import os
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np

from ..errors import DiluError, Loc

_VERSION = 1
_HINT = "write one with dilu run --record-load"


@dataclass(frozen=True)
class ExpertLoad:
    """`layers`: f64[L, E] by the name of a run of layers. `source`: the file, for messages."""

    layers: dict[str, np.ndarray]
    source: str = ""

    def of(self, name: str, layers: int, experts: int) -> np.ndarray:
        """Return f64[layers, experts]; raise DiluError where the file is of another model."""
        found = self.layers.get(name)
        if found is None or found.shape != (layers, experts):
            has = ", ".join(f"{n}: {'×'.join(map(str, a.shape))}" for n, a in self.layers.items())
            raise DiluError(
                f"the load is of another model: it has {has}, not {name}: {layers}×{experts}",
                Loc(self.source),
                hint=_HINT,
            )
        return found


def read_load(path: str | os.PathLike[str]) -> ExpertLoad:
    """Read a file of loads; raise DiluError where it is none."""
    file = Path(path)
    try:
        content: Any = json.loads(file.read_text("utf-8"))
        if content["expert_load"] != _VERSION:
            raise ValueError(f"version {content['expert_load']}")
        layers = {name: np.array(rows, np.float64) for name, rows in content["layers"].items()}
    except OSError as error:
        raise DiluError(
            f"cannot read the load of experts: {error.strerror}", Loc(str(file))
        ) from None
    except (ValueError, KeyError, TypeError, AttributeError) as error:
        raise DiluError(f"not a load of experts ({error})", Loc(str(file)), hint=_HINT) from None
    for name, load in layers.items():
        if load.ndim != 2 or not np.isfinite(load).all() or (load < 0).any():
            raise DiluError(f"the load of {name} is no table of counts", Loc(str(file)), hint=_HINT)
    return ExpertLoad(layers, str(file))


def load_text(layers: dict[str, np.ndarray]) -> str:
    """Return the content of a file of loads."""
    rows = {name: load.tolist() for name, load in layers.items()}
    return json.dumps({"expert_load": _VERSION, "layers": rows}, indent=1) + "\n"
