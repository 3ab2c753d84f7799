"""What a plan counts, compared with the checkpoint and with formulas."""

from __future__ import annotations

from dataclasses import replace
from math import prod

import checkpoints
import numpy as np
import pytest
from safetensors import safe_open

import dilu
from dilu.errors import DiluError
from dilu.ir.mesh import Mesh
from dilu.planner.cluster import Cluster, Device, Level
from dilu.planner.search import candidates
from dilu.planner.simulate import Demand, ShardedModel, expected_most, simulate
from dilu.planner.work import Sizes, count_work
from dilu.planning import plan, prepare
from dilu.runtime.mesh.wire import FORMATS

DEVICE = Device("d", 1e9, 1e11, {"f32": 1e12}, kernel=1e-6)
CLUSTER = Cluster("c", DEVICE, (Level("machine", 4, 1e9, 1e-5), Level("net", 4, 1e8, 1e-4)))
CONFIG = checkpoints.FAMILIES["qwen3_moe"]
HIDDEN, INNER = CONFIG["hidden_size"], CONFIG["moe_intermediate_size"]
EXPERTS, CHOICES = CONFIG["num_experts"], CONFIG["num_experts_per_tok"]
LAYERS, VOCABULARY = CONFIG["num_hidden_layers"], CONFIG["vocab_size"]
HEADS, KV_HEADS = CONFIG["num_attention_heads"], CONFIG["num_key_value_heads"]
WIDTH = CONFIG["head_dim"]

pytestmark = pytest.mark.usefixtures("captured_once")


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    folder = tmp_path_factory.mktemp("model")
    checkpoints.make_checkpoint(folder / "model", "qwen3_moe")
    return folder


@pytest.fixture(scope="module")
def model(folder):
    prepared = prepare(folder / "model", "f32")
    known: dict[tuple[int, bool], ShardedModel] = {}

    def get(tp: int = 1, routed: bool = False) -> ShardedModel:
        if (tp, routed) not in known:
            found = prepared.sharded(tp, routed)
            assert found is not None
            known[tp, routed] = found
        return known[tp, routed]

    return get


def products(model: ShardedModel, sizes: Sizes) -> dict[str, float]:
    """Return the weights that products use in a step, by layer; and their rows."""
    return {
        layer.name: layer.times * sum(w.weights for w in layer.works if w.part == "products")
        for layer in count_work(model.program, sizes)
    }


def test_products_are_those_of_the_checkpoint(folder, model):
    with safe_open(folder / "model/model.safetensors", "np") as file:
        shapes = {name: file.get_slice(name).get_shape() for name in file.keys()}  # noqa: SIM118
    matrices = {
        name: prod(shape)
        for name, shape in shapes.items()
        if len(shape) == 2 and "scale_inv" not in name and "embed" not in name
    }
    dense = sum(n for name, n in matrices.items() if "experts." not in name)
    found = products(model(), Sizes(3, 3, 1, 10))
    assert sum(found.values()) == dense
    head = matrices["lm_head.weight"]
    assert found["main"] == head
    # Heads are divided; the router, of every expert, is not.
    router = LAYERS * EXPERTS * HIDDEN
    half = sum(products(model(2), Sizes(3, 3, 1, 10)).values())
    assert half == (dense - router) / 2 + router


@pytest.mark.parametrize("tokens", [1, 3, 50])
def test_experts_that_some_token_chose(model, tokens):
    each = 3 * HIDDEN * INNER
    layers = count_work(model().program, Sizes(tokens, 1, 1, 10))
    (work,) = (w for layer in layers for w in layer.works if w.part == "experts")
    busy = EXPERTS * (1 - (1 - 1 / EXPERTS) ** (tokens * CHOICES))
    assert work.weights == pytest.approx(busy * each)
    assert work.rows == pytest.approx(tokens * CHOICES / busy)
    assert each < work.weight_bytes / busy < each * 1.1  # FP8, and scales


def test_attention_reads_the_cache(model):
    layers = count_work(model().program, Sizes(5, 1, 4, 100))
    (work,) = (w for layer in layers for w in layer.works if w.part == "attention")
    assert work.nbytes == 4 * 100 * 2 * KV_HEADS * WIDTH * 4  # sequences, keys and values, f32
    assert work.flops == 2 * 5 * HEADS * 100 * 2 * WIDTH


@pytest.mark.parametrize("ranks", [2, 4])
def test_bytes_on_the_wire(model, ranks):
    sizes = Sizes(5, 3, 4, 100, assignments=20, slots=3, ranks=ranks)
    layers = count_work(model(2, True).program, sizes)
    sent: dict[str, float] = {}
    for layer in layers:
        for work in layer.works:
            if work.collective:
                sent[work.name] = sent.get(work.name, 0) + layer.times * work.nbytes
    assert sent["combine"] == LAYERS * 20 * HIDDEN * 4
    if ranks <= CHOICES:  # a row with its experts, to everyone
        assert sent["dispatch"] == LAYERS * 5 * (HIDDEN * 4 + CHOICES * 4)
        assert "routing" not in sent
    else:
        assert sent["dispatch"] == sent["combine"]
        assert sent["routing"] == LAYERS * ranks * 3 * 8
    assert sent["all_reduce"] == 5 * (1 + 2 * LAYERS) * HIDDEN * 4
    assert sent["all_gather"] == 3 * VOCABULARY // 2 * 4


