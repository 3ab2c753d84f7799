"""Sharded models on devices, under Triton's interpreter; benchmarks/gpu/mesh.py runs more of them
on a GPU. The reference is one process on the CPU."""

from __future__ import annotations

import checkpoints
import numpy as np
import pytest
import ranks
from interpreted import INTERPRETED

import dilu
from dilu.codegen import targets

pytestmark = [pytest.mark.slow, pytest.mark.usefixtures("captured_once", "compiled_quickly")]
WIDTH = 144
TOKENS = 2  # the interpreter takes seconds for each
MET = {"host": "ranks meet on the host", "device": "ranks meet on their devices"}


@pytest.fixture(scope="module", autouse=True)
def known():
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(targets, "TARGETS", (*targets.TARGETS, INTERPRETED))
        yield


@pytest.fixture(scope="module")
def model(tmp_path_factory):
    """Two layers: rows go to experts, back, and to experts of a next layer."""
    folder = tmp_path_factory.mktemp("qwen3_moe")
    checkpoints.make_checkpoint(folder, "qwen3_moe", tokenizer=True, num_hidden_layers=2)
    return folder


@pytest.fixture(scope="module")
def alone(model, tmp_path_factory):
    artifact = dilu.compile(model).save(tmp_path_factory.mktemp("one") / "one.dilu")
    with dilu.load(artifact) as session:
        return ranks.found(session, TOKENS)


@pytest.mark.parametrize(
    ("mesh", "world", "where", "devices"),
    [
        ("ep=2,tp=2", 4, "host", "interpreter:0"),
        ("ep=2,tp=2", 4, "device", "interpreter:0"),
        ("ep=2", 2, "device", "interpreter:0"),
        ("tp=2", 2, "auto", "interpreter:0,cpu"),  # one pads its batches, the other does not
    ],
)
def test_equals_one_process_on_the_cpu(model, alone, mesh, world, where, devices, tmp_path):
    both = ["cpu", INTERPRETED.name]
    artifact = dilu.compile(model, mesh=mesh, target=both).save(tmp_path / "m.dilu")
    options = {
        "DILU_TEST_DEVICE": devices,
        "DILU_TEST_TOKENS": str(TOKENS),
        "DILU_COLLECTIVES": where,
    }
    each = ranks.run(artifact, tmp_path / "out", world, **options)
    assert MET.get(where, MET["host"]) in each[0]["reason"]
    for own in each:
        for got, want in zip(own["logits"], alone["logits"], strict=True):
            assert np.abs(np.array(got) - want).max() / np.abs(want).max() < 1e-5
        assert own["tokens"] == alone["tokens"]
        if "ep" in mesh:
            assert own["sent"] > 0
            assert own["expert_load"] == alone["expert_load"]


def test_rows_in_fp8(model, tmp_path):
    """A byte for each number and a scale for each row there, and bf16 back; by both ways of
    meeting the same bits."""
    artifact = dilu.compile(model, mesh="ep=2", target=INTERPRETED.name, dtype="bf16")
    artifact = artifact.save(tmp_path / "m.dilu")
    found = {}
    for wire, where in (("exact", "device"), ("f8e4m3", "device"), ("f8e4m3", "host")):
        options = {
            "DILU_TEST_DEVICE": INTERPRETED.name,
            "DILU_TEST_TOKENS": "1",
            "DILU_COLLECTIVES": where,
            "DILU_TEST_WIRE": wire,
        }
        found[wire, where] = ranks.run(artifact, tmp_path / f"{wire}-{where}", 2, **options)
    exact, fp8, hosted = ([own["logits"] for own in each] for each in found.values())
    assert fp8[0] == fp8[1] == hosted[0]
    for got, want in zip(fp8[0], exact[0], strict=True):
        error = np.linalg.norm(np.array(got) - want) / np.linalg.norm(want)
        assert 0 < error < 0.2  # some tokens choose another expert
    sent, fewer, _ = (sum(own["sent"] for own in each) for each in found.values())
    row, narrow = 2 * WIDTH + 4 * WIDTH, WIDTH + 4 + 2 * WIDTH  # experts make f32
    assert sent % row == 0 and fewer % narrow == 0  # as many rows there as back
    assert fewer / narrow == pytest.approx(sent / row, rel=0.1)
