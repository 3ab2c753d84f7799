"""What is decomposed, what is kept, and what is refused by which name."""

from __future__ import annotations

import numpy as np
import pytest
import torch
from calls import Call

from dilu.errors import UnsupportedError
from dilu.frontend.operators import TABLE
from dilu.frontend.program import decompose
from dilu.frontend.program.capture import capture_call, capture_module
from dilu.frontend.program.export import export
from dilu.ir.interpret import interpret

X = torch.tensor([0.25, 0.5, 1.0, 2.0])


def operators_of(function) -> set[str]:
    program = export(Call(function), (X,), None)
    nodes = program.graph_module.graph.nodes
    return {str(node.target) for node in nodes if node.op == "call_function"}


def test_without_a_lowering_an_operator_becomes_others_that_have_one():
    assert "aten.special_entr.default" not in TABLE
    assert operators_of(torch.special.entr) <= TABLE.keys()
    (main,) = capture_module(Call(torch.special.entr), (X,)).functions
    (got,) = interpret(main, [X.numpy()])
    np.testing.assert_allclose(got, torch.special.entr(X), rtol=1e-6)


@pytest.mark.parametrize("name", ["silu", "logsumexp", "softmax", "layer_norm", "gelu"])
def test_with_a_lowering_an_operator_stays_what_it_is(name):
    functions = {
        "silu": torch.nn.functional.silu,
        "gelu": torch.nn.functional.gelu,
        "logsumexp": lambda x: x.logsumexp(0),
        "softmax": lambda x: x.softmax(0),
        "layer_norm": lambda x: torch.nn.functional.layer_norm(x, (4,)),
    }
    (operator,) = operators_of(functions[name])
    assert operator.startswith(f"aten.{name}.")


def test_an_operator_that_torch_renames_to_its_own_primitive_is_no_decomposition():
    def forward(x):
        return torch.nextafter(x, x + 1)

    with pytest.raises(UnsupportedError, match=r"the operator aten\.nextafter\.default is not su"):
        capture_module(Call(forward), (X,))


def test_what_is_left_of_a_decomposition_is_refused_by_the_model_s_operator():
    message = (
        r"the operator aten\.special_ndtri\.default, of which torch makes prims\.ndtri\.default, "
        r"is not supported\n  at .*\.py:\d+\n"
    )
    with pytest.raises(UnsupportedError, match=message):
        capture_module(Call(torch.special.ndtri), (X,))


@pytest.fixture
def decomposing(monkeypatch):
    """Return `decomposing(operator, function)`, which sets an operator's decomposition."""
    known, told = decompose._decomposition, {}

    def decomposition(op):
        return told[str(op)] if str(op) in told else known(op)

    monkeypatch.setattr(decompose, "_decomposition", decomposition)
    return lambda operator, function: told.update({operator: function})


def test_where_a_decomposition_fails_the_others_are_used_and_the_operator_is_refused(decomposing):
    def failing(*_):
        raise ValueError("this decomposition fails")

    decomposing("aten.nextafter.default", failing)

    def forward(x):
        return torch.special.entr(x), torch.nextafter(x, x)

    assert operators_of(forward) - TABLE.keys() == {"aten.nextafter.default"}
    with pytest.raises(UnsupportedError, match=r"the operator aten\.nextafter\.default is not su"):
        capture_module(Call(forward), (X,))


def test_a_decomposition_that_leads_to_itself_ends(decomposing):
    decomposing("aten.nextafter.default", torch.nextafter)
    with pytest.raises(UnsupportedError, match=r"aten\.nextafter\.default is not supported"):
        capture_module(Call(lambda x: torch.nextafter(x, x)), (X,))


def test_what_a_decomposition_takes_for_granted_of_sizes_is_a_condition(decomposing):
    decomposing("aten.nextafter.default", lambda x, y: x + y if x.shape[0] > 5 else x - y)
    example = torch.arange(8.0)
    call = capture_call(
        Call(lambda x: torch.nextafter(x, x)), (example,), (({0: torch.export.Dim.AUTO},),)
    )
    ((left, relation, right),) = call.signature["conditions"]
    assert {left, right} == {"s0", 5} and relation in (">", "<")
