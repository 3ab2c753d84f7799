"""Rows on the wire, compared with torch's own conversions."""

from __future__ import annotations

import numpy as np
import pytest
import torch

from dilu.errors import DiluError
from dilu.runtime.mesh import wire


@pytest.fixture
def rows(rng):
    scale = 10.0 ** rng.integers(-20, 20, (37, 1))
    return (rng.standard_normal((37, 53)) * scale).astype(np.float32)


def there_and_back(form: str, rows: np.ndarray) -> np.ndarray:
    data = wire.encode(form, rows.view(f"u{rows.itemsize}"))
    assert data.shape == (len(rows), wire.row_bytes(form, rows.shape[1], rows.itemsize))
    out = np.full_like(rows, 7).view(f"u{rows.itemsize}")
    wire.decode(form, np.ascontiguousarray(data), out)
    return out.view(rows.dtype)


def test_exact(rows):
    assert (there_and_back("exact", rows) == rows).all()


@pytest.mark.parametrize("form", ["exact", "bf16"])
def test_bf16_stays_as_it_is(rows, form):
    bits = rows.view(np.uint16)
    data = wire.encode(form, bits)
    out = np.zeros_like(bits)
    wire.decode(form, data, out)
    assert (out == bits).all()


def test_bf16_is_what_torch_makes(rows):
    rows[3, 4], rows[5, 6], rows[7, 8] = np.nan, np.inf, -0.0
    got = torch.from_numpy(there_and_back("bf16", rows))
    want = torch.from_numpy(rows).bfloat16().float()
    assert torch.equal(got.nan_to_num(1.0), want.nan_to_num(1.0))
    assert torch.equal(got.isnan(), want.isnan())


def test_fp8_is_what_torch_makes(rows):
    rows[2] = 0
    rows[3] *= np.logspace(-6, 0, rows.shape[1], dtype=np.float32)  # down to subnormals of e4m3
    largest = np.abs(rows).max(1, keepdims=True)
    scales = np.where(largest == 0, 1, largest / np.float32(448)).astype(np.float32)
    codes = torch.from_numpy(rows / scales).clamp(-448, 448).to(torch.float8_e4m3fn)
    want = codes.float().numpy() * scales
    got = there_and_back("f8e4m3", rows)
    assert (got == want).all()
    assert (np.abs(got - rows).max(1) <= largest[:, 0] / 448 * 16).all()


def test_fp8_does_not_hide_what_is_no_number(rows):
    rows[1, 2], rows[4, 5] = np.nan, -np.inf
    got = there_and_back("f8e4m3", rows)
    assert np.isnan(got[[1, 4]]).all()
    assert np.isfinite(np.delete(got, [1, 4], 0)).all()


def test_no_rows():
    for form in ("exact", "bf16", "f8e4m3"):
        assert there_and_back(form, np.zeros((0, 5), np.float32)).shape == (0, 5)


def test_a_format_that_there_is_not():
    with pytest.raises(DiluError, match="unknown format 'int4'"):
        wire.check_format("int4")


def test_fp8_of_bf16_is_that_of_f32(rows):
    narrow = torch.from_numpy(rows).bfloat16()
    bits = narrow.view(torch.int16).numpy().view(np.uint16)
    data = wire.encode("f8e4m3", bits)
    assert data.shape == (len(rows), wire.row_bytes("f8e4m3", rows.shape[1], 2))
    wide = narrow.float().numpy()
    assert (data == wire.encode("f8e4m3", wide.view(np.uint32))).all()
    out = np.zeros_like(bits)
    wire.decode("f8e4m3", data, out)
    want = torch.from_numpy(there_and_back("f8e4m3", wide)).bfloat16()
    assert torch.equal(torch.from_numpy(out.view(np.int16)).view(torch.bfloat16), want)


def test_devices_write_the_same_bytes_of_bf16(rows):
    from dilu.runtime.gpu import wire as device

    narrow = torch.from_numpy(rows).bfloat16()
    bits = narrow.view(torch.int16).numpy().view(np.uint16)
    for form in ("exact", "bf16", "f8e4m3"):
        data = device.encode(form, narrow)
        assert (data.numpy() == wire.encode(form, bits)).all()
        out = np.zeros_like(bits)
        wire.decode(form, data.numpy(), out)
        back = device.decode(form, data, torch.bfloat16).view(torch.int16).numpy()
        assert (back.view(np.uint16) == out).all()


@pytest.mark.parametrize("form", ["exact", "bf16", "f8e4m3"])
def test_devices_write_the_same_bytes(rows, form):
    from dilu.runtime.gpu import wire as device

    rows[2], rows[3, :5] = 0, 1e-42
    want = wire.encode(form, rows.view(np.uint32))
    got = device.encode(form, torch.from_numpy(rows))
    assert (got.numpy() == want).all()
    back = device.decode(form, got, torch.float32)
    assert (back.numpy() == there_and_back(form, rows)).all()


def test_a_row_of_a_device_that_is_not_finite(rows):
    from dilu.runtime.gpu import wire as device

    rows[1, 2], rows[4, 3] = np.nan, -np.inf
    got = device.decode("f8e4m3", device.encode("f8e4m3", torch.from_numpy(rows)), torch.float32)
    want = there_and_back("f8e4m3", rows)
    assert (np.isnan(got.numpy()) == np.isnan(want)).all()
    assert np.isnan(want[[1, 4]]).all()
