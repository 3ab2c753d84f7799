"""Sharded models on several processes: the same logits and tokens as one process makes."""

from __future__ import annotations

import json
import os
import signal
import subprocess
import sys
import time
from pathlib import Path
from typing import Any

import checkpoints
import numpy as np
import pytest
import ranks

import dilu
from dilu.planner.expert_load import load_text
from dilu.planner.rebalance import rebalance
from dilu.runtime.artifact.artifact import Artifact
from dilu.runtime.mesh.shard import placements

pytestmark = [pytest.mark.slow, pytest.mark.usefixtures("captured_once", "compiled_quickly")]
HIDDEN = 144


@pytest.fixture(scope="module")
def made(tmp_path_factory):
    """Return `made(family)`: a checkpoint's folder and what one process finds."""
    known: dict[str, tuple[Path, dict[str, Any]]] = {}

    def make(family: str) -> tuple[Path, dict[str, Any]]:
        if family not in known:
            folder = tmp_path_factory.mktemp(family)
            checkpoints.make_checkpoint(folder / "model", family, tokenizer=True)
            dilu.compile(folder / "model").save(folder / "one.dilu")
            with dilu.load(folder / "one.dilu") as session:
                known[family] = folder, ranks.found(session)
            assert bool(known[family][1]["expert_load"]) == (family != "llama")
        return known[family]

    return make


def sharded(folder: Path, mesh: str, **options: Any) -> Path:
    return dilu.compile(folder / "model", mesh=mesh, **options).save(folder / f"{mesh}.dilu")


def check_equal(each: list[dict[str, Any]], alone: dict[str, Any]) -> None:
    for own in each:
        for got, want in zip(own["logits"], alone["logits"], strict=True):
            error = np.abs(np.array(got) - want).max() / np.abs(want).max()
            assert error < 1e-5
        assert own["tokens"] == alone["tokens"]
        assert own["expert_load"] == alone["expert_load"]


def off_rank(each: list[dict[str, Any]], artifact: Path, ep: int) -> int:
    """Return how many assignments had their expert on another rank, without replicas."""
    tables = np.concatenate(list(placements(Artifact.open(artifact).manifest).values()))
    count = 0
    for rank, own in enumerate(each):
        for table, load in zip(tables, own["load"], strict=True):
            count += sum(load) - sum(load[e] for e in table[rank % ep])
    return count


def exchanged_bytes(
    each: list[dict[str, Any]], artifact: Path, folder: Path, ep: int, out: int, back: int
) -> int:
    """Return the bytes that ranks send of rows of `out` and `back` bytes: one row for each
    assignment, or one to each rank, with its experts, where that is less."""
    config = json.loads((folder / "model/config.json").read_text())
    choices = config["num_experts_per_tok"]
    away = off_rank(each, artifact, ep)
    if ep > choices:
        return away * (out + back)
    tokens = sum(sum(load) for own in each for load in own["load"]) // choices
    return tokens * (ep - 1) * (out + 4 * choices) + away * back


