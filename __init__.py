"""dilu compiles FP8-native mixture-of-experts checkpoints for hardware without FP8.

The public API is loaded on first use (PEP 562), so that ``import dilu`` costs milliseconds and
imports neither torch nor numpy.
"""

from __future__ import annotations

from importlib import import_module
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from .compiler import compile as compile
    from .errors import DiluError as DiluError
    from .frontend.doors import register_door as register_door
    from .planning import plan as plan
    from .runtime.artifact.artifact import Artifact as Artifact
    from .runtime.session import load as load
    from .version import __version__ as __version__

_PUBLIC = {
    "__version__": ".version",
    "Artifact": ".runtime.artifact.artifact",
    "DiluError": ".errors",
    "compile": ".compiler",
    "load": ".runtime.session",
    "plan": ".planning",
    "register_door": ".frontend.doors",
}

__all__ = ["Artifact", "DiluError", "__version__", "compile", "load", "plan", "register_door"]


def __getattr__(name: str) -> object:
    if name not in _PUBLIC:
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    value = getattr(import_module(_PUBLIC[name], __name__), name)
    globals()[name] = value
    return value


def __dir__() -> list[str]:
    return sorted({*globals(), *_PUBLIC})
