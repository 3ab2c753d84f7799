"""Compiled modules are called, written to disk and called again as the modules themselves are."""

from __future__ import annotations

import dataclasses
import json
from typing import NamedTuple

import numpy as np
import pytest
import torch
from calls import same
from interpreted import INTERPRETED, under_test
from torch.nn import functional as F

import dilu
from dilu.codegen import targets
from dilu.errors import DiluError
from dilu.runtime.artifact.artifact import Artifact


class Pair(NamedTuple):
    first: torch.Tensor
    second: torch.Tensor


@dataclasses.dataclass
class Output:
    loss: torch.Tensor
    hidden: list[torch.Tensor] | None = None


torch.export.register_dataclass(Output)


class Everything(torch.nn.Module):
    """Takes and returns all that a module may."""

    def __init__(self) -> None:
        super().__init__()
        torch.manual_seed(0)
        self.linear = torch.nn.Linear(8, 8)

    def forward(self, batch, codes, cache, *, scale=1.0, mode="sum", extra=None):
        x = self.linear(batch["x"]) * scale
        cache.mul_(0.5).add_(batch["pair"].first)
        decoded = codes.to(torch.float32) + batch["pair"].second
        output = Output(x.sum(), [x.t(), decoded])
        again = (decoded * 2).to(torch.float8_e5m2)
        return Pair(output, (cache, batch["x"])), {"rows": x.shape[0], "mode": mode, "c": again}


def arguments(rows: int, seed: int):
    generator = torch.Generator().manual_seed(seed)
    x, first, second = torch.randn(3, rows, 8, generator=generator)
    codes = torch.randint(-8, 8, (rows, 8), generator=generator).to(torch.float8_e4m3fn)
    return {"x": x, "pair": Pair(first, second)}, codes, torch.ones(rows, 8)


def check(session) -> None:
    for rows in (5, 1, 16):
        given, wanted = arguments(rows, 3), arguments(rows, 3)
        result = session(*given, scale=0.5)
        same(result, Everything()(*wanted, scale=0.5))
        same(given[2], wanted[2])
        assert result[0].second[0] is given[2]
    for call, message in [
        ((arguments(20, 3), {"scale": 0.5}), "holds for n <= 16 only, and n=20"),
        ((arguments(4, 3), {"scale": 1.0}), "the argument scale is 1.0, but the program"),
        ((arguments(4, 3), {"scale": 0.5, "mode": "mean"}), "mode is 'mean', but the program"),
        ((arguments(4, 3)[:2], {"scale": 0.5}), "the argument cache is missing"),
    ]:
        with pytest.raises(DiluError, match=message):
            session(*call[0], **call[1])


def compile_for(target: str) -> Artifact:
    row = {0: torch.export.Dim("n", max=16)}
    shapes = {"batch": {"x": row, "pair": Pair(row, row)}, "codes": row, "cache": row}
    return dilu.compile(
        Everything(),
        arguments(5, 0),
        target=target,
        example_kwargs={"scale": 0.5},
        dynamic_shapes={**shapes, "scale": None},
    )


@pytest.fixture(scope="module")
def compiled():
    return compile_for("cpu")


def test_from_memory_and_from_disk(compiled, tmp_path):
    with dilu.load(compiled) as session:
        check(session)
    path = compiled.save(tmp_path / "m.dilu")
    with dilu.load(path) as session:
        check(session)
    (parameter,) = [p for p in compiled.manifest["functions"][0]["parameters"] if "element" in p]
    assert (parameter["dtype"], parameter["element"]) == ("u8", "f8e4m3")


def test_numpy_in_numpy_out(compiled):
    batch, codes, cache = arguments(3, 4)
    mine = {"x": batch["x"].numpy(), "pair": [v.numpy() for v in batch["pair"]]}
    written = cache.numpy().copy()
    with dilu.load(compiled) as session:
        pair, rest = session(mine, codes.view(torch.uint8).numpy(), written, scale=0.5)
        (output, _), more = Everything()(batch, codes, cache, scale=0.5)
    assert pair.second[0] is written and pair.second[1] is mine["x"]
    np.testing.assert_allclose(written, cache, rtol=1e-5, atol=1e-6)
    assert isinstance(pair.first, Output) and isinstance(pair.first.loss, np.ndarray)
    same(pair.first.hidden, output.hidden)
    assert rest["c"].dtype == np.uint8 and (rest["rows"], rest["mode"]) == (3, "sum")
    assert torch.equal(
        torch.from_numpy(rest["c"]).view(torch.float8_e5m2).float(), more["c"].float()
    )


def test_the_manifest_needs_no_class_of_the_model(compiled, tmp_path):
    """A process that knows nothing of the model gets named tuples with the same fields."""
    path = compiled.save(tmp_path / "m.dilu")
    artifact = Artifact.open(path)
    function = artifact.manifest["functions"][0]
    text = json.dumps(function["signature"])
    assert __name__ in text
    function["signature"] = json.loads(text.replace(__name__, "elsewhere"))
    with dilu.load(artifact) as session:
        pair, _ = session(*arguments(2, 5), scale=0.5)
    assert type(pair) is not Pair and pair._fields == ("first", "second")
    assert pair.first._fields == ("loss", "hidden") and len(pair.first.hidden) == 2


def test_attention_with_one_example_for_all():
    def attention(query, key, value):
        return F.scaled_dot_product_attention(query, key, value)

    one = torch.randn(1, 2, 4, 8)
    query, key, value = torch.randn(3, 1, 2, 4, 8)
    with dilu.load(dilu.compile(attention, (one, one, one))) as session:
        same(session(query, key, value), attention(query, key, value))


@pytest.mark.slow
def test_on_a_device(monkeypatch):
    pytest.importorskip("triton")
    monkeypatch.setattr(targets, "TARGETS", (*targets.TARGETS, INTERPRETED))
    target, device = under_test()
    with dilu.load(compile_for(target), device=device) as session:
        check(session)
