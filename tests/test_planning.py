"""`dilu plan`, as a user calls it."""

from __future__ import annotations

import json
import signal
from pathlib import Path

import checkpoints
import numpy as np
import pytest

from dilu import calibrate, cli
from dilu.errors import DiluError
from dilu.planner.cluster import cluster_text, read_cluster
from dilu.planner.expert_load import load_text
from dilu.planning import plan

pytestmark = pytest.mark.usefixtures("captured_once")

CLUSTER = """
name: two small machines
device:
  name: four cores
  memory: {memory}
  bandwidth: 20 GB/s
  compute: {{f32: 200 GFLOP/s}}
levels:
  - {{name: machine, count: 2, bandwidth: 5 GB/s, latency: 20 us}}
  - {{name: network, count: 2, bandwidth: 1 GB/s, latency: 60 us}}
"""


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    folder = tmp_path_factory.mktemp("model")
    checkpoints.make_checkpoint(folder / "tiny", "qwen3_moe")
    for name, memory in (("large", "1 GB"), ("small", "100 KB")):
        (folder / f"{name}.yaml").write_text(CLUSTER.format(memory=memory))
    return folder


@pytest.fixture
def run(capsys, folder):
    def run(*arguments: str | Path) -> tuple[int, str, str]:
        handler = signal.getsignal(signal.SIGTERM)
        with pytest.raises(SystemExit) as stop:
            cli.main(["plan", str(folder / "tiny"), *map(str, arguments), "--context", "256"])
        signal.signal(signal.SIGTERM, handler)
        captured = capsys.readouterr()
        return stop.value.code, captured.out, captured.err  # type: ignore[return-value]

    return run


@pytest.mark.slow
def test_what_is_said(run, folder, tmp_path):
    picture = tmp_path / "plan.svg"
    code, out, err = run("--cluster", folder / "large.yaml", "--picture", picture, "--batch", 8)
    assert (code, err) == (0, "")
    for words in (
        "two small machines: 4 × four cores, 1.00 GB and 20 GB/s each",
        "(2 in a machine, 2 in a network)",
        "8 sequences of 256 tokens, 256 of them the prompt",
        "fits: --mesh ",
        "of the parts tried, 1 device is enough",
        "where the time of a decode step goes",
        "layer_0 ×3",
        "by sequences at once",
        "by devices, for 8 sequences",
    ):
        assert words in out
    assert picture.read_text().startswith("<?xml")
    assert list(tmp_path.iterdir()) == [picture]


def test_as_data(run, folder):
    code, out, _ = run("--cluster", folder / "large.yaml", "--json", "--mesh", "ep=2,tp=2")
    found = json.loads(out)
    (mesh,) = found["meshes"]
    assert (code, found["fits"], mesh["mesh"], mesh["batch"]) == (0, True, "ep=2,tp=2", 32)
    assert mesh["decode_seconds"] == pytest.approx(sum(mesh["decode_parts"].values()))
    assert mesh["decode_parts"]["network"] > 0
    assert [b["batch"] for b in found["batches"][:3]] == [1, 4, 16]


def test_what_does_not_fit(run, folder):
    code, out, _ = run("--cluster", folder / "small.yaml")
    assert code == 1
    assert "does not fit: the least is" in out
    assert "they have 100.0 kB" in out


@pytest.mark.slow
def test_measured_loads_make_it_slower(run, folder, tmp_path):
    load = tmp_path / "load.json"
    rows = {"layers.mlp": [[1000, 1, 1, 1, 1, 1, 1, 1]] * 3}
    load.write_text(load_text({n: np.array(r) for n, r in rows.items()}))
    options = ("--cluster", folder / "large.yaml", "--mesh", "ep=4", "--json")
    even, skewed = (
        json.loads(run(*options, *more)[1])["meshes"][0] for more in ((), ("--expert-load", load))
    )
    assert skewed["decode_parts"]["imbalance"] > even["decode_parts"]["imbalance"]


@pytest.mark.parametrize(
    ("arguments", "says"),
    [
        (("--cluster", "none.yaml"), "cannot read the cluster"),
        (("--cluster", "{large}", "--mesh", "ep=8"), "the mesh ep=8 is for 8 devices"),
        (("--cluster", "{large}", "--mesh", "tp=3"), "cannot be divided by tp=3"),
        (("--cluster", "{large}", "--mesh", "xp=3"), "not a mesh"),
        (("--cluster", "{large}", "--batch", "0"), "batch is 0"),
        (("--cluster", "{large}", "--prompt", "999"), "a prompt of 999 tokens is longer"),
        (("--cluster", "{large}", "--replicas", "-1"), "replicas is -1"),
        (("--cluster", "{large}", "--dtype", "bf16"), "has no rate for bf16"),
        (("--cluster", "{large}", "--dtype", "int8"), "unknown dtype 'int8'"),
        (("--cluster", "{large}", "--wire", "f4"), "unknown format 'f4' for the wire"),
        (("--cluster", "{large}", "--picture", "p.bmp"), "no picture of kind '.bmp'"),
        (("--cluster", "{large}", "--measure", "c.yaml"), "--measure is of this machine"),
        (("--cluster", "{large}", "--expert-load", "l.json"), "cannot read the load"),
        (("--processes", "999"), "999 processes cannot share"),
    ],
)
def test_what_cannot_be_planned(run, folder, arguments, says):
    code, _, err = run(*(a.format(large=folder / "large.yaml") for a in arguments))
    assert code == 1
    assert says in err
    assert err.startswith("error: ")
    assert "hint: " in err or "cannot read" in err


def test_too_long_a_context(folder):
    with pytest.raises(DiluError, match="the context is 4096, and the model takes 512 tokens"):
        plan(folder / "tiny", folder / "large.yaml")
    with pytest.raises(DiluError, match="no such path"):
        plan(folder / "none", folder / "large.yaml")


@pytest.mark.slow
@pytest.mark.parametrize("processes", [1, 2])
def test_this_machine_is_measured(monkeypatch, tmp_path, processes):
    if processes > calibrate.default_threads():
        pytest.skip("needs a core for each process")
    monkeypatch.setattr(calibrate, "_LARGE", {"hidden": 256, "inner": 512, "layers": 2})
    cluster = calibrate.measure_machine(processes=processes)
    device = cluster.device
    assert device.bandwidth > 1e8
    assert device.compute["f32"] > 1e8
    seconds = [s for _, s in device.products]
    assert all(s > 0 for s in seconds)
    assert seconds[-1] > seconds[0]  # of 512 rows and of one
    assert cluster.size == processes
    file = tmp_path / "here.yaml"
    file.write_text(cluster_text(cluster))
    assert cluster_text(read_cluster(file)) == cluster_text(cluster)
