"""Sharded models across network boundaries: every process on a host of its own."""

from __future__ import annotations

import time
from pathlib import Path

import checkpoints
import numpy as np
import pytest
import ranks
from hosts import Hosts, why_not

import dilu

pytestmark = [pytest.mark.slow, pytest.mark.usefixtures("captured_once", "compiled_quickly")]


@pytest.fixture(scope="module", autouse=True)
def _possible():
    reason = why_not()
    if reason is not None:
        pytest.skip(reason)


@pytest.fixture(scope="module")
def folder(tmp_path_factory) -> Path:
    folder = tmp_path_factory.mktemp("model")
    checkpoints.make_checkpoint(folder / "model", "deepseek_v3", tokenizer=True)
    return folder


def test_four_hosts_are_as_good_as_one_process(folder, tmp_path):
    dilu.compile(folder / "model").save(folder / "one.dilu")
    with dilu.load(folder / "one.dilu") as session:
        alone = ranks.found(session)
    dilu.compile(folder / "model", mesh="ep=2,tp=2").save(folder / "four.dilu")
    with Hosts(4) as hosts:
        each = ranks.run(folder / "four.dilu", tmp_path, 4, hosts=hosts)
    for own in each:
        assert own["tokens"] == alone["tokens"]
        for got, want in zip(own["logits"], alone["logits"], strict=True):
            assert np.abs(np.array(got) - want).max() < 1e-5 * np.abs(want).max()


def test_a_host_whose_link_goes_down(folder, tmp_path):
    dilu.compile(folder / "model", mesh="ep=3", replicas=1).save(folder / "three.dilu")
    with Hosts(3) as hosts:
        processes = ranks.start(
            folder / "three.dilu", tmp_path, 3, mode="long", hosts=hosts, DILU_TIMEOUT="6"
        )
        try:
            ranks.until_running(processes, tmp_path)
            begun = time.monotonic()
            hosts.unplug(2)
            ends = ranks.outputs(processes, 60)
        finally:
            for process in processes:
                process.kill()
        assert time.monotonic() - begun < 45
    assert all(code == 1 for code, _ in ends), ends
    # Those that still see each other name it; it sees nobody, and names the first.
    assert all("rank 2 of 3 stopped answering" in errors for _, errors in ends[:2]), ends
    assert "of 3 stopped answering" in ends[2][1], ends
