"""torch's own samples of operators: scalars, empty tensors, sizes of 1, strides, in one capture.

A slice of what `python tests/operator_sweep.py` looks at.
"""

from __future__ import annotations

import operator_sweep
import operators
import pytest
import torch

#: Whose samples have much that has no elements or no axes.
NAMES = (
    "roll", "index_select", "flip", "max", "cumsum", "softmax", "var_mean", "any", "gather", "sort",
    "nn.functional.prelu", "native_group_norm", "cat", "repeat", "sum", "matmul",
)  # fmt: skip
#: One of each family of lowerings, and some that torch decomposes.
FAMILIES = (
    "atan2", "sinh", "round", "copysign", "prod", "cumprod", "cummax", "logcumsumexp", "median",
    "searchsorted", "scatter_add", "scatter_reduce", "index_add", "index_put", "put", "erfinv",
    "digamma", "nn.functional.conv1d", "nn.functional.conv_transpose2d", "nn.functional.max_pool1d",
    "nn.functional.avg_pool1d", "nn.functional.adaptive_max_pool2d", "nn.functional.pad",
    "nn.functional.batch_norm", "unfold", "diagonal", "cdist", "special.entr", "kron", "block_diag",
    "nn.functional.huber_loss", "expand", "positive",
)  # fmt: skip
OF_INTEGERS = ("bitwise_and", "bitwise_left_shift", "cumsum", "matmul", "scatter_add", "prod")
#: What a sample may be refused for.
REFUSED = ("all axes at once", "more than one number where a mask holds")


def outcomes(name: str, most: int, dtype: torch.dtype = torch.float32) -> list[operators.Outcome]:
    found = [o for o in operators.operators().values() if o.name == name]
    parts = [p for o in found for p in operators.samples(o, dtype) if p.is_valid]
    return operators.outcomes(operator_sweep.spread(parts, most))


def hold(found: list[operators.Outcome], right: int) -> None:
    """Assert that at least so many samples are right, and the others refused as they may be."""
    assert sum(o.kind == "right" for o in found) >= right
    for outcome in found:
        if outcome.kind == "refused":
            assert any(text in outcome.text for text in REFUSED), outcome.text
        elif outcome.kind != "missing":
            assert (outcome.kind, outcome.text) == ("right", ""), outcome.sample.name


@pytest.mark.slow
@pytest.mark.parametrize("name", NAMES)
def test_samples_are_right_or_refused(name):
    hold(outcomes(name, 40), 3)


@pytest.mark.slow
@pytest.mark.parametrize("name", FAMILIES)
def test_families(name):
    hold(outcomes(name, 12), 1)


@pytest.mark.slow
@pytest.mark.parametrize("name", OF_INTEGERS)
def test_integers(name):
    hold(outcomes(name, 12, torch.int64), 1)


def test_one_sample_of_each_family_in_one_capture():
    found = [o for o in operators.operators().values() if o.name in FAMILIES]
    first = [next((p for p in operators.samples(o) if p.is_valid), None) for o in found]
    parts = [p for p in first if p is not None]
    assert len(parts) >= len(FAMILIES)
    hold(operators.outcomes(parts), len(parts))


class Mutating(torch.nn.Module):
    def forward(self, x: torch.Tensor) -> tuple[torch.Tensor, ...]:
        x.add_(1)
        return x, x * 2


def sample(module: torch.nn.Module, wanted_first: float) -> operators.Outcome:
    part = operators.Sample("made up", module, (torch.tensor([1.0]),))  # type: ignore[arg-type]
    assert part.wanted[0].item() == wanted_first
    (outcome,) = operators.outcomes([part])
    return outcome


def test_what_is_returned_as_it_came_or_written_to_is_compared():
    assert sample(Mutating(), 2.0).kind == "right"


@pytest.mark.parametrize(
    ("counts", "verdict"),
    [
        ({}, "none"),
        ({"right": 3}, "right"),
        ({"right": 3, "refused": 1}, "partly"),
        ({"missing": 2}, "refused"),
        ({"right": 9, "missing": 1, "wrong": 1}, "wrong"),
        ({"internal": 1, "refused": 4}, "internal"),
        ({"uncaptured": 2}, "uncaptured"),
    ],
)
def test_the_worst_sample_says_how_an_operator_fares(counts, verdict):
    assert operator_sweep.verdict(counts) == verdict


def test_what_fares_otherwise_than_before_is_told():
    rows = {"abs": {"verdict": "right"}, "acos": {"verdict": "refused"}}
    assert operator_sweep.changes(rows) == ["acos: refused, not right"]


def test_a_wrong_result_is_seen(monkeypatch):
    monkeypatch.setattr(operators, "interpret", lambda *_: (0 * torch.ones(1).numpy(),) * 2)
    assert sample(Mutating(), 2.0).kind == "wrong"
