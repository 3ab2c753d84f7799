"""Exporting modules: what is taken, that a module stays as it was, and errors with their cause."""

from __future__ import annotations

import logging
import re

import pytest
import torch
from calls import Call, as_the_module
from torch import nn
from torch.nn import functional as F

from dilu.errors import DiluError, UnsupportedError
from dilu.frontend.program.capture import capture_module

X, Y = torch.randn(2, 3, 4, generator=torch.Generator().manual_seed(0))


def refusal(model, *args, shapes=None, error=DiluError):
    """Return the error that capturing raises, as a user sees it."""
    with pytest.raises(error) as caught:
        capture_module(model, args or (X,), shapes)
    return str(caught.value)


def here(function, offset=1):
    """Return how an error names a line of a function of this file."""
    return f"test_export.py:{function.__code__.co_firstlineno + offset}"


# ------------------------------------------------------------------------- what is taken


def plain(a, *, b=2.0):
    return a * b


class Encoder(nn.Module):
    def __init__(self):
        super().__init__()
        self.linear = nn.Linear(4, 4)

    def encode(self, x):
        return self.linear(x)


class Doubled(torch.autograd.Function):
    @staticmethod
    def forward(ctx, x):
        return x * 2

    @staticmethod
    def backward(ctx, gradient):
        return gradient * 2


def hooked():
    linear = nn.Linear(4, 4)
    linear.register_forward_pre_hook(lambda _, args: (args[0] * 2,))
    linear.register_forward_hook(lambda _, args, out: out + 1)
    return linear


TAKEN = {
    "a function": lambda: plain,
    "a closure": lambda: lambda x: linear(x) + 1,
    "a method": lambda: Encoder().encode,
    "a compiled module": lambda: torch.compile(nn.Linear(4, 4)),
    "a compiled module inside": lambda: nn.Sequential(torch.compile(nn.Linear(4, 4)), nn.ReLU()),
    "hooks": hooked,
    "an autograd function": lambda: Call(Doubled.apply),
    "a tensor made in forward": lambda: Call(lambda x: x + torch.tensor([1.0, 2, 3, 4])),
    "a norm of the batch": lambda: nn.BatchNorm1d(4, track_running_stats=False),
}
linear = nn.Linear(4, 4)


@pytest.mark.parametrize("name", TAKEN)
def test_models_of_all_kinds(name):
    as_the_module(TAKEN[name](), (X,), call=(Y,))


def test_weights_that_lie_in_odd_ways():
    matrix = torch.randn(6, 4)
    model = Call(
        lambda self, x: x @ self.strided.t() + self.spread + self.stepped + self.kept[1] + self.row,
        strided=nn.Parameter(matrix.t().contiguous().t()[:3]),
        spread=nn.Parameter(torch.randn(1, 1).expand(3, 3)),
        stepped=nn.Parameter(torch.randn(6)[::2]),
        kept=nn.ParameterList([nn.Parameter(torch.randn(3)), nn.Parameter(torch.randn(3))]),
    )
    shared = torch.randn(2, 3)
    model.register_buffer("row", shared[0])
    model.register_buffer("other", shared[1])
    model.register_buffer("absent", None)
    as_the_module(model, (X,))


@pytest.mark.parametrize(
    "unused", [torch.zeros(2, dtype=torch.complex64), torch.zeros(2, device="meta")]
)
def test_a_parameter_that_nothing_reads_is_no_reason_to_refuse(unused):
    as_the_module(Call(lambda self, x: x * 2, unused=nn.Parameter(unused)), (X,))


def test_modules_stay_in_training():
    model = nn.Sequential(nn.Linear(4, 4), nn.Dropout(0.5), nn.BatchNorm1d(4))
    model[0].eval()
    capture_module(model, (X,))
    assert [m.training for m in model.modules()] == [True, False, True, True]
    broken = nn.Sequential(model, Call(no_such_attribute))
    refusal(broken)
    assert broken.training and model.training and not model[0].training


# ------------------------------------------------------------------------- errors


def no_such_attribute(x):
    return x.no_such_attribute


def on_values(x):
    return x + 1 if x.sum() > 0 else x


def by_item(x):
    return x[: int(x[0, 0].abs())]


def in_numpy(x):
    return torch.from_numpy(x.numpy() + 1)


def raising(x):
    raise ValueError("heads do not divide")


