"""What compiling for several processes, and placing anew, say of bad input."""

from __future__ import annotations

import checkpoints
import numpy as np
import pytest
import torch

import dilu
from dilu.planner.expert_load import load_text
from dilu.planner.rebalance import rebalance
from dilu.runtime.artifact.artifact import Artifact
from dilu.runtime.mesh.shard import placements

pytestmark = pytest.mark.usefixtures("captured_once", "compiled_quickly")


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
        ({"replicas": 2}, "replicas is given, but no mesh"),
        ({"expert_load": "x.json"}, "expert_load is given, but no mesh"),
        ({"mesh": "ep=2", "expert_load": "no-such.json"}, "cannot read the load"),
        ({"cluster": "c.yaml"}, "cluster is given, but no mesh"),
        ({"mesh": "ep=2", "cluster": "no-such.yaml"}, "cannot read the cluster"),
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
    assert {block["placement"] for block in sharded.manifest["experts"]} == {name}


def test_a_model_without_experts_has_no_load(tmp_path):
    path = dilu.compile(torch.nn.Linear(2, 2), [torch.zeros(1, 2)]).save(tmp_path / "m.dilu")
    with dilu.load(path) as session, pytest.raises(dilu.DiluError, match="has no experts"):
        session.expert_load()


def test_load_is_not_counted_where_the_engine_does_not(checkpoint, tmp_path):
    path = dilu.compile(checkpoint).save(tmp_path / "m.dilu")
    with dilu.load(path) as session:
        session._engine.expert_counts = None  # as on GPUs
        with pytest.raises(dilu.DiluError, match="the load of experts is not counted on cpu"):
            session.expert_load()


CLUSTER = """
device: {name: d, memory: 1 GB, bandwidth: 1 GB/s, compute: {f32: 1 GFLOP/s}}
levels:
- {name: machine, count: 2, bandwidth: 1 GB/s, latency: 1 us}
- {name: network, count: 2, bandwidth: 1 MB/s, latency: 1 ms}
"""


@pytest.mark.slow
def test_groups_of_experts_stay_on_a_machine(tmp_path):
    """Four groups of two on two machines of two: flat placing would part them by their load."""
    checkpoints.make_checkpoint(tmp_path / "model", "deepseek_v3")
    (tmp_path / "c.yaml").write_text(CLUSTER)
    plain = dilu.compile(tmp_path / "model", config_only=False)
    ((name, layers),) = {b["placement"]: b["layer"] + 1 for b in plain.manifest["experts"]}.items()
    experts, groups = plain.manifest["experts"][0]["experts"], 4
    each = experts // groups
    heavy = np.arange(experts) % each == 0  # one of each group
    load = np.where(heavy, 100, 1) * np.ones((layers, 1))
    (tmp_path / "load.json").write_text(load_text({name: load}))
    options = {"mesh": "ep=4", "expert_load": tmp_path / "load.json"}
    artifact = dilu.compile(tmp_path / "model", cluster=tmp_path / "c.yaml", **options)
    assert artifact.manifest["topology"] == {"levels": [2, 2], "groups": groups}
    path = artifact.save(tmp_path / "m.dilu")
    for _ in range(2):  # placed, and placed anew
        (slots,) = placements(Artifact.open(path).manifest).values()
        for layer in slots:
            machines = [set((own // each).reshape(-1).tolist()) for own in np.split(layer, 2)]
            assert not machines[0] & machines[1]
        rebalance(path, tmp_path / "load.json")
    with pytest.raises(dilu.DiluError, match="8 ranks are more than the 4 devices"):
        dilu.compile(tmp_path / "model", mesh="ep=8", cluster=tmp_path / "c.yaml")
