from __future__ import annotations

from dilu.runtime.cpu.memory import zeros


def test_aligned_and_zero():
    for nbytes in (0, 1, 100, 5 << 20):
        block = zeros(nbytes)
        assert block.nbytes == nbytes
        assert block.ctypes.data % 64 == 0
        assert not block.any()
        block[:] = 1
