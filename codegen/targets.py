"""The list of known targets, and which of them this machine is."""

from __future__ import annotations

from ..errors import DiluError
from ..runtime.cpu.features import features
from .target import Target

BASELINE = Target("cpu:baseline", header="isa_baseline.h")
X86_64_V3 = Target(
    "cpu:x86-64-v3",
    # Single features, since compilers do not agree on the names of levels.
    flags=("-mavx2", "-mfma", "-mf16c", "-mbmi", "-mbmi2"),
    requires=("avx2", "fma", "f16c", "bmi2"),
    header="isa_avx2.h",
)
NULL = Target("null", header="isa_baseline.h", executable=False)

#: From the most general to the most special: the last that fits a machine is the best for it.
TARGETS: tuple[Target, ...] = (NULL, BASELINE, X86_64_V3)


def find_target(name: str) -> Target:
    """Return the target called `name`; `cpu` is the best for this machine."""
    if name == "cpu":
        return host_target()
    for target in TARGETS:
        if target.name == name:
            return target
    known = ", ".join(["cpu", *(t.name for t in TARGETS)])
    raise DiluError(f"unknown target {name!r}", hint=f"known targets: {known}")


def host_target() -> Target:
    """Return the best target whose requirements this machine meets."""
    return [t for t in TARGETS if t.executable and set(t.requires) <= features()][-1]
