from __future__ import annotations

import hashlib

import pytest

from dilu.runtime.artifact import fingerprint as module
from dilu.runtime.artifact.fingerprint import fingerprint, sha256_of


def test_small_files_are_hashed_whole(tmp_path):
    file = tmp_path / "w"
    file.write_bytes(b"weights")
    assert fingerprint(file) == "sha256:" + hashlib.sha256(b"weights").hexdigest()
    assert sha256_of(file) == sha256_of(b"weights")


@pytest.fixture
def large(tmp_path):
    file = tmp_path / "large"
    with open(file, "wb") as out:
        out.write((100).to_bytes(8, "little") + b"h" * 100)
        out.truncate(module.WHOLE_UP_TO + 12345)  # sparse
    return file


@pytest.mark.parametrize("where", [0, 50, -1, -4096, 1 << 25])
def test_large_files_are_sampled(large, where):
    before = fingerprint(large)
    assert before.startswith("sampled:")
    size = large.stat().st_size
    step = (size - 4096) // 63
    at = size + where if where < 0 else (where // step) * step if where > 100 else where
    with open(large, "r+b") as out:
        out.seek(at)
        out.write(b"x")
    assert fingerprint(large) != before


def test_size_counts(large):
    before = fingerprint(large)
    with open(large, "r+b") as out:
        out.truncate(large.stat().st_size + 1)
    assert fingerprint(large) != before
