"""What compiling for several processes, and placing anew, say of bad input."""

from __future__ import annotations

import checkpoints
import pytest
import torch

import dilu
from dilu.compiler import rebalance
from dilu.planner.expert_load import load_text


@pytest.fixture(scope="module")
def checkpoint(tmp_path_factory):
    folder = tmp_path_factory.mktemp("model")
    checkpoints.make_checkpoint(folder, "qwen3_moe")
    return folder


@pytest.mark.parametrize(
    ("options", "says"),
    [
        ({"mesh": "ep"}, "not a mesh"),
        ({"mesh": "tp=7"}, "nothing in this model can be divided among tp=7"),
        ({"mesh": "ep=2", "target": "cuda:80"}, "on CPUs only"),
        ({"replicas": 2}, "replicas is given, but no mesh"),
        ({"expert_load": "x.json"}, "expert_load is given, but no mesh"),
        ({"mesh": "ep=2", "expert_load": "no-such.json"}, "cannot read the load"),
        ({"mesh": "ep=3"}, "8 experts do not fill 8 slots on 3 ranks evenly"),
    ],
)
def test_options_that_do_not_fit(checkpoint, options, says):
    with pytest.raises(dilu.DiluError, match=says):
        dilu.compile(checkpoint, **options)


def test_a_module_has_no_mesh():
    with pytest.raises(dilu.DiluError, match="mesh is for checkpoints"):
        dilu.compile(torch.nn.Linear(2, 2), [torch.zeros(1, 2)], mesh="ep=2")


@pytest.mark.slow
def test_one_rank_is_the_same_program(checkpoint):
    plain, one = dilu.compile(checkpoint), dilu.compile(checkpoint, mesh="ep=1")
    (source,) = (n for n in plain.files if n.endswith("module.c"))
    assert plain.files[source] == one.files[source]
    assert plain.manifest["constants"] == one.manifest["constants"]


def test_placing_anew_needs_several_ranks(checkpoint, tmp_path):
    path = dilu.compile(checkpoint, mesh="ep=1").save(tmp_path / "m.dilu")
    with pytest.raises(dilu.DiluError, match="has no experts on several ranks"):
        rebalance(path, tmp_path / "load.json")


def test_one_process_counts_the_load_that_several_place_by(checkpoint, tmp_path):
    plain = dilu.compile(checkpoint)
    config = checkpoints.FAMILIES["qwen3_moe"]
    tokens = [5, 17, 3, 99, 42]
    with dilu.load(plain.save(tmp_path / "m.dilu")) as session:
        for times in (1, 2):
            list(session.language.logits([tokens]))
            ((name, load),) = session.expert_load().items()
            assert load.shape == (config["num_hidden_layers"], config["num_experts"])
            chosen = times * len(tokens) * config["num_experts_per_tok"]
            assert load.sum(1).tolist() == [chosen] * len(load)
            assert load.max() <= times * len(tokens)
    (tmp_path / "load.json").write_text(load_text({name: load}))
    sharded = dilu.compile(checkpoint, mesh="ep=2", expert_load=tmp_path / "load.json")
    assert {block["placement"] for block in sharded.manifest["routed"]} == {name}


def test_a_model_without_experts_has_no_load(tmp_path):
    path = dilu.compile(torch.nn.Linear(2, 2), [torch.zeros(1, 2)]).save(tmp_path / "m.dilu")
    with dilu.load(path) as session, pytest.raises(dilu.DiluError, match="has no experts"):
        session.expert_load()
