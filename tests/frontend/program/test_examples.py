"""Example inputs: an input for every tensor of theirs, and errors for what is no input."""

from __future__ import annotations

import io

import pytest
import torch
from calls import Call, as_the_module, interpreted, same
from torch import nn
from torch.export import Dim, ShapesCollection

from dilu.errors import DiluError
from dilu.frontend.program.capture import capture_call, capture_module


def weighted(a, b, c):
    return a * 2 + b * 3 - c


X = torch.randn(3, 4, generator=torch.Generator().manual_seed(0))
A, B, C = torch.randn(3, 3, 4, generator=torch.Generator().manual_seed(1))
BASE = torch.randn(4, 4)
PARAMETER = nn.Parameter(torch.randn(3, 4))
ALIKE = {
    "the same tensor": (X, X, X),
    "two of three": (X, A, X),
    "views of one another": (BASE[:3], BASE[1:], BASE[:3]),
    "one storage": (X, X.view(3, 4), X.detach()),
    "expanded": (torch.randn(4).expand(3, 4), torch.randn(1, 1).expand(3, 4), X),
    "transposed": (torch.randn(4, 3).t(), torch.randn(3, 8)[:, ::2], X.flip(0)),
    "parameters": (PARAMETER, PARAMETER, X.clone().requires_grad_()),
}


@pytest.mark.parametrize("name", ALIKE)
def test_examples_that_are_alike_are_inputs_of_their_own(name):
    as_the_module(weighted, ALIKE[name], call=(A, B, C))


def test_alike_inside_of_containers_and_among_keywords():
    def nested(pair, table, *, last):
        return pair[0] * 2 + pair[1] * 3 - table["a"] + table["b"][0] * last

    examples = ([X, X], {"a": X, "b": (X,)})
    call = ([A, B], {"a": C, "b": (A + 1,)})
    as_the_module(nested, examples, {"last": X}, call, {"last": B - 2})


def test_alike_with_dynamic_shapes():
    n = Dim("n")
    shapes = ({0: n}, {0: n}, {0: n})
    as_the_module(weighted, (X, X, X), call=(A[:2], B[:2], C[:2]), dynamic_shapes=shapes)
    collected = ShapesCollection()
    collected[X] = {0: n}
    as_the_module(weighted, (X, X, X), call=(A[:2], B[:2], C[:2]), dynamic_shapes=collected)


def test_a_modules_own_parameter_is_an_example_like_others():
    linear = nn.Linear(4, 4)
    model = Call(lambda self, a, b: self.inner(a) - b, inner=linear)
    model.weight = nn.Parameter(torch.ones(1))
    as_the_module(model, (linear.weight, linear.weight), call=(torch.eye(4), torch.ones(4, 4)))


def test_the_examples_are_left_as_they_were():
    before = X.clone()
    interpreted(lambda a: (a.add_(1), a * 2), (X,))
    assert torch.equal(X, before)


def saved(program):
    """Return an exported program after writing and reading it."""
    buffer = io.BytesIO()
    torch.export.save(program, buffer)
    buffer.seek(0)
    return torch.export.load(buffer)


@pytest.mark.parametrize("read", [lambda program: program, saved])
def test_a_program_whose_inputs_torch_merged_is_refused(read):
    program = read(torch.export.export(Call(weighted), (X, X, X)))
    with pytest.raises(DiluError, match=r"made one of the inputs 'args_0' and 'args_[12]'"):
        capture_module(program)


def test_programs_with_unused_inputs_are_not_merged_ones():
    program = torch.export.export(Call(lambda a, b: a + 1), (A, B))
    assert len(capture_module(program).function("main").parameters) == 2


# ------------------------------------------------------------------------- errors


def two(x, mask):
    return x + mask


