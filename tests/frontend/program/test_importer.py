"""The importer against torch: every supported operator, at ragged and at symbolic sizes."""

import math

import numpy as np
import pytest
import torch
from torch import nn
from torch.nn import functional as F

from dilu.errors import DiluError, UnsupportedError
from dilu.frontend.program.capture import capture_module
from dilu.ir.interpret import constant_values, interpret
from dilu.ir.text import parse_graph, print_graph
from dilu.ir.verify import verify

TOLERANCE = 2e-5


class Call(nn.Module):
    """A function as a module."""

    def __init__(self, function):
        super().__init__()
        self.function = function

    def forward(self, *inputs):
        return self.function(*inputs)


def numbers(*shape, seed=0, low=-2.0, high=2.0):
    generator = torch.Generator().manual_seed(seed + len(shape) + sum(shape))
    return torch.rand(shape, generator=generator) * (high - low) + low


def compare(module, inputs, *, dynamic=None, other=None, tolerance=TOLERANCE):
    """Capture `module`, interpret it and compare with torch; at sizes `other` too if dynamic."""
    module = module if isinstance(module, nn.Module) else Call(module)
    module.eval()
    shapes = None if dynamic is None else ([*dynamic],) if isinstance(module, Call) else dynamic
    graph = capture_module(module, inputs, shapes)
    verify(graph)
    assert parse_graph(print_graph(graph)) == graph
    main = graph.function("main")
    for values in (inputs, *([other] if other else [])):
        want = module(*values)
        want = [want] if isinstance(want, torch.Tensor) else list(want)
        arrays = [v.numpy() for v in values]
        got = interpret(main, (*arrays, *constant_values(graph, main)))
        assert len(got) == len(want)
        for g, w in zip(got, want, strict=True):
            w = w.detach()
            if w.dtype in (torch.bfloat16, torch.float16):
                w = w.float()
            assert g.shape == tuple(w.shape)
            np.testing.assert_allclose(g, w.numpy(), rtol=tolerance, atol=tolerance)
    return graph


def compare_all(table, *inputs, tolerance=TOLERANCE):
    """Compare all functions of a table in one capture."""

    def call(*values):
        out = []
        for function in table.values():
            result = function(*values)
            out += [result] if isinstance(result, torch.Tensor) else result
        return tuple(out)

    compare(call, inputs, tolerance=tolerance)


x23 = numbers(3, 5)
UNARY = {
    "neg": torch.neg,
    "abs": torch.abs,
    "exp": torch.exp,
    "log": lambda x: torch.log(x + 3),
    "sqrt": lambda x: torch.sqrt(x + 3),
    "rsqrt": lambda x: torch.rsqrt(x + 3),
    "sin": torch.sin,
    "cos": torch.cos,
    "tanh": torch.tanh,
    "erf": torch.erf,
    "sigmoid": torch.sigmoid,
    "floor": torch.floor,
    "ceil": torch.ceil,
    "trunc": torch.trunc,
    "sign": torch.sign,
    "reciprocal": torch.reciprocal,
    "square": torch.square,
    "exp2": torch.exp2,
    "log2": lambda x: torch.log2(x + 3),
    "log10": lambda x: torch.log10(x + 3),
    "expm1": torch.expm1,
    "relu": F.relu,
    "relu6": F.relu6,
    "silu": F.silu,
    "gelu": F.gelu,
    "gelu_tanh": lambda x: F.gelu(x, approximate="tanh"),
    "softplus": F.softplus,
    "hardswish": F.hardswish,
    "hardsigmoid": F.hardsigmoid,
    "hardtanh": F.hardtanh,
    "leaky_relu": F.leaky_relu,
    "elu": F.elu,
    "selu": F.selu,
    "celu": F.celu,
    "mish": F.mish,
    "log_sigmoid": F.logsigmoid,
    "clamp": lambda x: x.clamp(-0.5, 1),
    "clip": lambda x: x.clamp(max=0),
    "pow2": lambda x: x**2,
    "pow3": lambda x: x**3,
    "pow_half": lambda x: (x + 3) ** 0.5,
    "pow_other": lambda x: (x + 3) ** 1.7,
    "pow_scalar": lambda x: 2.0**x,
    "isnan": torch.isnan,
    "isinf": torch.isinf,
    "rsub": lambda x: 3 - x,
    "dropout": lambda x: F.dropout(x, 0.5, False),
    "softsign": F.softsign,
    "square_root_of_scalar": lambda x: x * math.sqrt(2),
    "floor_divide": lambda x: x // 0.7,
    "div_trunc": lambda x: torch.div(x, 0.3, rounding_mode="trunc"),
    "glu": lambda x: F.glu(x[:, :4]),
    "lerp": lambda x: torch.lerp(x, x * 2, 0.3),
    "addcmul": lambda x: torch.addcmul(x, x, x, value=0.5),
}


