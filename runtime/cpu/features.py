"""What this machine's processor can do, by the names that targets require.

On x86 these are the kernel's own names in /proc/cpuinfo (`avx2`, `fma`, `f16c`, …), on Arm too
(`asimd`, `asimddp`, …).
"""

from __future__ import annotations

import platform
import re
import subprocess
from functools import cache
from pathlib import Path

_NAMES = {"amd64": "x86_64", "arm64": "aarch64"}


def architecture() -> str:
    """Return the machine's architecture, such as `x86_64` or `aarch64`."""
    name = platform.machine().lower()
    return _NAMES.get(name, name)


@cache
def features() -> frozenset[str]:
    """Return the instruction set extensions of this machine's processor."""
    try:
        text = Path("/proc/cpuinfo").read_text("utf-8", "replace")
    except OSError:
        return frozenset(_darwin().lower().split())
    return parse_cpuinfo(text)


def parse_cpuinfo(text: str) -> frozenset[str]:
    """Return the extensions of the first processor that the text of /proc/cpuinfo lists."""
    found = re.search(r"^(?:flags|Features)\s*:(.*)$", text, re.MULTILINE)
    return frozenset(found[1].split()) if found else frozenset()


def _darwin() -> str:
    keys = ("machdep.cpu.features", "machdep.cpu.leaf7_features")
    try:
        done = subprocess.run(["sysctl", "-n", *keys], capture_output=True, text=True)
    except OSError:
        return ""
    return done.stdout
