"""Clusters: reading and writing, and what messages take."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path

import pytest
import yaml

from dilu.errors import DiluError
from dilu.planner.cluster import Cluster, Device, Level, cluster_text, read_cluster

EXAMPLES = sorted((Path(__file__).parents[2] / "examples/clusters").glob("*.yaml"))
DEVICE = Device("d", 40e9, 1e12, {"bf16": 3e14}, reach=0.5, efficiency=0.5, kernel=2e-6)
INNER = Level("machine", 8, 1e11, 1e-6)
OUTER = Level("network", 3, 1e10, 1e-5)
CLUSTER = Cluster("c", DEVICE, (INNER, OUTER))


@pytest.mark.parametrize("path", EXAMPLES, ids=lambda p: p.stem)
def test_examples_are_read_and_written(path, tmp_path):
    cluster = read_cluster(path)
    again = tmp_path / path.name
    again.write_text(cluster_text(cluster))
    assert cluster_text(read_cluster(again)) == cluster_text(cluster)


def test_what_was_measured_comes_back(tmp_path):
    products = ((1.0, 5e-11), (512.0, 7.25e-9))
    name = "this: machine, #1 × 2 threads"
    device = replace(DEVICE, products=products, step=0, compute={"f32": 1.25e11})
    cluster = Cluster(name, device)
    (tmp_path / "c.yaml").write_text(cluster_text(cluster))
    found = read_cluster(tmp_path / "c.yaml")
    assert found.name == name
    assert found.device.compute == device.compute
    assert [s for _, s in found.device.products] == pytest.approx([s for _, s in products])


GOOD = {
    "name": "c",
    "device": {
        "name": "d",
        "memory": "40 GB",
        "bandwidth": "1555 GB/s",
        "compute": {"bf16": "312 TFLOP/s"},
    },
    "levels": [{"name": "m", "count": 8, "bandwidth": "200 GB/s", "latency": "3 us"}],
}


def changed(path: str, value: object) -> dict:
    """Return GOOD with one field of another value, or without it."""
    content = yaml.safe_load(yaml.safe_dump(GOOD))
    at = content
    *way, last = [int(p) if p.isdecimal() else p for p in path.split(".")]
    for step in way:
        at = at[step]
    if value is None:
        del at[last]
    else:
        at[last] = value
    return content


@pytest.mark.parametrize(
    ("path", "value", "says"),
    [
        ("device", None, "device is missing"),
        ("device", 3, "device is no mapping"),
        ("device.memory", None, "device.memory is missing"),
        ("device.memory", 40, r"device.memory is 40; give a number with its unit, such as 40 GB"),
        ("device.memory", "40 GB/s", "device.memory is '40 GB/s'"),
        ("device.memory", "0 GB", "device.memory is '0 GB'"),
        ("device.bandwidth", "1.5.5 GB/s", "device.bandwidth is"),
        ("device.color", "red", "device.color is unknown; known are name, memory"),
        ("device.compute", {}, "device.compute names no rate"),
        ("device.compute", {"int8": "1 TFLOP/s"}, "device.compute.int8 is unknown"),
        ("device.reach", 1.5, "device.reach is no share between 0 and 1"),
        ("device.products", [1], "device.products is no mapping"),
        ("levels", {}, "levels is no list"),
        ("levels.0.count", 0, r"levels\[0\].count is no number from 1 on"),
        ("levels.0.latency", "3 hours", r"levels\[0\].latency is '3 hours'"),
        ("levels.0.bandwidth", None, r"levels\[0\].bandwidth is missing"),
    ],
)
def test_what_is_no_cluster(tmp_path, path, value, says):
    file = tmp_path / "c.yaml"
    file.write_text(yaml.safe_dump(GOOD))
    assert read_cluster(file).size == 8
    file.write_text(yaml.safe_dump(changed(path, value)))
    with pytest.raises(DiluError, match=says) as error:
        read_cluster(file)
    assert str(file) in error.value.format()


def test_files_that_cannot_be_read(tmp_path):
    with pytest.raises(DiluError, match="cannot read the cluster"):
        read_cluster(tmp_path / "none.yaml")
    for content, says in (("a: [", "not YAML"), ("", "the cluster is no mapping")):
        (tmp_path / "c.yaml").write_text(content)
        with pytest.raises(DiluError, match=says):
            read_cluster(tmp_path / "c.yaml")


@pytest.mark.parametrize(
    ("ranks", "stride", "peers"),
    [
        (24, 1, {"machine": 7, "network": 16}),
        (8, 1, {"machine": 7}),
        (3, 8, {"network": 2}),
        (6, 4, {"machine": 1, "network": 4}),
        (2, 1, {"machine": 1}),
        (1, 1, {}),
    ],
)
def test_where_the_peers_of_a_rank_are(ranks, stride, peers):
    assert {level.name: n for level, n in CLUSTER.spread(ranks, stride)} == peers


def test_messages_take_what_the_slowest_level_takes():
    inside, across = CLUSTER.all_to_all(8, 1, 7e6), CLUSTER.all_to_all(24, 1, 23e6)
    assert inside == pytest.approx(7e6 / 1e11 + 1e-6 * 1.6)
    assert across == pytest.approx(16e6 / 1e10 + 1e-5 * 1.1 + 1e-6 * 1.6)
    assert CLUSTER.all_gather(8, 1, 1e6) == pytest.approx(7e6 / 1e11 + 1e-6)
    assert CLUSTER.all_reduce(8, 1, 8e9) == pytest.approx(2 * (7e9 / 1e11 + 1e-6))
    # A machine's sum goes out in eighths, one by each card.
    out = 2 * (8e9 / 8 * 2 / 3 / 1e10 + 1e-5)
    assert CLUSTER.all_reduce(24, 1, 8e9) == pytest.approx(2 * (7e9 / 1e11 + 1e-6) + out)
    assert CLUSTER.all_reduce(8, 1, 1e3) == CLUSTER.all_gather(8, 1, 1e3)  # in one step
    assert CLUSTER.all_reduce(1, 1, 8e9) == CLUSTER.all_to_all(1, 1, 0) == 0


def test_products_take_reading_or_computing():
    few = DEVICE.product_seconds(1e9, 1e9, 1, "bf16")
    many = DEVICE.product_seconds(1e9, 1e9, 4096, "bf16")
    assert few == pytest.approx(1e9 / 0.5e12)
    assert many == pytest.approx(2 * 1e9 * 4096 / 1.5e14)
    assert DEVICE.product_seconds(1e9, 1e9, 4096, "f32") == pytest.approx(2 * many)
    assert DEVICE.product_seconds(1e9, 1e9, 0, "bf16") == 0


def test_measured_products_are_interpolated():
    device = replace(DEVICE, products=((1.0, 1e-10), (4.0, 4e-10), (16.0, 16e-10)))
    seconds = [device.product_seconds(1e6, 1e6, rows, "bf16") for rows in (0.5, 1, 2, 8, 16, 64)]
    assert seconds == pytest.approx([1e-4, 1e-4, 2e-4, 8e-4, 16e-4, 64e-4])


def test_a_rate_that_is_not_there():
    with pytest.raises(DiluError, match="d has no rate for bf16, only for f32") as error:
        replace(DEVICE, compute={"f32": 1e12}).rate("bf16")
    assert "--dtype f32" in str(error.value.hint)


def test_levels_of_a_group():
    inner = Level("machine", 4, 1e9, 1e-5)
    cluster = Cluster("c", CLUSTER.device, (inner, Level("net", 6, 1e8, 1e-4)))
    assert cluster.levels_of(24, 1) == (6, 4)
    assert cluster.levels_of(12, 2) == (6, 2)
    assert cluster.levels_of(6, 4) == (6,)  # one on each machine
    assert cluster.levels_of(3, 1) == (3,)
    assert cluster.levels_of(6, 1) == (6,)  # four on a machine, two on another
    assert cluster.levels_of(1, 4) == (1,)
    with pytest.raises(DiluError, match="48 ranks are more than the 24 devices of c"):
        cluster.levels_of(24, 2)
