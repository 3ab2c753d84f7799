"""Captured modules are called as the modules themselves: names, structures, constants, results."""

from __future__ import annotations

import collections
import dataclasses
from typing import NamedTuple

import numpy as np
import pytest
import torch
from calls import Call, as_the_module, interpreted, same
from torch import nn
from torch.export import Dim

from dilu.errors import DiluError, UnsupportedError
from dilu.frontend.program.capture import capture_call

X, Y, Z = torch.randn(3, 2, 4, generator=torch.Generator().manual_seed(0))


class Pair(NamedTuple):
    first: torch.Tensor
    second: torch.Tensor


@dataclasses.dataclass
class Output:
    logits: torch.Tensor
    hidden: tuple[torch.Tensor, ...] | None = None
    name: str | None = None


torch.export.register_dataclass(Output)


class Scaled(nn.Module):
    def forward(self, x, mask=None, *, scale=1.0, flags=(), mode="sum"):
        y = x * scale
        y = y if mask is None else y + mask
        for flag in flags:
            y = y * 2 if flag else -y
        return {"y": y, "rows": x.shape[0], "mode": mode, "none": None, "pair": (y, [y.max(1)[0]])}


def test_positions_and_keywords():
    keywords = {"mask": Y, "scale": 2.0, "flags": (True, False)}
    function = as_the_module(Scaled(), (X,), keywords)
    wanted = Scaled()(Z, X, scale=2.0, flags=(True, False))
    same(function(Z, X, scale=2.0, flags=(True, False)), wanted)
    same(function(flags=[True, False], scale=np.float64(2), mask=X, x=Z, mode="sum"), wanted)


def test_a_dictionary_of_examples_is_keywords():
    function = interpreted(Scaled(), {"mask": Y, "x": X})
    same(function(Z, Y), Scaled()(Z, Y))
    same(function(x=Z, mask=Y), Scaled()(Z, Y))


WRONG_CALLS = {
    "another number": (
        (X, Y), {"scale": 3.0, "flags": (True,)}, "scale is 3.0, but the program",
    ),
    "a number left out": ((X, Y), {"flags": (True,)}, "the argument scale is missing"),
    "an integer for a float": (
        (X, Y), {"scale": 2, "flags": (True,)}, "scale is 2, but the program was compiled",
    ),
    "a flag left out": ((X, Y), {"scale": 2.0}, "the argument flags is missing"),
    "another structure": (
        (X, Y), {"scale": 2.0, "flags": ()}, "flags is a tuple of 0, expected a sequence of 1",
    ),
    "another flag": (
        (X, Y), {"scale": 2.0, "flags": (1,)}, r"flags\[0\] is 1, but .* compiled for True only",
    ),
    "unknown": (
        (X, Y), {"skale": 2.0, "scale": 2.0, "flags": (True,)}, "no argument called 'skale'",
    ),
    "twice": ((X, Y), {"x": X, "scale": 2.0}, "the argument x is given twice"),
    "missing": ((), {"mask": Y, "scale": 2.0}, "the argument x is missing"),
    "too many": ((X, Y, Z), {"scale": 2.0, "flags": (True,)}, "takes 4 arguments, not 5"),
    "nothing for a tensor": ((X, None), {"scale": 2.0, "flags": (True,)}, "mask: None is no array"),
    "a tensor for a number": (
        (X, Y), {"scale": X, "flags": (True,)}, "scale is a Tensor, but the program was compiled",
    ),
}  # fmt: skip


@pytest.fixture(scope="module")
def scaled():
    return interpreted(Scaled(), (X, Y), {"scale": 2.0, "flags": (True,)})


@pytest.mark.parametrize("name", WRONG_CALLS)
def test_calls_that_do_not_fit(scaled, name):
    args, kwargs, message = WRONG_CALLS[name]
    with pytest.raises(DiluError, match=message):
        scaled(*args, **kwargs)


def test_what_the_examples_left_out_has_its_default():
    function = interpreted(Scaled(), (X,))
    same(function(Y, None, scale=1.0), Scaled()(Y))
    with pytest.raises(DiluError, match="mask is a Tensor, but the program was compiled for None"):
        function(Y, Z)
    with pytest.raises(DiluError, match=r"the argument flags is a tuple, but .* without it"):
        function(Y, flags=(True,))


def test_nested_inputs_and_results():
    def nested(d):
        results = Pair(d["a"] + d["list"][0], d["pair"].first * 2)
        return results, Output(d["a"], (d["out"].logits,)), [{"k": d["tuple"][1], 7: 7}], d["a"].t()

    d = {"a": X, "list": [Y], "tuple": (X, Y), "pair": Pair(X, Y), "out": Output(X)}
    function = as_the_module(nested, (d,))
    other = {key: d[key] for key in reversed(d)}
    same(function(other), nested(other))
    for wrong, message in [
        ({k: v for k, v in d.items() if k != "a"}, "the argument d has no 'a'"),
        ({**d, "z": X}, "the argument d has 'z' too many"),
        (X, "the argument d is a Tensor, expected a dictionary with 'a', 'list'"),
        ({**d, "tuple": (X,)}, r"d\['tuple'\] is a tuple of 1, expected a sequence of 2"),
        ({**d, "out": X}, r"d\['out'\] is a Tensor, expected an object with logits, hidden"),
        ({**d, "out": Output(X, (X,))}, r"d\['out'\].hidden is a tuple, but .* for None only"),
    ]:
        with pytest.raises(DiluError, match=message):
            function(wrong)


