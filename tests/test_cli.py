from __future__ import annotations

import json
import os
import re
import signal
import subprocess
import sys
import textwrap
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

import pytest
import typer

import dilu
from dilu import cli
from dilu.errors import DiluError
from dilu.options import Options
from dilu.runtime.artifact.artifact import Artifact


@dataclass
class Done:
    code: int
    out: str
    err: str


@pytest.fixture
def run(capsys, monkeypatch) -> Callable[..., Done]:
    """Run a command in this process."""
    monkeypatch.delenv("DILU_DEBUG", raising=False)

    def run(*arguments: str | Path) -> Done:
        handler = signal.getsignal(signal.SIGTERM)
        with pytest.raises(SystemExit) as stop:
            cli.main([str(a) for a in arguments])
        signal.signal(signal.SIGTERM, handler)
        captured = capsys.readouterr()
        return Done(stop.value.code, captured.out, captured.err)  # type: ignore[arg-type]

    return run


@pytest.fixture
def toy(toy: Artifact) -> Artifact:
    """The toy with what only the compiler knows."""
    slots = [{"size": "T*375000", "values": 2}, {"size": "9000", "values": 1}]
    memory = [{"function": "main", "times": 2, "slots": slots}]
    toy.manifest["functions"][0]["memory"] = memory
    record = {"stage": "fused", "name": "fuse_loops", "seconds": 0.25}
    toy.manifest["passes"] = [record | {"nodes_before": 7, "nodes_after": 3}]
    toy.manifest["targets"]["cpu:baseline"]["kernels"][0]["lines"] = [1, 2]
    toy.files["graph/fused.txt"] = b"graph fused\n"
    return toy


@pytest.fixture
def saved(toy: Artifact, tmp_path: Path) -> Path:
    return toy.save(tmp_path / "m.dilu")


def failed(done: Done, *messages: str) -> None:
    """Check that a command ended with one readable error and nothing else."""
    assert done.code == 1
    assert done.out == ""
    assert done.err.startswith("error: ")
    assert "Traceback" not in done.err
    for message in messages:
        assert re.search(message, done.err), done.err


# ---------------------------------------------------------------------- compile


@pytest.fixture
def compiled(toy, monkeypatch):
    """Make the compiler return the toy; what it was asked is in the list."""
    calls = []

    def compile_model(model, options, *, progress):
        calls.append((model, options))
        progress("capture")
        progress("compiling")
        return toy

    monkeypatch.setattr("dilu.compiler.compile_model", compile_model)
    monkeypatch.chdir(Path(toy.manifest["files"][0]["path"]).parent.parent)
    return calls


def test_compile(run, compiled, tmp_path):
    done = run("compile", "checkpoint")
    assert (done.code, done.err) == (0, "")
    assert re.fullmatch(r"toy\.dilu: 1 kernels for cpu:baseline, in [\d.]+ s\n", done.out)
    ((model, options),) = compiled
    assert model == Path("checkpoint")
    assert options == Options()
    assert Artifact.open(tmp_path / "toy.dilu").name == "toy"


def test_compile_options(run, compiled, tmp_path):
    out = tmp_path / "deep" / "x.dilu"
    done = run("compile", "c", "-o", out, "--target", "cpu", "--target", "null", "--bundle",
               "--dtype", "bf16", "--max-seq", "99", "--config-only", "-v", "--mesh", "ep=4",
               "--replicas", "4", "--expert-load", "load.json", "--cluster", "c.yaml")  # fmt: skip
    assert done.code == 0
    ((_, options),) = compiled
    assert options == Options(
        targets=("cpu", "null"),
        dtype="bf16",
        config_only=True,
        bundle=True,
        max_seq=99,
        mesh="ep=4",
        replicas=4,
        expert_load=Path("load.json"),
        cluster=Path("c.yaml"),
    )
    assert re.findall(r"^ +[\d.]+ s  (\w+)", done.err, re.MULTILINE) == ["capture", "compiling"]
    assert out.is_dir()


def test_what_is_there_is_not_replaced(run, compiled, tmp_path):
    (tmp_path / "mine").mkdir()
    (tmp_path / "mine" / "file").touch()
    failed(run("compile", "c", "-o", tmp_path / "mine"), "not a dilu artifact", "hint: .* -o")
    assert os.listdir(tmp_path / "mine") == ["file"]


