"""`dilu.compile` from end to end: modules against torch itself, and every error on the way."""

from __future__ import annotations

import json
import os
import re
import shutil
from pathlib import Path

import numpy as np
import pytest

import dilu
from dilu.errors import DiluError
from dilu.runtime.artifact.artifact import Artifact
from dilu.runtime.describe import describe_artifact, kernel_text, stage_text

torch = pytest.importorskip("torch")

EXAMPLE = Path(__file__).parent.parent / "examples" / "stdlib-moe"


class Mlp(torch.nn.Module):
    """Two layers of ragged sizes, a norm and an activation between."""

    def __init__(self) -> None:
        super().__init__()
        torch.manual_seed(0)
        self.up = torch.nn.Linear(20, 33)
        self.norm = torch.nn.LayerNorm(33)
        self.down = torch.nn.Linear(33, 7)

    def forward(self, x):
        hidden = self.norm(torch.nn.functional.silu(self.up(x)))
        return self.down(hidden), hidden.amax(-1)


def close(got, wanted, bound=1e-5):
    got, wanted = (np.asarray(a.detach() if hasattr(a, "detach") else a) for a in (got, wanted))
    assert got.shape == wanted.shape
    assert np.abs(got - wanted).max(initial=0) <= bound * np.abs(wanted).max(initial=1)


@pytest.fixture(scope="module")
def module():
    return Mlp().eval()


@pytest.fixture(scope="module")
def compiled(module):
    n = torch.export.Dim("N")
    return dilu.compile(module, (torch.randn(5, 20),), dynamic_shapes=({0: n},))


@pytest.mark.parametrize("rows", [0, 1, 5, 64, 131])
def test_a_module_of_any_batch_size(module, compiled, rows):
    x = torch.randn(rows, 20)
    with dilu.load(compiled) as session:
        for got, wanted in zip(session(x), module(x), strict=True):
            assert isinstance(got, torch.Tensor)
            close(got, wanted)


def test_saved_and_loaded(module, compiled, tmp_path):
    x = torch.randn(3, 20)
    path = compiled.save(tmp_path / "m.dilu")
    with dilu.load(path) as session:
        y, top = session(x.numpy())
    assert isinstance(y, np.ndarray)
    close(y, module(x)[0])
    close(top, module(x)[1])
    moved = shutil.move(path, tmp_path / "moved.dilu")
    again = Artifact.open(moved)
    again.bundle = True
    again.save(tmp_path / "b.dilu")
    shutil.rmtree(moved)
    close(dilu.load(tmp_path / "b.dilu")(x)[0], module(x)[0])


def test_threads_do_not_change_results(compiled):
    x = torch.randn(70, 20)
    one, three = (dilu.load(compiled, threads=n)(x)[0] for n in (1, 3))
    assert torch.equal(one, three)


def test_what_inspect_shows(compiled):
    text = describe_artifact(compiled)
    assert "main(x: f32[N,20])" in text
    assert "6 tensors" in text
    for stage in ("captured", "normalized", "legalized", "fused", "planned"):
        assert stage_text(compiled, stage).startswith(f"graph {stage}")
    (table,) = compiled.targets.values()
    assert {kernel["kind"] for kernel in table["kernels"]} >= {"matmul"}
    for kernel in table["kernels"]:
        assert kernel["name"] in kernel_text(compiled, kernel["name"])


def test_the_manifest_is_plain_data(compiled):
    manifest = json.loads(json.dumps(compiled.manifest))
    assert manifest["functions"][0]["symbols"] == ["N"]
    assert [p["name"] for p in manifest["passes"]][-1] == "plan_memory"
    assert manifest["language_model"] is None


def test_several_targets(module, tmp_path):
    x = torch.randn(4, 20)
    artifact = dilu.compile(module, (x,), target=["cpu:baseline", "null", "cpu:baseline"])
    assert list(artifact.targets) == ["cpu:baseline", "null"]
    assert artifact.targets["null"]["library"] is None
    session = dilu.load(artifact.save(tmp_path / "m.dilu"))
    assert session.target == "cpu:baseline"
    close(session(x)[0], module(x)[0])
    with pytest.raises(DiluError, match="main: the argument x is"):
        session(torch.randn(5, 20))


def test_an_exported_program(module, tmp_path):
    x = torch.randn(4, 20)
    program = torch.export.export(module, (x,))
    torch.export.save(program, tmp_path / "mlp.pt2")
    for model in (program, tmp_path / "mlp.pt2", str(tmp_path / "mlp.pt2")):
        artifact = dilu.compile(model, target="null")
        assert artifact.manifest["functions"][0]["parameters"][0]["shape"] == [4, 20]
    assert artifact.name == "mlp"
    with pytest.raises(DiluError, match="example_inputs is for modules, and an exported program"):
        dilu.compile(program, (x,))