def test_ordered_and_defaulting_dictionaries():
    def add(a, b):
        return collections.OrderedDict(y=a["x"] + b["x"])

    a, b = collections.OrderedDict(x=X), collections.defaultdict(int, x=Y)
    function = interpreted(add, (a, b))
    same(function({"x": X}, {"x": Y}), {"y": X + Y})


def test_any_number_of_arguments():
    model = Call(lambda *tensors, **more: sum(tensors) + more["last"])
    as_the_module(model, (X, Y, Z), {"last": X}, (Z, Z, Y), {"last": Y})
    with pytest.raises(DiluError, match="takes 3 arguments, not 1"):
        interpreted(lambda *tensors: sum(tensors), (X, Y, Z))(X)


def test_no_arguments_and_no_results():
    model = Call(lambda self: (self.weight, self.weight + 1, 3), weight=nn.Parameter(X.clone()))
    as_the_module(model)
    as_the_module(lambda x: None, (X,))
    as_the_module(lambda x: (), (X,))


def test_plain_results():
    as_the_module(lambda x: (x + 1, 3, -2.5, True, "a", None, float("inf")), (X,))


def test_sizes_as_results():
    n = Dim("n")
    as_the_module(
        lambda x: (x + 1, x.shape[0], {"numbers": x.numel() * 2 - 1}),
        (X,),
        call=(torch.zeros(5, 4),),
        dynamic_shapes=({0: n},),
    )


def test_plain_arguments_are_part_of_the_program():
    def first(x, k, name, bias=None):
        return x[:k] if name == "rows" else x[:, :k]

    function = as_the_module(first, (X, 1, "rows"))
    for wrong in (2, True, torch.tensor(1), 1.0):
        with pytest.raises(DiluError, match=r"the argument k is .* compiled for 1 only"):
            function(X, wrong, "rows")
    with pytest.raises(DiluError, match=r"name is 'columns', but .* compiled for 'rows' only"):
        function(X, 1, "columns")
    same(function(X, np.int64(1), "rows", None), X[:1])


def test_dynamic_numbers_are_refused():
    with pytest.raises(DiluError, match="the input k is a number that is made dynamic"):
        capture_call(lambda x, k: x * k, (X, 3), (None, Dim.DYNAMIC))


# --------------------------------------------------------------- the caller's own arrays


def test_an_input_that_comes_back_is_the_callers_own():
    function = as_the_module(lambda x, y: (x, x.detach(), y + 1, {"again": x}), (X, Y))
    first, detached, _, again = function(X, Y)
    assert first is X and again["again"] is X
    assert detached is not X
    array = X.numpy()
    assert function(array, array)[0] is array
    assert isinstance(function(array, Y)[0], torch.Tensor)
    assert isinstance(function(X.tolist(), array)[0], np.ndarray)


def test_results_are_not_overwritten_by_the_next_call():
    model = Call(
        lambda self, x: (x.view(-1), x[0], self.weight, self.weight.t(), x + 0),
        weight=nn.Parameter(Y.clone()),
    )
    function = as_the_module(model, (X,))
    before = [r.clone() for r in function(X)]
    results = function(X)
    function(Z)
    same(list(results), before)
    results[2].zero_()
    same(function(X)[2], Y)


def test_one_result_twice_is_one_object():
    def twice(x):
        y = x + 1
        return y, y, {"y": y}

    first, second, third = interpreted(twice, (X,))(X)
    assert first is second is third["y"]


def mutating(x, y):
    x.add_(1)
    y[0].mul_(2)
    return x, x * y


def test_arguments_that_are_written_to():
    function = as_the_module(mutating, (X.clone(), Y.clone()), call=(Z.clone(), X.clone()))
    mine, wanted = [X.clone(), Y.clone()], [X.clone(), Y.clone()]
    result, _ = function(*mine)
    mutating(*wanted)
    same(mine, wanted)
    assert result is mine[0]
    arrays = [X.numpy().astype(">f4"), np.asfortranarray(Y.numpy())]
    function(*arrays)
    same([torch.from_numpy(a.astype("<f4")) for a in arrays], wanted)
    half = X.to(torch.bfloat16)
    bits = half.view(torch.uint16).numpy().copy()
    interpreted(lambda x: (x.mul_(2), None)[1], (half.clone(),))(bits)
    np.testing.assert_array_equal(bits, (half * 2).view(torch.uint16).numpy())


def read_only():
    array = X.numpy().copy()
    array.flags.writeable = False
    return array