def test_elementwise():
    compare_all(UNARY, x23)


def test_accurate_near_zero():
    small = torch.tensor([0.0, 1e-9, -1e-9, 1e-5, 0.5, 30.0, 1e10])
    compare(torch.log1p, (small,), tolerance=1e-6)
    compare(lambda x: torch.expm1(x.clamp(max=3)), (small,), tolerance=1e-6)
    compare(F.softplus, (torch.tensor([-80.0, -15.0, 0.0, 15.0, 25.0]),), tolerance=1e-6)
    compare(lambda x: F.softplus(x, 2.0, 5.0), (x23,))


BINARY = {
    "add_alpha": lambda a, b: torch.add(a, b, alpha=2),
    "sub": lambda a, b: a - b,
    "mul": lambda a, b: a * b,
    "div": lambda a, b: a / (b + 3),
    "maximum": torch.maximum,
    "minimum": torch.minimum,
    "pow": lambda a, b: (a + 3) ** b,
    "lt": lambda a, b: a < b,
    "ge": lambda a, b: a >= b,
    "eq": lambda a, b: a.floor() == b.floor(),
    "ne": torch.ne,
    "where": lambda a, b: torch.where(a > b, a, b),
    "where_scalar": lambda a, b: torch.where(a > 0, b, 1.5),
    "masked_fill": lambda a, b: a.masked_fill(b > 0, -math.inf),
    "logical": lambda a, b: (a > 0) & (b > 0) | ~(a > 1) ^ (b < 0),
    "logical_ops": lambda a, b: torch.logical_and(a > 0, b) | torch.logical_not(b),
    "outer": lambda a, b: torch.outer(a[0], b[0]),
    "lt_scalar": lambda a, b: (a < 0.3) * b,
}


def test_binary():
    compare_all(BINARY, x23, numbers(5, seed=3).expand(3, 5).contiguous())