def summed_bytes(folder: Path, alone: dict[str, Any]) -> int:
    """Return the bytes that a rank of two sends to add up parts and to gather logits.

    Per token: the embedding, what attention and what the feed-forward block made; per row of
    logits, its half of them.
    """
    config = json.loads((folder / "model/config.json").read_text())
    prompt, new = sum(map(len, ranks.PROMPTS)), sum(map(len, alone["tokens"]))
    count = len(ranks.PROMPTS)
    tokens, rows = 2 * prompt + new - count, prompt + new
    sums = tokens * (1 + 2 * config["num_hidden_layers"]) * config["hidden_size"]
    return 4 * (sums + rows * config["vocab_size"] // 2)


@pytest.mark.parametrize(
    ("family", "mesh", "world"),
    [
        *(
            (family, mesh, world)
            for family in ("qwen3_moe", "glm4_moe", "deepseek_v3")
            for mesh, world in (("ep=2", 2), ("ep=4", 4), ("ep=8", 8), ("ep=2,tp=2", 4))
        ),
        ("deepseek_v3", "dp=2,ep=2", 4),
        ("llama", "tp=2", 2),
        ("qwen3_moe", "tp=2", 2),
    ],
)
def test_equals_one_process(made, family, mesh, world, tmp_path):
    folder, alone = made(family)
    artifact = sharded(folder, mesh)
    anew = family == "llama" or mesh.startswith("dp")  # some, as torchrun would
    each = ranks.run(artifact, tmp_path, world, anew=anew)
    check_equal(each, alone)
    axes = Artifact.open(artifact).manifest["mesh"]
    if axes["ep"] > 1:
        copies = each[:: axes["tp"]]  # neighbours along tp send the same rows
        sent = sum(own["sent"] for own in copies)
        row = HIDDEN * 4
        assert sent == exchanged_bytes(copies, artifact, folder, axes["ep"], row, row)
        assert sent > 0
    if axes["tp"] > 1:
        assert sum(own["summed"] for own in each[::2]) == summed_bytes(folder, alone)
    shared = [own["weights"] for own in each]
    assert max(shared) - min(shared) < 0.01 * max(shared)
    assert max(shared) < alone["weights"] * (1 / axes["tp"] + 0.05 if axes["tp"] > 1 else 1)


def test_rows_in_two_hops(made, tmp_path):
    """Four machines of two: rows for the other of another machine are passed on by one there."""
    folder, alone = made("qwen3_moe")
    artifact = sharded(folder, "ep=8")
    each = ranks.run(artifact, tmp_path / "hops", 8, local=2)
    check_equal(each, alone)
    tables = np.concatenate(list(placements(Artifact.open(artifact).manifest).values()))
    hops = 0
    for source, own in enumerate(each):
        for table, load in zip(tables, own["load"], strict=True):
            for expert, count in enumerate(load):
                holder = int(np.nonzero((table == expert).any(1))[0][0])
                hops += count * ((source // 2 != holder // 2) + (source % 2 != holder % 2))
    assert sum(own["sent"] for own in each) == 2 * hops * HIDDEN * 4


@pytest.mark.parametrize("ep", [2, 4])  # all rows for all ranks; rows for single ranks
def test_a_model_in_bf16_sends_bf16(made, ep, tmp_path):
    folder, _ = made("qwen3_moe")
    dilu.compile(folder / "model", dtype="bf16").save(tmp_path / "one.dilu")
    with dilu.load(tmp_path / "one.dilu") as session:
        alone = ranks.found(session)
    compiled = dilu.compile(folder / "model", mesh=f"ep={ep}", dtype="bf16")
    artifact = compiled.save(tmp_path / "m.dilu")
    each = ranks.run(artifact, tmp_path / "out", ep)
    check_equal(each, alone)
    sent = sum(own["sent"] for own in each)
    assert sent == exchanged_bytes(each, artifact, folder, ep, 2 * HIDDEN, 4 * HIDDEN)


@pytest.mark.parametrize(
    ("wire", "row", "most"),
    # Rounding is by 2^-9 (bf16, there and back) and 2^-4 (e4m3) of a row's larger numbers.
    [("bf16", 2 * HIDDEN, 0.02), ("f8e4m3", HIDDEN + 4, 0.1)],
)
def test_rows_in_fewer_bytes(made, wire, row, most, tmp_path):
    folder, alone = made("qwen3_moe")
    artifact = sharded(folder, "ep=2")
    each = ranks.run(artifact, tmp_path / "wire", 2, DILU_TEST_WIRE=wire)
    sent = sum(own["sent"] for own in each)
    assert sent == exchanged_bytes(each, artifact, folder, 2, row, 2 * HIDDEN)
    for got, want in zip(each[0]["logits"], alone["logits"], strict=True):
        error = np.abs(np.array(got) - want).max() / np.abs(want).max()
        assert 1e-5 < error < most
    assert each[0]["logits"] == each[1]["logits"]


def test_ranks_that_disagree_about_the_wire(made, tmp_path):
    folder, _ = made("qwen3_moe")
    artifact = sharded(folder, "ep=2")
    processes = ranks.start(artifact, tmp_path / "a", 2, DILU_TEST_WIRE="bf16,exact")
    for code, errors in ranks.outputs(processes):
        assert code == 1
        assert "the ranks do not have the same format on the wire: 1 differ from rank 0" in errors


def test_placing_anew_changes_where_and_nothing_else(made, tmp_path):
    folder, alone = made("deepseek_v3")
    artifact = sharded(folder, "ep=2", replicas=2)
    before = placements(Artifact.open(artifact).manifest)
    files = {p: p.read_bytes() for p in artifact.rglob("*") if p.is_file()}
    first = ranks.run(artifact, tmp_path / "first", 2)
    check_equal(first, alone)
    load = tmp_path / "load.json"
    rng = np.random.default_rng(2)
    names = {name: rng.zipf(1.5, (len(t), 8)).astype(float) for name, t in before.items()}
    load.write_text(load_text(names))
    ratios = rebalance(artifact, load)
    assert ratios["after"] <= ratios["before"]
    changed = {p.name for p, content in files.items() if p.read_bytes() != content}
    assert changed == {"manifest.json"}
    after = placements(Artifact.open(artifact).manifest)
    assert any((before[name] != after[name]).any() for name in before)
    again = ranks.run(artifact, tmp_path / "again", 2)
    assert again[0]["logits"] == first[0]["logits"]  # bit for bit
    assert again[0]["tokens"] == first[0]["tokens"]


def test_a_rank_holds_its_share_in_memory(tmp_path):
    """Of experts that are large beside the pages around them, as those of real models are."""
    sizes = {"hidden_size": 1024, "moe_intermediate_size": 1536, "num_experts": 8}
    checkpoints.make_checkpoint(tmp_path / "model", "qwen3_moe", num_hidden_layers=2, **sizes)
    artifact = sharded(tmp_path, "ep=4")
    each = ranks.run(artifact, tmp_path / "out", 4)
    file = (tmp_path / "model/model.safetensors").stat().st_size
    experts = 2 * 8 * 3 * 1024 * 1536
    for own in each:
        assert own["weights"] < file - experts * 0.74
        assert 0.9 * own["weights"] < own["resident"] < 1.05 * own["weights"]


def test_torchrun_starts_again(made, tmp_path):
    folder, _ = made("qwen3_moe")
    artifact = sharded(folder, "ep=2")
    launcher = [sys.executable, "-m", "torch.distributed.run", "--standalone"]
    command = [*launcher, "--nproc-per-node", "2", "--max-restarts", "1", "-m", "dilu", "run"]
    options = ["--prompt", "a", "--max-tokens", "300", "--threads", "1", "--seed", "1"]
    process = subprocess.Popen(
        [*command, str(artifact), *options, "--temperature", "1"],
        env={**os.environ, "DILU_TIMEOUT": "6"},
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
    )
    try:
        assert process.stdout is not None
        process.stdout.read(1)  # the first token was made
        found = Path(f"/proc/{process.pid}/task/{process.pid}/children").read_text().split()
        workers = [int(p) for p in found if b"dilu" in Path(f"/proc/{p}/cmdline").read_bytes()]
        assert len(workers) == 2
        os.kill(workers[1], signal.SIGKILL)
        _, errors = process.communicate(timeout=120)
    finally:
        process.kill()
    assert process.returncode == 0, errors.decode()
    assert b"exitcode: -9" in errors and b"new tokens" in errors


# ------------------------------------------------------------------------------- failures


@pytest.mark.parametrize("how", [signal.SIGKILL, signal.SIGSTOP])
def test_a_rank_that_dies_or_hangs_is_named(made, how, tmp_path):
    folder, _ = made("qwen3_moe")
    artifact = sharded(folder, "ep=4")
    processes = ranks.start(artifact, tmp_path, 4, mode="long", DILU_TIMEOUT="6")
    ranks.until_running(processes, tmp_path)
    processes[2].send_signal(how)
    begun = time.monotonic()
    others = [p for i, p in enumerate(processes) if i != 2]
    try:
        ends = [p.communicate(timeout=60)[1] for p in others]
    finally:
        for process in processes:
            process.kill()
            process.wait()
    assert time.monotonic() - begun < 40
    assert all(p.returncode == 1 for p in others)
    assert all("rank 2 of 4 stopped answering" in errors for errors in ends), ends


def test_artifacts_that_differ(made, tmp_path):
    folder, _ = made("qwen3_moe")
    artifact = sharded(folder, "ep=2")
    sharded(folder, "ep=2").rename(tmp_path / "m0.dilu")
    dilu.compile(folder / "model", mesh="ep=2", max_seq=64).save(tmp_path / "m1.dilu")
    ends = ranks.outputs(ranks.start(tmp_path / "m{rank}.dilu", tmp_path / "out", 2))
    assert all(code == 1 for code, _ in ends)
    assert all("do not have the same artifact: 1 differ" in errors for _, errors in ends)
    assert not artifact.exists()


def test_too_little_memory_on_one_rank_stops_all(made, tmp_path):
    folder, _ = made("qwen3_moe")
    artifact = sharded(folder, "ep=2")
    ends = ranks.outputs(ranks.start(artifact, tmp_path, 2, mode="run", DILU_TEST_POOR="1"))
    assert all(code == 1 for code, _ in ends)
    assert all("rank 1: not enough memory" in errors for _, errors in ends), ends


def test_another_number_of_processes(made, tmp_path):
    folder, _ = made("qwen3_moe")
    artifact = sharded(folder, "ep=2")
    with pytest.raises(dilu.DiluError, match=r"for 2 processes \(ep=2\), and there are 1") as e:
        dilu.load(artifact)
    assert "torchrun --nproc-per-node 2" in str(e.value.hint)
    done = subprocess.run(
        [sys.executable, "-m", "dilu", "run", str(artifact), "--prompt", "a"],
        env={**os.environ, "WORLD_SIZE": "2"},
        capture_output=True,
        text=True,
    )
    assert done.returncode == 1
    assert "error: cannot connect with the other processes: " in done.stderr
    assert "hint: start them with torchrun" in done.stderr