@pytest.mark.parametrize(
    ("x", "y", "message"),
    [
        (X.tolist(), Y, "the model writes to its argument x, which is a list"),
        (read_only(), Y, "x, which is read-only"),
        (nn.Parameter(X.clone()), Y, "x, which requires a gradient"),
        (X[:1].expand(2, 4), Y, "x, which has several elements in one place"),
        (X, X, "x, which shares memory with another argument"),
        (X.numpy(), X, "x, which shares memory with another argument"),
        (torch.zeros(4, 4)[:2], Y[:, :4].expand(2, 4).numpy()[::-1], None),
    ],
)
def test_arguments_that_cannot_be_written_to(x, y, message):
    function = interpreted(mutating, (X.clone(), Y.clone()))
    if message is None:
        function(x.clone(), y.copy())
        return
    before = X.clone()
    with pytest.raises(DiluError, match=message):
        function(x, y)
    assert torch.equal(X, before)


class Counting(nn.Module):
    def __init__(self):
        super().__init__()
        self.register_buffer("seen", torch.zeros(4))
        self.register_buffer("absent", None)
        self.weight = nn.Parameter(torch.ones(4))


class CountingCalls(Counting):
    def forward(self, x):
        self.seen += 1
        return x + self.seen


class CountingInWeight(Counting):
    def forward(self, x):
        self.weight.add_(1)
        return x + self.weight


@pytest.mark.parametrize(
    ("model", "what"), [(CountingCalls, "buffer 'seen'"), (CountingInWeight, "parameter 'weight'")]
)
def test_modules_that_keep_something(model, what):
    line = model.forward.__code__.co_firstlineno + 1
    message = rf"the model writes to its {what}\n  at .*test_signature.py:{line}\n  hint: .*return"
    with pytest.raises(UnsupportedError, match=message):
        capture_call(model(), (X,))


# --------------------------------------------------------------------------- float8


@pytest.mark.parametrize("dtype", [torch.float8_e4m3fn, torch.float8_e5m2, torch.float8_e8m0fnu])
def test_float8_arguments_and_results(dtype):
    codes = torch.tensor([1.0, 2.0, 0.5, 4.0]).to(dtype)

    def decode(x):
        return x.to(torch.float32), x, x.reshape(2, 2), (x.float() * 2).to(dtype)

    function = interpreted(decode, (codes,))
    values, back, moved, doubled = function(codes)
    assert values.tolist() == [1, 2, 0.5, 4] and back is codes
    assert moved.dtype == doubled.dtype == dtype
    assert doubled.float().tolist() == [2, 4, 1, 8]
    assert function.parameters[0]["dtype"] == function.results[1]["dtype"]
    for given in (codes.view(torch.uint8), codes.view(torch.uint8).numpy()):
        values, _, moved, _ = function(given)
        np.testing.assert_array_equal(np.asarray(values), [1, 2, 0.5, 4])
    assert torch.equal(torch.from_numpy(moved).view(dtype).float(), codes.reshape(2, 2).float())
    strided = torch.stack([codes.view(torch.uint8)] * 2, 1).view(dtype)[:, 0]
    assert function(strided)[0].tolist() == [1, 2, 0.5, 4]
    other = torch.float8_e5m2 if dtype != torch.float8_e5m2 else torch.float8_e4m3fn
    for wrong in (
        torch.ones(4),
        torch.ones(4, dtype=torch.int8),
        torch.ones(4).to(other),
        [1.0] * 4,
    ):
        with pytest.raises(DiluError, match="the argument x"):
            function(wrong)


def test_what_is_neither_a_container_nor_a_tensor():
    class Box:
        def __init__(self, inner):
            self.inner = inner

    torch.utils._pytree.register_pytree_node(
        Box,
        lambda b: ([b.inner], None),
        lambda parts, _: Box(next(iter(parts))),
        flatten_with_keys_fn=lambda b: (
            [(torch.utils._pytree.GetAttrKey("inner"), b.inner)],
            None,
        ),
    )
    with pytest.raises(UnsupportedError, match=r"the result is a .*Box, which is not supported"):
        capture_call(lambda x: Box(x + 1), (X,))
    with pytest.raises(UnsupportedError, match=r"the input x is a .*Box, which is not supported"):
        capture_call(lambda x: x.inner + 1, (Box(X),))
    with pytest.raises(UnsupportedError, match=r"the input x is a dictionary with the key 1.5"):
        capture_call(lambda x: x[1.5] + 1, ({1.5: X},))
    with pytest.raises(UnsupportedError, match="a value depends on a symbolic size"):
        capture_call(lambda x: (x, x.shape[0] > 3), (X,), ({0: Dim("n")},))


def test_an_exported_program_is_called_by_its_names():
    program = torch.export.export(Scaled(), (X,), {"mask": Y, "scale": 2.0})
    function = interpreted(program)
    same(function(Z, mask=X, scale=2.0), Scaled()(Z, X, scale=2.0))
    same(function(x=Z, mask=X, scale=2.0), Scaled()(Z, X, scale=2.0))
    with pytest.raises(DiluError, match=r"scale is 1.0, but the program was compiled for 2.0 only"):
        function(Z, mask=X, scale=1.0)