def test_passes_of_the_user(module):
    seen = []

    def look(graph):
        seen.append(graph.stage)
        return graph

    x = torch.randn(2, 20)
    artifact = dilu.compile(module, (x,), target="null", passes=[look, ("after:fuse_loops", look)])
    assert len(seen) == 2
    assert [p["name"] for p in artifact.manifest["passes"]].count("look") == 2
    with pytest.raises(DiluError, match="there is no place 'after:nothing' for a pass"):
        dilu.compile(module, (x,), target="null", passes=[("after:nothing", look)])


def test_integers_and_several_inputs():
    class Pick(torch.nn.Module):
        def forward(self, table, rows, factor):
            return table[rows] * factor, rows + 1

    table, rows, factor = torch.randn(9, 6), torch.tensor([3, 0, 8, 3]), torch.tensor(2.5)
    artifact = dilu.compile(Pick(), (table, rows, factor))
    y, after = dilu.load(artifact)(table, rows, factor)
    close(y, table[rows] * factor, 0)
    assert after.tolist() == [4, 1, 9, 4]


def test_a_sequential_whose_modules_have_numbers_for_names():
    torch.manual_seed(5)
    model = torch.nn.Sequential(torch.nn.Linear(12, 9), torch.nn.ReLU(), torch.nn.Linear(9, 5))
    x = torch.randn(3, 12)
    got = dilu.load(dilu.compile(model.eval(), (x,)))(x)
    torch.testing.assert_close(torch.as_tensor(got), model(x), rtol=1e-6, atol=1e-6)


def test_progress(module):
    steps = []
    dilu.compile(
        module, (torch.randn(1, 20),), target="null", progress=lambda t, *_: steps.append(t)
    )
    assert {"capture", "plan_memory", "describe weights"} <= set(steps)


# ------------------------------------------------------------------------- errors


class Unsupported(torch.nn.Module):
    def forward(self, x):
        return torch.linalg.det(x)  # the line that the error names


@pytest.mark.parametrize(
    ("model", "options", "message"),
    [
        (3, {}, "cannot compile a int"),
        (Mlp(), {}, "a module needs example inputs"),
        (Mlp(), {"config_only": True}, "config_only is for checkpoints"),
        (Mlp(), {"max_seq": 8}, "max_seq is for checkpoints"),
        (Mlp(), {"dtype": "bf16"}, "dtype is for checkpoints, and this is a module"),
        (Mlp(), {"mesh": "ep=2"}, "mesh is for checkpoints, and this is a module"),
        (Mlp(), {"replicas": 2}, "replicas is given, but no mesh"),
        (Mlp, {}, "cannot compile a type"),
        (EXAMPLE, {"example_inputs": (1,)}, "example_inputs is for modules, and this is a ch"),
        (EXAMPLE, {"example_kwargs": {}}, "example_kwargs is for modules, and this is a ch"),
        (EXAMPLE, {"dynamic_shapes": {}}, "dynamic_shapes is for modules, and this is a ch"),
        (Mlp(), {"target": "abacus"}, "unknown target 'abacus'"),
        (Mlp(), {"target": []}, "no target is given"),
        (Mlp(), {"dtype": "f8"}, "unknown dtype 'f8'"),
        ("nowhere", {}, "no such path: nowhere"),
    ],
)
def test_what_cannot_be_compiled(model, options, message):
    with pytest.raises(DiluError, match=message):
        dilu.compile(model, **options)


def test_an_unsupported_operator_is_named_with_its_line():
    with pytest.raises(DiluError, match="det") as caught:
        dilu.compile(Unsupported(), (torch.eye(3),))
    assert "test_compiler.py:" in str(caught.value)


def test_a_broken_program(tmp_path):
    (tmp_path / "x.pt2").write_bytes(b"nothing")
    with pytest.raises(DiluError, match="not an exported program"):
        dilu.compile(tmp_path / "x.pt2")


# -------------------------------------------------------- checkpoints that are broken


@pytest.fixture
def broken(tmp_path):
    """A copy of the bundled model that a test may damage."""
    return Path(shutil.copytree(EXAMPLE, tmp_path / "model"))


def change_config(folder: Path, **changes) -> None:
    config = json.loads((folder / "config.json").read_text())
    (folder / "config.json").write_text(json.dumps(config | changes))


def shard(folder: Path) -> Path:
    return min(folder.glob("model-*.safetensors"))


def truncate(folder: Path) -> None:
    with open(shard(folder), "r+b") as file:
        file.truncate(1000)


