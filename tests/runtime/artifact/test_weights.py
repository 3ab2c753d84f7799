from __future__ import annotations

import ctypes

import numpy as np
import pytest

from dilu.errors import DiluError
from dilu.runtime.artifact.artifact import Artifact
from dilu.runtime.artifact.weights import Weights, megabytes, require_memory, weight_bytes


def at(address: int, count: int) -> list[float]:
    return list((ctypes.c_float * count).from_address(int(address)))


def test_tables_point_at_the_pieces(toy):
    steps = []
    weights = Weights(toy, progress=lambda *step: steps.append(step))
    assert [at(a, 3) for a in weights.table("w")] == [[1, 2, 3], [10, 20, 30]]
    (bias,) = weights.table("bias")
    np.testing.assert_array_equal(at(bias, 260), np.linspace(0, 1, 260, dtype=np.float32))
    assert steps == [("map weights", 0, 1)]
    weights.close()


def test_shared_pieces_count_once(toy):
    assert weight_bytes(toy) == (260 + 6) * 4
    toy.manifest["constants"]["again"] = toy.manifest["constants"]["bias"]
    assert weight_bytes(toy) == (260 + 6) * 4


def test_wrong_number_of_pieces(toy: Artifact):
    toy.manifest["constants"]["w"]["shape"] = [3, 3]
    with pytest.raises(DiluError, match="places the constant w outside its files"):
        Weights(toy)


def test_a_checkpoint_larger_than_memory_is_refused_without_reading_it(toy, checkpoint):
    file = checkpoint / "model.safetensors"
    size = 1 << 42
    with open(file, "r+b") as out:
        try:
            out.truncate(size)  # sparse: no block of it exists
        except OSError:
            pytest.skip("no sparse files of this size here")
    toy.manifest["files"][0] |= {"size": size, "fingerprint": "never read"}
    toy.manifest["constants"]["bias"] |= {"shape": [size // 8]}
    from dilu.runtime.session import load

    with pytest.raises(DiluError, match=r"not enough memory: .*weights 2199.02 GB"):
        load(toy)


def test_memory(monkeypatch):
    monkeypatch.delenv("DILU_ALLOW_OVERCOMMIT", raising=False)
    require_memory({"weights": 3 << 30}, 3 << 30)
    message = r"4\.29 GB needed \(weights 3\.22 GB, cache 1\.07 GB\), 3\.22 GB available on x:0"
    with pytest.raises(DiluError, match=message):
        require_memory(
            {"weights": 3 << 30, "cache": 1 << 30, "working memory": 0}, 3 << 30, " on x:0"
        )
    require_memory({"weights": 1 << 60}, None)


def test_pieces_are_views_of_the_files(toy):
    weights = Weights(toy)
    pieces = [piece.view(np.float32).tolist() for piece in weights.pieces("w")]
    assert pieces == [[1, 2, 3], [10, 20, 30]]
    assert next(weights.pieces("w")).ctypes.data == weights.table("w")[0]


def test_megabytes():
    assert [megabytes(n) for n in (0, 2 << 20, 5 * 10**9)] == ["0.0 kB", "2.1 MB", "5.00 GB"]