def test_an_interrupted_compile_leaves_nothing(run, toy, compiled, tmp_path, monkeypatch):
    def interrupted(*_):
        raise KeyboardInterrupt

    monkeypatch.setattr("dilu.runtime.artifact.artifact._write", interrupted)
    before = sorted(os.listdir(tmp_path))
    done = run("compile", "c")
    assert done.code == 130
    assert "Traceback" not in done.err
    assert sorted(os.listdir(tmp_path)) == before


@pytest.mark.parametrize("arguments", [("nowhere",), ("nowhere/config.json", "--config-only")])
def test_no_such_path(run, tmp_path, monkeypatch, arguments):
    monkeypatch.chdir(tmp_path)
    failed(run("compile", *arguments), "no such path: nowhere", "hint: give the directory")
    assert os.listdir(tmp_path) == []


def test_unknown_target(run, checkpoint):
    failed(run("compile", checkpoint, "--target", "abacus"), "unknown target 'abacus'", "known")


def test_unknown_dtype(run, checkpoint):
    failed(run("compile", checkpoint, "--dtype", "f8"), "unknown dtype 'f8'", "f32, bf16")


def test_no_compiler(run, checkpoint, monkeypatch):
    monkeypatch.setenv("DILU_CC", "no-such-compiler")
    failed(run("compile", checkpoint), "no C compiler", "hint: install gcc or clang")


def test_a_file_without_config_only(run, tmp_path):
    (tmp_path / "config.json").write_text("{}")
    failed(run("compile", tmp_path / "config.json"), "not a checkpoint: .* is a file", "--config")


def test_config_only_of_a_program(run, tmp_path):
    (tmp_path / "x.pt2").write_bytes(b"")
    failed(run("compile", tmp_path / "x.pt2", "--config-only"), "config_only is for checkpoints")


# -------------------------------------------------------------------------- run


def test_run(run, saved):
    done = run("run", saved, "--prompt", "ab", "--max-tokens", "5", "--threads", "1")
    with dilu.load(saved) as session:
        assert done.out == session.generate("ab", max_tokens=5) + "\n"
    assert done.code == 0
    numbers = r"[\d.]+"
    assert re.fullmatch(
        rf"prompt 3 tokens, {numbers} tok/s; first token after {numbers} s; 5 new tokens, "
        rf"{numbers} tok/s; {numbers} MB resident \({numbers} MB without mapped files\); "
        r"cpu:baseline on 1 threads\n",
        done.err,
    )


def test_run_samples(run, saved):
    def said(seed):
        return run("run", saved, "--prompt", "ab", "--temperature", "9", "--top-k", "90",
                   "--top-p", "0.99", "--seed", str(seed)).out  # fmt: skip

    assert said(1) == said(1) != said(2)


def test_notes_are_said_by_compile_run_and_inspect(run, toy, compiled, tmp_path):
    toy.manifest["language_model"] |= {
        "notes": ["generation_config.json asks for repetition_penalty: 1.1, which is not applied"],
        "sampling": {"temperature": 0.6, "top_k": 20},
    }
    first, second = "note: generation_config.json asks for", "note: the checkpoint suggests tokens"
    done = run("compile", "checkpoint")
    for line, begins in zip(done.err.splitlines(), (first, second), strict=True):
        assert line.startswith(begins)
    assert "run with --temperature 0.6 --top-k 20" in done.err
    saved = tmp_path / "toy.dilu"
    options = ("run", saved, "--prompt", "ab", "--max-tokens", "1")
    assert run(*options).err.splitlines()[:2] == done.err.splitlines()
    sampled = run(*options, "--temperature", "0.6").err.splitlines()
    assert [line.startswith("note: ") for line in sampled] == [True, False]
    assert f"  {first}" in run("inspect", saved).out


def test_run_chat(run, saved):
    done = run("run", saved, "--prompt", "hi", "--chat", "--max-tokens", "3")
    assert done.err.startswith("prompt 4 tokens")


def test_the_prompt_from_standard_input(run, saved, monkeypatch):
    import io

    monkeypatch.setattr("sys.stdin", io.StringIO("abcd"))
    assert run("run", saved, "--prompt", "-").err.startswith("prompt 5 tokens")


def test_run_verbosely(run, saved):
    done = run("run", saved, "--prompt", "ab", "-v")
    assert "s  map weights" in done.err
    assert "cpu:baseline, " in done.err