DAMAGE = {
    "not a checkpoint": (lambda f: (f / "config.json").unlink(), "not a checkpoint"),
    "truncated": (truncate, "(?i)truncated|incomplete|outside|ends"),
    "missing shard": (lambda f: shard(f).unlink(), "model-00001-of-00002.safetensors"),
    "quantization": (
        lambda f: change_config(f, quantization_config={"quant_method": "magic"}),
        "unknown quantization method 'magic'",
    ),
    "architecture": (
        lambda f: change_config(f, architectures=["NoSuchModel"], model_type="no_such_model"),
        "no_such_model|NoSuchModel",
    ),
    "shapes": (lambda f: change_config(f, hidden_size=256), "shape|fit|expected"),
}


@pytest.mark.parametrize("damage", DAMAGE)
def test_broken_checkpoints(damage, broken, tmp_path, capsys, monkeypatch):
    """On the command line: one message, exit code 1, nothing left behind."""
    from dilu import cli

    monkeypatch.delenv("DILU_DEBUG", raising=False)
    change, message = DAMAGE[damage]
    change(broken)
    with pytest.raises(SystemExit) as stop:
        cli.main(["compile", str(broken), "-o", str(tmp_path / "m.dilu")])
    printed = capsys.readouterr()
    assert stop.value.code == 1
    assert printed.err.startswith("error: ")
    assert "Traceback" not in printed.err
    assert "this is a bug in dilu" not in printed.err
    assert re.search(message, printed.err), printed.err
    assert os.listdir(tmp_path) == ["model"]


@pytest.mark.slow
def test_a_checkpoint_without_a_tokenizer_takes_tokens(broken, tmp_path):
    for file in ("tokenizer.json", "tokenizer_config.json"):
        (broken / file).unlink()
    (broken / "generation_config.json").write_text('{"do_sample": true, "min_new_tokens": 3}')
    artifact = dilu.compile(broken)
    path = artifact.save(tmp_path / "m.dilu")
    told = Artifact.open(path).manifest["language_model"]
    assert told["notes"] == [
        "generation_config.json asks for min_new_tokens: 3, which is not applied",
        "the checkpoint has no tokenizer: the artifact takes and returns tokens, not text",
    ]
    assert told["sampling"] == {"temperature": 1.0, "top_k": 50}
    with dilu.load(path) as session:
        assert session.language.logits([[5, 6, 7]])[0].shape[0] == 3
        with pytest.raises(DiluError, match="has no tokenizer: the checkpoint has no tokenizer"):
            session.generate("x")


# ------------------------------------------------------------------ the bundled model


@pytest.fixture(scope="module")
def example(tmp_path_factory):
    return dilu.compile(EXAMPLE).save(tmp_path_factory.mktemp("example") / "m.dilu")


@pytest.mark.slow
def test_the_bundled_model_writes(example):
    prompt = "def read(self, size=-1):"
    with dilu.load(example) as session:
        text = session.generate(prompt, max_tokens=24)
        assert text.isprintable() or "\n" in text
        assert '"""' in text
        assert "".join(session.stream(prompt, max_tokens=24)) == text
        both = session.generate([prompt, "The following"], max_tokens=24)
        assert both == [text, session.generate("The following", max_tokens=24)]
        assert session.generate("What is a list?", chat=True, max_tokens=4)


@pytest.mark.slow
def test_the_prompt_may_come_in_chunks(example, monkeypatch):
    with dilu.load(example) as session:
        prompt = session.language.encode("class Thread: " * 40)
        (whole,) = session.language.logits([prompt])
        monkeypatch.setattr("dilu.runtime.text.generate.PREFILL_TOKENS", 37)
        (parts,) = session.language.logits([prompt])
        np.testing.assert_array_equal(whole, parts)


@pytest.mark.slow
def test_a_configuration_only(tmp_path):
    artifact = dilu.compile(EXAMPLE / "config.json", config_only=True, target="null", max_seq=100)
    path = artifact.save(tmp_path / "m.dilu")
    assert artifact.name == "stdlib-moe"
    assert artifact.manifest["language_model"]["max_positions"] == 100
    assert "compiled from a configuration only" in describe_artifact(Artifact.open(path))
    with pytest.raises(DiluError, match="max_seq is 1000000, and the model takes 1 to 512"):
        dilu.compile(EXAMPLE / "config.json", config_only=True, target="null", max_seq=10**6)


@pytest.mark.slow
def test_every_kernel_can_be_shown():
    """Those that share a function, too, as the attentions of two kinds of layers do."""
    made = dilu.compile(EXAMPLE, target="null")
    kernels = made.targets["null"]["kernels"]
    assert len({k["function"] for k in kernels}) < len({k["name"] for k in kernels})
    for kernel in kernels:
        text = kernel_text(made, kernel["name"])
        assert kernel["function"] in text
