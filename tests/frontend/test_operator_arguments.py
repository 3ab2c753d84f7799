"""Every argument of every operator in the table is used by its lowering, or known to say nothing.

The arguments are read off torch's own schemas, so that one that a new version adds, or a lowering
drops, shows up here and not as a wrong answer.
"""

from __future__ import annotations

import inspect

import pytest
import torch
from calls import as_the_module

from dilu.frontend.operators import TABLE
from dilu.frontend.program.importer import _STORAGE_KEYWORDS

#: Where and how a tensor lies; its element type is that which torch says the result has.
STORAGE = {*_STORAGE_KEYWORDS, "stride", "physical_layout"}
#: What the result's shape says, which torch tells: of views, joins, splits and what is made new.
SHAPE = {
    "size", "shape", "sizes", "other", "start_dim", "end_dim", "dim", "chunks", "split_size",
    "split_sizes", "sections", "n", "m", "self", "num_classes", "output_size",
}  # fmt: skip
OF_SHAPES = {"reshape", "expand", "split", "zeros", "ones", "full", "eye", "fill", "copy",
             "one_hot", "repeat_interleave", "convert"}  # fmt: skip
#: By lowering: arguments that say nothing here, and why.
NOTHING = {
    "softmax": {"half_to_float"},  # the result's type says it
    "log_softmax": {"half_to_float"},
    "embedding": {"padding_idx", "scale_grad_by_freq", "sparse"},  # of gradients
    "gather": {"sparse_grad"},
    "layer_norm": {"cudnn_enable"},  # another kernel for the same
    "group_norm": {"cudnn_enabled"},
    "native_group_norm": {"N", "C", "HxW"},  # sizes of the input
    "batch_norm": {"momentum", "cudnn_enabled"},  # of statistics that are being kept
    "prod_of_axes": {"output_dtype"},  # the result's type says it
    "trilinear": {"unroll_dim"},  # how it is computed
    "distances": {"compute_mode"},  # another way to the same
    "expand": {"implicit"},  # of vmap
    "einsum": {"path"},  # the order of products
}
#: By lowering: what it takes by position under a name of its own, in `*rest` or by a default.
TAKEN_BY_POSITION = {
    "arange": {"start", "end", "step"},
    "full": {"fill_value"},
    "pad": {"mode", "value"},
    "sort": {"dim", "descending"},
    "batch_norm": {"training", "eps"},
}
REFUSED = {"random", "view_dtype"}  # whatever its arguments are


def schema_of(operator):
    namespace, name, overload = operator.split(".")
    packet = getattr(getattr(torch.ops, namespace), name, None)
    found = getattr(packet, overload, None)
    return found._schema if found is not None else None


def swallowed(operator):
    """Yield the arguments of an operator that its lowering does not name."""
    parameters = list(inspect.signature(TABLE[operator]).parameters.values())[1:]
    places = [p for p in parameters if p.kind is p.POSITIONAL_OR_KEYWORD]
    named = {p.name for p in parameters if p.kind in (p.POSITIONAL_OR_KEYWORD, p.KEYWORD_ONLY)}
    takes_more = any(p.kind is p.VAR_POSITIONAL for p in parameters)
    for i, argument in enumerate(schema_of(operator).arguments):
        taken = not argument.kwarg_only and i < len(places)
        if taken and not places[i].name.startswith("_"):
            continue
        if argument.kwarg_only and argument.name in named:
            continue
        swallows = taken or takes_more or argument.kwarg_only
        if swallows or argument.name in named:
            yield argument.name


OPERATORS = [name for name in TABLE if not name.startswith("dilu.")]


def test_every_operator_is_one_of_torchs():
    assert [name for name in OPERATORS if schema_of(name) is None] == []


def test_no_argument_is_dropped():
    dropped = {}
    for operator in OPERATORS:
        lowering = TABLE[operator].__name__
        known = STORAGE | NOTHING.get(lowering, set()) | TAKEN_BY_POSITION.get(lowering, set())
        known |= SHAPE if lowering in OF_SHAPES else set()
        left = [name for name in swallowed(operator) if name not in known]
        if left and lowering not in REFUSED:
            dropped[operator] = left
    assert dropped == {}


def test_the_exceptions_are_still_needed():
    seen = {(TABLE[o].__name__, name) for o in OPERATORS for name in swallowed(o)}
    for table in (NOTHING, TAKEN_BY_POSITION):
        for lowering, names in table.items():
            assert {(lowering, name) for name in names} <= seen


HUNDREDS = torch.randn(3, 5, generator=torch.Generator().manual_seed(0)) * 100


def test_an_element_type_that_is_asked_for_converts_what_goes_in():
    """Softmax of hundreds in bf16 is another one; sums in f64 are more accurate."""
    double, narrow = torch.float64, torch.bfloat16

    def call(x):
        return (
            x.softmax(-1, dtype=narrow), x.log_softmax(-1, dtype=narrow),
            x.softmax(0, dtype=double),
            x.log_softmax(0, dtype=double), x.sum(1, dtype=double), x.mean(1, dtype=double),
            x.cumsum(0, dtype=double), torch.linalg.vector_norm(x, dtype=double),
            x.sum(dtype=narrow), (x > 0).sum(dtype=torch.int32),
        )  # fmt: skip

    function = as_the_module(call, (HUNDREDS,))
    wide = HUNDREDS.double()
    exact = [wide.softmax(0), wide.log_softmax(0), wide.sum(1), wide.mean(1), wide.cumsum(0)]
    for got, wanted in zip(function(HUNDREDS)[2:7], exact, strict=True):
        torch.testing.assert_close(got, wanted, rtol=1e-12, atol=1e-10)


@pytest.mark.parametrize("flag", ["contiguous", "to", "clone"])
def test_how_a_tensor_lies_changes_nothing(flag):
    calls = {
        "contiguous": lambda x: x.t().contiguous() + 1,
        "to": lambda x: x.to("cpu", torch.float64, non_blocking=True, copy=True),
        "clone": lambda x: x[None, None].clone(memory_format=torch.channels_last),
    }
    as_the_module(calls[flag], (HUNDREDS,))