@pytest.mark.parametrize(
    ("options", "message"),
    [
        (["--prompt", "x" * 99], "the prompt is longer than the maximum: 100 tokens"),
        (["--prompt", "x", "--temperature", "-1"], "temperature is -1.0"),
        (["--prompt", "x", "--top-p", "2"], "top_p is 2.0"),
        (["--prompt", "x", "--threads", "0"], "cannot run with 0 threads"),
        (["--prompt", "x", "--target", "cuda:80"], "no target 'cuda:80'"),
    ],
)
def test_run_errors(run, saved, options, message):
    failed(run("run", saved, *options), message)


def test_run_what_is_not_there(run, tmp_path):
    failed(run("run", tmp_path / "no.dilu", "--prompt", "x"), "no such artifact\n  at .*no.dilu")


def test_run_a_checkpoint(run, checkpoint):
    failed(run("run", checkpoint, "--prompt", "x"), "not a dilu artifact", "dilu compile")


@pytest.mark.parametrize(
    ("name", "message"),
    [
        ("manifest.json", "the manifest was changed|cannot be read"),
        ("kernels/cpu-baseline/module.so", "this file was changed after compiling"),
        ("../checkpoint/model.safetensors", "the weights changed since compiling"),
    ],
)
def test_run_what_was_changed(run, saved, name, message):
    with open(saved / name, "r+b") as file:
        file.seek(-2, os.SEEK_END)
        byte = file.read(1)
        file.seek(-2, os.SEEK_END)
        file.write(bytes([byte[0] ^ 1]))
    failed(run("run", saved, "--prompt", "x"), message)


def test_too_little_memory(run, saved, monkeypatch):
    monkeypatch.setattr("dilu.runtime.machine.available_memory", lambda: 1000)
    failed(run("run", saved, "--prompt", "x"), "not enough memory: .* needed", "available")


def test_a_processor_without_what_is_needed(run, toy, tmp_path):
    toy.manifest["targets"]["cpu:baseline"]["requires"] = ["quantum"]
    saved = toy.save(tmp_path / "m.dilu")
    failed(run("run", saved, "--prompt", "x"), "needs quantum, which", "--target cpu")


# ---------------------------------------------------------------------- inspect


def test_inspect(run, saved):
    done = run("inspect", saved)
    assert (done.code, done.err) == (0, "")
    for line in (
        r"toy: format 1, made by dilu [\d.]+",
        r"  ToyForCausalLM, vocabulary of 260",
        r"  up to 64 tokens, cache pages of 4",
        r"  scale\(x: f32\[N,3\]\)",
        r"    -> y: f32\[N,3\], count: i64\[\]",
        r"    keeps keys_0: f32\[2,B,1,4,1\]",
        r"  cpu:baseline  needs -  1 loops  runs here",
        r"  f32  1.1 kB  3 tensors",
        r"  .*/checkpoint/model.safetensors  [\d.]+ kB",
        r"  main ×2  3 values in 2 slots  384.0 kB, 24.0 MB for T=64",
        r"  fused  fuse_loops  7 → 3 nodes  0.25 s",
    ):
        assert re.search(f"^{line}$", done.out, re.MULTILINE), (line, done.out)


def test_inspect_a_stage(run, saved):
    done = run("inspect", saved, "--stage", "fused")
    assert (done.code, done.out) == (0, "graph fused\n")
    failed(run("inspect", saved, "--stage", "fuse"), "no stage 'fuse'\n  hint: stages: fused")


PLANNED = b"""graph planned
func @scale(%x: f32[N,3]) const(%w: f32[3]) {
  %y: f32[N,3] = kernel(%x, %w) {kind="loops", body=func @run_main(%x: f32[N,3], %w: f32[3]) {
    %y: f32[N,3] = add(%x, %w)
    return %y
  }}
  return %y
}
"""


@pytest.mark.parametrize("name", ["run_main", "run_m"])
def test_inspect_a_kernel(run, saved, name):
    done = run("inspect", saved, "--kernel", name)
    assert done.out.splitlines()[0].startswith("/* A module with the C interface")
    assert len(done.out.splitlines()) == 2


def test_inspect_an_unknown_kernel(run, saved):
    failed(run("inspect", saved, "--kernel", "x"), "no one kernel 'x'\n  hint: kernels: run_main")
    failed(run("inspect", saved, "--kernel", "run_main", "--target", "no"), "no target 'no'")


