"""torch's own samples of operators: scalars, empty tensors, sizes of 1, strides, in one capture.

A slice of what `python tests/operators.py` looks at.
"""

from __future__ import annotations

import operators
import pytest

pytestmark = pytest.mark.slow

#: Whose samples have much that has no elements or no axes.
NAMES = (
    "roll", "index_select", "flip", "max", "cumsum", "softmax", "var_mean", "any", "gather", "sort",
    "nn.functional.prelu", "native_group_norm", "cat", "repeat", "sum", "matmul",
)  # fmt: skip
#: What a sample may be refused for.
REFUSED = ("all axes at once",)


def of(name: str) -> list[operators.Outcome]:
    found = [o for o in operators.operators().values() if o.name == name]
    parts = [p for o in found for p in operators.samples(o) if p.is_valid]
    return operators.outcomes(parts[:40])


@pytest.mark.parametrize("name", NAMES)
def test_samples_are_right_or_refused(name):
    found = of(name)
    assert sum(o.kind == "right" for o in found) >= 3
    for outcome in found:
        if outcome.kind == "refused":
            assert any(text in outcome.text for text in REFUSED), outcome.text
        elif outcome.kind != "missing":
            assert (outcome.kind, outcome.text) == ("right", ""), outcome.sample.name