@pytest.mark.slow
def test_weights_are_what_a_session_maps(folder, model):
    dilu.compile(folder / "model").save(folder / "m.dilu")
    with dilu.load(folder / "m.dilu") as session:
        assert model().weight_bytes == session.weight_bytes
    one, routed = model(), model(1, True)
    table = LAYERS * EXPERTS * 8  # which says who holds what
    experts = routed.experts * routed.slot_bytes
    assert routed.experts == EXPERTS
    assert one.weight_bytes + table == pytest.approx(routed.weight_bytes + experts)
    estimate = simulate(routed, Mesh(ep=4), CLUSTER, Demand(4, 64, 16), replicas=4)
    held = 3 * routed.slot_bytes
    assert estimate.memory["weights"] == routed.weight_bytes + held
    assert (
        estimate.memory["cache"] == LAYERS * 64 * 2 * KV_HEADS * WIDTH * 4
    )  # a page of keys and values


def test_what_a_mesh_of_one_does_not_take(model):
    estimate = simulate(model(), Mesh(), CLUSTER, Demand(4, 64, 16))
    assert estimate.decode.parts["network"] == estimate.decode.parts["imbalance"] == 0
    assert estimate.decode.seconds == pytest.approx(sum(estimate.decode.parts.values()))
    assert estimate.decode_rate == pytest.approx(4 / estimate.decode.seconds)


def test_more_work_takes_longer(model):
    demands = [Demand(1, 64, 16), Demand(8, 64, 16), Demand(8, 512, 16), Demand(8, 512, 256)]
    routed = [simulate(model(1, True), Mesh(ep=4), CLUSTER, d) for d in demands]
    steps = [e.decode.seconds for e in routed]
    assert steps[0] < steps[1] < steps[2] == steps[3]
    assert routed[2].prefill.seconds < routed[3].prefill.seconds
    far = simulate(model(1, True), Mesh(ep=16), CLUSTER, Demand(16, 64, 16), replicas=8)
    near = simulate(model(1, True), Mesh(ep=4), CLUSTER, Demand(4, 64, 16))
    assert far.decode.parts["network"] > near.decode.parts["network"] > 0
    even = simulate(model(1, True), Mesh(ep=4), CLUSTER, demands[1])
    skewed = simulate(model(1, True), Mesh(ep=4), CLUSTER, demands[1], skew=2.0)
    assert skewed.decode.parts["imbalance"] > even.decode.parts["imbalance"] > 0


@pytest.mark.parametrize("ranks", [2, 4])  # with 2 experts of a token: gathered, or sent
def test_rows_in_fewer_bytes_take_less(model, ranks):
    def works(wire: str) -> dict[str, float]:
        sizes = Sizes(4, 4, 4, 64, assignments=8, ranks=ranks, wire=wire)
        layers = count_work(model(1, True).program, sizes)
        return {w.name: w.nbytes for layer in layers for w in layer.works if w.axis == "ep"}

    exact, narrow, fp8 = (works(wire) for wire in ("exact", "bf16", "f8e4m3"))
    assert exact["combine"] == 2 * narrow["combine"] == 2 * fp8["combine"] > 0
    indices = 4 * 4 * 2 if ranks == 2 else 0  # 4 tokens with 2 experts, i32, beside gathered rows
    rows = 4 if ranks == 2 else 8
    numbers = (exact["dispatch"] - indices) / 4
    assert narrow["dispatch"] == 2 * numbers + indices
    assert fp8["dispatch"] == numbers + 4 * rows + indices
    routed = [simulate(model(1, True), Mesh(ep=4), CLUSTER, Demand(64, 64, 16, w)) for w in FORMATS]
    seconds = [e.prefill.parts["network"] for e in routed]
    assert seconds[0] > seconds[1] > seconds[2]


def test_a_mesh_larger_than_the_cluster(model):
    with pytest.raises(DiluError, match="the mesh ep=32 is for 32 devices, and c has 16"):
        simulate(model(1, True), Mesh(ep=32), CLUSTER, Demand())


@pytest.mark.parametrize(("total", "bins"), [(8, 4), (1, 16), (64, 32), (3000, 8), (200_000, 64)])
def test_the_busiest_of_many(total, bins):
    rng = np.random.default_rng(total)
    counts = rng.multinomial(total, [1 / bins] * bins, size=4000).max(1).mean()
    # Poisson counts vary a little more than those of a fixed total.
    assert counts * 0.99 < expected_most(total, bins) < counts * 1.12


def test_all_meshes_of_so_many_devices():
    found = {str(m) for m in candidates(8, 4, 6)}
    assert found == {
        "dp=8", "dp=4,ep=2", "dp=2,ep=4", "dp=4,tp=2", "dp=2,ep=2,tp=2", "ep=4,tp=2",
        "dp=2,tp=4", "ep=2,tp=4",
    }  # fmt: skip


@pytest.mark.slow
def test_the_best_mesh_comes_first_and_parts_grow(folder):
    found = plan(folder / "model", CLUSTER, demand=Demand(32, 64, 16))
    best = found.best
    assert best is not None
    fitting = [e for e in found.estimates if e.fits]
    assert best.decode_rate == max(e.decode_rate for e in fitting)
    assert [devices for devices, _ in found.scaling] == [1, 2, 4, 8, 16]
    assert found.scaling[-1][1].decode_rate == best.decode_rate
    small = replace(CLUSTER, device=replace(DEVICE, memory=1e5))
    nothing = plan(folder / "model", small, demand=Demand(32, 64, 16))
    assert nothing.best is None
    assert all(e is None for _, e in nothing.scaling)
    assert not nothing.batches