def test_inspect_the_ir_of_a_kernel(run, toy, tmp_path):
    toy.files["graph/planned.txt"] = PLANNED
    (first, *_) = toy.manifest["constants"].values()
    toy.manifest["constants"]["w"] = first | {"grid": 1}
    saved = toy.save(tmp_path / "m.dilu")
    done = run("inspect", saved, "--kernel", "run_m", "--ir")
    assert done.out.splitlines() == [
        "kernel run_main: loops (t_x: f32[N,3], t_w: f32[3] constant pieces=1) -> (t_y: f32[N,3])",
        "  for i0 < N:",
        "    for 0 <= j0 < 3:",
        "      t_y[i0, j0] = (t_x[i0, j0] + t_w[j0])",
    ]
    failed(run("inspect", saved, "--ir"), "--ir prints the IR of a kernel\n  hint: .*--kernel")
    failed(run("inspect", saved, "--kernel", "x", "--ir"), "no one kernel 'x'")


@pytest.mark.parametrize(
    ("planned", "message"),
    [
        (None, "no stage 'planned'"),
        (PLANNED.replace(b"run_main", b"other"), "planned graph has no kernel 'run_main'"),
        (PLANNED.replace(b"add", b"plus"), "plus"),
    ],
)
def test_inspect_no_ir(run, toy, tmp_path, planned, message):
    del toy.files["graph/planned.txt"]
    if planned is not None:
        toy.files["graph/planned.txt"] = planned
    saved = toy.save(tmp_path / "m.dilu")
    failed(run("inspect", saved, "--kernel", "run_main", "--ir"), message)


def test_inspect_a_configuration(run, toy, tmp_path):
    for constant in toy.manifest["constants"].values():
        constant["file"] = constant["offset"] = constant["tensor"] = None
    toy.manifest["files"] = []
    saved = toy.save(tmp_path / "m.dilu")
    assert "compiled from a configuration only" in run("inspect", saved).out
    failed(run("run", saved, "--prompt", "x"), "toy was compiled from a configuration only")


# ---------------------------------------------------------------- everything else


def test_version(run):
    assert run("--version").out == f"dilu {dilu.__version__}\n"


COMMANDS = typer.main.get_command(cli.app).commands  # type: ignore[attr-defined]


@pytest.mark.parametrize("command", COMMANDS)
def test_help_says_all_that_is_declared(run, command, monkeypatch):
    """Whatever looks like markup in a help text would be left out."""
    monkeypatch.setenv("COLUMNS", "100")

    def words(text: str) -> str:
        return re.sub(r"[\s│]", "", text)

    shown = words(run(command, "--help").out)
    said = [
        text
        for p in COMMANDS[command].params
        for text in (getattr(p, "help", None), getattr(p, "show_default", None))
        if isinstance(text, str)
    ]
    assert [text for text in said if words(text) not in shown] == []


def test_targets(run):
    lines = run("targets").out.splitlines()
    assert [line.split()[0] for line in lines[1:3]] == ["null", "cpu:baseline"]
    assert sum("this machine" in line for line in lines) == 1
    devices = lines[lines.index("devices here") + 1 :]
    assert devices[0].startswith("  cpu ") and " cores" in devices[0]


@pytest.mark.parametrize(
    "arguments",
    [[], ["nothing"], ["compile"], ["run", "x"], ["run", "x", "--prompt", "a", "--max-tokens", "b"],
     ["inspect", "x", "--no-such-option"]],
)  # fmt: skip
def test_wrong_command_lines(run, arguments):
    done = run(*arguments)
    assert done.code == 2
    assert "Traceback" not in done.err


def test_unexpected_errors_are_one_line(run, saved, monkeypatch):
    def broken(*_, **__):
        raise ZeroDivisionError("what\n  now")

    monkeypatch.setattr(Artifact, "open", broken)
    done = run("inspect", saved)
    assert done.code == 1
    assert done.err == (
        "error: ZeroDivisionError: what now\n"
        "  hint: this is a bug in dilu; set DILU_DEBUG=1 to see where\n"
    )


def test_a_traceback_for_those_who_ask(tmp_path, monkeypatch):
    monkeypatch.setenv("DILU_DEBUG", "1")
    with pytest.raises(DiluError, match="no such artifact"):
        cli.main(["inspect", str(tmp_path / "no.dilu")])


# ------------------------------------------------------------------- as a process

PYTHON = [sys.executable, "-m", "dilu"]


