from __future__ import annotations

import numpy as np
import pytest

from dilu.runtime.artifact.tensor_file import ALIGNMENT, Entry, chunks, layout


def written(path, arrays):
    entries = [Entry(name, "f32", a.shape, a.nbytes) for name, a in arrays.items()]
    plan = layout(entries)
    path.write_bytes(b"".join(chunks(plan, ([a.tobytes()] for a in arrays.values()))))
    return plan


ARRAYS = {
    "a": np.arange(3, dtype=np.float32),
    "empty": np.zeros((0, 4), np.float32),
    "b": np.arange(12, dtype=np.float32).reshape(3, 4),
    "c": np.float32(7).reshape(()),
}


def test_every_reader_of_the_format_reads_it(tmp_path):
    library = pytest.importorskip("safetensors.numpy")
    plan = written(tmp_path / "x.safetensors", ARRAYS)
    read = library.load_file(tmp_path / "x.safetensors")
    for name, array in ARRAYS.items():
        np.testing.assert_array_equal(read[name], array)
    assert {n for n in read if not n.startswith("__pad_")} == set(ARRAYS)
    assert plan.size == (tmp_path / "x.safetensors").stat().st_size


def test_tensors_are_aligned(tmp_path):
    plan = written(tmp_path / "x.safetensors", ARRAYS)
    assert [offset % ALIGNMENT for offset in plan.offsets] == [0] * len(ARRAYS)
    content = (tmp_path / "x.safetensors").read_bytes()
    for offset, array in zip(plan.offsets, ARRAYS.values(), strict=True):
        assert content[offset : offset + array.nbytes] == array.tobytes()
