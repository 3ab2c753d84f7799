from __future__ import annotations

import json
import os
import re
import shutil
import subprocess
import sys
import textwrap
from pathlib import Path

import numpy as np
import pytest

import dilu
from dilu.errors import DiluError
from dilu.runtime.artifact import artifact
from dilu.runtime.artifact.artifact import MANIFEST, Artifact, manifest_hash

LIBRARY = "kernels/cpu-baseline/module.so"
X = np.ones((1, 3), np.float32)
Y = [[11, 22, 33]]


@pytest.fixture
def saved(toy, tmp_path):
    return toy.save(tmp_path / "m.dilu")


def scaled(path) -> list:
    with dilu.load(path) as session:
        return session.function("scale")(X)[0].tolist()


def edited(path, **changes):
    """Change a manifest as somebody who knows how to hash it again."""
    manifest = json.loads((path / MANIFEST).read_text()) | changes
    manifest["manifest_hash"] = manifest_hash(manifest)
    (path / MANIFEST).write_text(json.dumps(manifest))


def test_round_trip(toy, saved):
    opened = Artifact.open(saved)
    assert opened.name == "toy"
    assert opened.files.keys() == toy.files.keys()
    for name in toy.files:
        assert opened.read(name) == toy.read(name)
    assert opened.manifest["functions"] == toy.manifest["functions"]
    assert scaled(saved) == Y


def test_saving_changes_nothing_in_memory(toy, tmp_path):
    before = json.dumps(toy.manifest)
    toy.save(tmp_path / "m.dilu")
    assert json.dumps(toy.manifest) == before


def test_what_was_opened_can_be_saved_elsewhere(saved, tmp_path):
    again = Artifact.open(saved).save(tmp_path / "sub" / "again.dilu")
    shutil.rmtree(saved)
    assert scaled(again) == Y


def test_the_manifest_can_be_read_by_people(saved):
    lines = (saved / MANIFEST).read_text().splitlines()
    assert lines[1] == '"format": 1,'
    assert max(map(len, lines)) < 2000


def test_an_artifact_is_replaced(toy, saved):
    toy.manifest["name"] = "other"
    toy.save(saved)
    assert Artifact.open(saved).name == "other"
    assert sorted(os.listdir(saved.parent)) == ["checkpoint", "m.dilu"]


def test_something_else_is_not_replaced(toy, tmp_path):
    with pytest.raises(DiluError, match="not a dilu artifact, so it is not replaced"):
        toy.save(tmp_path / "checkpoint")
    assert os.listdir(tmp_path / "checkpoint") == ["model.safetensors"]


def test_a_session_survives_its_replacement(toy, tmp_path):
    toy.bundle = True
    path = toy.save(tmp_path / "m.dilu")
    with dilu.load(path) as session:
        toy.save(path)
        assert session.function("scale")(X)[0].tolist() == Y


def test_no_such_artifact(tmp_path):
    with pytest.raises(DiluError, match="no such artifact"):
        Artifact.open(tmp_path / "m.dilu")


def test_not_an_artifact(checkpoint):
    with pytest.raises(DiluError, match=r"not a dilu artifact(.|\n)*dilu compile"):
        Artifact.open(checkpoint)


@pytest.mark.parametrize("text", ["", "{", "[]", "{}", '"x"', "\x00"])
def test_no_manifest_at_all(saved, text):
    (saved / MANIFEST).write_text(text)
    with pytest.raises(DiluError, match="the manifest cannot be read"):
        Artifact.open(saved)


def test_changed_manifest(saved):
    text = (saved / MANIFEST).read_text()
    (saved / MANIFEST).write_text(text.replace('"name": "toy"', '"name": "boy"'))
    with pytest.raises(DiluError, match="the manifest was changed after compiling"):
        Artifact.open(saved)


@pytest.mark.parametrize(("version", "hint"), [(2, "update dilu"), (0, "compile the model again")])
def test_other_format(saved, version, hint):
    edited(saved, format=version)
    with pytest.raises(DiluError, match=f"has format {version}; this dilu reads format 1") as e:
        Artifact.open(saved)
    assert hint in str(e.value)


def test_changed_kernel(saved):
    with open(saved / LIBRARY, "r+b") as file:
        file.seek(100)
        file.write(b"\xff\xff")
    with pytest.raises(DiluError, match=r"this file was changed after compiling\n  at .*module.so"):
        Artifact.open(saved)


def test_missing_kernel(saved):
    (saved / LIBRARY).unlink()
    with pytest.raises(DiluError, match=r"the artifact is incomplete: .*\n  at .*module.so"):
        Artifact.open(saved)


def test_files_outside_are_refused(saved):
    edited(saved, hashes={"../checkpoint/model.safetensors": "0"})
    with pytest.raises(DiluError, match="names a file outside the artifact"):
        Artifact.open(saved)


def test_changed_weights(saved, checkpoint):
    with open(checkpoint / "model.safetensors", "r+b") as file:
        file.seek(-1, os.SEEK_END)
        file.write(b"\x01")
    with pytest.raises(DiluError, match=r"the weights changed since compiling\n  at .*safetensors"):
        dilu.load(saved)


def test_weights_of_another_size(saved, checkpoint):
    with open(checkpoint / "model.safetensors", "ab") as file:
        file.write(b"\x01")
    with pytest.raises(DiluError, match=r"the weights changed since compiling: the file has \d+"):
        dilu.load(saved)


