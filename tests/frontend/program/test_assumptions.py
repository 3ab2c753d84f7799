"""What a program takes for granted of its sizes holds at a call, or the call is refused."""

from __future__ import annotations

import pytest
import torch
from calls import as_the_module, interpreted, same
from torch.export import Dim

from dilu.errors import DiluError


def rows(n):
    return torch.arange(4.0 * n).reshape(n, 4)


def branch_on_one(x):
    if x.shape[0] == 1:
        return x * 0
    return x * 2


def branch_on_more(x):
    return x - x.mean(0) if x.shape[0] > 1 else x


def branch_on_none(x):
    if not x.numel():
        return x - 5
    return x * 2


def squeezed(x):
    return x.squeeze(0) * 2


def asserted(x):
    assert x.shape[0] != 1 and x.shape[0] < 9
    return x + 1


def halves(x):
    assert x.shape[0] % 2 == 0
    return x + 1


def at_ends(x):
    if x.shape[0] > 3 and x.shape[1] == 4:
        return x[:3] + x[-3:]
    return x * 2


REFUSED = {
    branch_on_one: (Dim("n"), 7, 1, "holds for n != 1 only, and n=1"),
    branch_on_more: (Dim("n"), 2, 1, "holds for n > 1 only, and n=1"),
    branch_on_none: (Dim("n"), 1, 0, "holds for n >= 1 only, and n=0"),
    squeezed: (Dim("n"), 2, 1, "holds for n != 1 only, and n=1"),
    asserted: (Dim.AUTO, 8, 9, r"holds for s0 (< 9|<= 8) only, and s0=9"),
    halves: (Dim.AUTO, 8, 5, "holds for s0 % 2 == 0 only, and s0=5"),
    at_ends: (Dim.AUTO, 5, 2, "only, and s0=2"),
}


@pytest.mark.parametrize("model", REFUSED)
def test_conditions_on_sizes(model):
    size, good, bad, message = REFUSED[model]
    function = as_the_module(model, (rows(6),), call=(rows(good),), dynamic_shapes=({0: size},))
    with pytest.raises(DiluError, match=message):
        function(rows(bad))


@pytest.mark.parametrize(
    ("size", "good", "bad", "message"),
    [
        (Dim("batch", max=16), 16, 20, "batch <= 16 only, and batch=20"),
        (Dim("batch", min=3), 3, 2, "batch >= 3 only, and batch=2"),
        (Dim("batch", min=2), 2, 1, "batch >= 2 only, and batch=1"),
        (Dim("batch", min=4, max=8), 8, 9, "batch <= 8 only"),
        (Dim.AUTO(max=7), 7, 8, "s0 <= 7 only"),
    ],
)
def test_ranges(size, good, bad, message):
    function = as_the_module(
        lambda x: x + 1, (rows(5),), call=(rows(good),), dynamic_shapes=({0: size},)
    )
    with pytest.raises(DiluError, match=message):
        function(rows(bad))


@pytest.mark.parametrize("size", [Dim("n"), Dim.DYNAMIC, Dim.AUTO])
def test_sizes_of_nothing_and_one_hold_where_nothing_depends_on_them(size):
    function = interpreted(lambda x: x + 1, (rows(5),), dynamic_shapes=({0: size},))
    for n in (0, 1, 9):
        same(function(rows(n)), rows(n) + 1)


def test_conditions_of_an_exported_program():
    class Halves(torch.nn.Module):
        def forward(self, x):
            return halves(x)

    program = torch.export.export(Halves(), (rows(6),), dynamic_shapes=({0: Dim.AUTO(max=12)},))
    function = interpreted(program)
    function(rows(4))
    with pytest.raises(DiluError, match="s0 % 2 == 0 only, and s0=5"):
        function(rows(5))
    with pytest.raises(DiluError, match="s0 <= 12 only, and s0=14"):
        function(rows(14))


def test_tensors_that_are_made_while_conditions_are_recorded():
    """Nothing that notes them keeps fake tensors alive, which torch takes for constants."""
    for _ in range(4):
        like = as_the_module(
            lambda x: x + torch.zeros_like(x) if x.shape[0] > 0 else x,
            (rows(6),),
            call=(rows(3),),
            dynamic_shapes=({0: Dim("n")},),
        )
        like(rows(9))


def test_what_cannot_be_checked_is_refused():
    def ratio(x):
        return x + 1 if x.shape[0] / 4 > 1.3 else x

    with pytest.raises(DiluError, match="which cannot be checked at a call"):
        interpreted(ratio, (rows(6),), dynamic_shapes=({0: Dim.AUTO},))
