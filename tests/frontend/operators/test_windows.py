"""Convolutions and pooling: against torch in f64, on every target."""

from __future__ import annotations

import copy
from collections.abc import Callable
from typing import Any

import numpy as np
import pytest
import torch
from everywhere import compare
from torch import nn
from torch.nn import functional as F

import dilu

pytestmark = [
    pytest.mark.slow,
    pytest.mark.filterwarnings("ignore::RuntimeWarning"),  # of numpy, under Triton's interpreter
]


def wide(function: Any) -> Callable[..., Any]:
    """Return what a module or function gives in f64, in the element type of its input."""
    inner = copy.deepcopy(function).double() if isinstance(function, nn.Module) else function

    def run(x):
        out = inner(x.double())
        each = out if isinstance(out, tuple) else (out,)
        return tuple(t.to(x.dtype) if t.is_floating_point() else t for t in each)

    return run


def convolutions() -> dict[str, nn.Module]:
    torch.manual_seed(3)
    return {
        "plain": nn.Conv2d(6, 8, 3),
        "padded": nn.Conv2d(6, 5, 3, padding=1),
        "strided": nn.Conv2d(6, 4, 3, stride=2, padding=1),
        "dilated": nn.Conv2d(6, 4, 3, dilation=2, padding=2),
        "grouped": nn.Conv2d(6, 4, 3, groups=2, padding=1),
        "depthwise": nn.Conv2d(6, 6, 3, groups=6, padding=1, bias=False),
        "two_of_each": nn.Conv2d(6, 12, (3, 2), groups=6, stride=(2, 1)),
        "of_one": nn.Conv2d(6, 7, 1, stride=2),
        "same": nn.Conv2d(6, 7, (2, 4), padding="same"),
        "transposed": nn.ConvTranspose2d(6, 4, 3, stride=2, padding=1, output_padding=1),
        "transposed_grouped": nn.ConvTranspose2d(6, 4, 2, stride=2, groups=2),
        "transposed_cropped": nn.ConvTranspose2d(6, 3, 3, dilation=2, padding=5),
    }


POOLS = {
    "max": lambda x: F.max_pool2d(x, 3, 2, 1),
    "max_indices": lambda x: F.max_pool2d(x, (3, 2), 2, 1, return_indices=True),
    "max_ceil": lambda x: F.max_pool2d(x, 2, 2, ceil_mode=True),
    "max_dilated": lambda x: F.max_pool2d(x, 2, 1, dilation=2),
    "avg": lambda x: F.avg_pool2d(x, 3, 2, 1),
    "avg_ceil": lambda x: F.avg_pool2d(x, 3, 2, 1, ceil_mode=True),
    "avg_inside": lambda x: F.avg_pool2d(x, 3, 2, 1, count_include_pad=False),
    "avg_divisor": lambda x: F.avg_pool2d(x, 2, divisor_override=3),
    "adaptive": lambda x: (F.adaptive_avg_pool2d(x, (4, 5)), F.adaptive_avg_pool2d(x, 1)),
    "adaptive_max": lambda x: F.adaptive_max_pool2d(x, (2, 3), return_indices=True),
    "unfold": lambda x: F.unfold(x, 3, stride=2),
}


def check(functions: dict[str, Any], x: torch.Tensor, tolerance: float) -> None:
    oracles = {n: wide(f) for n, f in functions.items()}
    compare(functions, [x], tolerance, oracles=oracles)


def test_planes():
    net = nn.Sequential(
        nn.Conv2d(6, 8, 3, padding=1), nn.ReLU(), nn.Conv2d(8, 4, 3, stride=2), nn.BatchNorm2d(4),
        nn.SiLU(),
    )  # fmt: skip
    check({**convolutions(), **POOLS, "net": net.eval()}, torch.randn(2, 6, 9, 11), 3e-6)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_planes_of_narrow_numbers(dtype):
    modules = {n: m.to(dtype) for n, m in convolutions().items()}
    check({**modules, **POOLS}, torch.randn(2, 6, 9, 11).to(dtype), 2**-6)


def test_rows():
    functions = {
        "conv": nn.Conv1d(6, 4, 5, padding=2, stride=3),
        "transposed": nn.ConvTranspose1d(6, 4, 4, stride=2, padding=1),
        "alone": lambda x: F.conv1d(x[0], torch.ones(3, 6, 2, dtype=x.dtype)),
        "max": lambda x: F.max_pool1d(x, 3, 2),
        "avg": lambda x: F.avg_pool1d(x, 3, 2, 1),
        "adaptive": lambda x: (F.adaptive_avg_pool1d(x, 5), F.adaptive_max_pool1d(x, 4)),
    }
    check(functions, torch.randn(2, 6, 17), 3e-6)


def test_volumes():
    functions = {
        "conv": nn.Conv3d(4, 4, 3, padding=1, stride=2, groups=2),
        "max": lambda x: F.max_pool3d(x, 2),
        "avg": lambda x: F.avg_pool3d(x, 2, 1, 1),
        "adaptive": lambda x: F.adaptive_avg_pool3d(x, (2, 3, 4)),
    }
    check(functions, torch.randn(1, 4, 5, 6, 7), 3e-6)


class Net(nn.Module):
    """All kinds of windows on sizes that a call tells."""

    def __init__(self) -> None:
        super().__init__()
        self.down = nn.Conv2d(3, 8, 3, stride=2, padding=1)
        self.each = nn.Conv2d(8, 8, 3, padding=1, groups=8)
        self.up = nn.ConvTranspose2d(8, 4, 2, stride=2)

    def forward(self, x):
        x = F.relu(self.down(x))
        x = F.max_pool2d(x + self.each(x), 3, 2, 1)
        return self.up(x), F.avg_pool2d(x, 2), F.adaptive_avg_pool2d(x, 1).flatten(1)


def test_sizes_that_a_call_tells():
    net, auto = Net().eval(), torch.export.Dim.AUTO
    artifact = dilu.compile(
        net, (torch.randn(2, 3, 32, 48),), dynamic_shapes=({0: auto, 2: auto, 3: auto},)
    )
    with dilu.load(artifact) as session:
        for shape in ((2, 3, 32, 48), (3, 3, 47, 65), (1, 3, 33, 30)):
            x = torch.randn(shape)
            for got, want in zip(session(x), net(x), strict=True):
                np.testing.assert_allclose(got, want.detach(), atol=3e-6)
