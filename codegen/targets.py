"""The list of known targets, and which of them this machine is."""

from __future__ import annotations

from importlib.metadata import EntryPoint, entry_points
from typing import Any

from .. import plugins
from ..errors import DiluError
from ..ir.dtypes import BF16, F16, F32
from ..runtime.cpu.features import features
from .target import Gpu, Target

BASELINE = Target("cpu:baseline", header="isa_baseline.h")
X86_64_V3 = Target(
    "cpu:x86-64-v3",
    # Single features, since compilers do not agree on the names of levels.
    flags=("-mavx2", "-mfma", "-mf16c", "-mbmi", "-mbmi2"),
    requires=("avx2", "fma", "f16c", "bmi2"),
    header="isa_avx2.h",
)
NULL = Target("null", header="isa_baseline.h", executable=False)


def _gpu(backend: str, arch: int | str, **features: Any) -> Target:
    return Target(
        f"{backend}:{arch}",
        language="triton",
        activations=(F32, BF16, F16),
        keeps_rows=False,
        copies_weights=True,
        gpu=Gpu(backend, arch, **features),
    )


def _nvidia(arch: int, shared_kb: int, *matrix: str, **features: Any) -> Target:
    features = {"dot": BF16, "decode": "packed"} | features
    return _gpu("cuda", arch, warp=32, shared=shared_kb << 10, matrix=matrix, **features)


def _amd(arch: str, warp: int, shared_kb: int, *matrix: str) -> Target:
    return _gpu(
        "hip", arch, warp=warp, shared=shared_kb << 10, matrix=matrix, dot=BF16, decode="portable"
    )


#: Triton has had no matrix instructions for the oldest two since 3.3.
_OLD = {"dot": F16, "triton": "3.2"}
_NATIVE = {"decode": "native"}
GPUS: tuple[Target, ...] = (
    _nvidia(70, 96, "HMMA", **_OLD, whole_reads=True),
    _nvidia(75, 64, "HMMA", **_OLD),
    _nvidia(80, 163, "HMMA"),
    _nvidia(86, 99, "HMMA"),
    _nvidia(89, 99, "HMMA", **_NATIVE),
    _nvidia(90, 227, "HGMMA", "HMMA", **_NATIVE),
    _nvidia(100, 227, "UTCHMMA", "HMMA", **_NATIVE),
    _nvidia(120, 99, "HMMA", **_NATIVE),
    _amd("gfx90a", 64, 64, "v_mfma"),
    _amd("gfx942", 64, 64, "v_mfma"),
    _amd("gfx950", 64, 160, "v_mfma"),
    _amd("gfx1100", 32, 64, "v_wmma"),
    _amd("gfx1201", 32, 64, "v_wmma"),
)

#: From the most general to the most special: the last that fits a machine is the best for it.
TARGETS: tuple[Target, ...] = (NULL, BASELINE, X86_64_V3, *GPUS)


#: Packages that bring targets name them here: an entry point is a callable that returns a Target.
ENTRY_POINTS = "dilu.targets"


def find_target(name: str) -> Target:
    """Return the target called `name`; `cpu` is the best for this machine."""
    if name == "cpu":
        return host_target()
    for target in TARGETS:
        if target.name == name:
            return target
    for point in entry_points(group=ENTRY_POINTS, name=name):
        return _plugged_in(point)
    known = ", ".join(["cpu", *(t.name for t in TARGETS), *other_targets()])
    raise DiluError(f"unknown target {name!r}", hint=f"known targets: {known}")


def other_targets() -> list[str]:
    """Return the names of the targets that other packages bring."""
    return sorted({point.name for point in entry_points(group=ENTRY_POINTS)})


def _plugged_in(point: EntryPoint) -> Target:
    target = plugins.make(point, f"the target {point.name}")
    if not isinstance(target, Target):
        raise DiluError(f"{point.value} returned no Target for {point.name}")
    return target


def host_target() -> Target:
    """Return the best target whose requirements this machine's processor meets."""
    cpus = [t for t in TARGETS if t.executable and t.language == "c"]
    return [t for t in cpus if set(t.requires) <= features()][-1]