def test_running_starts_without_the_compiler(saved, tmp_path):
    code = f"""
    import sys
    from dilu import cli
    try:
        cli.main(["run", {str(saved)!r}, "--prompt", "ab", "--max-tokens", "3"])
    except SystemExit as stop:
        assert stop.code == 0
    heavy = {{"torch", "transformers", "sympy", "networkx", "rich", "jinja2"}} & set(sys.modules)
    print(heavy, file=sys.stderr)
    """
    done = subprocess.run(
        [sys.executable, "-c", textwrap.dedent(code)], capture_output=True, text=True
    )
    assert done.returncode == 0
    assert done.stderr.splitlines()[-1] == "set()"


@pytest.mark.parametrize("command", ["inspect", "targets", "--version", "--help"])
def test_other_commands_start_without_torch(saved, command):
    code = f"""
    import sys
    from dilu import cli
    try:
        cli.main([{command!r}] + [{str(saved)!r}] * ({command!r} == "inspect"))
    except SystemExit:
        pass
    print({{"torch", "transformers", "networkx"}} & set(sys.modules), file=sys.stderr)
    """
    done = subprocess.run(
        [sys.executable, "-c", textwrap.dedent(code)], capture_output=True, text=True
    )
    assert done.stderr.splitlines() == ["set()"]


def test_control_c_prints_what_there_is(toy, tmp_path):
    """The model talks until the end token, which is never likely here: 16 MB of positions."""
    toy.manifest["language_model"] |= {"max_positions": 1 << 20, "eos_token_ids": []}
    saved = toy.save(tmp_path / "m.dilu")
    # What a shell runs in the background ignores interrupts, and so would what it starts.
    heeding = (
        "import runpy, signal; signal.signal(signal.SIGINT, signal.default_int_handler); "
        "runpy.run_module('dilu', run_name='__main__')"
    )
    process = subprocess.Popen(
        [sys.executable, "-c", heeding, "run", saved, "--prompt", "ab", "--max-tokens", "1000000"],
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
        encoding="utf-8",
    )
    assert process.stdout is not None
    process.stdout.read(1)
    process.send_signal(signal.SIGINT)
    _, err = process.communicate(timeout=30)
    assert process.returncode == 130
    assert err.startswith("interrupted; prompt 3 tokens")
    assert len(err.splitlines()) == 1


def test_a_reader_who_leaves(saved):
    line = f"{sys.executable} -m dilu inspect {saved} | true"
    done = subprocess.run(["bash", "-c", line], capture_output=True, text=True)
    assert done.stderr == ""


def test_a_killed_save_leaves_nothing_under_the_name(toy, tmp_path):
    """SIGTERM in the middle of writing: nothing remains, not even the temporary folder."""
    before = sorted(os.listdir(tmp_path))
    code = f"""
    import json, os, signal, sys, time
    from pathlib import Path
    from dilu import cli, compiler
    from dilu.runtime.artifact import artifact
    manifest = json.loads(Path(sys.argv[1]).read_text())
    made = artifact.Artifact(manifest, {{"a.txt": b"a", "b.txt": b"b"}})
    compiler.compile_model = lambda *_, **__: made
    write = artifact._write
    def slow(path, content):
        write(path, content)
        print("written", file=sys.stderr, flush=True)
        time.sleep(60)
    artifact._write = slow
    cli.main(["compile", "x", "-o", {str(tmp_path / "x.dilu")!r}])
    """
    manifest = tmp_path.parent / f"{tmp_path.name}.json"
    manifest.write_text(json.dumps(toy.manifest))
    process = subprocess.Popen(
        [sys.executable, "-c", textwrap.dedent(code), manifest], stderr=subprocess.PIPE, text=True
    )
    assert process.stderr is not None
    assert process.stderr.readline() == "written\n"
    assert len(os.listdir(tmp_path)) == len(before) + 1
    process.terminate()
    _, err = process.communicate(timeout=30)
    assert process.returncode == 143
    assert "Traceback" not in err
    assert sorted(os.listdir(tmp_path)) == before


def test_the_first_token_comes_fast(saved):
    """A second is promised on a quiet machine; what is asked here only catches a mistake.

    Processor time is compared, not the clock: it does not count what else the machine does.
    """
    command = [*PYTHON, "run", saved, "--prompt", "ab", "--max-tokens", "1"]
    process = subprocess.Popen(command, stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL)
    _, status, used = os.wait4(process.pid, 0)
    assert status == 0
    assert used.ru_utime + used.ru_stime < 3
