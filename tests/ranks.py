"""Several processes that run an artifact together, as torchrun would start them.

As a script: one of those processes. It writes what it found to a JSON file per rank.
"""

from __future__ import annotations

import itertools
import json
import os
import re
import socket
import statistics
import subprocess
import sys
import time
from pathlib import Path
from typing import TYPE_CHECKING, Any

from forked import Forked

from dilu.errors import DiluError

if TYPE_CHECKING:
    from hosts import Hosts

PROMPTS = [
    [5, 17, 3, 99, 42, 7, 250, 31, 8],
    [11, 4],
    [200, 100, 50, 25, 12, 6, 3, 90, 45, 22, 13],
]
#: Enough for several rounds of rows to experts, and for sums in two steps.
LONG = [
    [(31 * i * n + i * i * j) % 199 + 3 for i in range(490)] for n, j in ((1, 3), (2, 5), (3, 7))
]
TOKENS = 12


def start(
    artifact: Path,
    out: Path,
    world: int,
    *,
    mode: str = "run",
    hosts: Hosts | None = None,
    local: int = 0,
    anew: bool = False,
    **env: str,
) -> list[Any]:
    """Start `world` processes; return them. `env` is added to their environment; `{rank}` in a
    value stands for a process's rank, and so it does in the artifact's name. With `hosts`, each
    process is on a host of its own; with `local`, they say that so many share a machine. They
    are forks of one that has imported torch, unless they are to be started `anew`, or have to be:
    on hosts, and on real devices."""
    device = env.get("DILU_TEST_DEVICE", "cpu")
    anew = anew or hosts is not None or device.startswith(("cuda", "hip"))
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        port = probe.getsockname()[1]
    out.mkdir(exist_ok=True)
    found = []
    for rank in range(world):
        place = {"RANK": str(rank), "WORLD_SIZE": str(world), "MASTER_ADDR": "127.0.0.1",
                 "MASTER_PORT": str(port), "OMP_NUM_THREADS": "1"}  # fmt: skip
        before: list[str] = []
        if hosts is not None:
            place |= {"MASTER_ADDR": hosts.address(0), "GLOO_SOCKET_IFNAME": "eth0"}
            before = hosts.prefix(rank)
        if local:
            place |= {"LOCAL_WORLD_SIZE": str(local), "LOCAL_RANK": str(rank % local)}
        own = {name: value.format(rank=rank) for name, value in env.items()}
        given = [str(artifact).format(rank=rank), str(out / f"{rank}.json"), mode]
        environment = {**os.environ, **place, **own}
        if not anew:
            found.append(Forked(_main, given, environment, out / f"{rank}.errors"))
            continue
        found.append(
            subprocess.Popen(
                [*before, sys.executable, __file__, *given],
                env=environment,
                stdout=subprocess.PIPE,
                stderr=subprocess.PIPE,
                text=True,
            )
        )
    return found


def until_running(processes: list[Any], out: Path) -> None:
    """Wait until all processes of the mode `long` make tokens."""
    end = time.monotonic() + 120
    while len(list(out.glob("*.json"))) < len(processes):
        assert time.monotonic() < end and all(p.poll() is None for p in processes)
        time.sleep(0.1)


def outputs(processes: list[Any], seconds: float = 300) -> list[tuple[int, str]]:
    """Return the exit code and the errors of every process."""
    try:
        ends = [process.communicate(timeout=seconds) for process in processes]
    finally:
        for process in processes:
            process.kill()
    return [(p.returncode, errors) for p, (_, errors) in zip(processes, ends, strict=True)]


def run(artifact: Path, out: Path, world: int, **options: Any) -> list[dict[str, Any]]:
    """Run the prompts on `world` processes; return what each of them found."""
    for code, errors in outputs(start(artifact, out, world, **options)):
        assert code == 0, errors
    return [json.loads((out / f"{rank}.json").read_text()) for rank in range(world)]


def found(session: Any, tokens: int = TOKENS) -> dict[str, Any]:
    """Return what a process reports: logits, so many tokens, and what it sent."""
    logits = [rows.tolist() for rows in session.language.logits(PROMPTS)]
    made: list[list[int]] = [[] for _ in PROMPTS]
    for index, token in session.language.loop.generate(PROMPTS, max_tokens=tokens):
        made[index].append(token)
    exchange = session.host and session.host.exchange
    try:
        loads = session.expert_load()
    except DiluError:  # no experts, or on a device that does not count them
        loads = {}
    more = {}
    if os.environ.get("DILU_TEST_LONG"):
        more = {"long": session.language.logits(LONG)[2][-50:].tolist(), "rounds": _rounds(session)}
    return {
        **more,
        "expert_load": {name: load.tolist() for name, load in loads.items()},
        "logits": logits,
        "tokens": made,
        "sent": exchange and exchange.sent_bytes,
        "summed": session.host and session.host.sent_bytes,
        "load": exchange and [load.tolist() for load in exchange.load],
        "weights": session.weight_bytes,
        "resident": _resident_weights(),
        "reason": session.target_reason,
    }


def _rounds(session: Any) -> int:
    """Return the rounds of rows to experts so far."""
    return session.host.exchange.rounds if session.host else 0


def _step_seconds(session: Any) -> dict[str, float]:
    """Return the median time of a step that makes a token of each of so many sequences."""
    medians: dict[str, float] = {}
    for batch in (1, 8):
        prompts = [[(7 * i + j) % 199 + 3 for j in range(32)] for i in range(batch)]
        for _ in range(2):  # the first time, launches are not recorded yet
            times = []
            for number, _ in enumerate(session.language.loop.generate(prompts, max_tokens=48)):
                if number % batch == batch - 1:
                    times.append(time.perf_counter())
        medians[str(batch)] = statistics.median(b - a for a, b in itertools.pairwise(times))
    return medians


def _resident_weights() -> int:
    """Return the bytes of checkpoints' files that are mapped and in memory."""
    found, counts = 0, False
    for line in Path("/proc/self/smaps").read_text().splitlines():
        words = line.split()
        if re.match(r"[0-9a-f]+-[0-9a-f]+ ", line):
            counts = words[-1].endswith(".safetensors")
        elif counts and words[0] == "Rss:":
            found += int(words[1]) * 1024
    return found


def _main(artifact: str, out: str, mode: str) -> None:
    import dilu
    from dilu.runtime import machine

    if os.environ.get("DILU_TEST_POOR") == os.environ["RANK"]:
        machine.available_memory = lambda: 1
    try:
        wires = os.environ.get("DILU_TEST_WIRE", "exact").split(",")
        wire = wires[int(os.environ["RANK"]) % len(wires)]
        devices = os.environ.get("DILU_TEST_DEVICE", "").split(",")
        device: Any = devices[int(os.environ["RANK"]) % len(devices)] or None
        if device == "interpreter:0":
            from interpreted import InterpretedDevice

            device = InterpretedDevice()
        with dilu.load(artifact, threads=1, wire=wire, device=device) as session:
            if mode == "time":
                Path(out).write_text(json.dumps(_step_seconds(session)))
                return
            if mode == "run":
                tokens = int(os.environ.get("DILU_TEST_TOKENS", TOKENS))
                Path(out).write_text(json.dumps(found(session, tokens)))
                return
            for step, _ in enumerate(session.language.loop.generate([[5]] * 4, max_tokens=500)):
                if step % 8 == 0:
                    Path(out).write_text(str(step))
    except DiluError as error:
        sys.stderr.write(error.format())
        sys.stderr.flush()
        os._exit(1)


if __name__ == "__main__":
    _main(*sys.argv[1:])