WRONG = {
    "a tensor": (two, X, None, r"example_inputs is a Tensor, not a tuple(.|\n)*\(tensor,\)"),
    "a generator": (two, (x for x in [X]), None, "example_inputs is a generator, not a tuple"),
    "nothing": (two, None, None, "a module needs example inputs"),
    "too many": (two, (X, X, X), None, r"do not fit two\(x, mask\): too many positional"),
    "too few": (two, (X,), None, "missing a required argument: 'mask'"),
    "a wrong keyword": (two, (X,), {"msk": X}, "missing a required argument: 'mask'"),
    "keywords twice": (two, {"x": X}, {"mask": X}, "keyword inputs are given twice"),
    "no keywords": (two, (X,), [X], "example_kwargs is no dictionary"),
    "numpy": (two, (X, X.numpy()), None, r"input args\[1\] is a numpy.ndarray(.|\n)*from_numpy"),
    "an object": (two, (X, {"a": [object()]}), None, r"args\[1\]\['a'\]\[0\] is a builtins.object"),
    "a generator of numbers": (two, (X, torch.Generator()), None, "is a torch._C.Generator"),
    "a dtype": (two, (X,), {"mask": torch.float16}, r"kwargs\['mask'\] is a torch.dtype"),
    "complex": (two, (X, X.to(torch.complex64)), None, r"args\[1\] is of torch.complex64"),
    "sparse": (two, (X.to_sparse(), X), None, r"args\[0\] is a tensor that is sparse_coo"),
    "quantized": (
        two, (X, torch.quantize_per_tensor(X, 0.1, 0, torch.qint8)), None, "that is quantized",
    ),
    "nested": (two, (X, torch.nested.nested_tensor([X[0], X[1]])), None, "that is nested"),
}  # fmt: skip


@pytest.mark.parametrize("name", WRONG)
def test_what_is_no_example(name):
    model, inputs, keywords, message = WRONG[name]
    with pytest.raises(DiluError, match=message):
        capture_call(model, inputs, None, keywords)


def test_the_line_of_the_model_is_named():
    line = two.__code__.co_firstlineno
    with pytest.raises(DiluError, match=rf"test_examples.py:{line}"):
        capture_call(two, (X,))


@pytest.mark.parametrize(
    ("shapes", "message"),
    [
        (({5: Dim("n")},), "dynamic_shapes names axis 5 of an input that has 2"),
        (({0: Dim("n")}, None), "mismatch between the structure of `inputs` and `dynamic_shapes`"),
        ({"y": {0: Dim("n")}}, "must be the arg names"),
        (({0: "n"},), "Unexpected dimension mapped to index 0"),
        ("n", "expected dynamic_shapes to be dict, tuple, or list"),
        (({0: Dim("n", max=2)},), r"does not fit dynamic_shapes: 3 not in range \[2, 2\]"),
    ],
)
def test_dynamic_shapes_that_do_not_fit_the_examples(shapes, message):
    with pytest.raises(DiluError, match=message):
        capture_call(lambda x: x + 1, (X,), shapes)


def test_names_of_sizes_in_containers():
    n, m, k = Dim("rows"), Dim("columns"), Dim("k")

    def nested(pair, *, table):
        return pair[0].sum() + table["a"] * 2, pair[1][0]

    shapes = {"pair": ({0: n, 1: m}, [{0: 2 * k}]), "table": {"a": {0: k}}}
    twice = torch.randn(6), torch.randn(3)
    function = interpreted(
        nested, ((X, [twice[0]]),), {"table": {"a": twice[1]}}, dynamic_shapes=shapes
    )
    assert [p["shape"] for p in function.parameters] == [["rows", "columns"], ["2*k"], ["k"]]
    same(function((A, [torch.ones(8)]), table={"a": torch.ones(4)})[1], torch.ones(8))
    with pytest.raises(DiluError, match=r"is f32\[7\]"):
        function((A, [torch.ones(7)]), table={"a": torch.ones(3)})


def test_a_name_that_looks_like_ours_is_not_given_twice():
    shapes = ({0: Dim.DYNAMIC, 1: Dim("s0")}, {0: Dim.DYNAMIC})
    graph = capture_module(lambda a, b: (a + 1, b + 1), (X, torch.randn(7)), shapes)
    first, second = graph.function("main").parameters
    names = {str(d) for d in (*first.type.shape, *second.type.shape)}
    assert len(names) == 3 and "s0" in names
