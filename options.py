"""What a model is to be compiled to: one object, which the command line and the Python API fill.

Invariant: options that exist agree with each other. What only the model, this machine or a file can
tell is checked by whoever asks those.
"""

from __future__ import annotations

import os
from dataclasses import dataclass
from typing import TYPE_CHECKING

from .errors import DiluError
from .ir.mesh import parse_mesh

if TYPE_CHECKING:
    from .passes.pipeline import ExtraPass

DTYPES = ("f32", "bf16")


@dataclass(frozen=True)
class Options:
    """Options of compiling, as `dilu.compile` describes them.

    `targets` are names, `mesh` a text such as `ep=8,tp=2`; `dtype` and `max_seq` are None for the
    model's own. Raises DiluError for values that no model could be compiled with.
    """

    targets: tuple[str, ...] = ("cpu",)
    passes: tuple[ExtraPass, ...] = ()
    dtype: str | None = None
    max_seq: int | None = None
    config_only: bool = False
    bundle: bool = False
    mesh: str | None = None
    replicas: int = 0
    expert_load: str | os.PathLike[str] | None = None
    cluster: str | os.PathLike[str] | None = None

    def __post_init__(self) -> None:
        check_dtype(self.dtype)
        check_replicas(self.replicas)
        if not self.targets:
            raise DiluError("no target is given", hint="`cpu` is the best for this machine")
        if self.mesh is not None:
            parse_mesh(self.mesh)
            return
        for name in ("cluster", "replicas", "expert_load"):
            if getattr(self, name):
                raise DiluError(f"{name} is given, but no mesh", hint="give one, such as ep=8")


def check_dtype(dtype: str | None) -> None:
    """Raise DiluError for a type that models are not computed in."""
    if dtype not in (None, *DTYPES):
        raise DiluError(f"unknown dtype {dtype!r}", hint=f"dtype is one of {', '.join(DTYPES)}")


def check_replicas(replicas: int) -> None:
    """Raise DiluError for no number of more experts."""
    if replicas < 0:
        raise DiluError(f"replicas is {replicas}", hint="replicas is 0 or more")