def mismatched(x):
    return x @ x


def static_rows(x):
    return x.reshape(3, 4)


CAUSES = {
    on_values: ("data-dependent expression", "must not depend on the values of tensors"),
    by_item: ("data-dependent expression", "must not depend on the values of tensors"),
    no_such_attribute: ("has no attribute 'no_such_attribute'", "does the module run with these"),
    in_numpy: (r"\.numpy\(\) is not supported", "compute with torch"),
    raising: ("heads do not divide", None),
    mismatched: ("must have same reduction dim", None),
}


@pytest.mark.parametrize("model", CAUSES)
def test_the_cause_is_told_at_its_line(model, capfd):
    cause, hint = CAUSES[model]
    text = refusal(model)
    assert text.startswith("torch.export cannot capture the model: ")
    assert here(model) in text
    if hint is None:
        assert "hint" not in text
    else:
        assert hint in text
    assert re.search(cause, text)
    assert "Traceback" not in capfd.readouterr().err


def test_torchs_log_speaks_again_afterwards():
    refusal(mismatched)
    for handler in logging.getLogger("torch").handlers:
        assert handler.filter(logging.makeLogRecord({"levelno": logging.ERROR, "msg": "x"}))


def test_sizes_that_the_model_fixes():
    text = refusal(static_rows, shapes=({0: torch.export.Dim("n")},))
    assert "not every size of dynamic_shapes fits: You marked n as dynamic but" in text
    assert "hint: torch suggests: n = 3" in text


def random_numbers(x):
    return x + torch.randn(4, generator=torch.Generator().manual_seed(0))


@pytest.mark.parametrize(
    "model",
    [
        random_numbers,
        lambda x: torch.normal(x, 1.0),
        lambda x: torch.bernoulli(x.sigmoid()),
        lambda x: torch.multinomial(x.abs(), 1),
        lambda x: x[torch.randperm(3)],
        lambda x: x + torch.rand_like(x),
    ],
)
def test_random_numbers(model):
    text = refusal(model, error=UnsupportedError)
    assert "a random number inside of a model is not supported" in text
    assert here(model, 1 if model is random_numbers else 0) in text


def test_dropout_that_is_always_on():
    text = refusal(lambda x: F.dropout(x, 0.5))
    assert "dropout that does not depend on module.training is not supported" in text


def test_control_flow_operators():
    def chosen(x):
        return torch.cond(x.sum() > 0, lambda y: y + 1, lambda y: y - 1, (x,))

    text = refusal(chosen, error=UnsupportedError)
    assert "the operator cond is not supported" in text
    assert "a compiled model has no control flow" in text
    assert here(chosen) in text


def test_gradients_inside():
    def gradient(x):
        return torch.func.grad(lambda y: (y**2).sum())(x)

    refusal(gradient)


@pytest.mark.parametrize(
    ("model", "message"),
    [
        (nn.LazyLinear(4), "the parameter 'weight' has no shape yet: its module is lazy"),
        (nn.Linear(4, 4, device="meta"), "the parameter 'weight' has no values"),
        (
            Call(lambda self, x: x * self.scale.real, scale=nn.Parameter(torch.ones(4) * 1j)),
            "aten.view_as_real.default,? is not supported|element type torch.complex64",
        ),
    ],
)
def test_parameters_without_values(model, message):
    with pytest.raises(DiluError, match=message):
        capture_module(model, (X,))
    if message.startswith("the parameter 'weight' has no values"):
        with pytest.raises(DiluError, match=message):
            capture_module(model, (X.to("meta"),))


@pytest.mark.filterwarnings("ignore:.*torch.jit.*")
def test_scripts():
    scripted = torch.jit.script(nn.ReLU())
    for model in (scripted, nn.Sequential(scripted)):
        assert "a TorchScript module cannot be captured" in refusal(model)


def test_results_that_are_neither_tensors_nor_plain():
    text = refusal(lambda x: (x, x.dtype))
    assert "torch.dtype" in text


def test_a_parameter_named_as_a_word_of_python():
    class Named(torch.nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.register_buffer("for", torch.ones(3))

        def forward(self, x):
            return x * getattr(self, "for")

    with pytest.raises(DiluError, match="parameter is named 'for', which has a word of Python"):
        capture_module(Named(), (torch.ones(2, 3),))
