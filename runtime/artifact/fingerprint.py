"""Hashes that tell whether a file is still the one that was compiled.

Invariant: a file of the artifact is hashed whole. A weight file above 64 MiB is sampled, since
reading a checkpoint of hundreds of gigabytes would take longer than running it: its size, its
header (the first bytes) and 64 evenly spread pieces of 4 KiB.
"""

from __future__ import annotations

import hashlib
import os
from pathlib import Path

WHOLE_UP_TO = 64 << 20
_SAMPLES = 64
_SAMPLE_BYTES = 4096
_HEADER_LIMIT = 8 << 20


def sha256_of(content: bytes | Path) -> str:
    """Return the sha256 of bytes or of a whole file."""
    if isinstance(content, bytes):
        return hashlib.sha256(content).hexdigest()
    with open(content, "rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()


def fingerprint(path: Path) -> str:
    """Return the fingerprint of a weight file, such as `sha256:…` or `sampled:…`."""
    size = path.stat().st_size
    if size <= WHOLE_UP_TO:
        return f"sha256:{sha256_of(path)}"
    digest = hashlib.sha256(size.to_bytes(8, "little"))
    with open(path, "rb", buffering=0) as file:
        fd = file.fileno()
        header = int.from_bytes(os.pread(fd, 8, 0), "little")
        digest.update(os.pread(fd, min(header + 8, _HEADER_LIMIT), 0))
        step = (size - _SAMPLE_BYTES) // (_SAMPLES - 1)
        for sample in range(_SAMPLES):
            digest.update(os.pread(fd, _SAMPLE_BYTES, sample * step))
    return f"sampled:{digest.hexdigest()}"