def test_missing_weights(saved, checkpoint):
    (checkpoint / "model.safetensors").unlink()
    with pytest.raises(DiluError, match=r"not there: no file model\.safetensors") as caught:
        dilu.load(saved)
    assert str(checkpoint / "model.safetensors") in str(caught.value)
    assert "--bundle" in str(caught.value)


def test_artifact_and_checkpoint_move_together(saved, checkpoint, tmp_path):
    new = tmp_path / "elsewhere"
    new.mkdir()
    shutil.move(saved, new / "m.dilu")
    shutil.move(checkpoint, new / "checkpoint")
    assert scaled(new / "m.dilu") == Y


def test_the_artifact_moves_alone(saved, tmp_path):
    (tmp_path / "far" / "away").mkdir(parents=True)
    shutil.move(saved, tmp_path / "far" / "away" / "m.dilu")
    assert scaled(tmp_path / "far" / "away" / "m.dilu") == Y


def test_links(toy, checkpoint, tmp_path):
    """A checkpoint as a cache keeps it, its files links; an artifact reached through a link."""
    blob = tmp_path / "blobs" / "abc"
    blob.parent.mkdir()
    shutil.move(checkpoint / "model.safetensors", blob)
    (checkpoint / "model.safetensors").symlink_to(blob)
    (tmp_path / "real" / "deep").mkdir(parents=True)
    (tmp_path / "link").symlink_to(tmp_path / "real" / "deep")
    toy.save(tmp_path / "link" / "m.dilu")
    assert scaled(tmp_path / "link" / "m.dilu") == Y
    (entry,) = Artifact.open(tmp_path / "link" / "m.dilu").manifest["files"]
    assert entry["path"] == "../../../checkpoint/model.safetensors"


def test_bundle(toy, checkpoint, tmp_path):
    safetensors = pytest.importorskip("safetensors.numpy")
    toy.bundle = True
    steps = []
    path = toy.save(tmp_path / "m.dilu", progress=lambda *step: steps.append(step))
    shutil.rmtree(checkpoint)
    assert scaled(path) == Y
    opened = Artifact.open(path)
    assert all(o % 64 == 0 for c in opened.manifest["constants"].values() for o in c["offset"])
    (entry,) = opened.manifest["files"]
    tensors = safetensors.load_file(path / entry["path"])
    np.testing.assert_array_equal(tensors["w.1"], [10, 20, 30])
    assert steps[-1][1] == steps[-1][2]
    shutil.move(path, tmp_path / "moved")
    assert scaled(tmp_path / "moved") == Y
    again = Artifact.open(tmp_path / "moved")
    again.bundle = True
    again.save(tmp_path / "again")
    shutil.rmtree(tmp_path / "moved")
    assert scaled(tmp_path / "again") == Y


def test_bundle_in_several_files(toy, checkpoint, tmp_path, monkeypatch):
    monkeypatch.setattr("dilu.runtime.artifact.bundle.SHARD_BYTES", 20)
    toy.bundle = True
    path = toy.save(tmp_path / "m.dilu")
    shutil.rmtree(checkpoint)
    assert len(list(path.glob("weights-*-of-00003.safetensors"))) == 3
    assert scaled(path) == Y


def test_changed_bundle(toy, tmp_path):
    toy.bundle = True
    path = toy.save(tmp_path / "m.dilu")
    (file,) = path.glob("weights-*")
    with open(file, "r+b") as out:
        out.seek(-1, os.SEEK_END)
        out.write(b"\x01")
    with pytest.raises(DiluError, match="the weights changed since compiling"):
        dilu.load(path)
    file.unlink()
    with pytest.raises(DiluError, match="the artifact is incomplete"):
        dilu.load(path)


def test_constants_of_the_compiler(toy, tmp_path):
    """Constants without a checkpoint: in memory first, in a file of the artifact once saved."""
    content = memoryview(np.array([1, 2, 3, 10, 20, 30], np.float32)).cast("B")
    toy.files["constants.safetensors"] = (b"head", content)
    toy.manifest["files"].append({"path": "constants.safetensors", "size": 28, "fingerprint": None})
    toy.manifest["constants"]["w"] |= {"file": [1, 1], "offset": [4, 16]}
    assert scaled(toy) == Y
    assert scaled(toy.save(tmp_path / "m.dilu")) == Y
    toy.bundle = True
    path = toy.save(tmp_path / "b.dilu")
    assert not (path / "constants.safetensors").exists()
    assert scaled(path) == Y


def test_nothing_is_unpickled():
    imports = re.compile(r"^\s*(import|from) (pickle|marshal|shelve)|np\.load\(", re.MULTILINE)
    folder = Path(artifact.__file__).parent
    assert [f.name for f in folder.rglob("*.py") if imports.search(f.read_text("utf-8"))] == []


def test_running_loads_no_compiler(saved):
    code = f"""
    import sys, numpy, dilu
    session = dilu.load({str(saved)!r})
    session.function("scale")(numpy.ones((1, 3), numpy.float32))
    session.generate("ab", max_tokens=3)
    print({{"torch", "transformers", "sympy", "networkx", "safetensors"}} & set(sys.modules),
          [m for m in sys.modules if m.startswith(("dilu.ir", "dilu.codegen", "dilu.passes"))])
    """
    done = subprocess.run(
        [sys.executable, "-c", textwrap.dedent(code)], capture_output=True, text=True
    )
    assert (done.stdout.strip(), done.stderr) == ("set() []", "")