@pytest.mark.slow
def test_broadcasting_and_promotion():
    ints = torch.arange(5)
    compare(lambda a, i: a + i, (x23, ints))
    compare(lambda i: i / 2, (ints,))
    compare(lambda i: (i * 3 - 1) // 2 + i % 2, (ints,))
    compare(lambda i: i > 1.5, (ints,))
    compare(torch.sin, (ints,))
    compare(lambda i: (i > 2) + (i > 3), (ints,))
    compare(lambda a: a.to(torch.int32), (x23,))
    compare(lambda a: a.bool(), (x23.floor(),))
    compare(lambda i: i.float().to(torch.float64) * 2, (ints,))


def assigned(x):
    out = x.new_empty(12, 5, 9)
    out[..., :7].copy_(x)
    out[..., 7:] = x[..., :2]
    return out


def assigned_row(x):
    out = torch.zeros_like(x)
    out[3] = x[0] + 1
    out[:, 1:3] += 1
    return out


VIEWS = {
    "view": lambda x: x.view(4, 15, 7),
    "reshape": lambda x: x.permute(1, 0, 2).reshape(-1, 3),
    "unsqueeze": lambda x: x.unsqueeze(1).unsqueeze(-1),
    "squeeze": lambda x: x[:, None].squeeze(1),
    "permute": lambda x: x.permute(2, 0, 1),
    "transpose": lambda x: x.transpose(-1, 0),
    "T": lambda x: x[0].T,
    "mT": lambda x: x.mT,
    "movedim": lambda x: x.movedim(0, -1),
    "expand": lambda x: x[:, :1].expand(-1, 5, -1),
    "slice": lambda x: x[1:3, ::2, -3:],
    "slice_negative": lambda x: x[:-1, -4:-1, 5:100],
    "select": lambda x: x[:, -1] + x[:, 2],
    "split": lambda x: torch.cat(x.split(4, dim=2)[::-1], dim=2),
    "split_sizes": lambda x: x.split([2, 5], dim=-1),
    "chunk": lambda x: x.chunk(2, dim=-1),
    "unbind": lambda x: x.unbind(1)[3] * x.unbind(1)[0],
    "stack": lambda x: torch.stack([x, x * 2], 1),
    "cat": lambda x: torch.cat([x, x[:1], x[:0]], 0),
    "flatten": lambda x: x.flatten(1),
    "unflatten": lambda x: x.flatten().unflatten(0, (7, -1)),
    "contiguous": lambda x: x.mT.contiguous(),
    "clone": lambda x: x.clone() + x.detach(),
    "repeat": lambda x: x.repeat(2, 1, 3),
    "repeat_interleave": lambda x: x.repeat_interleave(3, dim=1),
    "tile": lambda x: x.tile(2),
    "roll": lambda x: x.roll((1, -2), (0, 2)),
    "pad": lambda x: F.pad(x, (1, 2, 0, -1), value=0.5),
    "tril": lambda x: x.tril() + x.triu(2),
    "flip": lambda x: x.flip(0, 2),
    "zeros_like": lambda x: torch.zeros_like(x) + x.new_ones(7) + torch.full((5, 7), 2.5),
    "arange": lambda x: x + torch.arange(7) * torch.arange(1, 15, 2) + torch.arange(0.0, 3.5, 0.5),
    "eye": lambda x: x[0] @ torch.eye(7) + torch.ones(1),
    "narrow": lambda x: x.narrow(1, 2, 3),
    "assignment": assigned,
    "select_assignment": assigned_row,
    "linspace": lambda x: x * torch.tensor([1.0, 2, 3, 4, 5, 6, 7]),
    "type_as": lambda x: x.type_as(x),
    "take_axis": lambda x: x.index_select(1, torch.tensor([4, 0, 0])),
    "cross_views": lambda x: x.view(12, 5, 7).swapaxes(0, 1)[..., None].sum(-1),
}


def test_views():
    compare_all(VIEWS, numbers(12, 5, 7))


REDUCTIONS = {
    "sum": lambda x: x.sum(),
    "sum_dim": lambda x: x.sum(-1, keepdim=True),
    "mean": lambda x: x.mean(),
    "sum_dims": lambda x: x.sum((0, 2)),
    "mean_dim": lambda x: x.mean((1, 2), True),
    "amax": lambda x: x.amax(1),
    "amin": lambda x: x.amin((0, 1), keepdim=True),
    "max": lambda x: x.max(),
    "max_dim": lambda x: tuple(x.max(1)),
    "min_dim": lambda x: tuple(x.min(-1)),
    "argmax": lambda x: x.argmax(1, keepdim=True),
    "argmin": lambda x: x.argmin(-1),
    "argmax_all": lambda x: x.argmax(),
    "var": lambda x: x.var(-1),
    "std": lambda x: x.std((0, 1)),
    "var_biased": lambda x: x.var(1, unbiased=False, keepdim=True),
    "norm": lambda x: x.norm(dim=-1),
    "var_mean": lambda x: torch.var_mean(x, -1),
    "any": lambda x: (x > 1.9).any(-1),
    "all": lambda x: (x > -1.9).all(),
    "logsumexp": lambda x: x.logsumexp(1),
    "cumsum": lambda x: x.cumsum(1),
    "topk": lambda x: tuple(x.topk(3)),
    "topk_small": lambda x: tuple(x.topk(2, dim=1, largest=False)),
    "sort": lambda x: tuple(x.sort(descending=True)),
    "argsort": lambda x: x.argsort(1),
    "softmax": lambda x: x.softmax(1),
    "log_softmax": lambda x: x.log_softmax(-1),
    "normalize": lambda x: F.normalize(x, dim=-1),
    "vector_norm": lambda x: torch.linalg.vector_norm(x, 1, 1),
}


def test_reductions():
    compare_all(REDUCTIONS, numbers(3, 5, 7))


INDEX = {
    "embedding": lambda x, i: F.embedding(i, x[0]),
    "index": lambda x, i: x[i],
    "index_second": lambda x, i: x[:, i],
    "index_two": lambda x, i: x[:, i, i],
    "index_pair": lambda x, i: x[i[:, None], i],
    "index_last": lambda x, i: x[..., i, :],
    "gather": lambda x, i: x.gather(1, i[None, :, None].expand(3, 4, 7)),
    "gather_last": lambda x, i: x.gather(-1, i.expand(3, 5, 4)),
    "take_along": lambda x, i: torch.take_along_dim(x, i[None, None], dim=2),
    "scatter": lambda x, i: torch.zeros_like(x).scatter_(2, i.expand(3, 5, 4), 1.0),
    "scatter_dim": lambda x, i: x.scatter(1, i[None, :, None].expand(3, 4, 7), 0.5),
    "one_hot": lambda x, i: F.one_hot(i, 5),
    "index_select": lambda x, i: x.index_select(0, i),
}


def test_indexing():
    compare_all(INDEX, numbers(3, 5, 7), torch.tensor([2, 0, 1, 2]))


def test_negative_indices():
    compare(lambda x, i: x[:, i], (numbers(3, 5), torch.tensor([-1, 0, -5])))


PRODUCTS = {
    "mm": lambda a, b: a[0] @ b[0].T,
    "bmm": lambda a, b: torch.bmm(a, b.mT),
    "matmul": lambda a, b: a @ b.mT,
    "matmul_4d": lambda a, b: a[None] @ b.mT[:, None],
    "vector": lambda a, b: a @ b[0, 0],
    "dot": lambda a, b: torch.dot(a[0, 0], b[0, 0]),
    "mv": lambda a, b: torch.mv(a[0], b[0, 0]),
    "addmm": lambda a, b: torch.addmm(a[0, :, :4], a[0], b[0].T, beta=0.5, alpha=2),
    "baddbmm": lambda a, b: torch.baddbmm(a[:, :, :4], a, b.mT),
    "linear": lambda a, b: F.linear(a, b[0], b[0, :, 0]),
    "einsum": lambda a, b: torch.einsum("bik,bjk->ijb", a, b),
    "einsum_2": lambda a, b: torch.einsum("bik,cjk->ki", a, b) + torch.einsum("bik->ki", a),
    "linear_vector": lambda a, b: F.linear(a[0, 0], b[0]),
}


def test_products():
    compare_all(PRODUCTS, numbers(3, 5, 7), numbers(3, 4, 7, seed=1))


ATTENTION = {
    "plain": {},
    "causal": {"is_causal": True},
    "scaled": {"scale": 0.3},
    "grouped": {"enable_gqa": True},
    "grouped_causal": {"enable_gqa": True, "is_causal": True},
}


@pytest.mark.parametrize("name", sorted(ATTENTION))
def test_attention(name):
    options = ATTENTION[name]
    heads = 2 if "enable_gqa" in options else 6
    q, k, v = numbers(2, 6, 5, 8), numbers(2, heads, 5, 8), numbers(2, heads, 5, 4)
    call = lambda q, k, v: F.scaled_dot_product_attention(q, k, v, **options)
    compare(call, (q, k, v))


def test_attention_masks():
    q, k, v = numbers(2, 6, 5, 8), numbers(2, 2, 9, 8), numbers(2, 2, 9, 8)
    bias, flags = numbers(2, 6, 5, 9), numbers(5, 9) > -1
    call = lambda q, k, v, m: F.scaled_dot_product_attention(q, k, v, m, enable_gqa=True)
    compare(call, (q, k, v, bias))
    compare(call, (q, k, v, flags))
    compare(call, (q, k, v, bias[:, :1]))


def lively(module):
    """Give every parameter and buffer a random value."""
    with torch.no_grad():
        for i, t in enumerate([*module.parameters(), *module.buffers()]):
            if t.is_floating_point():
                t.copy_(numbers(*t.shape, seed=i, low=0.1, high=1.5))
    return module


class SelfAttention(nn.Module):
    def __init__(self):
        super().__init__()
        self.inner = nn.MultiheadAttention(8, 2, batch_first=True)

    def forward(self, x):
        return self.inner(x, x, x, need_weights=False)[0]


class Narrow(nn.Module):
    """An MLP in a narrow element type."""

    def __init__(self, dtype):
        super().__init__()
        self.mlp = nn.Sequential(nn.Linear(7, 9), nn.GELU(), nn.LayerNorm(9)).to(dtype)
        self.dtype = dtype

    def forward(self, x):
        return self.mlp(x.to(self.dtype)).softmax(-1)


MODULES = {
    "layer_norm": (lambda: nn.LayerNorm((5, 7)), (3, 5, 7)),
    "rms_norm": (lambda: nn.RMSNorm(7), (3, 5, 7)),
    "group_norm": (lambda: nn.GroupNorm(2, 6), (3, 6, 7)),
    "batch_norm": (lambda: nn.BatchNorm1d(6), (3, 6, 7)),
    "prelu": (lambda: nn.PReLU(6), (3, 6, 7)),
    "mlp": (
        lambda: nn.Sequential(nn.Linear(7, 9), nn.GELU(), nn.Dropout(), nn.Linear(9, 4)),
        (3, 7),
    ),
    "attention": (lambda: nn.TransformerEncoderLayer(8, 2, 12, batch_first=True), (3, 5, 8)),
    "multihead": (SelfAttention, (3, 5, 8)),
}


@pytest.mark.parametrize("name", sorted(MODULES))
def test_modules(name):
    make, shape = MODULES[name]
    compare(lively(make()), (numbers(*shape),), tolerance=1e-4)


class Block(nn.Module):
    """Sizes that depend on the inputs' sizes in several ways."""

    def __init__(self):
        super().__init__()
        self.up = nn.Linear(6, 8)

    def forward(self, x):
        n, t, _ = x.shape
        y = self.up(x).view(n, t, 2, 4).transpose(1, 2).reshape(n, 2 * t, 4)
        y = y + torch.arange(2 * t)[:, None] + x.mean((0, 1)).sum() / t
        mask = torch.ones(t, t, dtype=torch.bool).tril()
        scores = (x @ x.transpose(1, 2)).masked_fill(~mask, -1e9).softmax(-1)
        return y[:, : t // 2], torch.cat([scores, scores[:, -1:]], 1), y.mean(1)


@pytest.mark.slow
def test_symbolic_sizes():
    batch = torch.export.Dim("batch")
    time = torch.export.Dim.DYNAMIC
    module = lively(Block())
    other = (numbers(2, 9, 6),)
    graph = compare(
        module, (numbers(3, 4, 6),), dynamic=({0: batch, 1: time},), other=other, tolerance=1e-4
    )
    main = graph.function("main")
    assert str(main.parameters[0].type) == "f32[batch,s1,6]"
    assert str(main.results[0].type) == "f32[batch,s1 // 2,4]"


def test_unnamed_symbolic_sizes():
    shapes = ({0: torch.export.Dim.DYNAMIC},)
    graph = capture_module(nn.Linear(3, 2), (numbers(4, 3),), shapes)
    assert str(graph.function("main").parameters[0].type) == "f32[s0,3]"


def test_exported_programs_are_taken_as_they_are():
    module = lively(nn.Linear(3, 2))
    graph = capture_module(torch.export.export(module, (numbers(4, 3),)))
    main = graph.function("main")
    (got,) = interpret(main, (numbers(4, 3).numpy(), *constant_values(graph, main)))
    np.testing.assert_allclose(got, module(numbers(4, 3)).detach().numpy(), rtol=1e-6)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_narrow_floats(dtype):
    graph = compare(lively(Narrow(dtype)), (numbers(3, 7),), tolerance=2e-2)
    weight = graph.weights["mlp.0.weight"]
    assert weight.data is not None
    assert weight.data.itemsize == 2


def test_float8_parameters_keep_their_codes():
    class Scaled(nn.Module):
        def __init__(self):
            super().__init__()
            codes = (numbers(4, 6) * 100).to(torch.float8_e4m3fn)
            self.weight = nn.Parameter(codes, requires_grad=False)

        def forward(self, x):
            return x @ (self.weight.float() * 0.01).T

    graph = compare(Scaled(), (numbers(3, 6),))
    (weight,) = graph.weights.values()
    assert str(weight.type) == "f8e4m3[4,6]"


def test_tied_parameters_are_one_constant():
    class Tied(nn.Module):
        def __init__(self):
            super().__init__()
            self.table = nn.Embedding(9, 4)
            self.head = nn.Linear(4, 9, bias=False)
            self.head.weight = self.table.weight

        def forward(self, i):
            return self.head(self.table(i))

    graph = compare(Tied(), (torch.tensor([1, 8, 3]),))
    assert len(graph.weights) == 1


# ------------------------------------------------------------------------------ errors


def line_of(function) -> int:
    return function.__code__.co_firstlineno + 1


def test_an_unsupported_operator_is_named_with_the_line():
    def forward(x):
        return torch.fft.fft(x).real

    name = r"aten\.\w+\.default"
    message = rf"the operator {name}(, of which torch makes {name},)? is not supported\n  at .*:"
    message += rf"{line_of(forward)}\n"
    with pytest.raises(UnsupportedError, match=message):
        capture_module(Call(forward), (numbers(4),))


def test_an_unsupported_form_of_an_operator_is_named_with_the_line():
    def forward(x):
        return x.view(torch.int32)

    with pytest.raises(UnsupportedError, match=rf"is not supported\n  at .*:{line_of(forward)}"):
        capture_module(Call(forward), (numbers(1, 3, 4),))


def test_dynamic_shapes_that_do_not_fit():
    half = torch.export.Dim("half")

    def forward(x):
        return x.view(2, -1)

    with pytest.raises(DiluError, match="not every size of dynamic_shapes fits: Not all values"):
        capture_module(Call(forward), (numbers(4),), (({0: half},),))


def test_a_size_that_is_only_a_multiple():
    even = 2 * torch.export.Dim("half")
    with pytest.raises(
        DiluError, match=r"axis 0 of input 0 has size 2\*\w+, which says nothing of"
    ):
        capture_module(Call(torch.neg), (numbers(4),), (({0: even},),))


def test_control_flow_on_values():
    def forward(x):
        return x if x.sum() > 0 else -x

    message = rf"torch\.export cannot capture the model[\s\S]*at .*:{line_of(forward)}\n  hint:"
    with pytest.raises(DiluError, match=message):
        capture_module(Call(forward), (numbers(4),))


def test_a_result_whose_size_depends_on_data():
    with pytest.raises(DiluError, match=r"not supported|depends on data"):
        capture_module(Call(lambda x: x[x > 0]), (numbers(4),))


def test_writing_to_a_buffer():
    class Counter(nn.Module):
        def __init__(self):
            super().__init__()
            self.register_buffer("seen", torch.zeros(()))

        def forward(self, x):
            self.seen += 1
            return x + self.seen

    with pytest.raises(UnsupportedError, match="the model writes to its buffer 'seen'"):
        capture_module(Counter(), (numbers(4),))


def test_example_inputs_are_needed():
    with pytest.raises(DiluError, match="a module needs example inputs"):
        capture_module(nn.Linear(2, 2))


def test_random_numbers():
    with pytest.raises(UnsupportedError, match="a random number inside of a model"):
        capture_module(Call(lambda x: x + torch.rand(4)), (numbers(4),))


def test_a_size_without_a_name_is_called_as_no_other():
    """`s0` is what a first size would be called; here another one has that name."""

    class Sums(nn.Module):
        def forward(self, a, b):
            return a.sum(0), b * 2

    dims = ({0: torch.export.Dim.AUTO}, {0: torch.export.Dim("s0")})
    graph = capture_module(Sums(), (numbers(3, 4), numbers(5, 4)), dims)
    assert [str(v.type) for v in graph.functions[0].parameters] == ["f32[s1,4]", "f32[s0,4]"]
